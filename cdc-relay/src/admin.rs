//! What the relay tells about itself: metrics and health.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use relay_core::poison::{self, Policy};

use crate::{error::Kind, standby::Holder};

/// The label of `cdc_relay_errors_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ErrorLabel {
    kind: &'static str,
}

/// The labels of `cdc_relay_diverted_rows_total`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct DivertedLabels {
    kind: &'static str,
    policy: &'static str,
}

/// The labels of `cdc_relay_slot_holder`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct HolderLabels {
    application: String,
    client: String,
    pid: String,
}

/// The relay's metrics. Cloning shares them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    pub(crate) records: Counter,
    pub(crate) acknowledged: Counter,
    pub(crate) ignored_changes: Counter,
    pub(crate) in_flight_records: Gauge,
    pub(crate) in_flight_bytes: Gauge,
    pub(crate) received_lsn: Gauge,
    pub(crate) confirmed_lsn: Gauge,
    pub(crate) sessions: Counter,
    pub(crate) transactions: Counter,
    pub(crate) passed_over: Counter,
    pub(crate) streaming: Gauge,
    pub(crate) standby: Gauge,
    pub(crate) kafka_up: Gauge,
    pub(crate) postgres_up: Gauge,
    pub(crate) slot_confirmed_lag_bytes: Gauge,
    pub(crate) slot_restart_lag_bytes: Gauge,
    pub(crate) slot_safe_wal_bytes: Gauge,
    pub(crate) parked_aggregates: Gauge,
    pub(crate) redriven: Counter,
    holder: Family<HolderLabels, Gauge>,
    errors: Family<ErrorLabel, Counter>,
    diverted: Family<DivertedLabels, Counter>,
}

impl Metrics {
    /// Registers every metric under its name.
    pub(crate) fn register(&self, r: &mut Registry) {
        // Up until it shows otherwise.
        self.kafka_up.set(1);
        self.postgres_up.set(1);
        r.register(
            "records_enqueued",
            "Records handed to the producer, repetitions after a rewind included",
            self.records.clone(),
        );
        r.register("records_acknowledged", "Records that Kafka has acknowledged", self.acknowledged.clone());
        r.register(
            "ignored_changes",
            "Changes in the stream that were not inserts into the outbox",
            self.ignored_changes.clone(),
        );
        r.register(
            "in_flight_records",
            "Records in flight, or waiting behind one that is",
            self.in_flight_records.clone(),
        );
        r.register("in_flight_bytes", "Bytes of the in-flight limit in use", self.in_flight_bytes.clone());
        r.register(
            "received_lsn",
            "Position in the log up to which the stream was read, as a number",
            self.received_lsn.clone(),
        );
        r.register(
            "confirmed_lsn",
            "Position in the log up to which everything is in Kafka, as a number",
            self.confirmed_lsn.clone(),
        );
        r.register(
            "kafka_transactions",
            "Transactions that Kafka has committed; with exactly-once delivery only",
            self.transactions.clone(),
        );
        r.register(
            "passed_over_rows",
            "Rows that were read again and are published already",
            self.passed_over.clone(),
        );
        r.register("sessions", "Replication sessions started", self.sessions.clone());
        r.register("streaming", "1 while this relay holds the slot and streams", self.streaming.clone());
        r.register("standby", "1 while another process holds the slot", self.standby.clone());
        r.register(
            "slot_holder",
            "1 while this relay stands by, for whoever holds the slot, as far as the server tells",
            self.holder.clone(),
        );
        self.register_outside(r);
    }

    /// What concerns the servers, and what went wrong.
    fn register_outside(&self, r: &mut Registry) {
        r.register("kafka_up", "0 while no broker can be reached", self.kafka_up.clone());
        r.register("postgres_up", "0 while the monitor cannot ask Postgres", self.postgres_up.clone());
        r.register(
            "slot_confirmed_lag_bytes",
            "Log written since the slot's confirmed flush LSN",
            self.slot_confirmed_lag_bytes.clone(),
        );
        r.register(
            "slot_restart_lag_bytes",
            "Log the server keeps for the slot, which a long transaction makes longer than the confirmed lag",
            self.slot_restart_lag_bytes.clone(),
        );
        r.register(
            "slot_safe_wal_bytes",
            "Log that can still be written before the slot is lost; -1 where the server sets no limit",
            self.slot_safe_wal_bytes.clone(),
        );
        r.register(
            "parked_aggregates",
            "Aggregates whose rows go to the dead-letter topic until a redrive",
            self.parked_aggregates.clone(),
        );
        r.register(
            "redriven_rows",
            "Dead letters that were published to their topic after all",
            self.redriven.clone(),
        );
        r.register(
            "diverted_rows",
            "Rows that did not go to their own topic, by why and by what was done, repetitions after a rewind included",
            self.diverted.clone(),
        );
        r.register("errors", "Errors by kind; all but the last end in another try", self.errors.clone());
    }

    /// Counts a row that did not go to its own topic.
    pub(crate) fn diverted(&self, kind: poison::Kind, policy: Policy) {
        let policy = match policy {
            Policy::Halt => "halt",
            Policy::DeadLetter => "dead-letter",
            Policy::ParkKey => "park-key",
            Policy::Skip => "skip",
        };
        self.diverted.get_or_create(&DivertedLabels { kind: kind.name(), policy }).inc();
    }

    /// Says who holds the slot while this relay stands by.
    pub(crate) fn slot_held_by(&self, holder: Option<&Holder>) {
        self.holder.clear();
        if let Some(Holder { application, client, pid }) = holder.cloned() {
            self.holder.get_or_create(&HolderLabels { application, client, pid }).set(1);
        }
    }

    /// Counts an error.
    pub(crate) fn error(&self, kind: Kind) {
        self.errors.get_or_create(&ErrorLabel { kind: kind.label() }).inc();
    }
}

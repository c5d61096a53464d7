//! What the relay tells about itself: metrics and health.

mod shapes;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use relay_core::poison::{self, Policy};

use self::shapes::{Age, Durations, MaybeGauge, OneOf};
use crate::{clock, config::Settings, error::Kind, standby::Holder};

/// What the relay is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// On its way to a session: Postgres, the slot, Kafka, or what Kafka knows of earlier sessions.
    Connecting,
    Streaming,
    /// It has the slot and reads nothing: the in-flight limit is reached, Kafka has not said yet whether it takes a record,
    /// or a redrive is under way.
    Paused,
    /// It finishes what is in flight, and stops.
    Draining,
    /// Another process has the slot.
    Standby,
}

impl State {
    const WORDS: [&str; 5] = ["connecting", "streaming", "paused", "draining", "standby"];

    fn word(self) -> &'static str {
        let [connecting, streaming, paused, draining, standby] = Self::WORDS;
        match self {
            Self::Connecting => connecting,
            Self::Streaming => streaming,
            Self::Paused => paused,
            Self::Draining => draining,
            Self::Standby => standby,
        }
    }
}

/// `wal_status` of `pg_replication_slots`, or that there is no such slot.
const WAL_STATUSES: [&str; 5] = ["reserved", "extended", "unreserved", "lost", "missing"];

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

impl DivertedLabels {
    fn new(kind: poison::Kind, policy: Policy) -> Self {
        let policy = match policy {
            Policy::Halt => "halt",
            Policy::DeadLetter => "dead-letter",
            Policy::ParkKey => "park-key",
            Policy::Skip => "skip",
        };
        Self { kind: kind.name(), policy }
    }
}

/// The labels of `cdc_relay_slot_holder`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct HolderLabels {
    application: String,
    client: String,
    pid: String,
}

/// The slot as the server sees it. What is unknown is None.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct SlotView {
    pub(crate) wal_status: Option<String>,
    pub(crate) confirmed_lag_bytes: Option<f64>,
    pub(crate) restart_lag_bytes: Option<f64>,
    pub(crate) safe_wal_bytes: Option<f64>,
    pub(crate) wal_bytes_per_second: Option<f64>,
    pub(crate) time_to_loss_seconds: Option<f64>,
}

/// The relay's metrics. Cloning shares them. All labels have few values: the slot, and words of ours.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub(crate) records: Counter,
    pub(crate) acknowledged: Counter,
    pub(crate) acknowledged_bytes: Counter,
    published_transactions: Counter,
    pub(crate) ignored_changes: Counter,
    pub(crate) in_flight_records: Gauge,
    pub(crate) in_flight_bytes: Gauge,
    pub(crate) received_lsn: MaybeGauge,
    pub(crate) confirmed_lsn: MaybeGauge,
    pub(crate) sessions: Counter,
    pub(crate) transactions: Counter,
    pub(crate) passed_over: Counter,
    pub(crate) kafka_up: MaybeGauge,
    pub(crate) postgres_up: MaybeGauge,
    pub(crate) parked_aggregates: MaybeGauge,
    pub(crate) redriven: Counter,
    pub(crate) replayed: Counter,
    /// Of the oldest transaction that is not in Kafka.
    pub(crate) lag: Age,
    acknowledgement: Durations,
    commit_to_acknowledgement: Durations,
    state: OneOf,
    streaming: Gauge,
    standby: Gauge,
    slot_wal_status: OneOf,
    slot_confirmed_lag_bytes: MaybeGauge,
    slot_restart_lag_bytes: MaybeGauge,
    slot_safe_wal_bytes: MaybeGauge,
    slot_time_to_loss_seconds: MaybeGauge,
    wal_bytes_per_second: MaybeGauge,
    holder: Family<HolderLabels, Gauge>,
    pub(crate) retention_deleted: Counter,
    pub(crate) retention_dropped: Counter,
    pub(crate) retention_failures: Counter,
    pub(crate) retention_overdue: MaybeGauge,
    errors: Family<ErrorLabel, Counter>,
    diverted: Family<DivertedLabels, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            records: Counter::default(),
            acknowledged: Counter::default(),
            acknowledged_bytes: Counter::default(),
            published_transactions: Counter::default(),
            ignored_changes: Counter::default(),
            in_flight_records: Gauge::default(),
            in_flight_bytes: Gauge::default(),
            received_lsn: MaybeGauge::default(),
            confirmed_lsn: MaybeGauge::default(),
            sessions: Counter::default(),
            transactions: Counter::default(),
            passed_over: Counter::default(),
            kafka_up: MaybeGauge::default(),
            postgres_up: MaybeGauge::default(),
            parked_aggregates: MaybeGauge::default(),
            redriven: Counter::default(),
            replayed: Counter::default(),
            lag: Age::default(),
            acknowledgement: Durations::default(),
            commit_to_acknowledgement: Durations::default(),
            state: OneOf::new("state", &State::WORDS),
            streaming: Gauge::default(),
            standby: Gauge::default(),
            slot_wal_status: OneOf::new("status", &WAL_STATUSES),
            slot_confirmed_lag_bytes: MaybeGauge::default(),
            slot_restart_lag_bytes: MaybeGauge::default(),
            slot_safe_wal_bytes: MaybeGauge::default(),
            slot_time_to_loss_seconds: MaybeGauge::default(),
            wal_bytes_per_second: MaybeGauge::default(),
            holder: Family::default(),
            retention_deleted: Counter::default(),
            retention_dropped: Counter::default(),
            retention_failures: Counter::default(),
            retention_overdue: MaybeGauge::default(),
            errors: Family::default(),
            diverted: Family::default(),
        };
        metrics.enter(State::Connecting);
        metrics
    }
}

impl Metrics {
    /// Registers every metric under its name.
    pub(crate) fn register(&self, r: &mut Registry, settings: &Settings) {
        self.register_work(r);
        self.register_times(r);
        self.register_troubles(r);
        let slot = ("slot".into(), settings.slot.clone().into());
        self.register_slot(r.sub_registry_with_label(slot));
        // What is counted from 0 on can be watched from its first case on.
        for kind in Kind::ALL {
            drop(self.errors.get_or_create(&ErrorLabel { kind: kind.label() }));
        }
        let parked = settings.may_park().then_some(poison::Kind::Parked);
        for kind in poison::Kind::CONFIGURABLE.into_iter().chain(parked) {
            let policy = settings.policies.of(kind);
            if policy != Policy::Halt {
                drop(self.diverted.get_or_create(&DivertedLabels::new(kind, policy)));
            }
        }
    }

    /// What goes through.
    fn register_work(&self, r: &mut Registry) {
        r.register(
            "records_enqueued",
            "Records handed to the producer, repetitions after a rewind included",
            self.records.clone(),
        );
        r.register("records_acknowledged", "Records that Kafka has acknowledged", self.acknowledged.clone());
        r.register(
            "acknowledged_bytes",
            "Bytes of these records as the in-flight limit counts them: key, value, headers and overhead",
            self.acknowledged_bytes.clone(),
        );
        r.register(
            "transactions_published",
            "Transactions of Postgres that brought records, all of which Kafka has acknowledged, with exactly-once \
             delivery committed, repetitions after a rewind included",
            self.published_transactions.clone(),
        );
        r.register(
            "kafka_transactions",
            "Transactions that Kafka has committed; with exactly-once delivery only",
            self.transactions.clone(),
        );
        r.register(
            "ignored_changes",
            "Changes in the stream that were not inserts into the outbox",
            self.ignored_changes.clone(),
        );
        r.register(
            "passed_over_rows",
            "Rows that were read again and are published already",
            self.passed_over.clone(),
        );
        r.register(
            "in_flight_records",
            "Records in flight, or waiting behind one that is",
            self.in_flight_records.clone(),
        );
        r.register("in_flight_bytes", "Bytes of the in-flight limit in use", self.in_flight_bytes.clone());
        r.register(
            "received_lsn",
            "Position in the log up to which the stream was read, as a number; absent while this relay does not stream",
            self.received_lsn.clone(),
        );
        r.register(
            "confirmed_lsn",
            "Position in the log up to which everything is in Kafka, as a number; absent while this relay does not stream",
            self.confirmed_lsn.clone(),
        );
        r.register("sessions", "Replication sessions started", self.sessions.clone());
    }

    /// How long it takes.
    fn register_times(&self, r: &mut Registry) {
        r.register(
            "acknowledgement_seconds",
            "Of each published transaction of Postgres, from its first record being read to Kafka's acknowledgement of its \
             last, with exactly-once delivery Kafka's commit",
            self.acknowledgement.clone(),
        );
        r.register(
            "commit_to_acknowledgement_seconds",
            "Of each published transaction, from its commit in Postgres to the same. By two clocks, the server's and the \
             relay's: what they differ by is in it, and what would be negative counts as 0",
            self.commit_to_acknowledgement.clone(),
        );
    }

    /// What went wrong, and what was done about it.
    fn register_troubles(&self, r: &mut Registry) {
        r.register(
            "kafka_up",
            "0 while no broker can be reached; absent until that is known, and at a standby",
            self.kafka_up.clone(),
        );
        r.register("postgres_up", "0 while the monitor cannot ask Postgres", self.postgres_up.clone());
        r.register("streaming", "1 while this relay holds the slot and streams", self.streaming.clone());
        r.register("standby", "1 while another process holds the slot", self.standby.clone());
        r.register(
            "slot_holder",
            "1 while this relay stands by, for whoever holds the slot, as far as the server tells",
            self.holder.clone(),
        );
        r.register(
            "errors",
            "Sessions, and attempts to begin one, that ended in an error, by its kind; slot_in_use leads to standing by, \
             the others to another try or the end of the process",
            self.errors.clone(),
        );
        r.register(
            "diverted_rows",
            "Rows that did not go to their own topic, by why and by what was done, repetitions after a rewind included",
            self.diverted.clone(),
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
            "replayed_records",
            "Records that were published once more because somebody asked for it",
            self.replayed.clone(),
        );
        r.register(
            "retention_deleted_rows",
            "Rows that were deleted from the outbox, confirmed and old enough",
            self.retention_deleted.clone(),
        );
        r.register(
            "retention_dropped_partitions",
            "Partitions of the outbox that were dropped, likewise",
            self.retention_dropped.clone(),
        );
        r.register(
            "retention_failures",
            "Attempts to delete or drop that failed; the log says why",
            self.retention_failures.clone(),
        );
        r.register(
            "retention_overdue_seconds",
            "For how long the oldest row has been older than retention.older_than_seconds when it was looked at last; 0 where none is; \
             absent without retention.mode = \"delete\", and while this relay does not stream",
            self.retention_overdue.clone(),
        );
    }

    /// What concerns the slot, which all of these have as a label.
    fn register_slot(&self, r: &mut Registry) {
        r.register("state", "1 for what this relay is doing", self.state.clone());
        r.register(
            "lag_seconds",
            "Age of the oldest transaction that was read and is not in Kafka, by the server's clock and ours; 0 where there is \
             none; absent while this relay does not stream",
            self.lag.clone(),
        );
        r.register(
            "slot_wal_status",
            "1 for the slot's wal_status in pg_replication_slots, or for missing",
            self.slot_wal_status.clone(),
        );
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
            "Log that can still be written before the slot is in danger; below 0 once it is; absent where the server sets no limit",
            self.slot_safe_wal_bytes.clone(),
        );
        r.register(
            "slot_time_to_loss_seconds",
            "Time until slot_safe_wal_bytes are written at the present rate, if the slot stood still; absent where the server sets \
             no limit, nothing is written or nothing is known yet",
            self.slot_time_to_loss_seconds.clone(),
        );
        r.register(
            "wal_bytes_per_second",
            "Log that the server wrote lately, over five minutes or as long as it was watched",
            self.wal_bytes_per_second.clone(),
        );
    }

    /// Says what the relay does from now on.
    pub(crate) fn enter(&self, state: State) {
        if self.state.get() == Some(state.word()) {
            return;
        }
        self.state.set(Some(state.word()));
        let has_slot = matches!(state, State::Streaming | State::Paused | State::Draining);
        self.streaming.set(i64::from(has_slot));
        self.standby.set(i64::from(state == State::Standby));
        if !has_slot {
            self.lag.forget();
            self.forget_positions();
            self.in_flight_records.set(0);
            self.in_flight_bytes.set(0);
            self.parked_aggregates.set(None);
            self.retention_overdue.set(None);
        }
        if state == State::Standby {
            self.kafka_up.set(None);
        }
    }

    /// Whether this relay has the slot.
    pub(crate) fn has_slot(&self) -> bool {
        self.streaming.get() == 1
    }

    /// Counts a transaction of Postgres that is published, by when it was committed and how long it was with us.
    pub(crate) fn published(&self, committed_at_us: i64, took: std::time::Duration) {
        self.published_transactions.inc();
        self.acknowledgement.observe_us(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        self.commit_to_acknowledgement.observe_us(clock::us_since(committed_at_us));
    }

    /// Positions are those of a slot that this relay has.
    fn forget_positions(&self) {
        self.received_lsn.set(None);
        self.confirmed_lsn.set(None);
    }

    /// Says how the slot is.
    pub(crate) fn slot(&self, view: &SlotView) {
        if matches!(view.wal_status.as_deref(), Some("lost" | "missing")) {
            self.forget_positions();
        }
        self.slot_wal_status.set(view.wal_status.as_deref());
        for (gauge, value) in [
            (&self.slot_confirmed_lag_bytes, view.confirmed_lag_bytes),
            (&self.slot_restart_lag_bytes, view.restart_lag_bytes),
            (&self.slot_safe_wal_bytes, view.safe_wal_bytes),
            (&self.slot_time_to_loss_seconds, view.time_to_loss_seconds),
            (&self.wal_bytes_per_second, view.wal_bytes_per_second),
        ] {
            gauge.set(value);
        }
    }

    /// Counts a row that did not go to its own topic.
    pub(crate) fn diverted(&self, kind: poison::Kind, policy: Policy) {
        self.diverted.get_or_create(&DivertedLabels::new(kind, policy)).inc();
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

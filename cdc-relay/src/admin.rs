//! What the relay tells about itself: metrics and health.

mod register;
mod shapes;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
};

use relay_core::poison::{self, Policy};

use self::shapes::{Age, Durations, MaybeGauge, OneOf};
use crate::{clock, error::Kind, standby::Holder};

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

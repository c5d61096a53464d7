//! What the consumer counts.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use crate::{
    decide::{Cause, Reason},
    group::PartitionId,
    store::Done,
};

const APPLIED: &str = "applied";
const DISCARDED: &str = "discarded";

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TypeLabel {
    r#type: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CauseLabel {
    cause: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PartitionLabel {
    topic: String,
    partition: i32,
}

/// The consumer's metrics. Labels are bounded: a handler's types, our reasons, causes and outcomes, our own partitions.
#[derive(Clone)]
pub(crate) struct Metrics {
    processed: Family<TypeLabel, Counter>,
    duplicates: Counter,
    stale: Counter,
    gaps: Counter,
    parked: Counter,
    settled: Family<OutcomeLabel, Counter>,
    failed: Family<CauseLabel, Counter>,
    retried: Family<CauseLabel, Counter>,
    dead_lettered: Family<ReasonLabel, Counter>,
    commits_failed: Counter,
    assigned: Gauge,
    waiting: Family<CauseLabel, Gauge>,
    lag_records: Family<PartitionLabel, Gauge>,
    lag_seconds: Family<PartitionLabel, Gauge<f64, AtomicU64>>,
    latency: Histogram,
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            processed: Family::default(),
            duplicates: Counter::default(),
            stale: Counter::default(),
            gaps: Counter::default(),
            parked: Counter::default(),
            settled: Family::default(),
            failed: Family::default(),
            retried: Family::default(),
            dead_lettered: Family::default(),
            commits_failed: Counter::default(),
            assigned: Gauge::default(),
            waiting: Family::default(),
            lag_records: Family::default(),
            lag_seconds: Family::default(),
            // 1 ms to 131 s.
            latency: Histogram::new(exponential_buckets(0.001, 2.0, 18)),
        };
        metrics.make_labels();
        let m = metrics.clone();
        registry.register("processed", "Events applied, by type", m.processed);
        registry.register(
            "duplicates_dropped",
            "Events dropped because they were applied before",
            m.duplicates,
        );
        registry.register(
            "stale_ignored",
            "Events ignored because one as new or newer of their aggregate was applied",
            m.stale,
        );
        registry.register(
            "version_gaps_accepted",
            "Events applied although the one before them was not",
            m.gaps,
        );
        registry.register("parked", "Records parked behind a dead letter of their key", m.parked);
        registry.register(
            "dead_letters_settled",
            "Dead letters that were redriven and applied, or discarded, by outcome",
            m.settled,
        );
        registry.register("failed", "Records or batches that failed for good or for now, by cause", m.failed);
        registry.register(
            "retried",
            "Attempts repeated after a failure that is no record's fault",
            m.retried,
        );
        registry.register(
            "dead_lettered",
            "Records written to the dead-letter topic, by reason",
            m.dead_lettered,
        );
        registry.register("offset_commits_failed", "Offset commits that failed", m.commits_failed);
        registry.register("assigned_partitions", "Partitions this instance works on", m.assigned);
        registry.register("waiting_partitions", "Partitions that wait for something, by cause", m.waiting);
        registry.register("lag_records", "Records in a partition that are not settled yet", m.lag_records);
        registry.register_with_unit(
            "lag",
            "How long ago the first record of a partition that is not settled was written; 0 where all are",
            Unit::Seconds,
            m.lag_seconds,
        );
        registry.register_with_unit(
            "apply_latency",
            "From a record's timestamp, its commit in the source, to its commit here",
            Unit::Seconds,
            m.latency,
        );
        metrics
    }

    /// A metric that is there before its first case can be watched.
    fn make_labels(&self) {
        for reason in Reason::ALL {
            drop(self.dead_lettered.get_or_create(&ReasonLabel { reason: reason.as_str() }));
        }
        for outcome in [APPLIED, DISCARDED] {
            drop(self.settled.get_or_create(&OutcomeLabel { outcome }));
        }
        for cause in Cause::ALL {
            drop(self.retried.get_or_create(&CauseLabel { cause: cause.as_str() }));
        }
    }

    /// An event was applied, so long after its record's timestamp.
    pub(crate) fn applied(&self, r#type: &'static str, latency_ms: Option<i64>) {
        self.processed.get_or_create(&TypeLabel { r#type }).inc();
        if let Some(ms) = latency_ms {
            // Clocks of two machines may disagree: not before it happened, and a u32 holds 49 days.
            let ms = u32::try_from(ms.max(0)).unwrap_or(u32::MAX);
            self.latency.observe(f64::from(ms) / 1000.0);
        }
    }

    /// A batch was settled.
    pub(crate) fn done(&self, done: &Done) {
        self.duplicates.inc_by(done.duplicates as u64);
        self.stale.inc_by(done.stale as u64);
        self.gaps.inc_by(done.gaps as u64);
        self.parked.inc_by(done.parked as u64);
        self.settled.get_or_create(&OutcomeLabel { outcome: APPLIED }).inc_by(done.settled);
    }

    /// So many dead letters were discarded.
    pub(crate) fn discarded(&self, count: u64) {
        self.settled.get_or_create(&OutcomeLabel { outcome: DISCARDED }).inc_by(count);
    }

    /// An attempt failed and will be repeated.
    pub(crate) fn retried(&self, cause: Cause) {
        let label = CauseLabel { cause: cause.as_str() };
        self.failed.get_or_create(&label).inc();
        self.retried.get_or_create(&label).inc();
    }

    /// A record is in the dead-letter topic.
    pub(crate) fn dead_lettered(&self, reason: Reason) {
        self.failed.get_or_create(&CauseLabel { cause: "record" }).inc();
        self.dead_lettered.get_or_create(&ReasonLabel { reason: reason.as_str() }).inc();
    }

    pub(crate) fn commit_failed(&self) {
        self.commits_failed.inc();
    }

    /// How many partitions are this instance's now.
    pub(crate) fn assigned(&self, count: usize) {
        self.assigned.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// How many of them wait for this.
    pub(crate) fn waiting(&self, cause: Cause, count: usize) {
        let gauge = self.waiting.get_or_create(&CauseLabel { cause: cause.as_str() });
        gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// How many of a partition's records are not settled, and the age of the first of them.
    pub(crate) fn lag(&self, id: &PartitionId, records: Option<i64>, age_ms: Option<i64>) {
        if let Some(records) = records {
            self.lag_records.get_or_create(&label(id)).set(records);
        }
        if let Some(ms) = age_ms {
            let ms = u32::try_from(ms).unwrap_or(u32::MAX);
            self.lag_seconds.get_or_create(&label(id)).set(f64::from(ms) / 1000.0);
        }
    }

    /// A partition is another's now.
    pub(crate) fn forget(&self, id: &PartitionId) {
        self.lag_records.remove(&label(id));
        self.lag_seconds.remove(&label(id));
    }
}

fn label(id: &PartitionId) -> PartitionLabel {
    PartitionLabel { topic: id.0.clone(), partition: id.1 }
}

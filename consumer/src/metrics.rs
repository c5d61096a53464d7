//! What the consumer counts.

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
};

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
struct PartitionLabel {
    topic: String,
    partition: i32,
}

/// The consumer's metrics. Labels are bounded: four types, a dozen reasons, three causes, our own partitions.
#[derive(Clone)]
pub(crate) struct Metrics {
    processed: Family<TypeLabel, Counter>,
    duplicates: Counter,
    failed: Family<CauseLabel, Counter>,
    retried: Family<CauseLabel, Counter>,
    dead_lettered: Family<ReasonLabel, Counter>,
    commits_failed: Counter,
    assigned: Gauge,
    waiting: Family<CauseLabel, Gauge>,
    lag_records: Family<PartitionLabel, Gauge>,
    latency: Histogram,
}

impl Metrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            processed: Family::default(),
            duplicates: Counter::default(),
            failed: Family::default(),
            retried: Family::default(),
            dead_lettered: Family::default(),
            commits_failed: Counter::default(),
            assigned: Gauge::default(),
            waiting: Family::default(),
            lag_records: Family::default(),
            // 1 ms to 131 s.
            latency: Histogram::new(exponential_buckets(0.001, 2.0, 18)),
        };
        for reason in Reason::ALL {
            drop(metrics.dead_lettered.get_or_create(&ReasonLabel { reason: reason.as_str() }));
        }
        for cause in Cause::ALL {
            drop(metrics.retried.get_or_create(&CauseLabel { cause: cause.as_str() }));
        }
        let m = metrics.clone();
        registry.register("processed", "Events applied, by type", m.processed);
        registry.register(
            "duplicates_dropped",
            "Events dropped because they were applied before",
            m.duplicates,
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
            "apply_latency",
            "From a record's timestamp, its commit in the source, to its commit here",
            Unit::Seconds,
            m.latency,
        );
        metrics
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

    pub(crate) fn duplicates(&self, count: usize) {
        self.duplicates.inc_by(count as u64);
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

    /// How many of a partition's records are not settled.
    pub(crate) fn lag(&self, id: &PartitionId, records: i64) {
        self.lag_records.get_or_create(&label(id)).set(records);
    }

    /// A partition is another's now.
    pub(crate) fn forget(&self, id: &PartitionId) {
        self.lag_records.remove(&label(id));
    }
}

fn label(id: &PartitionId) -> PartitionLabel {
    PartitionLabel { topic: id.0.clone(), partition: id.1 }
}

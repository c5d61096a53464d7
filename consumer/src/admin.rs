//! What an operator sees: metrics, health, and the probe that asks database and brokers how they are.

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

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
use rdkafka::consumer::{Consumer, RebalanceProtocol};
use service::{
    Health,
    shutdown::{Shutdown, Trigger},
};
use tokio::{task::JoinHandle, time::sleep};

use crate::{
    decide::{Cause, Reason},
    group::{GroupConsumer, PartitionId},
    run::{Partition, Shared},
};

/// How often database and brokers are asked.
const PROBE_EVERY: Duration = Duration::from_secs(2);
/// How long a broker may take to answer.
const BROKER_TIMEOUT: Duration = Duration::from_secs(2);

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

    /// What the partitions of this instance look like now.
    pub(crate) fn partitions(&self, partitions: &[Arc<Partition>]) {
        self.assigned.set(i64::try_from(partitions.len()).unwrap_or(i64::MAX));
        for cause in Cause::ALL {
            let count = partitions.iter().filter(|p| p.waiting().is_some_and(|(c, _)| c == cause)).count();
            let gauge = self.waiting.get_or_create(&CauseLabel { cause: cause.as_str() });
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        for partition in partitions {
            if let Some(lag) = partition.lag_records() {
                self.lag_records.get_or_create(&label(&partition.id)).set(lag);
            }
        }
    }

    /// A partition is another's now.
    pub(crate) fn forget(&self, id: &PartitionId) {
        self.lag_records.remove(&label(id));
    }
}

fn label(id: &PartitionId) -> PartitionLabel {
    PartitionLabel { topic: id.0.clone(), partition: id.1 }
}

/// What readiness depends on.
pub(crate) struct Situation<'a> {
    /// We are a member of the group, even if it has no partition left for us.
    pub(crate) joined: bool,
    pub(crate) partitions: &'a [Arc<Partition>],
    /// Why the database does not answer, if it does not.
    pub(crate) database: Option<String>,
    /// The last error of Kafka's that nothing has contradicted since.
    pub(crate) kafka: Option<String>,
}

/// Tells health: the first thing that is wrong, or that all is well.
pub(crate) fn report(health: &Health, now: &Situation<'_>) {
    let waiting = now.partitions.iter().find_map(|p| p.waiting().map(|w| (&p.id, w)));
    if let Some(((topic, partition), (cause, error))) = waiting {
        health.not_ready(&format!("waiting_for_{}", cause.as_str()), format!("{topic}/{partition}: {error}"));
    } else if let Some(error) = &now.database {
        health.not_ready("waiting_for_database", error);
    } else if !now.joined {
        // A topic that does not exist, say, or a broker that does not answer.
        health.not_ready("joining", now.kafka.clone().unwrap_or_default());
    } else if let Some(error) = &now.kafka {
        health.not_ready("waiting_for_kafka", error);
    } else {
        health.ready("consuming");
    }
}

/// Asks the database whether it answers and the brokers where the partitions end.
pub(crate) struct Probe {
    seen: Arc<Seen>,
    task: JoinHandle<()>,
    stop: Trigger,
}

#[derive(Default)]
struct Seen {
    database: Mutex<Option<String>>,
    partitions: Mutex<Vec<Arc<Partition>>>,
}

impl Probe {
    pub(crate) fn start(shared: Arc<Shared>, consumer: Arc<GroupConsumer>) -> Self {
        let seen = Arc::new(Seen::default());
        let (stop, stopped) = Shutdown::manual();
        let task = tokio::spawn({
            let seen = seen.clone();
            async move {
                while !stopped.is_requested() {
                    let error = shared.store.ping().await.err();
                    *seen.database.lock().unwrap_or_else(PoisonError::into_inner) = error;
                    let (seen, consumer, stop) = (seen.clone(), consumer.clone(), stopped.clone());
                    // Fails only if it panicked or the runtime ends.
                    drop(tokio::task::spawn_blocking(move || ask_brokers(&seen, &consumer, &stop)).await);
                    tokio::select! {
                        () = sleep(PROBE_EVERY) => {}
                        () = stopped.requested() => {}
                    }
                }
            }
        });
        Self { seen, task, stop }
    }

    /// Why the database does not answer, if it does not.
    pub(crate) fn database(&self) -> Option<String> {
        self.seen.database.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks about these partitions from now on.
    pub(crate) fn watch(&self, partitions: Vec<Arc<Partition>>) {
        *self.seen.partitions.lock().unwrap_or_else(PoisonError::into_inner) = partitions;
    }

    /// Asks no more; the task ends once the question under way is answered, and lets the consumer go.
    pub(crate) fn stop(self) -> JoinHandle<()> {
        self.stop.request();
        self.task
    }
}

fn ask_brokers(seen: &Seen, consumer: &GroupConsumer, stop: &Shutdown) {
    let partitions = seen.partitions.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let had_error = consumer.context().last_error().is_some();
    let none = partitions.is_empty();
    let mut answered = !none;
    for partition in partitions {
        if stop.is_requested() {
            return;
        }
        let (topic, number) = &partition.id;
        match consumer.fetch_watermarks(topic, *number, BROKER_TIMEOUT) {
            Ok((_, end)) => partition.end.store(end, Ordering::SeqCst),
            Err(_) => answered = false,
        }
    }
    // A member without partitions has nobody to ask about them; one who has not joined keeps its error, which
    // says why.
    let idle = || {
        matches!(consumer.rebalance_protocol(), RebalanceProtocol::Cooperative)
            && consumer.fetch_metadata(None, BROKER_TIMEOUT).is_ok()
    };
    if had_error && (answered || (none && idle())) {
        consumer.context().forget_error();
    }
}

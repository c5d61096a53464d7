//! What an operator sees: health, the partitions' metrics, and the probe that asks database and brokers how they are.

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use rdkafka::consumer::{Consumer, RebalanceProtocol};
use service::{
    Health,
    shutdown::{Shutdown, Trigger},
};
use tokio::{task::JoinHandle, time::sleep};

use crate::{
    decide::Cause, group::GroupConsumer, handler::Handler, metrics::Metrics, partition::Partition,
    run::Shared,
};

/// How often database and brokers are asked.
const PROBE_EVERY: Duration = Duration::from_secs(2);
/// How long a broker may take to answer.
const BROKER_TIMEOUT: Duration = Duration::from_secs(2);

/// Tells the metrics what the partitions of this instance look like now.
pub(crate) fn measure(metrics: &Metrics, partitions: &[Arc<Partition>]) {
    let now_ms = chrono::Utc::now().timestamp_millis();
    metrics.assigned(partitions.len());
    for cause in Cause::ALL {
        metrics.waiting(
            cause,
            partitions.iter().filter(|p| p.waiting().is_some_and(|(c, _)| c == cause)).count(),
        );
    }
    for partition in partitions {
        metrics.lag(&partition.id, partition.lag_records(), partition.lag_ms(now_ms));
    }
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
    if now.partitions.iter().any(|p| p.waiting().is_some_and(|(cause, _)| cause == Cause::Paused)) {
        // By somebody who wants it so: nothing is wrong.
        health.ready("paused");
    } else if let Some(((topic, partition), (cause, error))) = waiting {
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
    pub(crate) fn start<H: Handler>(shared: Arc<Shared<H>>, consumer: Arc<GroupConsumer>) -> Self {
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

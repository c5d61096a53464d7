//! One partition's loop: poll → settle → commit. A batch is taken from the partition's queue, each record of it is
//! settled (see `settle.rs`), and only then does the position move past them.

use std::sync::Arc;

use rdkafka::{Message, consumer::base_consumer::PartitionQueue, error::KafkaError};
use service::shutdown::Shutdown;
use tokio::{
    sync::Notify,
    time::{Duration, Instant, sleep},
};

use crate::{
    config::Limits,
    delivery::{Delivery, written_ms},
    dlq::DeadLetters,
    group::Context,
    handler::Handler,
    metrics::Metrics,
    partition::Partition,
    store::Store,
};

/// A queue that wakes nobody is looked at this often all the same.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How often it is looked whether a release was cut short.
const KEEP_EVERY: Duration = Duration::from_secs(30);

/// What all partitions share.
pub(crate) struct Shared<H> {
    pub(crate) store: Store<H>,
    /// Nothing where dead letters are only taken note of.
    pub(crate) dead_letters: Option<DeadLetters>,
    pub(crate) metrics: Metrics,
    pub(crate) limits: Limits,
    /// The topic of redriven records.
    pub(crate) redrive_topic: String,
}

/// The work was given up because the partition goes to another or the process stops; nothing of it is committed.
pub(crate) struct Abandoned;

/// Works through one partition.
pub(crate) struct Worker<H> {
    pub(crate) shared: Arc<Shared<H>>,
    pub(crate) partition: Arc<Partition>,
    pub(crate) queue: PartitionQueue<Context>,
    /// Told when the queue is no longer empty.
    pub(crate) nonempty: Arc<Notify>,
    pub(crate) stop: Shutdown,
}

/// What a poll gives.
struct Batch<'m> {
    records: Vec<Delivery<'m>>,
    /// The offset after the last of them.
    next: Option<i64>,
    /// They are the partition's last.
    at_end: bool,
}

impl<H: Handler> Worker<H> {
    /// Runs until told to stop; a batch under way is finished, one that waits for something is abandoned.
    pub(crate) async fn run(self) {
        let mut keep = self.keeps_from();
        while !self.stop.is_requested() {
            if keep.is_some_and(|at| at <= Instant::now()) {
                if self.release_abandoned().await.is_err() {
                    return;
                }
                keep = Some(Instant::now() + KEEP_EVERY);
            }
            let batch = self.poll();
            let Some(next) = batch.next else {
                tokio::select! {
                    () = self.nonempty.notified() => {}
                    () = sleep(LOOK_EVERY) => {}
                    () = self.stop.requested() => {}
                }
                continue;
            };
            if self.settle(&batch.records).await.is_err() {
                break;
            }
            self.partition.settled(next, batch.at_end);
        }
    }

    /// From when on this worker looks for releases that were cut short: one is enough. That of the redriven records does so
    /// at once; one of the others later, in case there is no topic for those.
    fn keeps_from(&self) -> Option<Instant> {
        let after = if self.is_for_redriven() { Duration::ZERO } else { KEEP_EVERY };
        (self.partition.id.1 == 0).then(|| Instant::now() + after)
    }

    /// Whether this partition holds redriven records.
    fn is_for_redriven(&self) -> bool {
        self.partition.id.0 == self.shared.redrive_topic
    }

    /// The records that are there, up to a batch's bounds.
    fn poll(&self) -> Batch<'_> {
        let (limits, redriven) = (&self.shared.limits, self.is_for_redriven());
        let mut batch = Batch { records: Vec::new(), next: None, at_end: false };
        let mut bytes = 0;
        while batch.records.len() < limits.batch_records_max && bytes < limits.batch_bytes_max {
            match self.queue.poll(Duration::ZERO) {
                Some(Ok(message)) => {
                    let offset = message.offset();
                    if batch.next.is_none() {
                        self.partition.begins(offset, written_ms(&message));
                    }
                    batch.next = Some(offset + 1);
                    bytes += message.payload_len() + message.key_len();
                    if !redriven {
                        batch.records.push(Delivery::Polled(message));
                    } else if let Some(record) = Delivery::redriven(message) {
                        batch.records.push(record);
                    } else {
                        let (topic, partition) = (&self.partition.id.0, self.partition.id.1);
                        tracing::error!(topic, partition, offset, "ignored: not a redriven record of ours");
                    }
                }
                Some(Err(KafkaError::PartitionEOF(_))) => {
                    batch.at_end = true;
                    break;
                }
                // Told by the context already.
                Some(Err(_)) => {}
                None => break,
            }
        }
        if batch.next.is_none() && batch.at_end {
            self.partition.at_end();
        }
        batch
    }
}

//! One partition's loop: poll → step → commit. A batch is taken from the partition's queue, each record of it is
//! applied or dead-lettered, and only then does the position move past them.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
};

use rdkafka::{
    Message, consumer::base_consumer::PartitionQueue, error::KafkaError, message::BorrowedMessage,
};
use service::shutdown::Shutdown;
use tokio::{
    sync::Notify,
    time::{Duration, sleep},
};

use crate::{
    config::Limits,
    decide::{Cause, Decision, Poison, decide},
    dlq::{DeadLetters, Letter},
    group::{Context, PartitionId},
    handler::Handler,
    metrics::Metrics,
    record::{self, Event, Record},
    store::Store,
};

/// A queue that wakes nobody is looked at this often all the same.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What all partitions share.
pub(crate) struct Shared<H> {
    pub(crate) store: Store<H>,
    pub(crate) dead_letters: DeadLetters,
    pub(crate) metrics: Metrics,
    pub(crate) limits: Limits,
}

/// Where a partition stands: written by its worker, read by everyone else.
pub(crate) struct Partition {
    pub(crate) id: PartitionId,
    /// The offset of the first record that is not settled; -1 before the first was seen.
    position: AtomicI64,
    /// Whether the worker has settled everything up to the partition's end.
    caught_up: AtomicBool,
    /// The offset that the next record will get; -1 until asked.
    pub(crate) end: AtomicI64,
    waiting: Mutex<Option<(Cause, String)>>,
}

impl Partition {
    pub(crate) fn new(id: PartitionId) -> Self {
        Self {
            id,
            position: AtomicI64::new(-1),
            caught_up: AtomicBool::new(false),
            end: AtomicI64::new(-1),
            waiting: Mutex::new(None),
        }
    }

    /// The offset that may be committed.
    pub(crate) fn position(&self) -> Option<i64> {
        Some(self.position.load(Ordering::SeqCst)).filter(|p| *p >= 0)
    }

    /// Records that are not settled yet, once known. Markers of transactions count as records where Kafka counts
    /// them, so the end of the partition is believed rather than the difference.
    pub(crate) fn lag_records(&self) -> Option<i64> {
        if self.caught_up.load(Ordering::SeqCst) {
            return Some(0);
        }
        let end = Some(self.end.load(Ordering::SeqCst)).filter(|e| *e >= 0)?;
        Some((end - self.position()?).max(0))
    }

    /// What the worker waits for, if it does.
    pub(crate) fn waiting(&self) -> Option<(Cause, String)> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn wait_for(&self, what: Option<(Cause, String)>) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }
}

/// The work was given up because the partition goes to another or the process stops; nothing of it is committed.
struct Abandoned;

/// Works through one partition.
pub(crate) struct Worker<H> {
    pub(crate) shared: Arc<Shared<H>>,
    pub(crate) partition: Arc<Partition>,
    pub(crate) queue: PartitionQueue<Context>,
    /// Told when the queue is no longer empty.
    pub(crate) nonempty: Arc<Notify>,
    pub(crate) stop: Shutdown,
}

impl<H: Handler> Worker<H> {
    /// Runs until told to stop; a batch under way is finished, one that waits for something is abandoned.
    pub(crate) async fn run(self) {
        while !self.stop.is_requested() {
            let (batch, at_end) = self.poll();
            let Some(last) = batch.last() else {
                tokio::select! {
                    () = self.nonempty.notified() => {}
                    () = sleep(LOOK_EVERY) => {}
                    () = self.stop.requested() => {}
                }
                continue;
            };
            if self.step(&batch).await.is_err() {
                break;
            }
            self.partition.position.store(last.offset() + 1, Ordering::SeqCst);
            self.partition.caught_up.store(at_end, Ordering::SeqCst);
        }
    }

    /// The records that are there, up to a batch's bounds, and whether they are the partition's last.
    fn poll(&self) -> (Vec<BorrowedMessage<'_>>, bool) {
        let limits = &self.shared.limits;
        let (mut batch, mut bytes, mut at_end) = (Vec::new(), 0, false);
        while batch.len() < limits.batch_records_max && bytes < limits.batch_bytes_max {
            match self.queue.poll(Duration::ZERO) {
                Some(Ok(record)) => {
                    bytes += record.payload_len() + record.key_len();
                    batch.push(record);
                }
                Some(Err(KafkaError::PartitionEOF(_))) => {
                    at_end = true;
                    break;
                }
                // Told by the context already.
                Some(Err(_)) => {}
                None => break,
            }
        }
        if let Some(first) = batch.first() {
            self.partition.caught_up.store(false, Ordering::SeqCst);
            if self.partition.position().is_none() {
                // So that the lag is known even if this very batch cannot be settled.
                self.partition.position.store(first.offset(), Ordering::SeqCst);
            }
        } else if at_end {
            self.partition.caught_up.store(true, Ordering::SeqCst);
        }
        (batch, at_end)
    }

    /// Settles every record of a batch: applied, known already, or dead-lettered and that acknowledged.
    async fn step(&self, batch: &[BorrowedMessage<'_>]) -> Result<(), Abandoned> {
        let mut events = Vec::with_capacity(batch.len());
        let mut records = Vec::with_capacity(batch.len());
        let mut letters = Vec::new();
        for record in batch {
            match H::Event::parse(&Record::of(record)) {
                Ok(event) => {
                    events.push(event);
                    records.push(record);
                }
                Err(poison) => letters.push(Letter::new(record, poison, 1)),
            }
        }
        self.apply(&events, &records, &mut letters).await?;
        self.dead_letter(letters).await
    }

    /// Applies events in order. A dead letter is a verdict on one event, so a batch that the database refuses is
    /// halved until the one is found; the others are applied.
    async fn apply<'m>(
        &self,
        events: &[H::Event],
        records: &[&'m BorrowedMessage<'m>],
        letters: &mut Vec<Letter<'m>>,
    ) -> Result<(), Abandoned> {
        // Parts still to do; the next one is the last.
        let mut parts: Vec<Range<usize>> = Vec::new();
        if !events.is_empty() {
            parts.push(0..events.len());
        }
        while let Some(part) = parts.pop() {
            let (poison, attempts) = match self.attempt(&events[part.clone()], &records[part.clone()]).await?
            {
                Attempted::Applied => continue,
                Attempted::Refused(poison, attempts) => (poison, attempts),
            };
            if part.len() == 1 {
                letters.push(Letter::new(records[part.start], poison, attempts));
            } else {
                let middle = part.start + part.len() / 2;
                parts.push(middle..part.end);
                parts.push(part.start..middle);
            }
        }
        Ok(())
    }

    /// Tries to apply events in one transaction, as often as it takes, until it is done or they are refused.
    async fn attempt(
        &self,
        events: &[H::Event],
        records: &[&BorrowedMessage<'_>],
    ) -> Result<Attempted, Abandoned> {
        let mut attempt = 1;
        loop {
            let outcome =
                self.shared.store.apply(events).await.map(|fresh| self.applied(events, records, &fresh));
            match decide(
                outcome,
                attempt,
                self.shared.limits.retries_max,
                self.shared.limits.backoff,
                fastrand::f64(),
            ) {
                Decision::Apply => {
                    self.partition.wait_for(None);
                    return Ok(Attempted::Applied);
                }
                Decision::DeadLetter(poison) => {
                    self.partition.wait_for(None);
                    return Ok(Attempted::Refused(poison, attempt));
                }
                Decision::Retry { after, cause, error } => self.pause(after, cause, error, attempt).await?,
            }
            attempt = attempt.saturating_add(1);
        }
    }

    fn applied(&self, events: &[H::Event], records: &[&BorrowedMessage<'_>], fresh: &[usize]) {
        let metrics = &self.shared.metrics;
        metrics.duplicates(events.len() - fresh.len());
        let now_ms = chrono::Utc::now().timestamp_millis();
        for index in fresh {
            let latency_ms = record::written_ms(records[*index]).map(|ms| now_ms.saturating_sub(ms));
            metrics.applied(events[*index].type_name(), latency_ms);
        }
    }

    /// Sends letters until each is acknowledged.
    async fn dead_letter(&self, mut letters: Vec<Letter<'_>>) -> Result<(), Abandoned> {
        let mut attempt = 1;
        while !letters.is_empty() {
            let told: Vec<_> = letters.iter().map(|l| (l.poison.clone(), l.record.offset())).collect();
            let (unsent, fault) = tokio::select! {
                sent = self.shared.dead_letters.send(letters) => sent,
                () = self.stop.requested() => return Err(Abandoned),
            };
            for (poison, offset) in &told {
                if !unsent.iter().any(|l| l.record.offset() == *offset) {
                    self.dead_lettered(poison, *offset);
                }
            }
            letters = unsent;
            let outcome = fault.map_or(Ok(()), Err);
            match decide(
                outcome,
                attempt,
                self.shared.limits.retries_max,
                self.shared.limits.backoff,
                fastrand::f64(),
            ) {
                Decision::Retry { after, cause, error } => self.pause(after, cause, error, attempt).await?,
                Decision::Apply | Decision::DeadLetter(_) => {}
            }
            attempt = attempt.saturating_add(1);
        }
        self.partition.wait_for(None);
        Ok(())
    }

    fn dead_lettered(&self, poison: &Poison, offset: i64) {
        self.shared.metrics.dead_lettered(poison.reason);
        let (topic, partition) = (&self.partition.id.0, self.partition.id.1);
        let reason = poison.reason.as_str();
        tracing::warn!(topic, partition, offset, reason, error = poison.error, "dead-lettered a record");
    }

    /// Waits out a failure that is no record's fault, visibly.
    async fn pause(
        &self,
        after: Duration,
        cause: Cause,
        error: String,
        attempt: u32,
    ) -> Result<(), Abandoned> {
        self.shared.metrics.retried(cause);
        let (topic, partition) = (&self.partition.id.0, self.partition.id.1);
        let after_ms = after.as_millis();
        // The backoff bounds how often: once per partition and pause.
        tracing::warn!(topic, partition, attempt, after_ms, error, "waiting, then trying again");
        self.partition.wait_for(Some((cause, format!("attempt {attempt}: {error}"))));
        tokio::select! {
            () = sleep(after) => Ok(()),
            () = self.stop.requested() => Err(Abandoned),
        }
    }
}

/// How the attempts to apply some events ended.
enum Attempted {
    Applied,
    /// The database refuses them, after so many attempts.
    Refused(Poison, u32),
}

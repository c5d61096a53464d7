//! The partitions that are ours: a worker for each, their offsets committed at an interval, before a partition is
//! given away and at the end.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use rdkafka::{
    consumer::{CommitMode, Consumer, RebalanceProtocol},
    error::KafkaResult,
};
use service::{
    Failure, Health,
    exit::Kind,
    shutdown::{Shutdown, Trigger},
};
use tokio::{
    sync::{Notify, mpsc},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, timeout, timeout_at},
};

use crate::{
    admin::{self, Probe, Situation},
    group::{self, Ended, GroupConsumer, GroupEvent, Listener, PartitionId},
    handler::Handler,
    partition::Partition,
    run::{Shared, Worker},
};

/// How often health and metrics are brought up to date.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long a commit that somebody waits for may take.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long leaving the group may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A partition and its worker.
struct Running {
    partition: Arc<Partition>,
    stop: Trigger,
    worker: JoinHandle<()>,
    /// The offset that Kafka has confirmed; -1 for none.
    committed: i64,
}

/// Owns the membership and the workers.
pub(crate) struct Assignment<H> {
    consumer: Arc<GroupConsumer>,
    events: mpsc::Receiver<GroupEvent>,
    listener: Listener,
    shared: Arc<Shared<H>>,
    health: Health,
    running: HashMap<PartitionId, Running>,
    /// The commit under way or last sent.
    committing: Option<JoinHandle<KafkaResult<Positions>>>,
}

/// Offsets by partition.
type Positions = BTreeMap<PartitionId, i64>;

impl<H: Handler> Assignment<H> {
    pub(crate) fn new(
        consumer: Arc<GroupConsumer>,
        events: mpsc::Receiver<GroupEvent>,
        shared: Arc<Shared<H>>,
        health: Health,
    ) -> Result<Self, Failure> {
        let listener = Listener::start(consumer.clone())?;
        Ok(Self { consumer, events, listener, shared, health, running: HashMap::new(), committing: None })
    }

    /// Consumes until asked to stop or the membership ends, then drains.
    pub(crate) async fn run(mut self, shutdown: Shutdown) -> Result<(), Ended> {
        let mut commit = interval(self.shared.limits.commit_interval);
        let mut look = interval(LOOK_EVERY);
        commit.set_missed_tick_behavior(MissedTickBehavior::Delay);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let probe = Probe::start(self.shared.clone(), self.consumer.clone());
        let outcome = loop {
            let done = tokio::select! {
                () = shutdown.requested() => break Ok(()),
                Some(event) = self.events.recv() => self.on(event).await,
                _ = commit.tick() => {
                    self.commit().await;
                    Ok(())
                }
                _ = look.tick() => self.look(&probe).map_err(Ended::from),
            };
            if let Err(failure) = done {
                break Err(failure);
            }
        };
        self.health.not_ready("draining", "");
        let drained = self.drain(probe).await;
        outcome.and(drained.map_err(Ended::from))
    }

    async fn on(&mut self, event: GroupEvent) -> Result<(), Ended> {
        match event {
            GroupEvent::Assigned(ids) => self.assigned(&ids)?,
            GroupEvent::Revoked(ids) => self.revoked(&ids).await?,
            GroupEvent::Fatal(ended) => return Err(ended),
        }
        Ok(())
    }

    /// Starts a worker for each partition, on a queue of its own, before its first record is fetched.
    fn assigned(&mut self, ids: &[PartitionId]) -> Result<(), Failure> {
        for id in ids {
            let mut queue = self.consumer.split_partition_queue(&id.0, id.1).ok_or_else(|| {
                Failure::new(Kind::Internal, format!("librdkafka has no queue for {}/{}", id.0, id.1))
            })?;
            let nonempty = Arc::new(Notify::new());
            let notify = nonempty.clone();
            queue.set_nonempty_callback(move || notify.notify_one());
            let partition = Arc::new(Partition::new(id.clone()));
            let (stop, stopped) = Shutdown::manual();
            let worker = Worker {
                shared: self.shared.clone(),
                partition: partition.clone(),
                queue,
                nonempty,
                stop: stopped,
            };
            let worker = tokio::spawn(worker.run());
            self.running.insert(id.clone(), Running { partition, stop, worker, committed: -1 });
        }
        tracing::info!(partitions = %names(ids), "assigned");
        // Without offsets: the committed ones, or the beginning.
        self.consumer
            .incremental_assign(&group::list(ids))
            .map_err(|e| Failure::new(Kind::Internal, format!("cannot take partitions: {e}")))
    }

    /// Ends the partitions' work and commits it, then lets them go.
    async fn revoked(&mut self, ids: &[PartitionId]) -> Result<(), Failure> {
        let lost = self.consumer.assignment_lost();
        tracing::info!(partitions = %names(ids), lost, "revoked");
        let leaving: Vec<Running> = ids.iter().filter_map(|id| self.running.remove(id)).collect();
        let leaving = stop(leaving, self.shared.limits.drain_timeout).await;
        for partition in &leaving {
            self.shared.metrics.forget(&partition.partition.id);
        }
        if !lost && let Err(error) = self.commit_and_wait(uncommitted(leaving.iter())).await {
            // The next owner gets some records again and drops them.
            self.shared.metrics.commit_failed();
            tracing::warn!(error, "committing offsets of partitions that leave failed");
        }
        self.consumer
            .incremental_unassign(&group::list(ids))
            .map_err(|e| Failure::new(Kind::Internal, format!("cannot give partitions away: {e}")))
    }

    /// Sends the offsets that have moved, one request at a time, and takes note of the last one's answer.
    ///
    /// The client's synchronous commit on another thread, because its asynchronous one never tells the outcome.
    async fn commit(&mut self) {
        if self.committing.as_ref().is_some_and(|c| !c.is_finished()) {
            return;
        }
        if let Some(committing) = self.committing.take()
            && let Ok(outcome) = committing.await
        {
            self.committed(outcome);
        }
        let moved = uncommitted(self.running.values());
        if !moved.is_empty() {
            self.committing = Some(send(self.consumer.clone(), moved));
        }
    }

    fn committed(&mut self, outcome: KafkaResult<Positions>) {
        match outcome {
            Ok(positions) => {
                for (id, offset) in positions {
                    if let Some(running) = self.running.get_mut(&id) {
                        running.committed = running.committed.max(offset);
                    }
                }
            }
            Err(error) => {
                self.shared.metrics.commit_failed();
                self.consumer.context().commit_failed(&error);
            }
        }
    }

    async fn commit_and_wait(&self, moved: Positions) -> Result<(), String> {
        if moved.is_empty() {
            return Ok(());
        }
        match timeout(COMMIT_TIMEOUT, send(self.consumer.clone(), moved)).await {
            Ok(Ok(outcome)) => outcome.map(drop).map_err(|e| e.to_string()),
            Ok(Err(e)) => Err(e.to_string()),
            Err(_) => Err(format!("no answer from Kafka within {} s", COMMIT_TIMEOUT.as_secs())),
        }
    }

    /// Brings health and metrics up to date, and notices a worker that ended by itself.
    fn look(&self, probe: &Probe) -> Result<(), Failure> {
        if let Some((id, _)) = self.running.iter().find(|(_, r)| r.worker.is_finished()) {
            let message = format!("the worker of {}/{} ended by itself (see the log)", id.0, id.1);
            return Err(Failure::new(Kind::Internal, message));
        }
        if self.listener.is_finished() && self.events.is_empty() {
            return Err(Failure::new(Kind::Internal, "the group's thread ended by itself (see the log)"));
        }
        let partitions: Vec<Arc<Partition>> = self.running.values().map(|r| r.partition.clone()).collect();
        admin::measure(&self.shared.metrics, &partitions);
        let joined = !self.running.is_empty()
            || matches!(self.consumer.rebalance_protocol(), RebalanceProtocol::Cooperative);
        let kafka = self.consumer.context().last_error();
        admin::report(
            &self.health,
            &Situation { joined, partitions: &partitions, database: probe.database(), kafka },
        );
        probe.watch(partitions);
        Ok(())
    }

    /// Ends all work, commits it, leaves the group; each step within its bound.
    async fn drain(mut self, probe: Probe) -> Result<(), Failure> {
        let probe = probe.stop();
        let running: Vec<Running> = self.running.drain().map(|(_, r)| r).collect();
        let ended = stop(running, self.shared.limits.drain_timeout).await;
        let committed = self.commit_and_wait(uncommitted(ended.iter())).await;
        drop(ended);
        let Self { consumer, mut events, listener, committing, .. } = self;
        consumer.context().close();
        events.close();
        let close = move || {
            listener.stop();
            // A rebalance that nobody has answered yet would hold up the leaving.
            while let Ok(event) = events.try_recv() {
                let answered = match event {
                    GroupEvent::Assigned(ids) => consumer.incremental_assign(&group::list(&ids)),
                    GroupEvent::Revoked(ids) => consumer.incremental_unassign(&group::list(&ids)),
                    GroupEvent::Fatal(_) => Ok(()),
                };
                drop(answered);
            }
            // The last one to hold the consumer leaves the group: that is us, the others have ended.
            drop(consumer);
        };
        let closing = async {
            if let Some(committing) = committing {
                drop(committing.await);
            }
            drop(probe.await);
            tokio::task::spawn_blocking(close).await
        };
        let left = timeout(CLOSE_TIMEOUT, closing).await.is_ok();
        match (committed, left) {
            (Ok(()), true) => Ok(()),
            (Ok(()), false) => {
                tracing::warn!("Kafka did not confirm that we left the group; it will notice by itself");
                Ok(())
            }
            (Err(error), _) => Err(Failure::new(
                Kind::GaveUp,
                format!("stopped, but the last offsets could not be committed: {error}"),
            )
            .hint("nothing is lost: the same records come again and are recognised")),
        }
    }
}

/// Commits on a thread where it may block, and gives the offsets back once Kafka has confirmed them.
fn send(consumer: Arc<GroupConsumer>, moved: Positions) -> JoinHandle<KafkaResult<Positions>> {
    tokio::task::spawn_blocking(move || {
        consumer.commit(&group::offsets(&moved)?, CommitMode::Sync)?;
        Ok(moved)
    })
}

/// Offsets that Kafka has not confirmed yet.
fn uncommitted<'a>(running: impl Iterator<Item = &'a Running>) -> Positions {
    running
        .filter_map(|r| {
            let position = r.partition.position().filter(|p| *p > r.committed)?;
            Some((r.partition.id.clone(), position))
        })
        .collect()
}

/// Tells workers to stop and waits for them; one that takes too long is abandoned, which is safe: its
/// transaction is all or nothing, and its records come again.
async fn stop(mut running: Vec<Running>, limit: Duration) -> Vec<Running> {
    for one in &running {
        one.stop.request();
    }
    let until = Instant::now() + limit;
    for one in &mut running {
        match timeout_at(until, &mut one.worker).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "a partition's worker failed"),
            Err(_) => {
                one.worker.abort();
                tracing::warn!(partition = ?one.partition.id, "abandoned a batch that took too long");
            }
        }
    }
    running
}

fn names(ids: &[PartitionId]) -> String {
    ids.iter().map(|(topic, partition)| format!("{topic}/{partition}")).collect::<Vec<_>>().join(" ")
}

//! The consumer group: the client's settings, what the group tells us, and the thread that listens to it.
//!
//! Each assigned partition has a queue of its own, which its worker empties at its own pace; a worker that waits
//! (for the database, say) just does not, librdkafka stops fetching at its bound, and nothing needs to be paused.
//! The thread here polls the rest whatever the workers do, so the membership never times out for want of polls.
//! That is why this is a `BaseConsumer`: partition queues can be emptied in batches without waiting, and a
//! rebalance is answered when we are ready (work under way finished, offsets committed), not inside a callback.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use rdkafka::{
    ClientConfig, ClientContext, Message, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer, ConsumerContext},
    error::{KafkaError, KafkaResult},
    types::{RDKafkaErrorCode, RDKafkaRespErr},
};
use service::{Failure, exit::Kind};
use tokio::sync::mpsc;

use crate::{config::KafkaConfig, delivery::redrive_topic, noise::Noise};

/// A partition's topic and number.
pub(crate) type PartitionId = (String, i32);
/// Our consumer.
pub(crate) type GroupConsumer = BaseConsumer<Context>;

/// Events that may wait to be handled. The group waits for our answer to each, so there is rarely more than one.
const EVENTS_MAX: usize = 8;
/// How long the thread waits for an event before it looks whether it should stop.
const POLL: Duration = Duration::from_millis(100);

/// What the group tells us.
#[derive(Debug)]
pub(crate) enum GroupEvent {
    /// These partitions are ours from now on; the group waits for our `incremental_assign`.
    Assigned(Vec<PartitionId>),
    /// These go to others; the group waits for our `incremental_unassign`.
    Revoked(Vec<PartitionId>),
    /// The client cannot go on.
    Fatal(Ended),
}

/// Why a membership ended by itself.
#[derive(Debug)]
pub(crate) enum Ended {
    /// Kafka knows another member by our `group.instance.id`. It may be ourselves: while a coordinator fails over,
    /// librdkafka can forget its member id, and then a commit of its own fences it.
    Fenced(Failure),
    Failed(Failure),
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// Receives librdkafka's callbacks.
pub(crate) struct Context {
    events: mpsc::Sender<GroupEvent>,
    /// Nobody handles events any more: rebalances are answered at once.
    closing: AtomicBool,
    /// The last error of the client as a whole, for `/health/ready`.
    last_error: Mutex<Option<String>>,
    noise: Noise,
    /// The topic of redriven records, which need not exist.
    redrive_topic: String,
}

impl Context {
    /// From now on rebalances are answered at once, because nobody handles events any more.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
    }

    /// The last error of the client as a whole since the last call of [`Self::forget_error`].
    pub(crate) fn last_error(&self) -> Option<String> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells a failed commit, without the noise.
    pub(crate) fn commit_failed(&self, error: &KafkaError) {
        self.noise.error(error, "committing offsets failed; trying again at the next interval");
    }

    /// All is well again.
    pub(crate) fn forget_error(&self) {
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.noise.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // The end of a partition is an event, not an error.
        if matches!(error.rdkafka_error_code(), Some(RDKafkaErrorCode::PartitionEOF)) {
            return;
        }
        if reason.contains(&self.redrive_topic) && error.rdkafka_error_code().is_some_and(is_unknown) {
            tracing::debug!(reason, "nothing can be redriven yet");
            return;
        }
        self.noise.error(&error, reason);
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("{error}: {reason}"));
    }
}

impl ConsumerContext for Context {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, error: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let assigned = error == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        let ids = ids(list);
        let event = if assigned { GroupEvent::Assigned(ids) } else { GroupEvent::Revoked(ids) };
        if !self.closing.load(Ordering::SeqCst) && self.events.blocking_send(event).is_ok() {
            return;
        }
        let done =
            if assigned { consumer.incremental_assign(list) } else { consumer.incremental_unassign(list) };
        if let Err(error) = done {
            tracing::debug!(%error, "a rebalance while closing");
        }
    }
}

fn is_unknown(code: RDKafkaErrorCode) -> bool {
    matches!(code, RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic)
}

fn ids(list: &TopicPartitionList) -> Vec<PartitionId> {
    list.elements().iter().map(|e| (e.topic().to_owned(), e.partition())).collect()
}

/// A list for librdkafka.
pub(crate) fn list<'a>(ids: impl IntoIterator<Item = &'a PartitionId>) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    for (topic, partition) in ids {
        list.add_partition(topic, *partition);
    }
    list
}

/// The settings that consumer and producer share: where Kafka is and how it is reached.
pub(crate) fn connection(kafka: &KafkaConfig) -> ClientConfig {
    let mut config = base(kafka);
    for (name, value) in &kafka.properties {
        let shared =
            ["security.", "ssl.", "sasl.", "enable.ssl", "enable.sasl", "socket.", "broker.", "client."]
                .iter()
                .any(|prefix| name.starts_with(prefix));
        if shared {
            config.set(name, value);
        }
    }
    config
}

fn base(kafka: &KafkaConfig) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", &kafka.brokers)
        .set("client.id", format!("consumer-{}", kafka.group))
        // A broker that comes back is noticed soon.
        .set("reconnect.backoff.max.ms", "2000")
        .set("socket.keepalive.enable", "true");
    config
}

fn settings(kafka: &KafkaConfig) -> ClientConfig {
    let mut config = base(kafka);
    config
        // Memory: what a partition holds ahead of its worker.
        .set("queued.max.messages.kbytes", "4096")
        .set("fetch.message.max.bytes", "1048576")
        .set("fetch.max.bytes", "8388608")
        // After a crash the others take over within this.
        .set("session.timeout.ms", "10000")
        .set("heartbeat.interval.ms", "2000")
        // A topic that is made after we started is found soon.
        .set("topic.metadata.refresh.interval.ms", "10000");
    for (name, value) in &kafka.properties {
        config.set(name, value);
    }
    config
        .set("group.id", &kafka.group)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "earliest")
        .set("isolation.level", "read_committed")
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("enable.partition.eof", "true")
        .set("check.crcs", "true")
        .set("allow.auto.create.topics", "false");
    config
}

/// Makes librdkafka check the settings; nothing connects.
pub(crate) fn check(kafka: &KafkaConfig) -> Result<(), Failure> {
    settings(kafka).create_native_config().map(|_| ()).map_err(|e| bad_client(&e))
}

/// The failure that a client which cannot be made is.
pub(crate) fn bad_client(error: &KafkaError) -> Failure {
    let message = match error {
        KafkaError::ClientConfig(_, why, name, value) => {
            // A value may be a password.
            let value =
                if name.contains("password") || name.contains("secret") { "***" } else { value.as_str() };
            format!("kafka.properties: {name} = {value:?}: {why}")
        }
        other => format!("cannot make a Kafka client: {other}"),
    };
    Failure::configuration(message).hint("look into [kafka.properties]; the names are librdkafka's")
}

/// Joins the group.
pub(crate) fn join(kafka: &KafkaConfig) -> Result<(Arc<GroupConsumer>, mpsc::Receiver<GroupEvent>), Failure> {
    let (events, receiver) = mpsc::channel(EVENTS_MAX);
    let context = Context {
        events,
        closing: AtomicBool::new(false),
        last_error: Mutex::new(None),
        noise: Noise::new("consumer"),
        redrive_topic: redrive_topic(&kafka.group),
    };
    let consumer: GroupConsumer = settings(kafka).create_with_context(context).map_err(|e| bad_client(&e))?;
    let redriven = redrive_topic(&kafka.group);
    let topics = kafka.topics.iter().map(String::as_str);
    let topics: Vec<&str> = topics.chain([redriven.as_str()]).collect();
    consumer
        .subscribe(&topics)
        .map_err(|e| Failure::configuration(format!("cannot subscribe to {topics:?}: {e}")))?;
    Ok((Arc::new(consumer), receiver))
}

/// Listens to the group until told to stop: rebalances and errors.
pub(crate) struct Listener {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Listener {
    pub(crate) fn start(consumer: Arc<GroupConsumer>) -> Result<Self, Failure> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::Builder::new()
            .name("group".into())
            .spawn(move || {
                while !stopped.load(Ordering::SeqCst) {
                    let Some(failure) = consumer.poll(POLL).and_then(fatal) else { continue };
                    drop(consumer.context().events.blocking_send(GroupEvent::Fatal(failure)));
                    return;
                }
            })
            .map_err(|e| Failure::new(Kind::Internal, format!("cannot start a thread: {e}")))?;
        Ok(Self { stop, thread })
    }

    /// Stops listening. Blocks for a moment.
    pub(crate) fn stop(self) {
        self.stop.store(true, Ordering::SeqCst);
        if self.thread.join().is_err() {
            tracing::error!("the group's thread panicked");
        }
    }

    /// Whether the thread has ended by itself.
    pub(crate) fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }
}

/// What of the group's queue ends the process. Other errors have been told by the context already.
fn fatal(polled: KafkaResult<rdkafka::message::BorrowedMessage<'_>>) -> Option<Ended> {
    match polled {
        // Every partition has its own queue before it is assigned. Going on would lose this record.
        Ok(record) => Some(Ended::Failed(Failure::new(
            Kind::Internal,
            format!(
                "a record of {}/{} at {} came outside its partition's queue",
                record.topic(),
                record.partition(),
                record.offset()
            ),
        ))),
        Err(KafkaError::MessageConsumptionFatal(code)) => {
            let failure =
                Failure::new(Kind::Refused, format!("Kafka refuses this consumer for good: {code}"));
            Some(match code {
                RDKafkaErrorCode::FencedInstanceId => Ended::Fenced(
                    failure.hint("another member uses the same group.instance.id: give each one of its own"),
                ),
                _ => Ended::Failed(failure),
            })
        }
        Err(_) => None,
    }
}

/// Offsets to commit.
pub(crate) fn offsets(positions: &BTreeMap<PartitionId, i64>) -> KafkaResult<TopicPartitionList> {
    let mut list = TopicPartitionList::with_capacity(positions.len());
    for ((topic, partition), offset) in positions {
        list.add_partition_offset(topic, *partition, rdkafka::Offset::Offset(*offset))?;
    }
    Ok(list)
}

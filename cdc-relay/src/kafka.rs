//! The producer: records in, acknowledgements out.
//!
//! One thread polls librdkafka and collects the delivery reports; the pipeline takes them in batches. A record
//! is known by its ticket, a number that travels through librdkafka without an allocation.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use rdkafka::{
    ClientConfig, ClientContext,
    config::RDKafkaLogLevel,
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Header, Headers as _, Message as _, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext},
    types::RDKafkaRespErr,
};
use relay_core::{Outgoing, progress::Ticket};

use crate::{
    admin::Metrics,
    config::KafkaConfig,
    error::{Error, Kind},
    wait::Waker,
};

/// How long one poll of librdkafka may last; a stop waits as long.
const POLL: Duration = Duration::from_millis(100);
/// How long after a producer broke its reports may take to say why.
const CAUSE_GRACE: Duration = Duration::from_millis(300);
/// How long to wait for a broker's answer about a topic.
const METADATA_TIMEOUT: Duration = Duration::from_secs(1);

/// What Kafka has said since it was last asked.
#[derive(Debug, Default)]
pub(crate) struct Reports {
    pub(crate) acknowledged: Vec<Ticket>,
    /// The first failure that is a cause; those that follow from it are not kept.
    failed: Option<Failed>,
}

/// A record that was not delivered, or the producer's own failure.
#[derive(Debug, Clone)]
struct Failed {
    code: RDKafkaErrorCode,
    what: String,
}

struct Context {
    reports: Mutex<Reports>,
    waker: Waker,
    metrics: Metrics,
}

impl Context {
    fn reports(&self) -> std::sync::MutexGuard<'_, Reports> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, code: RDKafkaErrorCode, what: impl FnOnce() -> String) {
        let mut reports = self.reports();
        if reports.failed.as_ref().is_none_or(|f| is_consequence(f.code)) {
            reports.failed = Some(Failed { code, what: what() });
        }
        drop(reports);
        self.waker.wake();
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        // What matters comes by `error` and by delivery reports; librdkafka's own lines are for whoever asks.
        tracing::debug!(?level, facility, "librdkafka: {message}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AllBrokersDown) => {
                if self.metrics.kafka_up.set(0) != 0 {
                    tracing::warn!(
                        reason,
                        "no Kafka broker can be reached; records wait and input pauses at its bound"
                    );
                }
            }
            Some(RDKafkaErrorCode::Fatal) => {
                tracing::warn!(reason, "the producer is broken and will be replaced");
                self.fail(RDKafkaErrorCode::Fatal, || "a record".into());
            }
            Some(RDKafkaErrorCode::Authentication | RDKafkaErrorCode::SSL) => {
                tracing::error!(
                    reason,
                    "Kafka refuses the connection: check kafka.properties (security.protocol, sasl.*, ssl.*)"
                );
            }
            _ => tracing::debug!(reason, "librdkafka: {error}"),
        }
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, ticket: usize) {
        match result {
            Ok(_) => {
                let mut reports = self.reports();
                let first = reports.acknowledged.is_empty();
                reports.acknowledged.push(Ticket(ticket as u64));
                drop(reports);
                if first {
                    self.waker.wake();
                }
            }
            Err((error, message)) => {
                self.fail(error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown), || {
                    describe_failed(message)
                });
            }
        }
    }
}

/// What the failure of another record, or our own closing, did to this one: it says nothing about the cause.
fn is_consequence(code: RDKafkaErrorCode) -> bool {
    matches!(code, RDKafkaErrorCode::PurgeQueue | RDKafkaErrorCode::PurgeInflight | RDKafkaErrorCode::Fatal)
}

/// What happened to a record that was to be enqueued.
#[derive(Debug)]
pub(crate) enum Enqueued {
    Yes,
    /// Try again later.
    Full,
}

/// What is known of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Topic {
    Exists,
    /// No broker answered in time.
    Unknown,
}

/// An idempotent producer and the thread that polls it. Dropping it forgets what is in flight.
pub(crate) struct Producer {
    inner: Arc<BaseProducer<Context>>,
    closing: Arc<AtomicBool>,
    poller: Option<JoinHandle<()>>,
    /// The topics that were seen to exist.
    known: Vec<String>,
}

impl Producer {
    /// Connects in the background; whether Kafka is there shows itself later.
    pub(crate) fn new(config: &KafkaConfig, waker: Waker, metrics: Metrics) -> Result<Self, Error> {
        let context = Context { reports: Mutex::default(), waker, metrics };
        let inner: BaseProducer<Context> =
            client_config(config).create_with_context(context).map_err(|e| {
                Error::new(Kind::Misconfigured, format!("librdkafka does not take the configuration: {e}"))
                    .hint("look at kafka.brokers and kafka.properties")
            })?;
        let (inner, closing) = (Arc::new(inner), Arc::new(AtomicBool::new(false)));
        let (polled, stop) = (Arc::clone(&inner), Arc::clone(&closing));
        let poll = move || {
            while !stop.load(Ordering::Relaxed) {
                polled.poll(POLL);
            }
        };
        let poller = std::thread::Builder::new().name("kafka-poll".into()).spawn(poll);
        let poller = poller.map_err(|e| Error::new(Kind::Internal, format!("cannot start a thread: {e}")))?;
        Ok(Self { inner, closing, poller: Some(poller), known: Vec::new() })
    }

    /// Asks once for each topic whether it is there, before the first record goes to it.
    ///
    /// # Errors
    /// Halted: the topic does not exist, or we may not write to it.
    pub(crate) fn look_up(&mut self, topic: &str) -> Result<Topic, Error> {
        if self.known.iter().any(|t| t == topic) {
            return Ok(Topic::Exists);
        }
        let Ok(metadata) = self.inner.client().fetch_metadata(Some(topic), METADATA_TIMEOUT) else {
            return Ok(Topic::Unknown);
        };
        let error = metadata
            .topics()
            .iter()
            .find(|t| t.name() == topic)
            .and_then(rdkafka::metadata::MetadataTopic::error);
        match error {
            None => {
                self.known.push(topic.to_owned());
                Ok(Topic::Exists)
            }
            Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART) => Err(Error::new(Kind::Halted, format!("topic {topic:?} does not exist"))
                .hint(format!("create it (kafka-topics.sh --create --topic {topic} --partitions N --replication-factor N) or mend route.topic, then start again"))),
            Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED) => Err(Error::new(Kind::Halted, format!("Kafka does not allow us to write to topic {topic:?}"))
                .hint(format!("grant it: kafka-acls.sh --add --producer --topic {topic} --allow-principal User:…, then start again"))),
            // A leader is being elected, or the like.
            Some(_) => Ok(Topic::Unknown),
        }
    }

    /// Hands a record over. It is copied.
    ///
    /// # Errors
    /// Halted when the record can never be sent.
    pub(crate) fn enqueue(&self, record: &Outgoing<'_>) -> Result<Enqueued, Error> {
        let mut headers = OwnedHeaders::new_with_capacity(8);
        for (key, value) in record.headers() {
            headers = headers.insert(Header { key, value });
        }
        let ticket = usize::try_from(record.ticket.0).unwrap_or(usize::MAX);
        let row = &record.row;
        let mut message = BaseRecord::with_opaque_to(record.topic, ticket)
            .key(row.aggregate_id.as_bytes())
            .timestamp(record.committed_at_ms)
            .headers(headers);
        message.payload = row.payload;
        message.partition = row.partition;
        match self.inner.send(message) {
            Ok(()) => Ok(Enqueued::Yes),
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), _)) => Ok(Enqueued::Full),
            Err((error, _)) => Err(refused(
                error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown),
                &describe(record),
            )),
        }
    }

    /// Takes what Kafka has said since the last call; `into` is emptied and its capacity used again.
    ///
    /// # Errors
    /// A record was not delivered: this producer is of no more use.
    pub(crate) fn take_reports(&self, into: &mut Vec<Ticket>) -> Result<(), Error> {
        into.clear();
        let context = self.inner.context();
        let mut reports = context.reports();
        std::mem::swap(&mut reports.acknowledged, into);
        let Some(mut failed) = reports.failed.clone() else { return Ok(()) };
        drop(reports);
        if is_consequence(failed.code) {
            // The cause arrives in the reports that follow; it decides between another try and a halt.
            std::thread::sleep(CAUSE_GRACE);
            failed = context.reports().failed.clone().unwrap_or(failed);
        }
        Err(refused(failed.code, &failed.what))
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
        if let Some(poller) = self.poller.take() {
            // It cannot panic, and if it did there would be nothing to do about it here.
            let _ = poller.join();
        }
    }
}

fn describe(record: &Outgoing<'_>) -> String {
    format!("outbox row {} for topic {}", record.row.id, record.topic)
}

/// The same of a record that came back. Others of its batch fail with it, and it may be one of them that is
/// to blame.
fn describe_failed(message: &BorrowedMessage<'_>) -> String {
    let id = message.headers().and_then(|h| h.iter().find(|h| h.key == "id")?.value);
    let id = id.map_or_else(|| "unknown".into(), String::from_utf8_lossy);
    format!("outbox row {id} for topic {}", message.topic())
}

/// What a record's failure means.
fn refused(code: RDKafkaErrorCode, what: &str) -> Error {
    match code {
        RDKafkaErrorCode::MessageSizeTooLarge => Error::new(Kind::Halted, format!("{what} is larger than Kafka takes"))
            .hint("raise max.message.bytes of the topic and kafka.properties.\"message.max.bytes\" of the relay (both default to about 1 MB), then start again"),
        RDKafkaErrorCode::UnknownTopic | RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownPartition => {
            Error::new(Kind::Halted, format!("{what} names a topic or partition that does not exist: {code}"))
                .hint("create it, or mend the row's topic or partition, then start again")
        }
        RDKafkaErrorCode::TopicAuthorizationFailed | RDKafkaErrorCode::ClusterAuthorizationFailed => {
            Error::new(Kind::Halted, format!("Kafka does not allow us to write {what}: {code}"))
                .hint("grant WRITE on the topic (and IDEMPOTENT_WRITE before Kafka 2.8), then start again")
        }
        RDKafkaErrorCode::InvalidRecord => Error::new(Kind::Halted, format!("Kafka refuses {what} as invalid"))
            .hint("a compacted topic takes no record without a key; look at the broker's log"),
        _ => Error::new(Kind::DeliveryFailed, format!("Kafka did not take {what}: {code}")),
    }
}

/// Asks librdkafka whether it would take the configuration; connects to nothing.
pub(crate) fn check(config: &KafkaConfig) -> Result<(), Error> {
    client_config(config).create_native_config().map(drop).map_err(|e| not_taken(&e))
}

fn not_taken(error: &KafkaError) -> Error {
    Error::new(Kind::Misconfigured, format!("librdkafka does not take the configuration: {error}"))
        .hint("look at kafka.brokers and kafka.properties")
}

fn client_config(config: &KafkaConfig) -> ClientConfig {
    let mut client = ClientConfig::new();
    client
        .set("client.id", "cdc-relay")
        // Partitions as Java's producer, and Debezium, would choose them.
        .set("partitioner", "murmur2_random")
        .set("linger.ms", "5")
        .set("reconnect.backoff.max.ms", "1000")
        .set("socket.keepalive.enable", "true")
        // OpenSSL is built in, so it has to be told where this system keeps its certificates.
        .set("ssl.ca.location", "probe");
    for (name, value) in &config.properties {
        client.set(name, value);
    }
    client
        .set("bootstrap.servers", &config.brokers)
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("enable.gapless.guarantee", "true")
        .set("message.timeout.ms", "0")
        .set("allow.auto.create.topics", "false")
        // The bound is ours (limits.in_flight_bytes); librdkafka's would count payloads only.
        .set("queue.buffering.max.messages", "0")
        .set("queue.buffering.max.kbytes", "2147483647")
        .set_log_level(RDKafkaLogLevel::Info);
    client
}

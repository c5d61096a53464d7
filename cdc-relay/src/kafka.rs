//! The producer: records in, acknowledgements out.
//!
//! One thread polls librdkafka and collects the delivery reports; the pipeline takes them in batches. A record
//! is known by its ticket, a number that travels through librdkafka without an allocation.

mod refusal;

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, ClientContext,
    config::RDKafkaLogLevel,
    error::{KafkaError, RDKafkaErrorCode},
    message::{Header, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext, PurgeConfig},
    types::RDKafkaRespErr,
};
use relay_core::{Outgoing, progress::Ticket, record::Record};

use self::refusal::{describe_failed, is_consequence, refused};
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

/// How long a topic must be reported missing before that is believed: a broker may be a moment behind.
const MISSING_GRACE: Duration = Duration::from_secs(3);
/// librdkafka's default of `batch.size`, in bytes.
const BATCH_BYTES: usize = 1_000_000;
/// Below this many bytes, batches give way to single records.
const BATCH_LEAST_BYTES: usize = 2_000;

/// How much goes into one batch of records. Kafka refuses a batch that is larger than its topic's
/// `max.message.bytes`, although each record of it may fit, and librdkafka does not split it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Batch {
    /// As configured.
    #[default]
    Configured,
    UpToBytes(usize),
    /// One record: what is refused then is the record itself.
    Single,
}

impl Batch {
    /// The next smaller one, after Kafka refused one of this size.
    pub(crate) fn smaller(self, config: &KafkaConfig) -> Self {
        let configured = config.properties.get("batch.size").and_then(|v| v.expose().parse().ok());
        let bytes = match self {
            Self::Configured => configured.unwrap_or(BATCH_BYTES),
            Self::UpToBytes(bytes) => bytes,
            Self::Single => 0,
        };
        if bytes / 2 < BATCH_LEAST_BYTES { Self::Single } else { Self::UpToBytes(bytes / 2) }
    }
}

/// What Kafka has said since it was last asked.
#[derive(Debug, Default)]
struct Reports {
    acknowledged: Vec<Ticket>,
    /// The first failure that is a cause; those that follow from it are not kept.
    failed: Option<Failed>,
    /// How many records were refused for their size.
    too_large: usize,
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
    /// Whether it has been told that no broker can be reached.
    told_down: AtomicBool,
}

impl Context {
    fn reports(&self) -> MutexGuard<'_, Reports> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, code: RDKafkaErrorCode, what: impl FnOnce() -> String) {
        let mut reports = self.reports();
        reports.too_large += usize::from(code == RDKafkaErrorCode::MessageSizeTooLarge);
        if reports.failed.as_ref().is_none_or(|f| is_consequence(f.code)) {
            reports.failed = Some(Failed { code, what: what() });
        }
        drop(reports);
        self.waker.wake();
    }

    fn down(&self, reason: &str) {
        self.metrics.kafka_up.set(0);
        if !self.told_down.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                reason,
                "no Kafka broker can be reached; records wait and input pauses at its bound"
            );
        }
    }

    fn up(&self) {
        self.metrics.kafka_up.set(1);
        if self.told_down.swap(false, Ordering::Relaxed) {
            tracing::info!("Kafka can be reached again");
        }
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        // What matters comes by `error` and by delivery reports; librdkafka's own lines are for whoever asks.
        tracing::debug!(?level, facility, "librdkafka: {message}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AllBrokersDown) => self.down(reason),
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
                let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
                self.fail(code, || describe_failed(message));
            }
        }
    }
}

/// An idempotent producer and the thread that polls it. Dropping it forgets what is in flight.
pub(crate) struct Producer {
    inner: Arc<BaseProducer<Context>>,
    batch: Batch,
    closing: Arc<AtomicBool>,
    poller: Option<JoinHandle<()>>,
    /// The topics that were seen to exist.
    known: HashSet<String>,
    /// The topic that was last reported missing, and since when.
    missing: Option<(String, Instant)>,
}

impl Producer {
    /// Connects in the background; whether Kafka is there shows itself later.
    pub(crate) fn new(
        config: &KafkaConfig,
        batch: Batch,
        waker: Waker,
        metrics: Metrics,
    ) -> Result<Self, Error> {
        let context =
            Context { reports: Mutex::default(), waker, metrics, told_down: AtomicBool::new(false) };
        let mut client = client_config(config);
        match batch {
            Batch::Configured => {}
            Batch::UpToBytes(bytes) => drop(client.set("batch.size", bytes.to_string())),
            Batch::Single => drop(client.set("batch.num.messages", "1")),
        }
        let inner: BaseProducer<Context> = client.create_with_context(context).map_err(|e| not_taken(&e))?;
        let (inner, closing) = (Arc::new(inner), Arc::new(AtomicBool::new(false)));
        let (polled, stop) = (Arc::clone(&inner), Arc::clone(&closing));
        let poll = move || {
            while !stop.load(Ordering::Relaxed) {
                polled.poll(POLL);
            }
        };
        let poller = std::thread::Builder::new().name("kafka-poll".into()).spawn(poll);
        let poller = poller.map_err(|e| Error::new(Kind::Internal, format!("cannot start a thread: {e}")))?;
        Ok(Self { inner, batch, closing, poller: Some(poller), known: HashSet::new(), missing: None })
    }

    /// Hands a record over, which is copied; false when its topic cannot be looked up at the moment.
    ///
    /// # Errors
    /// Halted when the record can never be sent: its topic does not exist or may not be written to, or it is
    /// too large.
    pub(crate) fn offer(&mut self, record: &Outgoing<'_>) -> Result<bool, Error> {
        if !self.known.contains(record.record.topic) && !self.look_up(&record.record)? {
            return Ok(false);
        }
        self.enqueue(record)?;
        Ok(true)
    }

    /// Asks whether the topic is there, before the first record goes to it; false when no broker can tell.
    fn look_up(&mut self, record: &Record<'_>) -> Result<bool, Error> {
        let topic = record.topic;
        let Ok(metadata) = self.inner.client().fetch_metadata(Some(topic), METADATA_TIMEOUT) else {
            return Ok(false);
        };
        self.inner.context().up();
        match metadata.topics().iter().find(|t| t.name() == topic).and_then(rdkafka::metadata::MetadataTopic::error) {
            None => {
                self.missing = None;
                self.known.insert(topic.to_owned());
                Ok(true)
            }
            Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART) => {
                let since = match &self.missing {
                    Some((name, since)) if name == topic => *since,
                    _ => self.missing.insert((topic.to_owned(), Instant::now())).1,
                };
                if since.elapsed() < MISSING_GRACE {
                    return Ok(false);
                }
                Err(Error::new(Kind::Halted, format!("{} is for topic {topic:?}, which does not exist", record.describe())).hint(format!(
                    "create it (kafka-topics.sh --create --topic {topic} --partitions N --replication-factor N) or mend \
                     route.topic, then start again; nothing from this row on has been confirmed"
                )))
            }
            Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED) => {
                Err(Error::new(Kind::Halted, format!("{}: Kafka does not allow us to write to topic {topic:?}", record.describe())).hint(format!(
                    "grant it (kafka-acls.sh --add --producer --topic {topic} --allow-principal User:…), then start again"
                )))
            }
            // A leader is being elected, or the like.
            Some(_) => Ok(false),
        }
    }

    fn enqueue(&self, outgoing: &Outgoing<'_>) -> Result<(), Error> {
        let record = &outgoing.record;
        let mut headers = OwnedHeaders::new_with_capacity(record.headers.len());
        for (key, value) in record.headers.iter() {
            headers = headers.insert(Header { key, value });
        }
        let ticket = usize::try_from(outgoing.ticket.0).unwrap_or(usize::MAX);
        let mut message = BaseRecord::<[u8], [u8], _>::with_opaque_to(record.topic, ticket)
            .timestamp(record.timestamp_ms)
            .headers(headers);
        (message.key, message.payload, message.partition) = (record.key, record.value, record.partition);
        self.inner.send(message).map_err(|(error, _)| {
            let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
            refused(code, &format!("{} for topic {}", record.describe(), record.topic))
        })
    }

    /// Whether nothing that was handed over still waits for its report.
    pub(crate) fn is_empty(&self) -> bool {
        self.inner.in_flight_count() == 0
    }

    /// Takes what Kafka has acknowledged since the last call; `into` is emptied and its capacity used again.
    ///
    /// # Errors
    /// A record was not delivered: this producer is of no more use.
    pub(crate) fn take_reports(&self, into: &mut Vec<Ticket>) -> Result<(), Error> {
        into.clear();
        let context = self.inner.context();
        let mut reports = context.reports();
        std::mem::swap(&mut reports.acknowledged, into);
        let failed = reports.failed.is_some();
        drop(reports);
        if failed {
            return Err(self.why_it_failed());
        }
        if !into.is_empty() {
            context.up();
        }
        Ok(())
    }

    /// Stops sending, then finds out why.
    fn why_it_failed(&self) -> Error {
        // What is behind the failed record must not be sent before it.
        self.inner.purge(PurgeConfig::default().queue().inflight());
        // The cause, or the rest of its batch, may be in reports that are still to come.
        std::thread::sleep(CAUSE_GRACE);
        let (failed, too_large) = {
            let reports = self.inner.context().reports();
            (reports.failed.clone(), reports.too_large)
        };
        let Some(failed) = failed else { return Error::new(Kind::Internal, "a failure without a report") };
        match self.inner.client().fatal_error() {
            // A fatal error of its own, such as a refused producer id, comes without a report of a record.
            Some((code, reason))
                if is_consequence(failed.code) && code != RDKafkaErrorCode::GaplessGuarantee =>
            {
                refused(code, &format!("a record ({reason})"))
            }
            _ if failed.code == RDKafkaErrorCode::MessageSizeTooLarge
                && too_large > 1
                && self.batch != Batch::Single =>
            {
                Error::new(
                    Kind::BatchTooLarge,
                    "Kafka refused a batch as larger than its topic's max.message.bytes; going on with smaller ones. Set \
                     kafka.properties.\"batch.size\" below that limit to avoid this",
                )
            }
            _ => refused(failed.code, &failed.what),
        }
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        // Nothing more is to be sent while the poller ends.
        self.inner.purge(PurgeConfig::default().queue().inflight());
        self.closing.store(true, Ordering::Relaxed);
        if let Some(poller) = self.poller.take() {
            // It cannot panic, and if it did there would be nothing to do about it here.
            let _ = poller.join();
        }
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
        client.set(name, value.expose());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_shrink_to_single_records() {
        let mut config = KafkaConfig::default();
        let steps = |config: &KafkaConfig| {
            let mut batch = Batch::Configured;
            (0..100).find(|_| {
                batch = batch.smaller(config);
                batch == Batch::Single
            })
        };
        assert_eq!(Batch::Configured.smaller(&config), Batch::UpToBytes(500_000));
        assert_eq!(steps(&config), Some(8));
        config.properties.insert("batch.size".into(), service::Secret::new("3000"));
        assert_eq!(Batch::Configured.smaller(&config), Batch::Single);
        assert_eq!(Batch::Single.smaller(&config), Batch::Single);
    }
}

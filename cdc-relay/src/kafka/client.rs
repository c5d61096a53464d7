//! The configuration that every client of Kafka here starts from.

use std::time::Duration;

use rdkafka::{
    ClientConfig, ClientContext,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer as _, ConsumerContext},
    error::{KafkaError, KafkaResult},
};

use crate::{
    config::KafkaConfig,
    error::{Error, Kind},
    faults::{self, Fault},
};

/// Settings that name a file (the first two also a folder).
const FILES: [&str; 5] = [
    "ssl.ca.location",
    "ssl.crl.location",
    "ssl.certificate.location",
    "ssl.key.location",
    "ssl.keystore.location",
];

/// Between two questions that fail.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// Asks librdkafka whether it would take the configuration, and looks whether the files are there; connects to
/// nothing.
pub(crate) fn check(config: &KafkaConfig) -> Result<(), Error> {
    for name in FILES {
        let Some(path) = config.properties.get(name).map(service::Secret::expose) else { continue };
        if path != "probe"
            && let Err(e) = std::fs::File::open(path)
        {
            let what = format!("bad configuration: kafka.properties.\"{name}\": cannot read {path}: {e}");
            return Err(Error::new(Kind::Misconfigured, what));
        }
    }
    client_config(config).create_native_config().map(drop).map_err(|e| not_taken(&e))
}

pub(super) fn not_taken(error: &KafkaError) -> Error {
    Error::new(Kind::Misconfigured, format!("librdkafka does not take the configuration: {error}"))
        .hint("look at kafka.brokers and kafka.properties")
}

/// The producer's configuration; a consumer takes what concerns it and ignores the rest.
pub(super) fn client_config(config: &KafkaConfig) -> ClientConfig {
    let mut client = ClientConfig::new();
    client
        .set("client.id", "cdc-relay")
        // Partitions as Java's producer, and Debezium, would choose them.
        .set("partitioner", "murmur2_random")
        // Of librdkafka's 5 ms most would be latency for nothing: under load a millisecond gathers as many records as pay.
        .set("linger.ms", "1")
        .set("reconnect.backoff.max.ms", "1000")
        .set("socket.keepalive.enable", "true")
        // OpenSSL is built in, so it has to be told where this system keeps its certificates.
        .set("ssl.ca.location", "probe")
        // The topic's max.message.bytes decides, and is asked for.
        .set("message.max.bytes", "1000000000");
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
    if faults::has(Fault::RetryReorders) {
        client.set("enable.gapless.guarantee", "false").set("enable.idempotence", "false");
    }
    client
}

/// The configuration of a consumer that reads without a group.
pub(super) fn reader_config(config: &KafkaConfig) -> ClientConfig {
    let mut client = client_config(config);
    // Asked for by librdkafka and never joined.
    client.set("group.id", "cdc-relay-unused").set("enable.auto.commit", "false");
    client.set("enable.partition.eof", "true").set("isolation.level", "read_committed");
    // The end is known once a fetch comes back empty: let it come back soon.
    client.set("fetch.wait.max.ms", "10");
    // A replica that is nearer is behind its leader, and ends before the end.
    client.remove("client.rack");
    client
}

/// The offsets of a partition's first record, and behind its last.
///
/// librdkafka looks for the leader among the brokers that it knows. While a broker comes back, it can know that one for the
/// leader and not where it is: then it fails at once, and would for minutes, because it asks again only at an interval. So a
/// failure asks, and takes its time.
pub(super) fn watermarks<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partition: i32,
    timeout: Duration,
) -> KafkaResult<(i64, i64)> {
    let found = consumer.fetch_watermarks(topic, partition, timeout);
    if found.is_err() {
        let _ = consumer.fetch_metadata(Some(topic), timeout);
        std::thread::sleep(RETRY_AFTER);
    }
    found
}

/// Whether batches are compressed: then only the broker knows how large one is.
pub(super) fn compresses(config: &KafkaConfig) -> bool {
    let set = |name: &str| config.properties.get(name).is_some_and(|v| v.expose() != "none");
    set("compression.type") || set("compression.codec")
}

/// Of a client whose failures its caller sees: what librdkafka says beside is for whoever asks.
pub(super) struct Quiet;

impl ClientContext for Quiet {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(?level, facility, "librdkafka: {message}");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(reason, "librdkafka: {error}");
    }
}

impl ConsumerContext for Quiet {}

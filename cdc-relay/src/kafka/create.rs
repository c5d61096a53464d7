//! The relay's own topics, made where they are missing.

use std::time::Duration;

use rdkafka::{
    admin::{AdminClient, AdminOptions, NewTopic as NativeTopic, TopicReplication},
    consumer::{BaseConsumer, Consumer as _},
    error::RDKafkaErrorCode,
};

use super::{
    client::{Quiet, client_config, not_taken, reader_config},
    door::Visitor,
};
use crate::{
    config::KafkaConfig,
    error::{Error, Kind},
};

const TIMEOUT: Duration = Duration::from_secs(15);
/// Long enough for a handshake or two.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(100);
const POLLS: u32 = 20;
/// A compacted topic is read whole at each start, and compaction leaves its last segment alone. Kafka takes no
/// smaller one.
const SEGMENT_BYTES: &str = "1048576";

/// A topic of the relay's own: one partition, and the broker's default replication.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewTopic<'a> {
    pub(crate) name: &'a str,
    /// Keeps the last value of each key for ever; else every record for ever.
    pub(crate) is_compacted: bool,
}

/// Makes what is missing; for each topic, whether it was.
pub(crate) fn create_topics(config: &KafkaConfig, topics: &[NewTopic<'_>]) -> Result<Vec<bool>, Error> {
    let admin: AdminClient<Quiet> =
        client_config(config).create_with_context(Quiet).map_err(|e| not_taken(&e))?;
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.map_err(|e| Error::new(Kind::Internal, format!("cannot start a runtime: {e}")))?;
    let native: Vec<_> = topics.iter().map(native).collect();
    let options = AdminOptions::new().request_timeout(Some(TIMEOUT)).operation_timeout(Some(TIMEOUT));
    let results = runtime.block_on(admin.create_topics(&native, &options)).map_err(|e| {
        if let Some(refused) = topics.first().and_then(|topic| refusal(config, topic.name)) {
            return refused;
        }
        let what = format!("Kafka at {} cannot be asked to create topics: {e}", config.brokers);
        Error::new(Kind::GaveUp, what)
            .hint("check kafka.brokers and kafka.properties, and whether Kafka runs")
    })?;
    let made = |(topic, result): (&NewTopic<'_>, Result<String, (String, RDKafkaErrorCode)>)| match result {
        Ok(_) => Ok(true),
        Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => Ok(false),
        // Whether we may create is asked first, even of a topic that is there.
        Err((
            _,
            RDKafkaErrorCode::TopicAuthorizationFailed | RDKafkaErrorCode::ClusterAuthorizationFailed,
        )) if exists(&admin, topic.name) => Ok(false),
        Err((_, code)) => Err(not_created(topic, code)),
    };
    topics.iter().zip(results).map(made).collect()
}

/// Whether we are refused: the admin client cannot be asked what became of its connections, so another one tries.
pub(super) fn refusal(config: &KafkaConfig, topic: &str) -> Option<Error> {
    let visitor: BaseConsumer<Visitor> =
        reader_config(config).create_with_context(Visitor::default()).ok()?;
    let _ = visitor.fetch_metadata(Some(topic), REFUSAL_TIMEOUT);
    // What happened is told while it is polled, one thing at a time.
    (0..POLLS).find_map(|_| {
        let _ = visitor.poll(POLL);
        visitor.client().context().door.any_refusal().map(|refusal| refusal.into_error(config))
    })
}

fn exists(admin: &AdminClient<Quiet>, topic: &str) -> bool {
    let metadata = admin.inner().fetch_metadata(Some(topic), TIMEOUT);
    metadata.is_ok_and(|m| m.topics().iter().any(|t| t.name() == topic && t.error().is_none()))
}

fn native<'a>(topic: &NewTopic<'a>) -> NativeTopic<'a> {
    // -1 is the broker's default.
    let new = NativeTopic::new(topic.name, 1, TopicReplication::Fixed(-1));
    if topic.is_compacted {
        new.set("cleanup.policy", "compact")
            .set("segment.bytes", SEGMENT_BYTES)
            .set("min.cleanable.dirty.ratio", "0.1")
    } else {
        new.set("retention.ms", "-1")
    }
}

fn not_created(topic: &NewTopic<'_>, code: RDKafkaErrorCode) -> Error {
    let settings = if topic.is_compacted {
        format!("cleanup.policy=compact --config segment.bytes={SEGMENT_BYTES}")
    } else {
        "retention.ms=-1".into()
    };
    Error::new(Kind::Refused, format!("topic {} cannot be created: {code}", topic.name)).hint(format!(
        "let somebody who may run: kafka-topics.sh --create --topic {} --partitions 1 --config {settings}",
        topic.name
    ))
}

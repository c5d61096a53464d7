//! What it means that Kafka did not take a record.

use rdkafka::{
    error::RDKafkaErrorCode,
    message::{BorrowedMessage, Headers as _, Message as _},
};

use crate::error::{Error, Kind};

/// What the failure of another record, or our own closing, did to this one: it says nothing about the cause.
pub(super) fn is_consequence(code: RDKafkaErrorCode) -> bool {
    matches!(
        code,
        RDKafkaErrorCode::PurgeQueue
            | RDKafkaErrorCode::PurgeInflight
            | RDKafkaErrorCode::Fatal
            | RDKafkaErrorCode::InvalidDifferentRecord
    )
}

/// A record that came back.
pub(super) fn describe_failed(message: &BorrowedMessage<'_>) -> String {
    let header = |name: &str| {
        let value = message.headers().and_then(|h| h.iter().find(|h| h.key == name)?.value);
        value.map_or_else(|| "unknown".into(), String::from_utf8_lossy)
    };
    let (id, lsn, seq) = (header("id"), header("lsn"), header("seq"));
    format!("outbox row {id} (commit LSN {lsn}, change {seq}) for topic {}", message.topic())
}

/// What a record's failure means.
pub(super) fn refused(code: RDKafkaErrorCode, what: &str) -> Error {
    use RDKafkaErrorCode as Code;
    let halted = |why: String, hint: &str| Error::new(Kind::Halted, why).hint(hint);
    match code {
        Code::MessageSizeTooLarge => halted(
            format!("{what} is larger than Kafka takes"),
            "raise max.message.bytes of the topic and kafka.properties.\"message.max.bytes\" of the relay (both default to \
             about 1 MB), then start again",
        ),
        Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition => halted(
            format!("{what} names a topic or partition that does not exist: {code}"),
            "create it, or mend the row's topic or partition, then start again",
        ),
        Code::TopicAuthorizationFailed | Code::ClusterAuthorizationFailed => halted(
            format!("Kafka does not allow us to write {what}: {code}"),
            "grant WRITE on the topic (and IDEMPOTENT_WRITE on the cluster before Kafka 2.8), then start again",
        ),
        Code::InvalidRecord | Code::InvalidTimestamp => halted(
            format!("Kafka refuses {what} as invalid: {code}"),
            "the timestamp is the commit time: look at message.timestamp.before.max.ms and message.timestamp.after.max.ms \
             of the topic, and at the broker's log",
        ),
        Code::InvalidMessageSize
        | Code::MessageBatchTooLarge
        | Code::PolicyViolation
        | Code::InvalidConfig
        | Code::InvalidRequiredAcks
        | Code::UnsupportedForMessageFormat
        | Code::UnsupportedCompressionType => halted(
            format!("Kafka refuses {what} for good: {code}"),
            "mend the topic's configuration or kafka.properties; the broker's log may say more",
        ),
        _ => Error::new(Kind::DeliveryFailed, format!("Kafka did not take {what}: {code}")),
    }
}

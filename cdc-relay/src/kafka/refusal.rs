//! What it means that Kafka did not take a record.

use rdkafka::error::RDKafkaErrorCode as Code;
use relay_core::{poison::Poison, record::Identity};

use super::transactions::{fenced, is_fenced};
use crate::error::{Error, Kind};

/// A record that was not delivered, or the producer's own failure.
#[derive(Debug, Clone)]
pub(super) struct Failed {
    pub(super) code: Code,
    pub(super) topic: String,
    /// Which row it was, where it was one.
    pub(super) identity: Option<Identity>,
}

/// What the failure of another record, or our own closing, did to this one: it says nothing about the cause.
pub(super) fn is_consequence(code: Code) -> bool {
    matches!(code, Code::PurgeQueue | Code::PurgeInflight | Code::Fatal | Code::InvalidDifferentRecord)
}

/// Whether the producer takes nothing any more, for a cause that it tells elsewhere.
pub(super) fn is_broken(code: Code) -> bool {
    matches!(code, Code::Fatal | Code::State)
}

/// Whether the record itself is why, so that another try would end alike.
pub(super) fn poison(code: Code, topic: &str) -> Option<Poison> {
    let topic = topic.to_owned();
    match code {
        Code::MessageSizeTooLarge | Code::InvalidMessageSize | Code::MessageBatchTooLarge => {
            Some(Poison::TooLarge { topic, bytes: None, limit_bytes: None })
        }
        Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition => {
            Some(Poison::UnknownTopic { topic, partition: None })
        }
        Code::TopicAuthorizationFailed => Some(Poison::Unauthorized { topic }),
        Code::InvalidRecord | Code::InvalidTimestamp | Code::PolicyViolation => {
            Some(Poison::Refused { topic, why: code.to_string() })
        }
        _ => None,
    }
}

/// The session's end because of a record that was not delivered.
pub(super) fn refused(failed: &Failed) -> Error {
    let Failed { code, topic, identity } = failed;
    if let (Some(identity), Some(poison)) = (identity, poison(*code, topic)) {
        let what = format!(
            "Kafka does not take change {} of commit {}: {poison}",
            identity.seq, identity.commit_lsn
        );
        return Error::new(Kind::RecordRefused, what).poison(*identity, poison);
    }
    let halted = |why: String, hint: &str| Error::new(Kind::Halted, why).hint(hint);
    match code {
        // One of the relay's own records.
        Code::TopicAuthorizationFailed => {
            let hint = "grant READ, WRITE and DESCRIBE_CONFIGS on the relay's own topics, then start again";
            halted(format!("Kafka does not allow us to write to topic {topic}"), hint)
        }
        Code::UnknownTopic | Code::UnknownTopicOrPartition => {
            halted(format!("topic {topic} does not exist"), "`cdc-relay init` creates the relay's own topics")
        }
        // The producer's own id is refused, before any record.
        Code::ClusterAuthorizationFailed => Error::new(
            Kind::Refused,
            format!("Kafka does not allow us to write to any topic, nor idempotently: {code}"),
        )
        .hint(
            "grant WRITE on the topics (kafka-acls.sh --add --producer --topic … --allow-principal User:…), and before Kafka 2.8 \
             IDEMPOTENT_WRITE on the cluster",
        ),
        Code::InvalidConfig
        | Code::InvalidRequiredAcks
        | Code::UnsupportedForMessageFormat
        | Code::UnsupportedCompressionType => halted(
            format!("Kafka refuses records for topic {topic} for good: {code}"),
            "mend the topic's configuration or kafka.properties; the broker's log may say more",
        ),
        code if is_fenced(*code) => fenced(None),
        Code::Inconsistent => Error::new(
            Kind::DeliveryFailed,
            format!("Kafka has not said that it has a record for topic {topic:?}, only one behind it"),
        ),
        _ => Error::new(
            Kind::DeliveryFailed,
            format!("Kafka did not take a record for topic {topic:?}: {code}"),
        ),
    }
}

/// The session's end because of a batch of several records: which of them is why shows itself in smaller ones.
pub(super) fn batch_refused(failed: &Failed) -> Error {
    let Failed { code, topic, .. } = failed;
    match poison(*code, topic) {
        Some(Poison::TooLarge { .. }) => Error::new(
            Kind::BatchTooLarge,
            "Kafka refused a batch as larger than its topic's max.message.bytes; going on with smaller ones. Set \
             kafka.properties.\"batch.size\" below that limit to avoid this",
        ),
        Some(Poison::Refused { .. }) => {
            let what = format!(
                "topic {topic:?} refused a batch: {code}; going on with single records to find which is why"
            );
            Error::new(Kind::BatchRefused, what)
        }
        _ => refused(failed),
    }
}

//! A topic read from its beginning to its end, without a consumer group.

use std::{collections::HashSet, time::Duration};

use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::{KafkaError, RDKafkaErrorCode},
    message::BorrowedMessage,
    types::RDKafkaRespErr,
};

use super::client::{Quiet, not_taken, reader_config};
use crate::{
    config::KafkaConfig,
    error::{Error, Kind},
};

/// How long one wait may last; a stop waits as long.
const POLL: Duration = Duration::from_millis(100);
const METADATA_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a topic must be reported missing before that is believed: a broker may be a moment behind.
const MISSING_TRIES: u32 = 3;

/// Hands every record of a topic to `take`, partition by partition in order, until its present end. Waits for
/// Kafka as long as `patience`, asked every now and then, is Ok. False when the topic does not exist.
///
/// # Errors
/// [`Kind::Refused`] when we may not read; what `patience` says.
pub(crate) fn read_to_end(
    config: &KafkaConfig,
    topic: &str,
    patience: &dyn Fn() -> Result<(), Error>,
    mut take: impl FnMut(&BorrowedMessage<'_>),
) -> Result<bool, Error> {
    let consumer: BaseConsumer<Quiet> =
        reader_config(config).create_with_context(Quiet).map_err(|e| not_taken(&e))?;
    let Some(partitions) = partitions(&consumer, topic, patience)? else { return Ok(false) };
    let mut list = TopicPartitionList::new();
    for partition in &partitions {
        // Cannot fail: the offset is a legal one.
        let _ = list.add_partition_offset(topic, *partition, Offset::Beginning);
    }
    consumer.assign(&list).map_err(|e| Error::new(Kind::Internal, format!("cannot read {topic}: {e}")))?;
    let mut open: HashSet<i32> = partitions.into_iter().collect();
    while !open.is_empty() {
        patience()?;
        match consumer.poll(POLL) {
            None => {}
            Some(Ok(message)) => take(&message),
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                open.remove(&partition);
            }
            Some(Err(error)) => {
                if error.rdkafka_error_code() == Some(RDKafkaErrorCode::TopicAuthorizationFailed) {
                    return Err(not_allowed(topic));
                }
                // Brokers that are away come back; the group that we do not use may be refused.
                tracing::debug!("reading {topic}: {error}");
            }
        }
    }
    Ok(true)
}

fn partitions(
    consumer: &BaseConsumer<Quiet>,
    topic: &str,
    patience: &dyn Fn() -> Result<(), Error>,
) -> Result<Option<Vec<i32>>, Error> {
    let mut missing = 0;
    loop {
        patience()?;
        let Ok(metadata) = consumer.fetch_metadata(Some(topic), METADATA_TIMEOUT) else { continue };
        let Some(found) = metadata.topics().iter().find(|t| t.name() == topic) else { continue };
        match found.error() {
            None => {
                return Ok(Some(
                    found.partitions().iter().map(rdkafka::metadata::MetadataPartition::id).collect(),
                ));
            }
            Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART) => missing += 1,
            Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED) => {
                return Err(not_allowed(topic));
            }
            Some(_) => {}
        }
        if missing >= MISSING_TRIES {
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
}

fn not_allowed(topic: &str) -> Error {
    Error::new(Kind::Refused, format!("Kafka does not allow us to read topic {topic}")).hint(format!(
        "grant it (kafka-acls.sh --add --operation Read --topic {topic} --allow-principal User:…), then start again"
    ))
}

//! Dead letters: a record that can never be applied goes to `<topic>-dlq` as it was, with headers that say why.
//!
//! | header | value |
//! |---|---|
//! | `dlq.reason` | one word, see [`Reason`](crate::decide::Reason) |
//! | `dlq.error` | for a person, at most 1000 bytes |
//! | `dlq.attempts` | how often it was tried |
//! | `dlq.topic`, `dlq.partition`, `dlq.offset` | where it was |
//! | `dlq.group` | who could not use it |
//! | `dlq.at` | when, RFC 3339 |
//! | `dlq.value_omitted` | only if the broker takes no record that large: the bytes of the value left out |

use std::sync::{Mutex, PoisonError};

use rdkafka::{
    ClientConfig, ClientContext, Message,
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
    message::{BorrowedHeaders, BorrowedMessage, Header, OwnedHeaders},
    producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer},
};
use service::Failure;

use crate::{
    config::KafkaConfig,
    decide::{Cause, Fault, Poison},
    group,
    noise::Noise,
};

/// The longest `dlq.error`, so that the headers stay small.
const ERROR_BYTES_MAX: usize = 1000;

/// A record on its way to the dead-letter topic.
pub(crate) struct Letter<'m> {
    pub(crate) record: &'m BorrowedMessage<'m>,
    pub(crate) poison: Poison,
    pub(crate) attempts: u32,
    /// The broker refused the whole: send it without its value.
    without_value: bool,
}

impl<'m> Letter<'m> {
    pub(crate) fn new(record: &'m BorrowedMessage<'m>, poison: Poison, attempts: u32) -> Self {
        Self { record, poison, attempts, without_value: false }
    }
}

/// Writes dead letters.
pub(crate) struct DeadLetters {
    config: ClientConfig,
    producer: Mutex<FutureProducer<Context>>,
    group: String,
}

/// Passes librdkafka's log lines on, without the noise.
#[derive(Clone)]
pub(crate) struct Context(std::sync::Arc<Noise>);

impl ClientContext for Context {
    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, facility: &str, message: &str) {
        self.0.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.0.error(&error, reason);
    }
}

impl DeadLetters {
    pub(crate) fn new(kafka: &KafkaConfig) -> Result<Self, Failure> {
        let mut config = group::connection(kafka);
        config
            .set("acks", "all")
            .set("enable.idempotence", "true")
            .set("compression.type", "zstd")
            .set("linger.ms", "5")
            // After this the batch's loop tries again: a partition waits, nothing is lost.
            .set("message.timeout.ms", "15000")
            // How long a topic may be unknown before we say so.
            .set("topic.metadata.propagation.max.ms", "5000")
            // The broker decides how large a record may be, not the client.
            .set("message.max.bytes", "1000000000")
            .set("partitioner", "murmur2_random");
        let producer = create(&config).map_err(|e| group::bad_client(&e))?;
        Ok(Self { config, producer: Mutex::new(producer), group: kafka.group.clone() })
    }

    /// Sends the letters, waits for each to be acknowledged by all replicas in sync, and gives back those that
    /// were not, to be sent again, with the last reason why.
    pub(crate) async fn send<'m>(&self, letters: Vec<Letter<'m>>) -> (Vec<Letter<'m>>, Option<Fault>) {
        let producer = match self.producer() {
            Ok(producer) => producer,
            Err(e) => return (letters, Some(around(&e, ""))),
        };
        let sent: Vec<(Letter<'m>, KafkaResult<DeliveryFuture>)> = letters
            .into_iter()
            .map(|letter| {
                let delivery = self.enqueue(&producer, &letter);
                (letter, delivery)
            })
            .collect();
        let (mut unsent, mut fault) = (Vec::new(), None);
        for (mut letter, delivery) in sent {
            let outcome = match delivery {
                // The future fails only if the producer is destroyed before the report.
                Ok(future) => {
                    future.await.map_or(Err(KafkaError::Canceled), |r| r.map(|_| ()).map_err(|(e, _)| e))
                }
                Err(e) => Err(e),
            };
            let Err(error) = outcome else { continue };
            let too_large = error.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageSizeTooLarge);
            letter.without_value |= too_large;
            fault = Some(around(&error, letter.record.topic()));
            unsent.push(letter);
        }
        (unsent, fault)
    }

    fn enqueue(
        &self,
        producer: &FutureProducer<Context>,
        letter: &Letter<'_>,
    ) -> KafkaResult<DeliveryFuture> {
        let topic = topic_of(letter.record.topic());
        let mut record: FutureRecord<'_, [u8], [u8]> =
            FutureRecord::to(&topic).headers(headers(letter, &self.group));
        record.key = letter.record.key();
        record.payload = letter.record.payload().filter(|_| !letter.without_value);
        producer.send_result(record).map_err(|(e, _)| e)
    }

    /// The producer; a new one if the old met an error that an idempotent producer does not survive.
    fn producer(&self) -> KafkaResult<FutureProducer<Context>> {
        let mut producer = self.producer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((code, reason)) = producer.client().fatal_error() {
            tracing::warn!(%code, reason, "the producer of dead letters failed for good, making a new one");
            *producer = create(&self.config)?;
        }
        Ok(producer.clone())
    }
}

fn create(config: &ClientConfig) -> KafkaResult<FutureProducer<Context>> {
    config.create_with_context(Context(std::sync::Arc::new(Noise::new("dead letters"))))
}

/// The dead-letter topic of a topic.
pub(crate) fn topic_of(topic: &str) -> String {
    format!("{topic}-dlq")
}

fn headers(letter: &Letter<'_>, group: &str) -> OwnedHeaders {
    let record = letter.record;
    let error = truncate(&letter.poison.error, ERROR_BYTES_MAX);
    let added = [
        ("dlq.reason", letter.poison.reason.as_str().to_owned()),
        ("dlq.error", error.to_owned()),
        ("dlq.attempts", letter.attempts.to_string()),
        ("dlq.topic", record.topic().to_owned()),
        ("dlq.partition", record.partition().to_string()),
        ("dlq.offset", record.offset().to_string()),
        ("dlq.group", group.to_owned()),
        ("dlq.at", chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true)),
    ];
    // Copied as bytes: a header's name need not be UTF-8.
    let original = record.headers().map_or_else(OwnedHeaders::new, BorrowedHeaders::detach);
    let mut headers = added.iter().fold(original, |headers, (key, value)| {
        headers.insert(Header { key, value: Some(value.as_bytes()) })
    });
    if letter.without_value {
        let bytes = record.payload_len().to_string();
        headers = headers.insert(Header { key: "dlq.value_omitted", value: Some(&bytes) });
    }
    headers
}

fn around(error: &KafkaError, topic: &str) -> Fault {
    let dlq = topic_of(topic);
    let (cause, error) = match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => (
            Cause::DeadLetterTopic,
            format!("the dead-letter topic {dlq} does not exist: create it; until then its partition waits"),
        ),
        Some(RDKafkaErrorCode::TopicAuthorizationFailed) => (
            Cause::DeadLetterTopic,
            format!(
                "Kafka does not let us write to {dlq}: grant WRITE on it; until then its partition waits"
            ),
        ),
        _ => (Cause::Kafka, format!("cannot write to {dlq}: {error}")),
    };
    Fault::Around { cause, error }
}

/// At most `bytes_max` bytes of `text`, cut between characters.
fn truncate(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_cut_between_characters() {
        assert_eq!(truncate("aé", 2), "a");
        assert_eq!(truncate("aé", 3), "aé");
        assert_eq!(truncate("", 3), "");
    }

    #[test]
    fn a_missing_topic_says_which_and_what_to_do() {
        let error = KafkaError::MessageProduction(RDKafkaErrorCode::UnknownTopic);
        let Fault::Around { cause, error } = around(&error, "order-events") else { panic!() };
        assert_eq!(cause, Cause::DeadLetterTopic);
        assert!(error.contains("order-events-dlq") && error.contains("create it"), "{error}");
    }
}

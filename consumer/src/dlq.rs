//! Dead letters: a record that can never be applied goes to `<topic>-dlq` as it was, with headers that say why.
//!
//! | header | value |
//! |---|---|
//! | `dlq.reason` | one word, see [`Reason`](crate::decide::Reason) |
//! | `dlq.error` | for a person, at most 1000 bytes |
//! | `dlq.attempts` | how often it was tried, in all |
//! | `dlq.topic`, `dlq.partition`, `dlq.offset` | where it was |
//! | `dlq.group` | who could not use it |
//! | `dlq.at` | when, RFC 3339 |
//! | `dlq.redrives` | only of one that was redriven: how often |
//! | `dlq.value_omitted` | only if the broker takes no record that large: the bytes of the value left out |

use std::sync::{Mutex, PoisonError};

use rdkafka::{
    ClientConfig, ClientContext,
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
    message::{Header, OwnedHeaders},
    producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer},
};
use service::Failure;

use crate::{
    config::KafkaConfig,
    decide::{Cause, Fault, Poison},
    delivery::Delivery,
    group,
    noise::Noise,
};

/// The longest `dlq.error`, so that the headers stay small.
const ERROR_BYTES_MAX: usize = 1000;

/// A record on its way to the dead-letter topic.
pub(crate) struct Letter<'d, 'm> {
    pub(crate) record: &'d Delivery<'m>,
    pub(crate) poison: Poison,
    /// In all, also before a redrive.
    attempts: i32,
    /// Kafka did not take it the last time.
    repeated: bool,
    /// The broker refused the whole: send it without its value.
    without_value: bool,
}

/// A letter that is in its topic, and where: partition and offset.
pub(crate) type Sent<'d, 'm> = (Letter<'d, 'm>, (i32, i64));

impl<'d, 'm> Letter<'d, 'm> {
    pub(crate) fn new(record: &'d Delivery<'m>, poison: Poison, attempts: i32) -> Self {
        Self { record, poison, attempts, repeated: false, without_value: false }
    }

    /// Whether it was sent before and not taken.
    pub(crate) fn is_repeated(&self) -> bool {
        self.repeated
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

    /// Sends the letters and waits for each to be acknowledged by all replicas in sync. Gives back those that are, those
    /// that are not, to be sent again, and the last reason why.
    pub(crate) async fn send<'d, 'm>(
        &self,
        letters: Vec<Letter<'d, 'm>>,
    ) -> (Vec<Sent<'d, 'm>>, Vec<Letter<'d, 'm>>, Option<Fault>) {
        let producer = match self.producer() {
            Ok(producer) => producer,
            Err(e) => return (Vec::new(), letters, Some(around(&e, ""))),
        };
        let under_way: Vec<(Letter<'d, 'm>, KafkaResult<DeliveryFuture>)> = letters
            .into_iter()
            .map(|letter| {
                let delivery = self.enqueue(&producer, &letter);
                (letter, delivery)
            })
            .collect();
        let (mut sent, mut unsent, mut fault) = (Vec::new(), Vec::new(), None);
        for (mut letter, delivery) in under_way {
            let outcome = match delivery {
                // The future fails only if the producer is destroyed before the report.
                Ok(future) => future
                    .await
                    .map_or(Err(KafkaError::Canceled), |report| report.map_err(|(error, _)| error)),
                Err(e) => Err(e),
            };
            match outcome {
                Ok(delivered) => sent.push((letter, (delivered.partition, delivered.offset))),
                Err(error) => {
                    let too_large = error.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageSizeTooLarge);
                    letter.without_value |= too_large;
                    letter.repeated = true;
                    fault = Some(around(&error, letter.record.place().topic));
                    unsent.push(letter);
                }
            }
        }
        (sent, unsent, fault)
    }

    fn enqueue(
        &self,
        producer: &FutureProducer<Context>,
        letter: &Letter<'_, '_>,
    ) -> KafkaResult<DeliveryFuture> {
        let topic = topic_of(letter.record.place().topic);
        let mut record: FutureRecord<'_, [u8], [u8]> =
            FutureRecord::to(&topic).headers(headers(letter, &self.group));
        record.key = letter.record.key();
        record.payload = letter.record.value().filter(|_| !letter.without_value);
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

fn headers(letter: &Letter<'_, '_>, group: &str) -> OwnedHeaders {
    let place = letter.record.place();
    let error = truncate(&letter.poison.error, ERROR_BYTES_MAX);
    let added = [
        ("dlq.reason", letter.poison.reason.as_str().to_owned()),
        ("dlq.error", error.to_owned()),
        ("dlq.attempts", letter.attempts.to_string()),
        ("dlq.topic", place.topic.to_owned()),
        ("dlq.partition", place.partition.to_string()),
        ("dlq.offset", place.offset.to_string()),
        ("dlq.group", group.to_owned()),
        ("dlq.at", chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true)),
    ];
    let mut headers = added.iter().fold(letter.record.headers(), |headers, (key, value)| {
        headers.insert(Header { key, value: Some(value.as_bytes()) })
    });
    if letter.record.redrive() > 0 {
        let redrives = letter.record.redrive().to_string();
        headers = headers.insert(Header { key: "dlq.redrives", value: Some(&redrives) });
    }
    if letter.without_value {
        let bytes = letter.record.value().map_or(0, <[u8]>::len).to_string();
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

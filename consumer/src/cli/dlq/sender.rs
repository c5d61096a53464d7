//! Sends letters to the group's own topic.

use rdkafka::{
    Message,
    error::{KafkaError, RDKafkaErrorCode},
    producer::{DeliveryFuture, FutureProducer, FutureRecord},
};
use service::{Failure, exit::Kind};

use super::copy::Copy;
use crate::{
    cluster::Quiet,
    config::KafkaConfig,
    delivery::redrive_topic,
    group,
    ledger::Letter,
    redrive::{self, Action},
};

/// What may be under way at once.
const RECORDS_LIMIT: usize = 100;
const BYTES_LIMIT: usize = 16 << 20;

/// A producer, and what it has under way.
pub(super) struct Sender {
    producer: FutureProducer<Quiet>,
    topic: String,
    /// Each with what the caller knows it by.
    under_way: Vec<(usize, DeliveryFuture)>,
    bytes: usize,
}

impl Sender {
    pub(super) fn new(kafka: &KafkaConfig) -> Result<Self, Failure> {
        let mut config = group::connection(kafka);
        config
            .set("acks", "all")
            .set("enable.idempotence", "true")
            .set("compression.type", "zstd")
            .set("linger.ms", "1")
            .set("message.timeout.ms", "15000")
            // The broker decides how large a record may be, not the client.
            .set("message.max.bytes", "1000000000")
            .set("partitioner", "murmur2_random");
        let producer = config.create_with_context(Quiet::default()).map_err(|e| group::bad_client(&e))?;
        let topic = redrive_topic(&kafka.group);
        Ok(Self { producer, topic, under_way: Vec::new(), bytes: 0 })
    }

    /// Whether [`Self::finish`] comes first.
    pub(super) fn is_full(&self) -> bool {
        self.under_way.len() >= RECORDS_LIMIT || self.bytes >= BYTES_LIMIT
    }

    /// Sends a letter, with what there is of its record: nothing for one that is to be discarded.
    pub(super) fn send(
        &mut self,
        name: usize,
        letter: &Letter,
        copy: Option<&Copy>,
        number: i32,
        action: Action,
    ) -> Result<(), Failure> {
        let original = copy.and_then(|copy| copy.headers.as_deref()).unwrap_or_default();
        let place = (letter.place.topic.as_str(), letter.place.partition, letter.place.offset);
        let headers = redrive::headers(original, place, number, action);
        let mut record: FutureRecord<'_, [u8], [u8]> = FutureRecord::to(&self.topic).headers(headers);
        record.key = letter.key.as_deref();
        record.payload = copy.and_then(|copy| copy.record.payload());
        record.timestamp = letter.written_at.map(|at| at.timestamp_millis());
        self.bytes += record.payload.map_or(0, <[u8]>::len);
        let delivery = self.producer.send_result(record).map_err(|(e, _)| self.failure(&e))?;
        self.under_way.push((name, delivery));
        Ok(())
    }

    /// Waits until all that was sent is acknowledged, and gives back what is too large for the topic.
    ///
    /// # Errors
    /// When Kafka takes no more.
    pub(super) async fn finish(&mut self) -> Result<Vec<usize>, Failure> {
        let (mut too_large, mut failure) = (Vec::new(), None);
        self.bytes = 0;
        for (name, delivery) in std::mem::take(&mut self.under_way) {
            // The future fails only if the producer is destroyed before the report.
            let outcome = delivery.await.map_or(Err(KafkaError::Canceled), |r| r.map_err(|(e, _)| e));
            match outcome {
                Ok(_) => {}
                Err(e) if e.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageSizeTooLarge) => {
                    too_large.push(name);
                }
                Err(e) => failure = Some(self.failure(&e)),
            }
        }
        failure.map_or(Ok(too_large), Err)
    }

    fn failure(&self, error: &KafkaError) -> Failure {
        let kind = match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::TopicAuthorizationFailed) => Kind::Refused,
            _ => Kind::GaveUp,
        };
        Failure::new(kind, format!("cannot write to {}: {error}", self.topic))
            .hint("nothing is lost: what is still open can be sent once more")
    }
}

//! A partition read backwards from its end, a few records at first and then more at a time, without a consumer group.

use std::time::Duration;

use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::{KafkaError, RDKafkaErrorCode},
    message::BorrowedMessage,
};

use super::{
    client::{Quiet, not_taken, reader_config, watermarks},
    history::{POLL, Patience, QUEUED_KIB, not_allowed},
};
use crate::{
    config::KafkaConfig,
    error::{Error, Kind},
};

/// How long a broker may take to answer one question.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(5);
/// How many offsets the first window has, and the most that one has; each has four times those of the one before.
const FIRST_OFFSETS: i64 = 512;
const MOST_OFFSETS: i64 = 65_536;

/// Reads committed records only.
pub(crate) struct Tails {
    consumer: BaseConsumer<Quiet>,
}

impl Tails {
    pub(crate) fn open(config: &KafkaConfig) -> Result<Self, Error> {
        let mut client = reader_config(config);
        client.set("queued.max.messages.kbytes", QUEUED_KIB);
        // Where a window's beginning was deleted meanwhile, it begins later.
        client.set("auto.offset.reset", "earliest");
        let consumer = client.create_with_context(Quiet).map_err(|e| not_taken(&e))?;
        Ok(Self { consumer })
    }

    /// Every topic that we may know of, with its partitions.
    ///
    /// # Errors
    /// What `patience` says.
    pub(crate) fn topics(&self, patience: Patience<'_>) -> Result<Vec<(String, Vec<i32>)>, Error> {
        loop {
            patience()?;
            let Ok(metadata) = self.consumer.fetch_metadata(None, QUESTION_TIMEOUT) else { continue };
            let topics = metadata.topics().iter();
            let found = topics.map(|topic| {
                let partitions = topic.partitions().iter().map(rdkafka::metadata::MetadataPartition::id);
                (topic.name().to_owned(), partitions.collect())
            });
            return Ok(found.collect());
        }
    }

    /// The partition as it is now.
    ///
    /// # Errors
    /// What `patience` says.
    pub(crate) fn tail<'a>(
        &'a self,
        topic: &'a str,
        partition: i32,
        patience: Patience<'a>,
    ) -> Result<Tail<'a>, Error> {
        loop {
            patience()?;
            if let Ok((low, high)) = watermarks(&self.consumer, topic, partition, QUESTION_TIMEOUT) {
                let step = FIRST_OFFSETS;
                return Ok(Tail {
                    consumer: &self.consumer,
                    topic,
                    partition,
                    patience,
                    low,
                    end: high,
                    step,
                });
            }
        }
    }
}

/// One partition that is being read.
pub(crate) struct Tail<'a> {
    consumer: &'a BaseConsumer<Quiet>,
    topic: &'a str,
    partition: i32,
    patience: Patience<'a>,
    /// The first offset that is there.
    low: i64,
    /// Everything from here on was read.
    end: i64,
    /// How many offsets the next window has.
    step: i64,
}

impl Tail<'_> {
    /// Hands the records of the window before the last one to `take`, in their order; false where there are no more.
    ///
    /// # Errors
    /// [`Kind::Refused`] when we may not read; what the patience says.
    pub(crate) fn window(&mut self, mut take: impl FnMut(&BorrowedMessage<'_>)) -> Result<bool, Error> {
        if self.end <= self.low {
            return Ok(false);
        }
        let from = (self.end - self.step).max(self.low);
        let mut list = TopicPartitionList::new();
        // Cannot fail: the offset is a legal one.
        let _ = list.add_partition_offset(self.topic, self.partition, Offset::Offset(from));
        let cannot = |e| Error::new(Kind::Internal, format!("cannot read {}: {e}", self.topic));
        self.consumer.assign(&list).map_err(cannot)?;
        loop {
            (self.patience)()?;
            match self.consumer.poll(POLL) {
                None => {}
                Some(Ok(message)) if message.offset() >= self.end => break,
                Some(Ok(message)) => take(&message),
                Some(Err(KafkaError::PartitionEOF(_))) => break,
                Some(Err(e))
                    if e.rdkafka_error_code() == Some(RDKafkaErrorCode::TopicAuthorizationFailed) =>
                {
                    return Err(not_allowed(self.topic));
                }
                Some(Err(e)) => tracing::debug!("reading {}: {e}", self.topic),
            }
        }
        self.end = from;
        self.step = (self.step * 4).min(MOST_OFFSETS);
        Ok(true)
    }
}

//! What is in a relay's topic, as those see it who read it.

use std::{collections::BTreeSet, sync::Arc};

use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
};

use super::relay::END_LIMIT;
use crate::{
    failure::{Explain, Failure, Result},
    topics::{self, Quiet},
};

/// How many partitions the relay's topic has.
pub(super) const PARTITIONS: i32 = 3;

/// A topic and two readers of it: one to whom everything counts, and one to whom only what is committed does. All
/// of the methods wait for the broker.
#[derive(Clone)]
pub(super) struct Contents {
    topic: String,
    written: Arc<BaseConsumer<Quiet>>,
    committed: Arc<BaseConsumer<Quiet>>,
}

impl Contents {
    pub(super) fn of(bootstrap: &str, topic: &str) -> Result<Self> {
        let reader = |isolation: &str| {
            let mut config = topics::client(bootstrap);
            config.set("group.id", "bench").set("enable.auto.commit", "false");
            config.set("isolation.level", isolation).set("enable.partition.eof", "true");
            let made = config.create_with_context(Quiet).explain(|| "make a Kafka client".to_owned());
            made.map(Arc::new)
        };
        let (written, committed) = (reader("read_uncommitted")?, reader("read_committed")?);
        Ok(Self { topic: topic.to_owned(), written, committed })
    }

    /// How many offsets are taken: by records, and by the ends of transactions where there are any.
    pub(super) fn offsets(&self) -> Result<u64> {
        (0..PARTITIONS).try_fold(0, |sum, partition| {
            let (low, high) = self.bounds(&self.written, partition)?;
            Ok(sum + u64::try_from(high - low).unwrap_or(0))
        })
    }

    /// Whether a reader of committed records sees all that was there when this was asked.
    pub(super) fn is_committed(&self) -> Result<bool> {
        for partition in 0..PARTITIONS {
            // In this order: what is added in between may be committed or not.
            let (_, written) = self.bounds(&self.written, partition)?;
            let (_, committed) = self.bounds(&self.committed, partition)?;
            if committed < written {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn bounds(&self, reader: &BaseConsumer<Quiet>, partition: i32) -> Result<(i64, i64)> {
        let bounds = reader.fetch_watermarks(&self.topic, partition, END_LIMIT);
        bounds.explain(|| format!("ask for the records of {}", self.topic))
    }

    /// Reads all committed records, and counts them.
    pub(super) fn committed_records(&self) -> Result<u64> {
        let reader = self.read_committed()?;
        let (mut count, mut ended) = (0, BTreeSet::new());
        while (0..PARTITIONS).any(|partition| !ended.contains(&partition)) {
            match reader.poll(END_LIMIT) {
                Some(Ok(_)) => count += 1,
                Some(Err(KafkaError::PartitionEOF(partition))) => drop(ended.insert(partition)),
                Some(Err(error)) => return Err(Failure::new(format!("read {}: {error}", self.topic))),
                None => return Err(Failure::new(format!("the records of {} do not come", self.topic))),
            }
        }
        Ok(count)
    }

    /// The reader of committed records, at the beginning of each partition.
    pub(super) fn read_committed(&self) -> Result<&BaseConsumer<Quiet>> {
        let mut partitions = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            let added = partitions.add_partition_offset(&self.topic, partition, Offset::Beginning);
            added.explain(|| format!("read {}", self.topic))?;
        }
        self.committed.assign(&partitions).explain(|| format!("read {}", self.topic))?;
        Ok(&self.committed)
    }
}

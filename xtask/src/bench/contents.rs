//! What is in a relay's topic, as those see it who read it.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use rdkafka::{
    Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    message::Headers,
};
use serde::Serialize;
use uuid::Uuid;

use super::{publisher::END_LIMIT, workload::Outbox};
use crate::{
    failure::{Explain, Failure, Result},
    topics::{self, Quiet},
};

/// What is wrong with a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(super) struct Loss {
    /// Rows without a record.
    pub(super) missing: u64,
    /// Records of rows that have one already.
    pub(super) duplicates: u64,
    /// First records of a partition that come behind one of a later row.
    pub(super) out_of_order: u64,
    /// Records of no row.
    pub(super) foreign: u64,
}

impl Loss {
    /// How much is lost, in disorder or made up.
    pub(super) fn lost(self) -> u64 {
        self.missing + self.out_of_order + self.foreign
    }
}

/// Compares records, as they come, with the rows.
struct Tally<'a> {
    outbox: &'a Outbox,
    seen: Vec<bool>,
    /// The last row of each partition. What publishes in the order of commits has them in order there, whatever their keys.
    last: HashMap<i32, u32>,
    loss: Loss,
}

impl<'a> Tally<'a> {
    fn new(outbox: &'a Outbox) -> Self {
        Self { outbox, seen: vec![false; outbox.len()], last: HashMap::new(), loss: Loss::default() }
    }

    fn take(&mut self, id: &[u8], partition: i32) {
        // Debezium Server writes it as JSON.
        let id = std::str::from_utf8(id).ok().map(|id| id.trim_matches('"'));
        let place = id.and_then(|id| self.outbox.place(id.parse::<Uuid>().ok()?.as_u128()));
        let seen = place.and_then(|place| self.seen.get_mut(usize::try_from(place).ok()?));
        let (Some(place), Some(seen)) = (place, seen) else {
            self.loss.foreign += 1;
            return;
        };
        if std::mem::replace(seen, true) {
            self.loss.duplicates += 1;
            return;
        }
        let last = self.last.entry(partition).or_default();
        self.loss.out_of_order += u64::from(*last > place);
        *last = place.max(*last);
    }

    fn loss(self) -> Loss {
        Loss { missing: self.seen.iter().filter(|seen| !**seen).count() as u64, ..self.loss }
    }
}

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

    /// Reads all committed records, and compares them with the rows.
    pub(super) fn compare(&self, outbox: &Outbox) -> Result<Loss> {
        let reader = self.read_committed()?;
        let mut tally = Tally::new(outbox);
        let mut ended = BTreeSet::new();
        while (0..PARTITIONS).any(|partition| !ended.contains(&partition)) {
            match reader.poll(END_LIMIT) {
                Some(Ok(record)) => {
                    let headers = record.headers();
                    let id = headers.and_then(|all| all.iter().find(|h| h.key == "id")?.value);
                    tally.take(id.unwrap_or_default(), record.partition());
                }
                Some(Err(KafkaError::PartitionEOF(partition))) => drop(ended.insert(partition)),
                Some(Err(error)) => return Err(Failure::new(format!("read {}: {error}", self.topic))),
                None => return Err(Failure::new(format!("the records of {} do not come", self.topic))),
            }
        }
        Ok(tally.loss())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_there_twice_out_of_order_or_nobodys_is_counted() {
        let ids: Vec<Uuid> = (1..=5).map(Uuid::from_u128).collect();
        let outbox = Outbox::of(ids.iter().map(Uuid::as_u128));
        let mut tally = Tally::new(&outbox);
        let mut take = |id: usize, partition| tally.take(ids[id].to_string().as_bytes(), partition);
        for (id, partition) in [(0, 0), (2, 1), (1, 1), (0, 0), (3, 0)] {
            take(id, partition);
        }
        tally.take(b"\"00000000-0000-0000-0000-000000000009\"", 0);
        tally.take(b"x", 0);
        let loss = tally.loss();
        assert_eq!(loss, Loss { missing: 1, duplicates: 1, out_of_order: 1, foreign: 2 });
        let mut quoted = Tally::new(&outbox);
        quoted.take(format!("{:?}", ids[4].to_string()).as_bytes(), 0);
        assert_eq!(quoted.loss(), Loss { missing: 4, ..Loss::default() }, "as JSON, too");
    }
}

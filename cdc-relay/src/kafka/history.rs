//! A topic read from its beginning to its end, or record by record, without a consumer group.

use std::{collections::BTreeMap, time::Duration};

use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, OwnedMessage},
    types::RDKafkaRespErr,
};

use super::{
    client::{Quiet, not_taken, reader_config, watermarks},
    partition::Partitioner,
};
use crate::{
    config::KafkaConfig,
    error::{Error, Kind},
};

/// How long one wait may last; a stop waits as long.
pub(super) const POLL: Duration = Duration::from_millis(100);
const METADATA_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a topic must be reported missing before that is believed: a broker may be a moment behind.
const MISSING_TRIES: u32 = 3;

/// What the consumer holds of a topic that is not handed out yet, in KiB; one message may exceed it.
pub(super) const QUEUED_KIB: &str = "4096";
/// A record so many offsets ahead is read up to; one further away is jumped to.
const READ_ON_OFFSETS: i64 = 1000;

/// Err when it is no use to wait any longer.
pub(crate) type Patience<'a> = &'a dyn Fn() -> Result<(), Error>;

/// A topic that is being read. Waits for Kafka as long as the patience that is asked every now and then is Ok.
pub(crate) struct History {
    consumer: BaseConsumer<Quiet>,
    /// Sees what is in open transactions, too.
    uncommitted: BaseConsumer<Quiet>,
    topic: String,
    partitioner: Partitioner,
    /// The next offset of each partition.
    next: BTreeMap<i32, Offset>,
    /// Where [`fetch`](Self::fetch) is: partition and next offset.
    cursor: Option<(i32, i64)>,
}

impl History {
    /// None when the topic does not exist.
    ///
    /// # Errors
    /// [`Kind::Refused`] when we may not read; what `patience` says.
    pub(crate) fn open(
        config: &KafkaConfig,
        topic: &str,
        patience: Patience<'_>,
    ) -> Result<Option<Self>, Error> {
        let mut client = reader_config(config);
        client.set("queued.max.messages.kbytes", QUEUED_KIB);
        let consumer: BaseConsumer<Quiet> = client.create_with_context(Quiet).map_err(|e| not_taken(&e))?;
        client.set("isolation.level", "read_uncommitted");
        let uncommitted = client.create_with_context(Quiet).map_err(|e| not_taken(&e))?;
        let Some(partitions) = partitions(&consumer, topic, patience)? else { return Ok(None) };
        let next = partitions.into_iter().map(|partition| (partition, Offset::Beginning)).collect();
        let (topic, partitioner) = (topic.to_owned(), Partitioner::of(config));
        Ok(Some(Self { consumer, uncommitted, topic, partitioner, next, cursor: None }))
    }

    /// The topic's partitions, as they were when it was opened.
    pub(crate) fn partitions(&self) -> Vec<i32> {
        self.next.keys().copied().collect()
    }

    /// Which of its partitions the relay's producer chooses for a key; None where the key decides nothing.
    pub(crate) fn partition_of(&self) -> impl Fn(Option<&[u8]>) -> Option<i32> + use<> {
        let (partitioner, count) = (self.partitioner, i32::try_from(self.next.len()).unwrap_or(0));
        move |key| partitioner.partition(key, count)
    }

    /// Hands every record that was not handed out yet to `take`, partition by partition in order, until the present
    /// end of the topic. What is in transactions that are open now is waited for.
    ///
    /// # Errors
    /// As [`open`](Self::open), and what `take` says.
    pub(crate) fn read_on(
        &mut self,
        patience: Patience<'_>,
        mut take: impl FnMut(&BorrowedMessage<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.cursor = None;
        let mut ends = self.wait_for_transactions(patience)?;
        self.assign(self.next.iter().map(|(partition, offset)| (*partition, *offset)))?;
        while !ends.is_empty() {
            patience()?;
            match self.consumer.poll(POLL) {
                None => {}
                Some(Ok(message)) => {
                    take(&message)?;
                    self.next.insert(message.partition(), Offset::Offset(message.offset() + 1));
                }
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    let Some(end) = ends.get_mut(&partition) else { continue };
                    if self.is_at(end, partition, patience)? {
                        ends.remove(&partition);
                    } else {
                        std::thread::sleep(POLL);
                        // The end is told once only, unless the consumer begins anew.
                        self.assign(ends.keys().map(|partition| (*partition, self.next[partition])))?;
                    }
                }
                Some(Err(error)) => self.look_at(&error)?,
            }
        }
        Ok(())
    }

    /// Whether the consumer, which was told that the partition ends where it is, has reached the end that was asked for.
    ///
    /// A broker that has just become the leader, or one that only follows, does not know yet how far its records are
    /// committed, and tells of an end before that. Asked where the end is, it gives none until it knows (KIP-207). Then the
    /// end may come earlier than before: records were deleted, or lost together with the brokers that had them.
    fn is_at(&self, end: &mut i64, partition: i32, patience: Patience<'_>) -> Result<bool, Error> {
        let place = self.place(partition);
        if place >= *end {
            return Ok(true);
        }
        let (beginning, now) = self.watermarks(&self.consumer, partition, patience)?;
        *end = now.min(*end);
        let is_at = place.max(beginning) >= *end;
        if !is_at {
            tracing::debug!("{} [{partition}] is read to {place} and ends at {end}: reading on", self.topic);
        }
        Ok(is_at)
    }

    /// The offset that comes next; below 0 when nothing came. The consumer counts control records, which are not handed out.
    fn place(&self, partition: i32) -> i64 {
        let position = self.consumer.position().ok();
        let position = position.as_ref().and_then(|all| all.find_partition(&self.topic, partition));
        let position = position.and_then(|found| found.offset().to_raw());
        let handed_out = self.next.get(&partition).and_then(|offset| offset.to_raw());
        position.max(handed_out).unwrap_or(-1)
    }

    /// Waits until what is in the topic now is committed or aborted: behind an open transaction, of whoever, committed
    /// records cannot be read, and the end of what can be read is not the end. Where each partition ends.
    fn wait_for_transactions(&self, patience: Patience<'_>) -> Result<BTreeMap<i32, i64>, Error> {
        let mut ends = BTreeMap::new();
        let end = |consumer: &BaseConsumer<Quiet>, partition| {
            self.watermarks(consumer, partition, patience).map(|(_, end)| end)
        };
        for partition in self.next.keys().copied() {
            let mut written = end(&self.uncommitted, partition)?;
            let mut told = false;
            while end(&self.consumer, partition)? < written {
                if !std::mem::replace(&mut told, true) {
                    tracing::info!(
                        topic = self.topic,
                        "a transaction is open on it: waiting until Kafka, or whoever has it, ends it"
                    );
                }
                std::thread::sleep(POLL);
                // It may have become less: records are lost together with the brokers that had them.
                written = end(&self.uncommitted, partition)?.min(written);
            }
            ends.insert(partition, written);
        }
        Ok(ends)
    }

    /// The first offset of each partition that is not deleted.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub(crate) fn beginnings(&self, patience: Patience<'_>) -> Result<Vec<(i32, i64)>, Error> {
        let beginning = |partition: i32| {
            self.watermarks(&self.consumer, partition, patience).map(|(beginning, _)| (partition, beginning))
        };
        self.next.keys().copied().map(beginning).collect()
    }

    fn watermarks(
        &self,
        consumer: &BaseConsumer<Quiet>,
        partition: i32,
        patience: Patience<'_>,
    ) -> Result<(i64, i64), Error> {
        loop {
            patience()?;
            match watermarks(consumer, &self.topic, partition, METADATA_TIMEOUT) {
                Ok(watermarks) => return Ok(watermarks),
                Err(error) => self.look_at(&error)?,
            }
        }
    }

    /// One record; None when it is not there. Cheap when they are asked for in order.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub(crate) fn fetch(
        &mut self,
        partition: i32,
        offset: i64,
        patience: Patience<'_>,
    ) -> Result<Option<OwnedMessage>, Error> {
        if !self.next.contains_key(&partition) {
            return Ok(None);
        }
        let near =
            |(p, next): (i32, i64)| p == partition && (next..=next + READ_ON_OFFSETS).contains(&offset);
        if !self.cursor.take().is_some_and(near) {
            self.assign([(partition, Offset::Offset(offset))])?;
        }
        loop {
            patience()?;
            match self.consumer.poll(POLL) {
                Some(Ok(message)) if message.offset() < offset => {}
                Some(Ok(message)) if message.offset() == offset => {
                    self.cursor = Some((partition, offset + 1));
                    return Ok(Some(message.detach()));
                }
                Some(Ok(_) | Err(KafkaError::PartitionEOF(_))) => return Ok(None),
                None => {}
                Some(Err(error)) => self.look_at(&error)?,
            }
        }
    }

    fn assign(&self, places: impl IntoIterator<Item = (i32, Offset)>) -> Result<(), Error> {
        let mut list = TopicPartitionList::new();
        for (partition, offset) in places {
            // Cannot fail: the offset is a legal one.
            let _ = list.add_partition_offset(&self.topic, partition, offset);
        }
        let cannot = |e| Error::new(Kind::Internal, format!("cannot read {}: {e}", self.topic));
        self.consumer.assign(&list).map_err(cannot)
    }

    fn look_at(&self, error: &KafkaError) -> Result<(), Error> {
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::TopicAuthorizationFailed) {
            return Err(not_allowed(&self.topic));
        }
        // Brokers that are away come back; the group that we do not use may be refused.
        tracing::debug!("reading {}: {error}", self.topic);
        Ok(())
    }
}

fn partitions(
    consumer: &BaseConsumer<Quiet>,
    topic: &str,
    patience: Patience<'_>,
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

pub(super) fn not_allowed(topic: &str) -> Error {
    Error::new(Kind::Refused, format!("Kafka does not allow us to read topic {topic}")).hint(format!(
        "grant it (kafka-acls.sh --add --operation Read --topic {topic} --allow-principal User:…), then start again"
    ))
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use rdkafka::{
        ClientConfig,
        mocking::MockCluster,
        producer::{BaseProducer, BaseRecord, Producer as _},
        types::RDKafkaApiKey,
    };

    use super::*;

    const TOPIC: &str = "checkpoints";
    const COUNT: i64 = 10;
    /// What the leader takes for the end at first.
    const LAGS: i64 = 5;

    /// A broker that has records, each a batch of its own.
    fn broker() -> (MockCluster<'static, rdkafka::producer::DefaultProducerContext>, KafkaConfig) {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic(TOPIC, 1, 1).unwrap();
        let config = KafkaConfig { brokers: cluster.bootstrap_servers(), ..KafkaConfig::default() };
        let mut producer = ClientConfig::new();
        producer.set("bootstrap.servers", &config.brokers).set("linger.ms", "0");
        let producer: BaseProducer = producer.create().unwrap();
        for n in 0..COUNT {
            producer.send(BaseRecord::to(TOPIC).key("k").payload(&n.to_be_bytes())).unwrap();
            producer.flush(Duration::from_secs(60)).unwrap();
        }
        (cluster, config)
    }

    #[test]
    fn a_leader_that_does_not_know_the_end_yet_is_not_believed() {
        let (cluster, config) = broker();
        // The mocked broker tells of an earlier end where it follows, and of no other one in this version of the request.
        cluster.apiversion(RDKafkaApiKey::Fetch, Some(0), Some(3)).unwrap();
        cluster.partition_follower(TOPIC, 0, 1).unwrap();
        cluster.follower_watermarks(TOPIC, 0, None, Some(LAGS)).unwrap();
        let (seen, asked) = (RefCell::new(Vec::new()), Cell::new(0));
        let patience = || {
            // Asked before the end is told, and after it.
            if seen.borrow().last() == Some(&(LAGS - 1)) {
                asked.set(asked.get() + 1);
            }
            if asked.get() == 2 {
                cluster.follower_watermarks(TOPIC, 0, None, None).unwrap();
            }
            Ok(())
        };
        let mut history = History::open(&config, TOPIC, &patience).unwrap().unwrap();
        let take = |message: &BorrowedMessage<'_>| {
            seen.borrow_mut().push(message.offset());
            Ok(())
        };
        history.read_on(&patience, take).unwrap();
        assert_eq!(*seen.borrow(), (0..COUNT).collect::<Vec<_>>());
        // And nothing more is there.
        history.read_on(&patience, |message| panic!("{} again", message.offset())).unwrap();
    }
}

//! A producer's first record of a partition goes alone.
//!
//! A broker that knows nothing of a producer in a partition takes any sequence number as its first
//! (`ProducerAppendInfo.checkSequence`). Were several records under way and the first of them refused for the moment (too few
//! replicas in sync), the next one could be written before it: out of order, and for good. From the first acknowledgement on the
//! broker holds each record against the one before.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use relay_core::{progress::Ticket, record::Record};

use super::{partition::Partitioner, reports::ticket_of};

/// How long an acknowledgement is relied upon. A broker forgets a producer that is silent in a partition for
/// `producer.id.expiration.ms`, a day by default.
const LASTS: Duration = Duration::from_hours(1);

/// What a record may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Go,
    /// Go as the first of this partition.
    First(usize),
    /// The first record of its partition is on its way.
    Wait,
}

/// What is known of one partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing was sent there.
    Untried,
    /// The first record is on its way.
    Waits,
    /// The broker knows the producer.
    Known,
}

#[derive(Debug, Default)]
struct Partitions {
    states: Vec<State>,
    /// How many are not [`State::Known`].
    unknown: usize,
}

/// The partitions that have acknowledged something to this producer.
#[derive(Debug)]
pub(super) struct Firsts {
    partitioner: Partitioner,
    topics: HashMap<String, Partitions>,
    /// Topics and partitions whose first record is on its way.
    waiting: Vec<(Ticket, String, usize)>,
    since: Instant,
}

impl Firsts {
    pub(super) fn new(partitioner: Partitioner, now: Instant) -> Self {
        Self { partitioner, topics: HashMap::new(), waiting: Vec::new(), since: now }
    }

    /// What a record for a topic of so many partitions may do.
    pub(super) fn turn(&mut self, record: &Record<'_>, partitions: i32) -> Turn {
        let count = usize::try_from(partitions).unwrap_or_default();
        let topic = match self.topics.get_mut(record.topic) {
            Some(topic) => topic,
            None => self.topics.entry(record.topic.to_owned()).or_default(),
        };
        if topic.states.len() < count {
            topic.unknown += count - topic.states.len();
            topic.states.resize(count, State::Untried);
        }
        if topic.unknown == 0 {
            return Turn::Go;
        }
        // Without a key, there is no order to keep.
        let partition = record.partition.or_else(|| self.partitioner.partition(record.key, partitions));
        let Some(partition) = partition.and_then(|p| usize::try_from(p).ok()) else { return Turn::Go };
        match topic.states.get(partition) {
            Some(State::Untried) => Turn::First(partition),
            Some(State::Waits) => Turn::Wait,
            Some(State::Known) | None => Turn::Go,
        }
    }

    /// The first record of a partition is on its way.
    pub(super) fn sent(&mut self, topic: &str, partition: usize, opaque: usize) {
        if let Some(state) = self.topics.get_mut(topic).and_then(|t| t.states.get_mut(partition)) {
            *state = State::Waits;
            self.waiting.push((ticket_of(opaque), topic.to_owned(), partition));
        }
    }

    /// These were acknowledged.
    pub(super) fn acknowledged(&mut self, tickets: &[Ticket]) {
        let Self { waiting, topics, .. } = self;
        waiting.retain(|(ticket, name, partition)| {
            let is_acknowledged = tickets.contains(ticket);
            if is_acknowledged && let Some(topic) = topics.get_mut(name) {
                topic.unknown -= 1;
                topic.states[*partition] = State::Known;
            }
            !is_acknowledged
        });
    }

    /// After a while, what was acknowledged is not relied upon any more.
    pub(super) fn look_at_the_clock(&mut self, now: Instant) {
        if now.saturating_duration_since(self.since) < LASTS {
            return;
        }
        self.since = now;
        for topic in self.topics.values_mut() {
            topic.unknown = topic.states.len();
            for state in topic.states.iter_mut().filter(|state| **state == State::Known) {
                *state = State::Untried;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::{
        Message as _, Offset, TopicPartitionList,
        config::ClientConfig,
        consumer::{BaseConsumer, Consumer as _},
        mocking::MockCluster,
        types::{RDKafkaApiKey, RDKafkaRespErr},
    };
    use relay_core::Outgoing;
    use service::Secret;

    use super::*;
    use crate::{
        admin::Metrics,
        config::KafkaConfig,
        kafka::{Batch, Offer, Producer},
        owned_record::OwnedRecord,
        wait,
    };

    const COUNT: u64 = 40;
    const TOO_FEW: RDKafkaRespErr = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS;

    fn record(key: &str, value: &[u8]) -> OwnedRecord {
        let (key, value) = (Some(key.into()), Some(value.into()));
        OwnedRecord { topic: "orders".into(), key, value, ..OwnedRecord::default() }
    }

    #[test]
    fn what_is_refused_at_first_is_not_overtaken() {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("orders", 1, 1).unwrap();
        // Each request has one record, and several are under way at a time.
        let settings = [("linger.ms", "0"), ("batch.num.messages", "1"), ("retry.backoff.ms", "1")];
        let mut config = KafkaConfig { brokers: cluster.bootstrap_servers(), ..KafkaConfig::default() };
        for (name, value) in settings {
            config.properties.insert(name.into(), Secret::new(value));
        }
        let (waker, wakeups) = wait::pair().unwrap();
        let new = Producer::new(&config, Batch::Configured, waker, Metrics::default(), None);
        let (mut producer, mut acknowledged, mut left) = (new.unwrap(), Vec::new(), COUNT);
        cluster.request_errors(RDKafkaApiKey::Produce, &[TOO_FEW; 3]);
        for n in 0..COUNT {
            let record = record("k", &n.to_be_bytes());
            let outgoing = Outgoing { ticket: Ticket(n), record: record.record(), is_dead_letter: false };
            while producer.offer(&outgoing).unwrap() == Offer::Later {
                wakeups.wait(Duration::from_millis(100));
                producer.take_reports(&mut acknowledged).unwrap();
                left -= acknowledged.len() as u64;
            }
        }
        while left > 0 {
            wakeups.wait(Duration::from_millis(100));
            producer.take_reports(&mut acknowledged).unwrap();
            left -= acknowledged.len() as u64;
        }
        let mut reader = ClientConfig::new();
        reader.set("bootstrap.servers", cluster.bootstrap_servers()).set("group.id", "unused");
        let consumer: BaseConsumer = reader.create().unwrap();
        let mut all = TopicPartitionList::new();
        all.add_partition_offset("orders", 0, Offset::Beginning).unwrap();
        consumer.assign(&all).unwrap();
        for n in 0..COUNT {
            let message = consumer.poll(Duration::from_secs(60)).unwrap().unwrap();
            assert_eq!(message.payload(), Some(&n.to_be_bytes()[..]));
        }
    }

    #[test]
    fn each_partition_has_a_first_one_and_after_a_while_another() {
        let now = Instant::now();
        let mut firsts = Firsts::new(Partitioner::of(&KafkaConfig::default()), now);
        // Kafka's own UtilsTest.testMurmur2 has their hashes: of 2 partitions they take one each.
        let [even, odd] = ["21", "a-little-bit-longer-string"].map(|key| record(key, b""));
        let (even, odd) = (even.record(), odd.record());
        let Turn::First(first) = firsts.turn(&even, 2) else { panic!() };
        // Not sent yet, so it is still the first.
        assert_eq!(firsts.turn(&even, 2), Turn::First(first));
        firsts.sent("orders", first, 7);
        assert_eq!(firsts.turn(&even, 2), Turn::Wait);
        let Turn::First(second) = firsts.turn(&odd, 2) else { panic!() };
        assert_ne!(first, second);
        firsts.sent("orders", second, 8);
        firsts.acknowledged(&[Ticket(6), Ticket(7)]);
        assert_eq!((firsts.turn(&even, 2), firsts.turn(&odd, 2)), (Turn::Go, Turn::Wait));
        // Without a key there is no order.
        assert_eq!(firsts.turn(&Record { key: None, ..odd }, 2), Turn::Go);
        let later = now + LASTS;
        firsts.look_at_the_clock(later);
        assert_eq!((firsts.turn(&even, 2), firsts.turn(&odd, 2)), (Turn::First(first), Turn::Wait));
        firsts.acknowledged(&[Ticket(8)]);
        assert_eq!((firsts.turn(&even, 2), firsts.turn(&odd, 2)), (Turn::First(first), Turn::Go));
        // More partitions: each is new.
        assert_eq!(firsts.turn(&Record { partition: Some(2), ..odd }, 3), Turn::First(2));
    }
}

//! Topics of a test's own, and what is in them.

use std::{collections::BTreeMap, time::Duration};

use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, AlterConfig, NewTopic, ResourceSpecifier, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
    message::{Headers as _, OwnedMessage},
    producer::{BaseProducer, BaseRecord, Producer as _},
};

use crate::database::{Servers, eventually, unique};

/// A topic that the default template gives to rows of the aggregate type `kind`.
pub(crate) struct Topic {
    pub(crate) kind: String,
    pub(crate) name: String,
    partitions: i32,
    brokers: String,
}

impl Topic {
    pub(crate) fn new(partitions: i32, configuration: &[(&str, &str)]) -> Self {
        Self::on(&Servers::shared(), partitions, configuration)
    }

    pub(crate) fn on(servers: &Servers, partitions: i32, configuration: &[(&str, &str)]) -> Self {
        let topic = Self { brokers: servers.kafka.clone(), ..Self::missing(partitions) };
        topic.create(configuration);
        topic
    }

    /// A topic of one partition and that name.
    pub(crate) fn named(name: &str) -> Self {
        let topic = Self { kind: String::new(), name: name.to_owned(), ..Self::missing(1) };
        topic.create(&[]);
        topic
    }

    /// One that does not exist yet.
    pub(crate) fn missing(partitions: i32) -> Self {
        let kind = format!("k{}", unique());
        Self { name: format!("outbox.event.{kind}"), kind, partitions, brokers: Servers::shared().kafka }
    }

    pub(crate) fn create(&self, configuration: &[(&str, &str)]) {
        let mut new = NewTopic::new(&self.name, self.partitions, TopicReplication::Fixed(1));
        for (key, value) in configuration {
            new = new.set(key, value);
        }
        let admin: AdminClient<DefaultClientContext> = client(&self.brokers).create().unwrap();
        let created = runtime().block_on(admin.create_topics([&new], &AdminOptions::new())).unwrap();
        assert!(created.iter().all(Result::is_ok), "{created:?}");
    }

    /// Everything in the topic once there are at least `count` records: partition by partition, in order.
    pub(crate) fn read(&self, count: usize) -> Vec<OwnedMessage> {
        let consumer: BaseConsumer = client(&self.brokers).set("group.id", "none").create().unwrap();
        let mut list = TopicPartitionList::new();
        for partition in 0..self.partitions {
            list.add_partition_offset(&self.name, partition, Offset::Beginning).unwrap();
        }
        consumer.assign(&list).unwrap();
        let mut messages = Vec::new();
        eventually(&format!("{count} records in {}", self.name), || {
            while let Some(message) = consumer.poll(Duration::from_millis(200)) {
                messages.push(message.unwrap().detach());
            }
            (messages.len() >= count).then_some(())
        });
        messages.sort_by_key(|m| (m.partition(), m.offset()));
        messages
    }

    /// Changes one of its settings.
    pub(crate) fn configure(&self, key: &str, value: &str) {
        let admin: AdminClient<DefaultClientContext> = client(&self.brokers).create().unwrap();
        let change = AlterConfig::new(ResourceSpecifier::Topic(&self.name)).set(key, value);
        let altered = runtime().block_on(admin.alter_configs([&change], &AdminOptions::new())).unwrap();
        assert!(altered.iter().all(Result::is_ok), "{altered:?}");
    }

    /// How many records there are at the moment.
    pub(crate) fn size(&self) -> i64 {
        let consumer: BaseConsumer = client(&self.brokers).create().unwrap();
        let marks = |p| consumer.fetch_watermarks(&self.name, p, Duration::from_secs(30)).unwrap();
        (0..self.partitions).map(marks).map(|(low, high)| high - low).sum()
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn client(brokers: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers);
    config
}

/// A record's headers as text.
pub(crate) fn headers(message: &OwnedMessage) -> Vec<(String, Option<String>)> {
    let text = |v: &[u8]| String::from_utf8(v.to_vec()).unwrap();
    let headers = message.headers().unwrap();
    headers.iter().map(|h| (h.key.to_owned(), h.value.map(text))).collect()
}

/// Asserts that the counted rows `0..count` are all there, that the first occurrences of each key are in order,
/// and says how many records were repetitions.
pub(crate) fn assert_complete_and_ordered(messages: &[OwnedMessage], count: usize) -> usize {
    let mut highest: BTreeMap<String, i64> = BTreeMap::new();
    let mut seen = vec![false; count];
    let mut repeated = 0;
    for message in messages {
        let key = String::from_utf8(message.key().unwrap().to_vec()).unwrap();
        let body: serde_json::Value = serde_json::from_slice(message.payload().unwrap()).unwrap();
        let n = body["n"].as_i64().unwrap();
        let index = usize::try_from(n).unwrap();
        if seen[index] {
            repeated += 1;
            continue;
        }
        seen[index] = true;
        let before = highest.insert(key.clone(), n);
        assert!(before.is_none_or(|b| b < n), "key {key}: {n} comes first after {before:?}");
    }
    let missing: Vec<_> = (0..count).filter(|i| !seen[*i]).take(10).collect();
    assert!(missing.is_empty(), "missing, among others: {missing:?}");
    repeated
}

/// Writes a record, or without a value a tombstone.
pub(crate) fn put(topic: &str, key: &str, value: Option<&str>) {
    let producer: BaseProducer = client(&Servers::shared().kafka).create().unwrap();
    let mut record = BaseRecord::to(topic).key(key);
    record.payload = value;
    producer.send(record).unwrap();
    producer.flush(Duration::from_secs(30)).unwrap();
}

/// The records of one key in a topic of one partition, as it is now.
pub(crate) fn read_keyed(topic: &str, key: &str) -> Vec<OwnedMessage> {
    let consumer: BaseConsumer = client(&Servers::shared().kafka)
        .set("group.id", "none")
        .set("enable.partition.eof", "true")
        // Another test's open transaction would hide what is behind it.
        .set("isolation.level", "read_uncommitted")
        .create()
        .unwrap();
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(topic, 0, Offset::Beginning).unwrap();
    consumer.assign(&list).unwrap();
    let mut found = Vec::new();
    eventually(&format!("the end of {topic}"), || {
        while let Some(message) = consumer.poll(Duration::from_millis(200)) {
            if matches!(message, Err(KafkaError::PartitionEOF(_))) {
                return Some(());
            }
            let message = message.unwrap().detach();
            if message.key() == Some(key.as_bytes()) {
                found.push(message);
            }
        }
        None
    });
    found
}

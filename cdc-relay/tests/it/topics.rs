//! Topics of a test's own, and what is in them.

use std::{collections::BTreeMap, time::Duration};

use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, AlterConfig, NewTopic, ResourceSpecifier, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    error::{KafkaError, RDKafkaErrorCode},
    message::{Headers as _, OwnedMessage},
    producer::{BaseProducer, BaseRecord, Producer as _},
};

use crate::database::{Servers, eventually, unique};

/// A topic that the default template gives to rows of the aggregate type `kind`.
pub(crate) struct Topic {
    pub(crate) kind: String,
    pub(crate) name: String,
    partitions: i32,
    /// The brokers that have them; empty: any one.
    replicas: Vec<i32>,
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

    /// One partition on these brokers, the first of which leads it.
    pub(crate) fn replicated(servers: &Servers, replicas: &[i32]) -> Self {
        let topic = Self { brokers: servers.kafka.clone(), replicas: replicas.to_vec(), ..Self::missing(1) };
        topic.create(&[]);
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
        Self {
            name: format!("outbox.event.{kind}"),
            kind,
            partitions,
            replicas: Vec::new(),
            brokers: Servers::shared().kafka,
        }
    }

    pub(crate) fn create(&self, configuration: &[(&str, &str)]) {
        let replicas = [self.replicas.as_slice()];
        let replication = if self.replicas.is_empty() {
            TopicReplication::Fixed(1)
        } else {
            TopicReplication::Variable(&replicas)
        };
        let mut new = NewTopic::new(&self.name, self.partitions, replication);
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
                match message {
                    Ok(message) => messages.push(message.detach()),
                    // Of a broker that is down on purpose.
                    Err(e) if e.rdkafka_error_code() == Some(RDKafkaErrorCode::BrokerTransportFailure) => {}
                    Err(e) => panic!("{}: {e}", self.name),
                }
            }
            (messages.len() >= count).then_some(())
        });
        messages.sort_by_key(|m| (m.partition(), m.offset()));
        messages
    }

    /// Changes one of its settings, and waits until the broker goes by it.
    ///
    /// A broker takes changes up one by one, some time after they were accepted, and tells of one before it goes by it. So by
    /// the time it tells of another one, it goes by the one before.
    pub(crate) fn configure(&self, key: &str, value: &str) {
        let admin: AdminClient<DefaultClientContext> = client(&self.brokers).create().unwrap();
        self.change(&admin, &[(key, value)]);
        self.change(&admin, &[(key, value), ("file.delete.delay.ms", "60001")]);
    }

    /// Replaces its settings, and waits until the broker tells of the last of these.
    fn change(&self, admin: &AdminClient<DefaultClientContext>, settings: &[(&str, &str)]) {
        let (topic, options) = (ResourceSpecifier::Topic(&self.name), AdminOptions::new());
        let change =
            settings.iter().fold(AlterConfig::new(topic), |change, (key, value)| change.set(key, value));
        let altered = runtime().block_on(admin.alter_configs([&change], &options)).unwrap();
        assert!(altered.iter().all(Result::is_ok), "{altered:?}");
        let (key, value) = settings.last().unwrap();
        eventually("the broker knows the setting", || {
            let described = runtime().block_on(admin.describe_configs([&topic], &options)).unwrap().remove(0);
            (described.unwrap().get(key)?.value.as_deref() == Some(value)).then_some(())
        });
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

/// What became of counted rows.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// Those without a record.
    pub(crate) missing: Vec<usize>,
    /// First occurrences of a key's rows that come after one that was committed later: what there is, and behind what.
    pub(crate) disordered: Vec<(usize, usize)>,
    /// How many records were repetitions.
    pub(crate) repeated: usize,
}

impl Findings {
    /// Whether nothing is missing or out of order.
    pub(crate) fn is_faultless(&self) -> bool {
        self.missing.is_empty() && self.disordered.is_empty()
    }
}

/// Asserts that the counted rows `0..count` are all there, that the first occurrences of each key are in order,
/// and says how many records were repetitions.
pub(crate) fn assert_complete_and_ordered(messages: &[OwnedMessage], count: usize) -> usize {
    let Findings { missing, disordered, repeated } = compare(messages, count);
    assert!(disordered.is_empty(), "rows that come first behind later ones of their key: {disordered:?}");
    assert!(missing.is_empty(), "missing, among others: {:?}", &missing[..missing.len().min(10)]);
    repeated
}

/// Compares the counted rows `0..count` with what is there.
pub(crate) fn compare(messages: &[OwnedMessage], count: usize) -> Findings {
    let mut highest: BTreeMap<String, usize> = BTreeMap::new();
    let mut seen = vec![false; count];
    let mut findings = Findings::default();
    for message in messages {
        let key = String::from_utf8(message.key().unwrap().to_vec()).unwrap();
        let body: serde_json::Value = serde_json::from_slice(message.payload().unwrap()).unwrap();
        let n = usize::try_from(body["n"].as_i64().unwrap()).unwrap();
        if std::mem::replace(&mut seen[n], true) {
            findings.repeated += 1;
            continue;
        }
        let highest = highest.entry(key).or_default();
        if *highest > n {
            findings.disordered.push((n, *highest));
        }
        *highest = n.max(*highest);
    }
    findings.missing = (0..count).filter(|n| !seen[*n]).collect();
    findings
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
        // The end is known once a fetch comes back empty, and others write all the time.
        .set("fetch.wait.max.ms", "10")
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

//! Reads the topics, as a consumer that sees committed records only, from where it stopped last to their ends.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use rdkafka::{
    Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    message::{BorrowedMessage, Headers},
    metadata::MetadataPartition,
};

use super::{
    compare::Record,
    content::{self, Content},
};
use crate::{
    failure::{Explain, Failure, Result},
    topics::{Quiet, client},
};

/// How long a broker may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How long reading may go without a record before that is an error.
const SILENCE_LIMIT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(100);

/// Where each partition is read from next.
#[derive(Debug)]
pub(super) struct Reader {
    brokers: String,
    next: BTreeMap<String, BTreeMap<i32, i64>>,
}

impl Reader {
    /// Of topics as they are now: what is in them already is not read.
    pub(super) fn new(brokers: &str, topics: &[String]) -> Result<Self> {
        let mut reader = Self { brokers: brokers.to_owned(), next: BTreeMap::new() };
        let consumer = reader.consumer()?;
        for topic in topics {
            for partition in reader.look(&consumer, topic)? {
                let (_, end) = consumer
                    .fetch_watermarks(topic, partition, ANSWER_LIMIT)
                    .explain(|| format!("ask for the end of {topic}/{partition}"))?;
                reader.next.entry(topic.clone()).or_default().insert(partition, end);
            }
        }
        Ok(reader)
    }

    /// How many partitions each topic has.
    pub(super) fn partitions(&self) -> BTreeMap<String, i32> {
        let count = |partitions: &BTreeMap<i32, i64>| i32::try_from(partitions.len()).unwrap_or(i32::MAX);
        self.next.iter().map(|(topic, partitions)| (topic.clone(), count(partitions))).collect()
    }

    /// Reads one topic to the ends of its partitions; one that is not there has none. `each` takes the records with their
    /// values. After an error it goes on behind the last record that was taken.
    pub(super) fn read(&mut self, topic: &str, mut each: impl FnMut(&Record, Option<&[u8]>)) -> Result<()> {
        let consumer = self.consumer()?;
        let found = self.look(&consumer, topic)?;
        let next = self.next.entry(topic.to_owned()).or_default();
        let mut assignment = TopicPartitionList::new();
        for partition in found {
            let from = *next.entry(partition).or_insert(0);
            assignment
                .add_partition_offset(topic, partition, Offset::Offset(from))
                .explain(|| format!("read {topic}/{partition} from {from}"))?;
        }
        let mut unfinished: BTreeSet<i32> = next.keys().copied().collect();
        consumer.assign(&assignment).explain(|| format!("read {topic}"))?;
        let mut heard = Instant::now();
        while !unfinished.is_empty() {
            match consumer.poll(POLL) {
                Some(Ok(message)) => {
                    heard = Instant::now();
                    each(&record(&message), message.payload());
                    next.insert(message.partition(), message.offset() + 1);
                }
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    unfinished.remove(&partition);
                }
                // The client tries again by itself.
                Some(Err(_)) | None if heard.elapsed() < SILENCE_LIMIT => {}
                other => {
                    let why = other.and_then(std::result::Result::err).map(|error| format!(": {error}"));
                    return Err(Failure::new(format!(
                        "{topic} cannot be read to its end, not even in {} s; partitions {unfinished:?} are left{}",
                        SILENCE_LIMIT.as_secs(),
                        why.unwrap_or_default()
                    )));
                }
            }
        }
        Ok(())
    }

    fn consumer(&self) -> Result<BaseConsumer<Quiet>> {
        let mut config = client(&self.brokers);
        config
            .set("isolation.level", "read_committed")
            .set("enable.partition.eof", "true")
            .set("enable.auto.commit", "false")
            // Where a log has become shorter, nothing is skipped in silence.
            .set("auto.offset.reset", "error")
            // It is asked for and never used: nothing is committed, and partitions are assigned by us.
            .set("group.id", "chaos-checker")
            // What is fetched ahead, in KiB.
            .set("queued.max.messages.kbytes", "16384");
        config.create_with_context(Quiet).explain(|| "make a Kafka consumer".to_owned())
    }

    /// A topic's partitions.
    fn look(&self, consumer: &BaseConsumer<Quiet>, topic: &str) -> Result<Vec<i32>> {
        let metadata = consumer
            .fetch_metadata(Some(topic), ANSWER_LIMIT)
            .explain(|| format!("ask Kafka at {} for the topic {topic}", self.brokers))?;
        let found = metadata.topics().iter().find(|known| known.name() == topic);
        Ok(found
            .map(|known| known.partitions().iter().map(MetadataPartition::id).collect())
            .unwrap_or_default())
    }
}

fn record(message: &BorrowedMessage<'_>) -> Record {
    let mut headers: content::Headers = Vec::new();
    for header in message.headers().into_iter().flat_map(Headers::iter) {
        headers.push((header.key.to_owned(), header.value.map(<[u8]>::to_vec)));
    }
    let text = |name: &str| {
        let (_, value) = headers.iter().find(|(known, _)| known == name)?;
        std::str::from_utf8(value.as_deref()?).ok()
    };
    let (id, lsn, seq) = (text("id"), text("lsn"), text("seq"));
    let (id, lsn, seq) = (
        id.and_then(|text| text.parse().ok()),
        lsn.and_then(|text| text.parse().ok()),
        seq.and_then(|text| text.parse().ok()),
    );
    let of_order = text("aggregatetype") == Some("order");
    headers.retain(|(name, _)| name != "lsn" && name != "seq");
    Record {
        topic: message.topic().to_owned(),
        partition: message.partition(),
        offset: message.offset(),
        id,
        lsn,
        seq,
        of_order,
        content: Content::of(message.key(), message.payload(), headers),
    }
}

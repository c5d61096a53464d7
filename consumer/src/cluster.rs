//! Asks Kafka for an operator's commands: a topic's partitions, a group's members and offsets, single records. Nothing
//! here joins the group.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientContext, Message, Offset, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext},
    error::KafkaError,
    message::OwnedMessage,
    types::RDKafkaErrorCode,
};
use service::{Failure, exit::Kind};

use crate::{
    config::KafkaConfig,
    group::{self, PartitionId},
};

/// How long an answer of Kafka's may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// A record that is at most so many further on is read up to, rather than looked for anew.
const NEAR_RECORDS: i64 = 1000;

/// A topic as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Topic {
    pub(crate) partitions: i32,
    pub(crate) replicas: usize,
}

/// A group as its coordinator knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Group {
    /// `Stable`, `Empty`, `Dead`, …; Kafka's own word.
    pub(crate) state: String,
    pub(crate) members: Vec<Member>,
}

/// An instance that consumes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) id: String,
    pub(crate) client: String,
    pub(crate) host: String,
    pub(crate) partitions: Vec<PartitionId>,
}

/// Kafka, asked in the name of a group.
pub(crate) struct Cluster {
    consumer: BaseConsumer<Quiet>,
    brokers: String,
    group: String,
    /// The partition that records are read from, and the offset that comes next.
    reading: Option<(PartitionId, i64)>,
}

impl Cluster {
    pub(crate) fn new(kafka: &KafkaConfig) -> Result<Self, Failure> {
        let mut config = group::connection(kafka);
        config
            .set("group.id", &kafka.group)
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("enable.partition.eof", "true")
            .set("isolation.level", "read_committed")
            .set("auto.offset.reset", "earliest")
            .set("allow.auto.create.topics", "false")
            // Single records are looked for: little is fetched ahead, and nothing waited for.
            .set("fetch.message.max.bytes", "65536")
            .set("queued.max.messages.kbytes", "4096")
            .set("fetch.wait.max.ms", "10");
        let consumer = config.create_with_context(Quiet::default()).map_err(|e| group::bad_client(&e))?;
        Ok(Self { consumer, brokers: kafka.brokers.clone(), group: kafka.group.clone(), reading: None })
    }

    /// What there is of a topic; nothing if it does not exist.
    pub(crate) fn topic(&self, name: &str) -> Result<Option<Topic>, Failure> {
        let metadata = self.consumer.fetch_metadata(Some(name), PATIENCE).map_err(|e| self.failure(&e))?;
        let Some(topic) = metadata.topics().iter().find(|topic| topic.name() == name) else {
            return Ok(None);
        };
        match topic.error().map(RDKafkaErrorCode::from) {
            None => {}
            Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => {
                return Ok(None);
            }
            Some(code) => return Err(self.failure(&KafkaError::MetadataFetch(code))),
        }
        let replicas = topic.partitions().iter().map(|p| p.replicas().len()).max().unwrap_or(1);
        let partitions = i32::try_from(topic.partitions().len()).unwrap_or(i32::MAX);
        Ok(Some(Topic { partitions, replicas }))
    }

    /// Who consumes.
    pub(crate) fn group(&self) -> Result<Group, Failure> {
        let list =
            self.consumer.fetch_group_list(Some(&self.group), PATIENCE).map_err(|e| self.failure(&e))?;
        let Some(found) = list.groups().iter().find(|group| group.name() == self.group) else {
            return Ok(Group { state: "Dead".into(), members: Vec::new() });
        };
        let member = |member: &rdkafka::groups::GroupMemberInfo| Member {
            id: member.id().into(),
            client: member.client_id().into(),
            host: member.client_host().trim_start_matches('/').into(),
            // While the group rebalances there is none.
            partitions: member.assignment().and_then(assignment).unwrap_or_default(),
        };
        let mut members: Vec<Member> = found.members().iter().map(member).collect();
        members.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(Group { state: found.state().into(), members })
    }

    /// The first offset of a partition that there is, and the one that its next record will get.
    pub(crate) fn bounds(&self, (topic, partition): &PartitionId) -> Result<(i64, i64), Failure> {
        self.consumer.fetch_watermarks(topic, *partition, PATIENCE).map_err(|e| self.failure(&e))
    }

    /// The group's committed offsets, where it has any.
    pub(crate) fn committed(&self, ids: &[PartitionId]) -> Result<BTreeMap<PartitionId, i64>, Failure> {
        let list = self.consumer.committed_offsets(group::list(ids), PATIENCE);
        Ok(positions(&list.map_err(|e| self.failure(&e))?))
    }

    /// The offset of the first record at or after a time (in milliseconds of Unix time), where there is one.
    pub(crate) fn at_time(
        &self,
        ids: &[PartitionId],
        ms: i64,
    ) -> Result<BTreeMap<PartitionId, i64>, Failure> {
        let mut list = group::list(ids);
        let asked = list.set_all_offsets(Offset::Offset(ms));
        let found = asked.and_then(|()| self.consumer.offsets_for_times(list, PATIENCE));
        Ok(positions(&found.map_err(|e| self.failure(&e))?))
    }

    /// Commits for the group, which Kafka allows only while it has no members, and looks whether it is so.
    pub(crate) fn commit(&self, offsets: &BTreeMap<PartitionId, i64>) -> Result<(), Failure> {
        let list = group::offsets(offsets).map_err(|e| self.failure(&e))?;
        self.consumer.commit(&list, CommitMode::Sync).map_err(|e| self.failure(&e))?;
        let ids: Vec<PartitionId> = offsets.keys().cloned().collect();
        if self.committed(&ids)? == *offsets {
            return Ok(());
        }
        let why = format!("Kafka did not take all offsets of the group {}", self.group);
        Err(Failure::new(Kind::GaveUp, why)
            .hint("has an instance been started meanwhile? `consumer status` tells"))
    }

    /// The first record of a partition at an offset or behind it; nothing at the end. Reading on is fast, going back
    /// is not.
    pub(crate) fn first(&mut self, id: &PartitionId, offset: i64) -> Result<Option<OwnedMessage>, Failure> {
        let near =
            |(at, next): &(PartitionId, i64)| at == id && (*next..*next + NEAR_RECORDS).contains(&offset);
        if !self.reading.as_ref().is_some_and(near) {
            let (_, end) = self.bounds(id)?;
            // Or it would begin again at the beginning.
            if offset >= end {
                return Ok(None);
            }
            let from = group::offsets(&BTreeMap::from([(id.clone(), offset)]));
            from.and_then(|list| self.consumer.assign(&list)).map_err(|e| self.failure(&e))?;
        }
        self.reading = None;
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            match self.consumer.poll(Duration::from_millis(100)) {
                Some(Ok(record)) if record.offset() >= offset => {
                    self.reading = Some((id.clone(), record.offset() + 1));
                    return Ok(Some(record.detach()));
                }
                Some(Err(KafkaError::PartitionEOF(_))) => return Ok(None),
                // What is before it; or an error, which the context has told, and librdkafka tries again.
                Some(_) | None => {}
            }
        }
        Err(self.failure(&KafkaError::MessageConsumption(RDKafkaErrorCode::OperationTimedOut)))
    }

    fn failure(&self, error: &KafkaError) -> Failure {
        // Its reasons come as events, which somebody has to take.
        while self.consumer.poll(Duration::ZERO).is_some() {}
        let (brokers, quiet) = (&self.brokers, self.consumer.context());
        let (refused, why) = quiet.told();
        let why = why.map_or_else(|| error.to_string(), |why| format!("{error} ({why})"));
        let codes = [
            RDKafkaErrorCode::TopicAuthorizationFailed,
            RDKafkaErrorCode::GroupAuthorizationFailed,
            RDKafkaErrorCode::ClusterAuthorizationFailed,
            RDKafkaErrorCode::Authentication,
            RDKafkaErrorCode::SaslAuthenticationFailed,
        ];
        if refused || error.rdkafka_error_code().is_some_and(|code| codes.contains(&code)) {
            return Failure::new(Kind::Refused, format!("Kafka at {brokers} refuses us: {why}"))
                .hint("grant what is missing, or correct [kafka.properties]");
        }
        Failure::new(Kind::GaveUp, format!("Kafka at {brokers} does not do what is asked: {why}"))
            .hint("start it, or correct kafka.brokers")
    }
}

fn positions(list: &TopicPartitionList) -> BTreeMap<PartitionId, i64> {
    let known = list.elements();
    let known = known.iter().filter_map(|e| match e.offset() {
        Offset::Offset(offset) => Some(((e.topic().to_owned(), e.partition()), offset)),
        _ => None,
    });
    known.collect()
}

/// A client that keeps librdkafka's complaints to itself until one is of interest.
#[derive(Default)]
pub(crate) struct Quiet {
    /// Whether it was about who we are, and what it was.
    last: Mutex<(bool, Option<String>)>,
}

impl Quiet {
    fn told(&self) -> (bool, Option<String>) {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ClientContext for Quiet {
    fn log(&self, _level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        let code = error.rdkafka_error_code();
        // That all brokers are down comes after the reason why.
        if matches!(code, Some(RDKafkaErrorCode::AllBrokersDown | RDKafkaErrorCode::PartitionEOF)) {
            return;
        }
        let refused = code == Some(RDKafkaErrorCode::Authentication);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = (refused, Some(reason.to_owned()));
    }
}

impl ConsumerContext for Quiet {}

/// A member's partitions, out of what it was assigned (version, topics with their partitions, data of the assignor's);
/// nothing if it is cut or damaged.
fn assignment(bytes: &[u8]) -> Option<Vec<PartitionId>> {
    let mut rest = bytes.get(2..)?;
    let mut ids = Vec::new();
    for _ in 0..number(&mut rest)? {
        let length = usize::from(u16::from_be_bytes(*rest.split_first_chunk::<2>()?.0));
        let topic = std::str::from_utf8(rest.get(2..2 + length)?).ok()?;
        rest = &rest[2 + length..];
        for _ in 0..number(&mut rest)? {
            ids.push((topic.to_owned(), number(&mut rest)?));
        }
    }
    ids.sort();
    Some(ids)
}

fn number(rest: &mut &[u8]) -> Option<i32> {
    let (number, behind) = rest.split_first_chunk::<4>()?;
    *rest = behind;
    Some(i32::from_be_bytes(*number))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(topics: &[(String, Vec<i32>)]) -> Vec<u8> {
        let mut bytes = vec![0, 3];
        bytes.extend(i32::try_from(topics.len()).unwrap().to_be_bytes());
        for (topic, partitions) in topics {
            bytes.extend(u16::try_from(topic.len()).unwrap().to_be_bytes());
            bytes.extend(topic.as_bytes());
            bytes.extend(i32::try_from(partitions.len()).unwrap().to_be_bytes());
            bytes.extend(partitions.iter().flat_map(|p| p.to_be_bytes()));
        }
        bytes.extend((-1_i32).to_be_bytes());
        bytes
    }

    proptest! {
        #[test]
        fn an_assignment_is_read_as_it_was_written(
            topics in prop::collection::vec(("[a-z.-]{1,20}", prop::collection::vec(0..100_i32, 0..5)), 0..4)
        ) {
            let mut expected: Vec<PartitionId> =
                topics.iter().flat_map(|(t, ps)| ps.iter().map(|p| (t.clone(), *p))).collect();
            expected.sort();
            prop_assert_eq!(assignment(&encoded(&topics)), Some(expected));
        }

        #[test]
        fn any_bytes_whatever_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..64), cut in 0..40_usize) {
            let _ = assignment(&bytes);
            let whole = encoded(&[("order-events".into(), vec![1, 2, 3])]);
            prop_assert!(assignment(&whole[..cut.min(whole.len() - 5)]).is_none());
        }
    }
}

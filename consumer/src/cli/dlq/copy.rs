//! A dead letter's record: looked for in the dead-letter topic, then where it was at first.

use std::panic::{AssertUnwindSafe, catch_unwind};

use rdkafka::{
    Message,
    message::{Headers as _, OwnedMessage},
};
use service::Failure;

use crate::{
    cluster::Cluster,
    dlq,
    ledger::{Letter, Place},
    redrive::OwnedHeader,
};

/// A record as Kafka still has it.
pub(super) struct Copy {
    pub(super) record: OwnedMessage,
    /// In order; nothing if the name of one is not UTF-8, which the library cannot read.
    pub(super) headers: Option<Vec<OwnedHeader>>,
    /// Where it was found.
    pub(super) place: Place,
    /// The dead-letter topic did not take the value, and it is nowhere else.
    pub(super) lacks_value: bool,
}

impl Copy {
    /// A header's value; the last one where a name stands twice, which is ours.
    fn header(&self, name: &str) -> Option<&[u8]> {
        let found = self.headers.iter().flatten().rev().find(|(key, _)| key == name)?;
        found.1.as_deref()
    }

    fn is_of(&self, group: &str, place: &Place) -> bool {
        let is = |name: &str, value: &str| self.header(name).is_some_and(|found| found == value.as_bytes());
        is("dlq.topic", &place.topic)
            && is("dlq.partition", &place.partition.to_string())
            && is("dlq.offset", &place.offset.to_string())
            && is("dlq.group", group)
    }
}

/// A letter's record, if Kafka still has it.
pub(super) fn find(cluster: &mut Cluster, group: &str, letter: &Letter) -> Result<Option<Copy>, Failure> {
    let mut dead = None;
    if let (Some(partition), Some(offset)) = (letter.dlq_partition, letter.dlq_offset) {
        let topic = dlq::topic_of(&letter.place.topic);
        let found = at(cluster, Place { topic, partition, offset })?;
        dead = found.filter(|copy| copy.is_of(group, &letter.place));
        if dead.as_ref().is_some_and(|copy| copy.header("dlq.value_omitted").is_none()) {
            return Ok(dead);
        }
    }
    // The topic may have been made anew, with another record there.
    let is_original = |copy: &Copy| {
        let written_ms = letter.written_at.map(|at| at.timestamp_millis());
        copy.record.key() == letter.key.as_deref()
            && (written_ms.is_none() || copy.record.timestamp().to_millis() == written_ms)
    };
    let original = at(cluster, letter.place.clone())?.filter(is_original);
    Ok(original.or_else(|| dead.map(|copy| Copy { lacks_value: true, ..copy })))
}

fn at(cluster: &mut Cluster, place: Place) -> Result<Option<Copy>, Failure> {
    match cluster.topic(&place.topic)? {
        Some(topic) if place.partition < topic.partitions => {}
        _ => return Ok(None),
    }
    let record = cluster.first(&(place.topic.clone(), place.partition), place.offset)?;
    // Something behind it, where it has been compacted away or its time was over.
    Ok(record.filter(|record| record.offset() == place.offset).map(|record| {
        let headers = || {
            let headers = record.headers().into_iter().flat_map(|headers| headers.iter());
            headers.map(|h| (h.key.to_owned(), h.value.map(<[u8]>::to_vec))).collect()
        };
        let headers = catch_unwind(AssertUnwindSafe(headers)).ok();
        Copy { headers, place, lacks_value: false, record }
    }))
}

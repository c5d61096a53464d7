//! What a topic whose beginning is deleted still tells of a row that is not in it: one that was committed after the oldest
//! record that its partition holds would be behind that record, and was never deleted.

use std::collections::{BTreeMap, BTreeSet};

use relay_core::{outbox::Outbox, record::Record};

use crate::{error::Error, snapshot::Snapshot};

/// So much later than the oldest record a row has to be, in milliseconds: its time is not the one of its commit, and may be
/// another clock's.
const MARGIN_MS: i64 = 60_000;
/// `timestamptz`: a time without its zone could be of any.
const TIMESTAMPTZ_OID: u32 = 1184;

/// Which partition a key has now.
type PartitionOf = Box<dyn Fn(Option<&[u8]>) -> Option<i32>>;

/// The oldest record of a partition that has a time to go by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Oldest {
    offset: i64,
    /// Since the Unix epoch.
    at_ms: i64,
}

/// What there is of a topic.
pub(super) struct Remains {
    partition_of: PartitionOf,
    oldest: BTreeMap<i32, Oldest>,
    /// Partitions whose beginning is deleted.
    cut: BTreeSet<i32>,
    is_compacted: bool,
    /// A record is in another partition than its key has now: partitions were added, or somebody else chose it.
    is_mixed: bool,
    /// Whether a record's time is that of its commit.
    has_commit_time: bool,
}

impl Remains {
    pub(super) fn new(partition_of: PartitionOf, has_commit_time: bool) -> Self {
        Self {
            partition_of,
            oldest: BTreeMap::new(),
            cut: BTreeSet::new(),
            is_compacted: false,
            is_mixed: false,
            has_commit_time,
        }
    }

    /// Takes a record that nobody asked for once more, each partition's in order; with its time where it is the relay's.
    pub(super) fn take(&mut self, key: Option<&[u8]>, (partition, offset): (i32, i64), at_ms: Option<i64>) {
        self.is_mixed |= (self.partition_of)(key).is_some_and(|own| own != partition);
        if let Some(at_ms) = at_ms.filter(|_| self.has_commit_time) {
            self.oldest.entry(partition).or_insert(Oldest { offset, at_ms });
        }
    }

    /// How it was once everything was read: where each partition begins.
    pub(super) fn end(&mut self, beginnings: &[(i32, i64)], is_compacted: bool) {
        self.is_compacted = is_compacted;
        for (partition, beginning) in beginnings.iter().copied().filter(|(_, offset)| *offset > 0) {
            self.cut.insert(partition);
            // What was deleted while we read may have been more than we saw.
            if self.oldest.get(&partition).is_some_and(|oldest| oldest.offset < beginning) {
                self.oldest.remove(&partition);
            }
        }
    }

    /// Whether the row's record would have to be there, had it ever been. Its time is no later than its commit.
    pub(super) fn would_hold(&self, row: &Record<'_>) -> bool {
        if self.is_compacted {
            return false;
        }
        let is_behind = |partition: &i32| {
            let oldest = self.oldest.get(partition);
            oldest.is_some_and(|oldest| row.timestamp_ms > oldest.at_ms.saturating_add(MARGIN_MS))
        };
        let by_key = || (self.partition_of)(row.key).filter(|_| !self.is_mixed);
        match row.partition.or_else(by_key) {
            Some(partition) => !self.cut.contains(&partition) || is_behind(&partition),
            None => self.cut.iter().all(is_behind),
        }
    }
}

/// The outbox with that column as its rows' time, where it has none that is configured and the table has this one.
pub(super) fn with_time(snapshot: &mut Snapshot<'_>, outbox: &Outbox, column: &str) -> Result<Outbox, Error> {
    if outbox.has_timestamp_column() {
        return Ok(outbox.clone());
    }
    // The column may be used for something else: then it is no time.
    let Ok(timed) = outbox.with_timestamp_column(column) else { return Ok(outbox.clone()) };
    let columns = snapshot.columns(&timed)?;
    let is_time = columns.iter().any(|c| c.name == column && c.type_oid == TIMESTAMPTZ_OID);
    Ok(if is_time { timed } else { outbox.clone() })
}

#[cfg(test)]
mod tests {
    use relay_core::record::{Headers, Identity};

    use super::*;

    const T: i64 = 1_700_000_000_000;

    /// Keys begin with the number of their partition. Partition 0 begins at offset 10, 1 is whole, 2 is emptied.
    fn remains() -> Remains {
        let mut remains = Remains::new(Box::new(|key| Some(i32::from(*key?.first()?))), true);
        remains.take(Some(&[0]), (0, 9), None);
        remains.take(Some(&[0]), (0, 10), Some(T));
        remains.take(Some(&[0]), (0, 11), Some(T + 1));
        remains.take(Some(&[1]), (1, 0), Some(T));
        remains
    }

    fn ended() -> Remains {
        let mut remains = remains();
        remains.end(&[(0, 10), (1, 0), (2, 5)], false);
        remains
    }

    fn holds(remains: &Remains, key: u8, partition: Option<i32>, timestamp_ms: i64) -> bool {
        remains.would_hold(&Record {
            identity: Identity::default(),
            table: "",
            row_id: "",
            aggregate_type: "",
            aggregate_id: "",
            topic: "t",
            key: Some(&[key]),
            value: None,
            partition,
            timestamp_ms,
            headers: &Headers::default(),
        })
    }

    #[test]
    fn a_row_is_held_against_its_own_partition() {
        let remains = ended();
        assert!(holds(&remains, 0, None, T + MARGIN_MS + 1));
        assert!(!holds(&remains, 0, None, T + MARGIN_MS));
        assert!(holds(&remains, 1, None, 0), "of a partition that is whole nothing is deleted");
        assert!(!holds(&remains, 2, None, i64::MAX), "an empty one tells nothing");
        assert!(holds(&remains, 2, Some(1), 0), "the row's own choice");
    }

    #[test]
    fn where_the_partition_is_not_known_all_have_to_agree() {
        let mut mixed = remains();
        mixed.take(Some(&[1]), (0, 12), Some(T));
        mixed.end(&[(0, 10), (1, 0)], false);
        assert!(holds(&mixed, 1, None, T + MARGIN_MS + 1) && !holds(&mixed, 1, None, T));
        let mut mixed = remains();
        mixed.take(Some(&[1]), (0, 12), Some(T));
        mixed.end(&[(0, 10), (1, 0), (2, 5)], false);
        assert!(!holds(&mixed, 1, None, i64::MAX));
    }

    #[test]
    fn what_is_deleted_meanwhile_or_compacted_tells_nothing() {
        let mut moved = remains();
        moved.end(&[(0, 11)], false);
        assert!(!holds(&moved, 0, None, i64::MAX));
        let mut of_rows = Remains::new(Box::new(|_| Some(0)), false);
        of_rows.take(None, (0, 10), Some(T));
        of_rows.end(&[(0, 10)], false);
        assert!(!holds(&of_rows, 0, None, i64::MAX), "the time is the row's own");
        let mut compacted = remains();
        compacted.end(&[(0, 10)], true);
        assert!(!holds(&compacted, 0, None, i64::MAX) && !holds(&compacted, 1, None, i64::MAX));
    }
}

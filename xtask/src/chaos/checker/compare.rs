//! What was committed beside what was published. Pure; what is remembered of an id has a fixed size.

use std::collections::{BTreeMap, HashMap};

use uuid::Uuid;

use super::{
    Counts,
    content::Content,
    decoding::{Row, Transaction},
    lsn::Lsn,
};
use crate::chaos::verdict::{Kind, Verdict};

/// A record, as it was read.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) topic: String,
    pub(super) partition: i32,
    pub(super) offset: i64,
    /// Of its header.
    pub(super) id: Option<Uuid>,
    /// Likewise: the LSN of the commit.
    pub(super) lsn: Option<Lsn>,
    /// Likewise: its ordinal in the transaction.
    pub(super) seq: Option<u32>,
    /// Whether it says that it is an order's event.
    pub(super) of_order: bool,
    pub(super) content: Content,
}

/// Both sides by id.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    topics: Vec<String>,
    entries: HashMap<Uuid, Entry>,
    counts: Counts,
    /// Rows without a record yet.
    missing: u64,
    /// Places of records without an id, since the last verdict.
    nameless: Vec<Place>,
    /// Those of the last verdict.
    told: Counts,
}

#[derive(Debug, Default)]
struct Entry {
    committed: Option<Committed>,
    seen: Option<Seen>,
    /// Few have any, so few take the room.
    again: Option<Box<Again>>,
    /// A verdict was given of it, and nothing has changed since.
    told: bool,
}

#[derive(Debug, Clone, Copy)]
struct Committed {
    /// Counts the committed rows.
    order: u64,
    /// The commit's record is here or later …
    after: Lsn,
    /// … and it ends here.
    end: Lsn,
    topic: u16,
    murmur2: u32,
    content: Content,
}

/// The first record of an id.
#[derive(Debug, Clone, Copy)]
struct Seen {
    place: Place,
    lsn: Option<Lsn>,
    seq: Option<u32>,
    content: Content,
}

/// The further records of an id.
#[derive(Debug, Default)]
struct Again {
    /// How many there are since the last verdict.
    count: u64,
    last: Place,
    /// The first that is not the same record.
    other: Option<Place>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
struct Place {
    topic: u16,
    partition: i32,
    offset: i64,
}

/// A committed row and its first record.
#[derive(Debug, Clone, Copy)]
struct Pair {
    id: Uuid,
    row: Committed,
    seen: Seen,
    other: Option<Place>,
    told: bool,
}

impl Comparison {
    /// Takes a transaction; they come in commit order.
    ///
    /// # Errors
    /// An id was committed before: rows are known by their ids.
    pub(super) fn commit(&mut self, transaction: Transaction) -> Result<(), String> {
        let (after, end) = (transaction.after, transaction.end);
        for Row { id, topic, murmur2, content } in transaction.rows {
            let topic = self.topic(&topic);
            let entry = self.entries.entry(id).or_default();
            if let Some(before) = entry.committed {
                return Err(format!(
                    "two rows have the id {id}, of the commits before {} and {end}",
                    before.end
                ));
            }
            entry.told = false;
            entry.committed =
                Some(Committed { order: self.counts.committed, after, end, topic, murmur2, content });
            self.counts.committed += 1;
            self.missing += u64::from(entry.seen.is_none());
        }
        Ok(())
    }

    /// Takes a record; those of a partition come in the order of their offsets. Tells whether it is the first of its id.
    pub(super) fn publish(&mut self, record: &Record) -> bool {
        self.counts.published += 1;
        let place =
            Place { topic: self.topic(&record.topic), partition: record.partition, offset: record.offset };
        let Some(id) = record.id else {
            self.nameless.push(place);
            return false;
        };
        let Record { lsn, seq, content, .. } = *record;
        let entry = self.entries.entry(id).or_default();
        let Some(first) = entry.seen else {
            entry.told = false;
            self.missing -= u64::from(entry.committed.is_some());
            entry.seen = Some(Seen { place, lsn, seq, content });
            return true;
        };
        self.counts.duplicates += 1;
        let again = entry.again.get_or_insert_default();
        again.count += 1;
        again.last = place;
        let same = (first.place.topic, first.place.partition) == (place.topic, place.partition)
            && (first.lsn, first.seq, first.content) == (lsn, seq, content);
        if !same && again.other.is_none() {
            entry.told = false;
            again.other = Some(place);
        }
        false
    }

    pub(super) fn counts(&self) -> Counts {
        self.counts
    }

    /// The topics that rows were committed for, or records read of.
    pub(super) fn topics(&self) -> &[String] {
        &self.topics
    }

    /// Whether every row has a record.
    pub(super) fn complete(&self) -> bool {
        self.missing == 0
    }

    /// What there is to say since the last time; `partitions` is how many each topic has, and `confirmed` how far the relay
    /// calls everything done, if it says so.
    pub(super) fn verdict(&mut self, partitions: &BTreeMap<String, i32>, confirmed: Option<Lsn>) -> Verdict {
        let mut verdict = Verdict {
            committed: self.counts.committed - self.told.committed,
            published: self.counts.published - self.told.published,
            ..Verdict::default()
        };
        let mut pairs = Vec::new();
        let mut entries: Vec<(&Uuid, &Entry)> = self.entries.iter().collect();
        // So that examples are the first ones.
        entries.sort_by_key(|(_, entry)| (entry.committed.map(|row| row.order), entry.seen.map(|s| s.place)));
        for (&id, entry) in entries {
            let other = entry.again.as_ref().and_then(|again| again.other);
            match (entry.committed, entry.seen) {
                (Some(row), Some(seen)) => pairs.push(Pair { id, row, seen, other, told: entry.told }),
                (Some(row), None) if !entry.told => {
                    let is_late = confirmed.is_some_and(|confirmed| confirmed < row.end);
                    verdict.add(if is_late { Kind::Late } else { Kind::Missing }, || {
                        let topic = &self.topics[usize::from(row.topic)];
                        format!("{topic} has no record of id {id}, commit before {}", row.end)
                    });
                }
                (None, Some(seen)) if !entry.told => verdict
                    .add(Kind::Foreign, || format!("{}: id {id} was never committed", self.at(seen.place))),
                _ => {}
            }
            self.repeated(id, entry, &mut verdict);
        }
        for &place in &self.nameless {
            verdict.add(Kind::Foreign, || format!("{}: the header id is no UUID", self.at(place)));
        }
        self.contents(&pairs, partitions, &mut verdict);
        self.order(&mut pairs, &mut verdict);
        self.nameless.clear();
        self.told = self.counts;
        for entry in self.entries.values_mut() {
            entry.told = true;
            if let Some(again) = &mut entry.again {
                again.count = 0;
            }
        }
        verdict
    }

    fn repeated(&self, id: Uuid, entry: &Entry, verdict: &mut Verdict) {
        let (Some(seen), Some(again)) = (&entry.seen, &entry.again) else { return };
        for _ in 0..again.count {
            verdict.add(Kind::Duplicate, || {
                let (first, last) = (self.at(seen.place), self.at(again.last));
                format!("id {id} is at {first} and {} times more, the last at {last}", again.count)
            });
        }
    }

    /// Each record against its row. The pairs come in commit order.
    fn contents(&self, pairs: &[Pair], partitions: &BTreeMap<String, i32>, verdict: &mut Verdict) {
        let mut before: Option<&Pair> = None;
        for pair in pairs {
            let mut mistakes = self.mistakes(pair, partitions);
            if let Some(before) = before.filter(|before| before.row.end == pair.row.end) {
                if before.seen.lsn != pair.seen.lsn {
                    mistakes.push("the header lsn is not that of its transaction's other rows".to_owned());
                }
                if before.seen.seq >= pair.seen.seq {
                    mistakes.push("the header seq is not above that of the row before it".to_owned());
                }
            }
            if !pair.told && !mistakes.is_empty() {
                verdict.add(Kind::Wrong, || format!("{}: {}", self.told(pair), mistakes.join(", ")));
            }
            before = Some(pair);
        }
    }

    fn mistakes(
        &self,
        Pair { row, seen, other, .. }: &Pair,
        partitions: &BTreeMap<String, i32>,
    ) -> Vec<String> {
        let differences = row.content.differences(&seen.content);
        let mut mistakes: Vec<String> =
            differences.into_iter().map(|part| format!("{part} is not the row's")).collect();
        let topic = &self.topics[usize::from(row.topic)];
        let count = partitions.get(topic).copied().unwrap_or(0);
        let wanted = u32::try_from(count).ok().and_then(|count| row.murmur2.checked_rem(count));
        if row.topic != seen.place.topic {
            mistakes.push(format!("its topic is {topic}"));
        } else if wanted.is_some_and(|wanted| i64::from(wanted) != i64::from(seen.place.partition)) {
            mistakes.push(format!("its partition is {}", wanted.unwrap_or_default()));
        }
        match seen.lsn {
            None => mistakes.push("the header lsn is none".to_owned()),
            Some(lsn) if !(row.after..row.end).contains(&lsn) => {
                mistakes.push(format!("the header lsn {lsn} is not from {} on", row.after));
            }
            Some(_) => {}
        }
        if seen.seq.is_none() {
            mistakes.push("the header seq is no number".to_owned());
        }
        if let Some(other) = other {
            mistakes.push(format!("{} is another record of the same id", self.at(*other)));
        }
        mistakes
    }

    /// First occurrences, by their offsets, against commit order.
    fn order(&self, pairs: &mut [Pair], verdict: &mut Verdict) {
        pairs.sort_by_key(|pair| pair.seen.place);
        let mut newest: Option<&Pair> = None;
        let mut newest_of_key: HashMap<u64, &Pair> = HashMap::new();
        for pair in &*pairs {
            let place = pair.seen.place;
            let same = |other: &&Pair| {
                (other.seen.place.topic, other.seen.place.partition) == (place.topic, place.partition)
            };
            // Keys live in one partition; whatever is elsewhere is wrong already.
            let mut ahead = [
                (Kind::OutOfCommitOrder, newest.filter(same)),
                (Kind::OutOfOrderInKey, newest_of_key.get(&pair.row.content.key).copied().filter(same)),
            ];
            for (kind, ahead) in &mut ahead {
                match ahead {
                    Some(newer) if newer.row.order > pair.row.order => {
                        if pair.told {
                            continue;
                        }
                        verdict
                            .add(*kind, || format!("{} comes after {}", self.told(pair), self.told(newer)));
                    }
                    _ => *ahead = Some(pair),
                }
            }
            newest = ahead[0].1;
            newest_of_key.extend(ahead[1].1.map(|newest| (pair.row.content.key, newest)));
        }
    }

    fn told(&self, pair: &Pair) -> String {
        let lsn = pair.seen.lsn.map_or_else(|| "?".to_owned(), |lsn| lsn.to_string());
        format!("{}: id {}, lsn {lsn}, commit before {}", self.at(pair.seen.place), pair.id, pair.row.end)
    }

    fn at(&self, place: Place) -> String {
        format!("{}/{}@{}", self.topics[usize::from(place.topic)], place.partition, place.offset)
    }

    fn topic(&mut self, name: &str) -> u16 {
        let known = self.topics.iter().position(|known| known == name);
        let at = known.unwrap_or_else(|| {
            self.topics.push(name.to_owned());
            self.topics.len() - 1
        });
        u16::try_from(at).expect("a stage has a handful of topics")
    }
}

#[cfg(test)]
#[path = "compare_tests.rs"]
mod tests;

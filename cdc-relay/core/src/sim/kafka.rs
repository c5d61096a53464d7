//! The broker, and the way to it.
//!
//! Within a partition what is sent arrives in order, or, once something failed there, not at all (that is what the
//! idempotent producer and its gapless guarantee are for). Acknowledgements come in any order. What a dead producer
//! had sent to the topic's partitions may still arrive, in part and late. Of its markers and checkpoints it is taken
//! that they have arrived, or never will, when the next session reads those topics: without fencing nothing else
//! could be said.
//!
//! With transactions, what arrives is seen once its transaction is committed, as a whole. A new producer fences: what an
//! earlier one had not asked to be committed is aborted, and what it had is either.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use fastrand::Rng;

use super::postgres::{KEYS, Nature, OutboxRow, RowId};
use crate::{Checkpoint, Lsn, parking::Key, progress::Ticket, record::Identity};

pub(super) const PARTITIONS: usize = 3;
/// Those of the topic, then one each of dead letters, of markers of parked keys, and of checkpoints.
pub(super) const LOGS: usize = PARTITIONS + 3;
const DEAD_LETTERS: usize = PARTITIONS;
const MARKERS: usize = PARTITIONS + 1;
const CHECKPOINTS: usize = PARTITIONS + 2;

/// What is sent.
#[derive(Debug, Clone)]
pub(super) enum Item {
    Record(OutboxRow),
    DeadLetter(OutboxRow),
    /// A dead letter that goes to its topic after all.
    Redriven(OutboxRow),
    /// A record that is there already, once more, in this partition.
    Replayed(usize),
    Marker(Key, Option<Identity>),
    Checkpoint(Checkpoint),
}

/// What the relay is told.
#[derive(Debug, Clone, Copy)]
pub(super) enum Report {
    Settled(Ticket),
    Checkpointed,
    /// Refused for what it is.
    Refused(OutboxRow),
}

/// A row of the topic that was committed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shown {
    pub(super) row: OutboxRow,
    pub(super) is_redriven: bool,
}

#[derive(Debug, Default)]
pub(super) struct Kafka {
    on_its_way: [VecDeque<(Report, Item)>; LOGS],
    /// What dead producers had sent to each log, one queue for each producer.
    late: Vec<(usize, VecDeque<Item>)>,
    /// Nothing more of the living producer arrives there, because something failed.
    failed: [bool; LOGS],
    reports: Vec<Report>,
    /// Cannot be reached.
    pub(super) is_away: bool,
    /// Every row that arrived in the topic, in the order of arrival.
    pub(super) topic: Vec<RowId>,
    pub(super) dead_letters: Vec<OutboxRow>,
    /// Those that a redrive has published, and marked in the same transaction.
    redriven: BTreeSet<RowId>,
    pub(super) parked: BTreeMap<Key, Identity>,
    pub(super) checkpoint: Checkpoint,
    /// What has arrived in the open transaction; None without transactions.
    open: Option<Vec<Item>>,
    /// It was asked to be committed.
    is_committing: bool,
}

impl Kafka {
    /// With the first checkpoint.
    pub(super) fn new(checkpoint: u64, transactions: bool) -> Self {
        let open = transactions.then(Vec::new);
        Self { checkpoint: Lsn(checkpoint).into(), open, ..Self::default() }
    }

    pub(super) fn send(&mut self, report: Report, item: Item) {
        let log = match &item {
            Item::Record(row) | Item::Redriven(row) => row.id.key % PARTITIONS,
            Item::Replayed(partition) => *partition,
            Item::DeadLetter(_) => DEAD_LETTERS,
            Item::Marker(..) => MARKERS,
            Item::Checkpoint(_) => CHECKPOINTS,
        };
        if !self.failed[log] {
            self.on_its_way[log].push_back((report, item));
        }
    }

    /// The next of a log arrives. The row, if it is the topic's.
    pub(super) fn arrive(&mut self, log: usize) -> Option<RowId> {
        if self.is_away {
            return None;
        }
        let (report, item) = self.on_its_way[log].pop_front()?;
        if let Some(row) = refused(&item) {
            self.reports.push(Report::Refused(row));
            self.failed[log] = true;
            self.on_its_way[log].clear();
            return None;
        }
        self.reports.push(report);
        if let Some(open) = &mut self.open {
            open.push(item);
            return None;
        }
        self.append(item)
    }

    /// The transaction is asked to be committed.
    pub(super) fn ask_to_commit(&mut self) {
        assert!(self.on_its_way.iter().all(VecDeque::is_empty), "something of it has not arrived");
        assert!(!std::mem::replace(&mut self.is_committing, true), "one at a time");
    }

    /// It is committed, if that was asked for: those of its rows that are the topic's.
    pub(super) fn commit(&mut self) -> Option<Vec<Shown>> {
        if self.is_away || !std::mem::take(&mut self.is_committing) {
            return None;
        }
        Some(self.show())
    }

    fn show(&mut self) -> Vec<Shown> {
        let items = self.open.as_mut().map(std::mem::take).unwrap_or_default();
        let mut rows = Vec::new();
        for item in items {
            if let Item::Record(row) | Item::Redriven(row) = item {
                rows.push(Shown { row, is_redriven: matches!(item, Item::Redriven(_)) });
            }
            self.append(item);
        }
        rows
    }

    /// Something of a dead producer arrives, behind and before what the living one sends. The row, if it is the topic's.
    pub(super) fn arrive_late(&mut self, rng: &mut Rng) -> Option<RowId> {
        if self.is_away || self.late.is_empty() {
            return None;
        }
        let any = rng.usize(..self.late.len());
        let Some(item) = self.late[any].1.pop_front() else {
            self.late.swap_remove(any);
            return None;
        };
        if refused(&item).is_some() {
            self.late.swap_remove(any);
            return None;
        }
        self.append(item)
    }

    fn append(&mut self, item: Item) -> Option<RowId> {
        match item {
            Item::Record(row) => {
                self.topic.push(row.id);
                return Some(row.id);
            }
            Item::Redriven(row) => {
                self.topic.push(row.id);
                self.redriven.insert(row.id);
                return Some(row.id);
            }
            Item::DeadLetter(row) => self.dead_letters.push(row),
            Item::Marker(key, Some(first)) => drop(self.parked.insert(key, first)),
            Item::Marker(key, None) => drop(self.parked.remove(&key)),
            Item::Checkpoint(checkpoint) => self.checkpoint = checkpoint,
            Item::Replayed(_) => {}
        }
        None
    }

    /// One of the reports that are due, any.
    pub(super) fn report(&mut self, rng: &mut Rng) -> Option<Report> {
        if self.is_away || self.reports.is_empty() {
            return None;
        }
        let any = rng.usize(..self.reports.len());
        Some(self.reports.swap_remove(any))
    }

    /// The producer is gone, and another one fences it, where there are transactions: the rows of one that was committed
    /// although nobody heard of it. Without, a part in front of what it had sent may still arrive.
    pub(super) fn lose_producer(&mut self, rng: &mut Rng) -> Vec<Shown> {
        self.reports.clear();
        self.failed = [false; LOGS];
        if self.open.is_some() {
            self.on_its_way = Default::default();
            let is_committed = std::mem::take(&mut self.is_committing) && rng.bool();
            let rows = if is_committed { self.show() } else { Vec::new() };
            self.open = Some(Vec::new());
            return rows;
        }
        for log in 0..LOGS {
            let mut queue = std::mem::take(&mut self.on_its_way[log]);
            queue.truncate(rng.usize(..=queue.len()));
            let items = queue.into_iter().map(|(_, item)| item);
            if log == MARKERS || log == CHECKPOINTS {
                for item in items {
                    self.append(item);
                }
            } else {
                self.late.push((log, items.collect()));
            }
        }
        Vec::new()
    }

    /// Puts the dead letters of a key back into the topic, as a redrive does. Only those up to `settled` are: before a
    /// later one, an earlier row of the key may still be refused. For the same reason it goes by their identities and
    /// not by the order in which they arrived. Those rows.
    pub(super) fn redrive(&mut self, key: usize, settled: Lsn) -> Vec<RowId> {
        let rows: Vec<RowId> = self.letters(key, settled).iter().map(|row| row.id).collect();
        self.topic.extend(&rows);
        rows
    }

    /// Those dead letters, but for the ones that are marked as published.
    pub(super) fn letters(&self, key: usize, settled: Lsn) -> Vec<OutboxRow> {
        let ours =
            self.dead_letters.iter().filter(|row| row.id.key == key && row.identity.commit_lsn < settled);
        let open = ours.filter(|row| !self.redriven.contains(&row.id));
        let by_identity: BTreeMap<Identity, OutboxRow> = open.map(|row| (row.identity, *row)).collect();
        by_identity.into_values().collect()
    }
}

/// The row, if the broker refuses it.
fn refused(item: &Item) -> Option<OutboxRow> {
    match item {
        Item::Record(row) if row.nature == Nature::RefusedLater => Some(*row),
        _ => None,
    }
}

/// The aggregate of a key.
pub(super) fn aggregate(key: usize) -> Key {
    assert!(key < KEYS);
    Key { aggregate_type: "k".into(), aggregate_id: key.to_string() }
}

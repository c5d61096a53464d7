//! What must hold of what arrived, whatever happened.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::{
    kafka::{Kafka, Shown},
    postgres::{KEYS, OutboxRow, Postgres, RowId, Transaction},
};
use crate::Lsn;

/// Watches the topic.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Rows that were in the topic, or need not be.
    done: BTreeSet<RowId>,
    /// Rows that policies have kept out of the topic for good: left out, or dead-lettered without being parked.
    excused: HashSet<RowId>,
    /// The first row of each key that is not done.
    next: BTreeMap<usize, u64>,
    /// Of each transaction of Postgres, the last of Kafka's that has rows of it.
    committed_in: BTreeMap<Lsn, u64>,
    /// Kafka's transactions so far.
    commits: u64,
    /// Transactions of Postgres whose end did not come in time.
    late: BTreeSet<Lsn>,
}

impl Ledger {
    /// The transaction's end did not come for so long that it may be split.
    pub(super) fn late(&mut self, commit_lsn: u64) {
        self.late.insert(Lsn(commit_lsn));
    }

    /// The relay decided, by a policy, that the row does not go to the topic.
    pub(super) fn excuse(&mut self, row: RowId) {
        self.excused.insert(row);
        self.done.insert(row);
    }

    /// A row arrived in the topic: first occurrences of a key come in order, without a gap.
    pub(super) fn arrived(&mut self, row: RowId) {
        if self.done.contains(&row) {
            return;
        }
        let next = self.next.entry(row.key).or_insert(1);
        while self.done.contains(&RowId { key: row.key, n: *next }) {
            *next += 1;
        }
        assert_eq!(row.n, *next, "a row of key {} comes before that one", row.key);
        self.done.insert(row);
    }

    /// One of Kafka's transactions is committed. Each row comes once, and one of Postgres' that fits into one of Kafka's
    /// is in one of them.
    pub(super) fn committed(&mut self, rows: &[Shown], postgres: &Postgres) {
        self.commits += 1;
        for Shown { row, is_redriven } in rows {
            assert!(
                !self.done.contains(&row.id) || self.excused.contains(&row.id),
                "{:?} is published twice",
                row.id
            );
            self.arrived(row.id);
            if *is_redriven {
                continue;
            }
            let before = self.committed_in.insert(row.identity.commit_lsn, self.commits);
            let is_split = before.is_some_and(|before| before < self.commits);
            let commit_lsn = row.identity.commit_lsn;
            let may_be = !postgres.is_small(commit_lsn) || self.late.contains(&commit_lsn);
            assert!(!is_split || may_be, "{:?} is split", row.identity);
        }
    }

    /// A status update confirms this much: all that the server would leave out from now on is in Kafka.
    pub(super) fn confirmed(&self, lsn: u64, postgres: &Postgres, kafka: &Kafka) {
        let letters = kafka.dead_letters.iter().map(|row| &row.id);
        let has: HashSet<&RowId> = kafka.topic.iter().chain(letters).chain(&self.excused).collect();
        for transaction in postgres.log.iter().filter(|t| Postgres::is_forgotten(t, lsn)) {
            for OutboxRow { id, .. } in transaction.rows() {
                assert!(has.contains(&id), "{id:?} is confirmed at {lsn:X} and not in Kafka");
            }
        }
    }

    /// At the end everything is done.
    pub(super) fn finish(&self, postgres: &Postgres) {
        for row in postgres.log.iter().flat_map(Transaction::rows).filter(|row| row.id.key < KEYS) {
            assert!(self.done.contains(&row.id), "{:?} never arrived", row.id);
        }
    }
}

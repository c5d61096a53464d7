//! The server: transactions in a log, a slot with a confirmed LSN of which a crash may forget the latest, and the
//! stream that a session reads.

use std::collections::VecDeque;

use fastrand::Rng;

use crate::{Lsn, pgoutput::tests::encode, record::Identity};

pub(super) const KEYS: usize = 7;
/// So many rows that go the usual way always fit into one of Kafka's transactions here.
const SMALL_ROWS: usize = 3;
const OUTBOX: u32 = 1;
const OTHER: u32 = 2;
const COLUMNS: [(&str, u32); 6] =
    [("id", 25), ("aggregatetype", 25), ("aggregateid", 25), ("type", 25), ("payload", 25), ("headers", 25)];

/// A row of the outbox: its number counts the rows of its key from 1 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct RowId {
    pub(super) key: usize,
    pub(super) n: u64,
}

/// What becomes of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nature {
    Good,
    /// Its headers cannot be read.
    BadHeaders,
    /// It has no key: nobody's row, in an order of its own.
    NoKey,
    /// The producer does not take it.
    TooLarge,
    /// The broker does not take it, and says so later.
    RefusedLater,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct OutboxRow {
    pub(super) id: RowId,
    pub(super) nature: Nature,
    pub(super) identity: Identity,
    filler: usize,
}

#[derive(Debug, Clone, Copy)]
enum Change {
    Row(OutboxRow),
    OtherTable,
    Deleted,
    Message,
    /// Not of the transaction, only in its midst, and not counted.
    MessageAtOnce,
}

/// A committed transaction.
#[derive(Debug)]
pub(super) struct Transaction {
    pub(super) commit_lsn: u64,
    pub(super) end_lsn: u64,
    changes: Vec<Change>,
}

impl Transaction {
    pub(super) fn rows(&self) -> impl Iterator<Item = OutboxRow> {
        self.changes.iter().filter_map(|change| if let Change::Row(row) = change { Some(*row) } else { None })
    }
}

#[derive(Debug)]
pub(super) struct Postgres {
    pub(super) log: Vec<Transaction>,
    /// The end of the log.
    pub(super) lsn: u64,
    pub(super) confirmed: u64,
    /// What it would know after a crash.
    confirmed_on_disk: u64,
    /// The last row of each key, and of those without one.
    last_of_key: [u64; KEYS + 1],
    /// One row of so many is poison; none when 0.
    poison_one_in: u8,
}

impl Postgres {
    pub(super) fn new(rng: &mut Rng) -> Self {
        // Some worlds begin just below the place where the lower half of an LSN wraps.
        let lsn = if rng.bool() { 0xFFFF_FF00 + rng.u64(..0x100) } else { rng.u64(1..1000) };
        Self {
            log: Vec::new(),
            lsn,
            confirmed: lsn,
            confirmed_on_disk: lsn,
            last_of_key: [0; KEYS + 1],
            poison_one_in: *rng.choice([0, 0, 40, 15, 5].as_slice()).unwrap_or(&0),
        }
    }

    fn nature(&self, rng: &mut Rng) -> Nature {
        if self.poison_one_in == 0 || rng.u8(..self.poison_one_in) != 0 {
            return Nature::Good;
        }
        let all = [Nature::BadHeaders, Nature::NoKey, Nature::TooLarge, Nature::RefusedLater];
        all[rng.usize(..all.len())]
    }

    /// A transaction commits.
    pub(super) fn commit(&mut self, rng: &mut Rng) {
        // Its commit record may come right behind the one before: then one's end is the other's LSN.
        let commit_lsn = self.lsn + rng.u64(..3) * rng.u64(..20);
        let end_lsn = commit_lsn + rng.u64(1..4);
        let mut changes = Vec::new();
        let size = if rng.u8(..10) == 0 { rng.usize(..40) } else { rng.usize(..4) };
        let mut seq = 0;
        for _ in 0..size {
            let change = match rng.u8(..9) {
                0 => Change::OtherTable,
                1 => Change::Deleted,
                2 => Change::Message,
                3 => Change::MessageAtOnce,
                _ => {
                    let nature = self.nature(rng);
                    let key = if nature == Nature::NoKey { KEYS } else { rng.usize(..KEYS) };
                    self.last_of_key[key] += 1;
                    let id = RowId { key, n: self.last_of_key[key] };
                    let identity = Identity { commit_lsn: Lsn(commit_lsn), seq };
                    Change::Row(OutboxRow { id, nature, identity, filler: rng.usize(..200) })
                }
            };
            seq += u64::from(!matches!(change, Change::MessageAtOnce));
            changes.push(change);
        }
        self.lsn = end_lsn;
        self.log.push(Transaction { commit_lsn, end_lsn, changes });
    }

    /// Other databases write to the same log.
    pub(super) fn write_elsewhere(&mut self, rng: &mut Rng) {
        self.lsn += rng.u64(..20);
    }

    /// The slot is written to disk.
    pub(super) fn save_slot(&mut self) {
        self.confirmed_on_disk = self.confirmed;
    }

    /// Whether anything was forgotten.
    pub(super) fn crash(&mut self) -> bool {
        std::mem::replace(&mut self.confirmed, self.confirmed_on_disk) > self.confirmed_on_disk
    }

    /// As the server does: a transaction is left out when its commit record begins before what is confirmed.
    pub(super) fn is_forgotten(transaction: &Transaction, confirmed: u64) -> bool {
        transaction.commit_lsn < confirmed
    }

    /// Whether a transaction is far from filling one of Kafka's, and all its rows go the usual way.
    pub(super) fn is_small(&self, commit_lsn: Lsn) -> bool {
        let transaction = self.log.iter().find(|t| Lsn(t.commit_lsn) == commit_lsn).expect("it was written");
        transaction.rows().all(|row| row.nature == Nature::Good) && transaction.rows().count() <= SMALL_ROWS
    }

    pub(super) fn row(&self, id: RowId) -> OutboxRow {
        let mut rows = self.log.iter().flat_map(Transaction::rows);
        rows.find(|row| row.id == id).expect("a row that was written")
    }
}

/// A message of the stream.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) bytes: Vec<u8>,
    pub(super) start: u64,
}

/// What a walsender does for one session.
#[derive(Debug)]
pub(super) struct Walsender {
    /// The next transaction to look at.
    next: usize,
    confirmed_at_start: u64,
    queue: VecDeque<Sent>,
    /// The end of what was sent.
    sent_to: u64,
    described: [bool; 3],
}

impl Walsender {
    /// Of the transaction that is being sent, or was last.
    pub(super) fn commit_lsn(&self, postgres: &Postgres) -> u64 {
        postgres.log[self.next - 1].commit_lsn
    }

    pub(super) fn new(postgres: &Postgres) -> Self {
        let confirmed = postgres.confirmed;
        Self {
            next: 0,
            confirmed_at_start: confirmed,
            queue: VecDeque::new(),
            sent_to: confirmed,
            described: [false; 3],
        }
    }

    /// The next message.
    pub(super) fn read(&mut self, postgres: &Postgres, rng: &mut Rng) -> Option<Sent> {
        while self.queue.is_empty() {
            let transaction = postgres.log.get(self.next)?;
            self.next += 1;
            if !Postgres::is_forgotten(transaction, self.confirmed_at_start) {
                self.send(transaction, rng);
            }
        }
        let sent = self.queue.pop_front();
        if let Some(end) = sent.as_ref().filter(|sent| sent.bytes[0] == b'C') {
            self.sent_to = self.sent_to.max(end.start);
        }
        sent
    }

    fn send(&mut self, transaction: &Transaction, rng: &mut Rng) {
        let Transaction { commit_lsn, end_lsn, changes } = transaction;
        // All changes may share one LSN.
        self.put(*commit_lsn, encode::begin(*commit_lsn, 0));
        for change in changes {
            match change {
                Change::Row(row) => {
                    self.describe(OUTBOX, "outbox", *commit_lsn, rng);
                    self.put(*commit_lsn, encode_row(*row));
                }
                Change::OtherTable => {
                    self.describe(OTHER, "other", *commit_lsn, rng);
                    self.put(*commit_lsn, encode::insert(OTHER, &[Some(b"1"), None, None, None, None, None]));
                }
                Change::Deleted => self.put(*commit_lsn, encode::delete(OUTBOX)),
                Change::Message => self.put(*commit_lsn, encode::message(true, "elsewhere", b"{}")),
                Change::MessageAtOnce => self.put(*commit_lsn, encode::message(false, "elsewhere", b"{}")),
            }
        }
        self.put(*end_lsn, encode::commit(*commit_lsn, *end_lsn, 0));
    }

    fn put(&mut self, start: u64, bytes: Vec<u8>) {
        self.queue.push_back(Sent { bytes, start });
    }

    /// A table is described before its first change, and again when it may have changed.
    fn describe(&mut self, oid: u32, name: &str, start: u64, rng: &mut Rng) {
        let described = std::mem::replace(&mut self.described[oid as usize], true);
        if !described || rng.u8(..20) == 0 {
            self.put(start, encode::relation(oid, "public", name, &COLUMNS));
        }
    }

    /// The position of a keepalive. Behind a whole transaction that is its end, or later when there is nothing more
    /// for us; inside one, it may already be that one's end, or the end of the log.
    pub(super) fn keepalive(&mut self, postgres: &Postgres, rng: &mut Rng) -> u64 {
        let inside = self.queue.front().is_some_and(|next| next.bytes[0] != b'B');
        if inside {
            return if rng.bool() {
                postgres.lsn
            } else {
                self.queue.back().map_or(0, |commit| commit.start)
            };
        }
        if self.is_caught_up(postgres) {
            self.sent_to = self.sent_to.max(postgres.lsn);
        }
        self.sent_to
    }

    pub(super) fn is_caught_up(&self, postgres: &Postgres) -> bool {
        self.queue.is_empty() && self.next == postgres.log.len()
    }
}

fn encode_row(row: OutboxRow) -> Vec<u8> {
    let OutboxRow { id: RowId { key, n }, nature, filler, .. } = row;
    let (id, key, filler) = (format!("{key}.{n}"), key.to_string(), "x".repeat(filler));
    let key = (nature != Nature::NoKey).then_some(key.as_bytes());
    let headers = if nature == Nature::BadHeaders { &b"["[..] } else { b"{}" };
    encode::insert(
        OUTBOX,
        &[Some(id.as_bytes()), Some(b"k"), key, Some(b"t"), Some(filler.as_bytes()), Some(headers)],
    )
}

/// The row that a record's id tells.
pub(super) fn row_id(text: &str) -> RowId {
    let (key, n) = text.split_once('.').expect("ids are key.number");
    RowId { key: key.parse().expect("a number"), n: n.parse().expect("a number") }
}

//! What happened to a relay, kept naively: every row, ticket and status update ever, never forgotten.

use std::{collections::BTreeSet, time::Duration};

use proptest::{prelude::*, sample::Index};

use crate::{
    Lsn, Relay, StatusUpdate,
    pgoutput::tests::encode,
    poison::{Policies, Policy},
    progress::Ticket,
    record::Identity,
    relay::{Delivery, Halt, Options, Past},
    source::tests::source_to,
};

const OUTBOX: u32 = 1;
pub(super) const START: Lsn = Lsn(0xFFFF_FFF0);
pub(super) const LIMIT_BYTES: usize = 3000;
pub(super) const STATUS_INTERVAL: Duration = Duration::from_secs(10);

/// One thing that happens.
#[derive(Debug, Clone)]
pub(super) enum Op {
    /// A row of a key, in the open transaction or a new one.
    Row {
        key: u8,
        is_poison: bool,
    },
    /// A change that is none of ours.
    Other,
    Commit {
        gap: u64,
    },
    /// So far behind the last commit.
    Keepalive {
        ahead: u64,
        asks: bool,
    },
    /// Kafka acknowledges any one of those that it has not.
    Settle(Index),
    Checkpoint,
    Checkpointed,
    Status,
    Wait(Duration),
}

pub(super) fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => (0..4_u8, prop::bool::weighted(0.15)).prop_map(|(key, is_poison)| Op::Row { key, is_poison }),
        1 => Just(Op::Other),
        4 => (0..3_u64).prop_map(|gap| Op::Commit { gap }),
        2 => (0..5_u64, any::<bool>()).prop_map(|(ahead, asks)| Op::Keepalive { ahead, asks }),
        8 => any::<Index>().prop_map(Op::Settle),
        2 => Just(Op::Checkpoint),
        2 => Just(Op::Checkpointed),
        2 => Just(Op::Status),
        2 => (0..400_u64).prop_map(|ms| Op::Wait(Duration::from_millis(ms))),
    ];
    prop::collection::vec(op, 0..150)
}

#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) key: u8,
    pub(super) is_poison: bool,
    pub(super) identity: Identity,
    /// What it became, unless it was left out.
    pub(super) sent: Option<Sent>,
}

#[derive(Debug, Clone)]
pub(super) struct Sent {
    pub(super) is_dead_letter: bool,
    pub(super) cost_bytes: usize,
    /// The record's, and that of the marker if it parked its key.
    pub(super) tickets: Vec<Ticket>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Transaction {
    pub(super) commit_lsn: Lsn,
    /// None while it is open.
    pub(super) end_lsn: Option<Lsn>,
    pub(super) rows: Vec<Row>,
    changes: u64,
}

/// A relay and all that ever happened to it.
#[derive(Debug)]
pub(super) struct History {
    pub(super) relay: Relay,
    pub(super) now: Duration,
    pub(super) transactions: Vec<Transaction>,
    lsn: u64,
    /// The last one.
    pub(super) keepalive: Lsn,
    pub(super) tickets: BTreeSet<Ticket>,
    pub(super) settled: BTreeSet<Ticket>,
    /// When each checkpoint was taken, and whether Kafka has it.
    pub(super) checkpoints: Vec<(Duration, Lsn, bool)>,
    pub(super) statuses: Vec<(Duration, StatusUpdate)>,
}

pub(super) fn options(policy: Policy) -> Options {
    Options {
        delivery: Delivery::AtLeastOnce,
        source: source_to("t"),
        policies: Policies::all(policy),
        dead_letter_topic: "dead".into(),
        dead_letter_source: "1/slot".into(),
        in_flight_limit_bytes: LIMIT_BYTES,
        status_interval: STATUS_INTERVAL,
        silence_limit: Duration::from_mins(1),
    }
}

impl History {
    pub(super) fn new(policy: Policy) -> Self {
        let mut relay = Relay::new(options(policy), START, Duration::ZERO);
        relay.recall(Past { checkpoint: START.into(), ..Past::default() });
        relay.set_listening(true, Duration::ZERO);
        let columns =
            ["id", "aggregatetype", "aggregateid", "type", "payload", "headers"].map(|name| (name, 25));
        let relation = encode::relation(OUTBOX, "public", "outbox", &columns);
        assert!(relay.handle_wal(START, &relation, Duration::ZERO).expect("a relation").is_none());
        Self {
            relay,
            now: Duration::ZERO,
            transactions: Vec::new(),
            lsn: START.0,
            keepalive: START,
            tickets: BTreeSet::new(),
            settled: BTreeSet::new(),
            checkpoints: Vec::new(),
            statuses: Vec::new(),
        }
    }

    /// It happens.
    pub(super) fn apply(&mut self, op: &Op) -> Result<(), Halt> {
        match op {
            Op::Row { key, is_poison } if self.relay.wants_input() => return self.row(*key, *is_poison),
            Op::Row { .. } => {}
            Op::Other => {
                self.begin();
                self.feed(&encode::delete(OUTBOX))?;
                self.open().changes += 1;
            }
            Op::Commit { gap } => {
                self.begin();
                let commit_lsn = self.open().commit_lsn;
                self.lsn = commit_lsn.0 + 1;
                let end_lsn = Lsn(self.lsn);
                self.feed(&encode::commit(commit_lsn.0, end_lsn.0, 0))?;
                self.open().end_lsn = Some(end_lsn);
                // The next commit may begin where this one ends.
                self.lsn += gap;
            }
            Op::Keepalive { ahead, asks } => {
                let is_open = self.relay.is_in_transaction();
                self.lsn += if is_open { 0 } else { *ahead };
                // In the midst of a transaction too the server may tell a position behind it.
                self.keepalive = Lsn(self.lsn + if is_open { 3 } else { 0 });
                self.relay.handle_keepalive(self.keepalive, *asks, self.now)?;
            }
            Op::Settle(index) => {
                let open: Vec<Ticket> = self.tickets.difference(&self.settled).copied().collect();
                if !open.is_empty() {
                    let ticket = *index.get(&open);
                    self.relay.handle_settled(ticket)?;
                    self.settled.insert(ticket);
                }
            }
            Op::Checkpoint => {
                let lsn = self.relay.take_checkpoint(self.now);
                self.checkpoints.extend(lsn.map(|checkpoint| (self.now, checkpoint.lsn, false)));
            }
            Op::Checkpointed => {
                self.relay.handle_checkpointed();
                if let Some(last) = self.checkpoints.last_mut() {
                    last.2 = true;
                }
            }
            Op::Status => {
                let status = self.relay.take_status(self.now);
                self.statuses.extend(status.map(|status| (self.now, status)));
            }
            Op::Wait(time) => self.now += *time,
        }
        Ok(())
    }

    fn open(&mut self) -> &mut Transaction {
        self.transactions.last_mut().expect("it has begun")
    }

    fn begin(&mut self) {
        if self.transactions.last().is_none_or(|t| t.end_lsn.is_some()) {
            let commit_lsn = Lsn(self.lsn);
            self.feed(&encode::begin(commit_lsn.0, 0)).expect("none is open");
            self.transactions.push(Transaction { commit_lsn, ..Transaction::default() });
        }
    }

    fn feed(&mut self, bytes: &[u8]) -> Result<(), Halt> {
        assert!(self.relay.handle_wal(Lsn(self.lsn), bytes, self.now)?.is_none());
        Ok(())
    }

    fn row(&mut self, key: u8, is_poison: bool) -> Result<(), Halt> {
        self.begin();
        let (key_text, headers) = (key.to_string(), if is_poison { "[" } else { "{}" });
        let payload = "x".repeat(usize::from(key) * 50);
        let values = ["id", "a", &key_text, "t", &payload, headers].map(|text| Some(text.as_bytes()));
        let bytes = encode::insert(OUTBOX, &values);
        let seq = self.open().changes;
        self.open().changes += 1;
        let identity = Identity { commit_lsn: self.open().commit_lsn, seq };
        let sent = self.relay.handle_wal(Lsn(self.lsn), &bytes, self.now)?.map(|out| {
            assert_eq!(out.record.identity, identity, "counted from 0, every change, before any policy");
            Sent {
                is_dead_letter: out.is_dead_letter,
                cost_bytes: out.record.cost_bytes(),
                tickets: vec![out.ticket],
            }
        });
        let markers = self.relay.take_markers();
        let sent = sent.map(|mut sent| {
            sent.tickets.extend(markers.iter().map(|marker| marker.ticket));
            sent
        });
        self.tickets.extend(sent.iter().flat_map(|sent| sent.tickets.clone()));
        self.open().rows.push(Row { key, is_poison, identity, sent });
        Ok(())
    }

    /// Whether each record of it, and its markers, is acknowledged.
    pub(super) fn is_settled(&self, transaction: &Transaction) -> bool {
        let mut tickets =
            transaction.rows.iter().flat_map(|row| row.sent.iter().flat_map(|sent| &sent.tickets));
        tickets.all(|ticket| self.settled.contains(ticket))
    }

    /// Whether all that was read is of transactions that are complete and settled.
    pub(super) fn is_idle(&self) -> bool {
        self.transactions.iter().all(|t| t.end_lsn.is_some() && self.is_settled(t))
    }

    /// The last position that Kafka has.
    pub(super) fn checkpointed(&self) -> Lsn {
        self.checkpoints.iter().filter(|(_, _, taken)| *taken).map(|(_, lsn, _)| *lsn).max().unwrap_or(START)
    }
}

//! Everything that can happen, one thing at a time.

mod faults;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    time::Duration,
};

use fastrand::Rng;

use super::{
    kafka::{Item, Kafka, LOGS, Report},
    ledger::Ledger,
    postgres::{Nature, OutboxRow, Postgres, Walsender, row_id},
};
use crate::{
    Lsn, Outgoing, Relay, StatusUpdate,
    poison::{Kind, Poison, Policies, Policy},
    record::Identity,
    relay::{Delivery, Options, Past},
    source::tests::source_to,
    transactions::Sizes,
};

const LIMIT_BYTES: usize = 4_000;
/// Room for three rows, or one that is dead-lettered and its marker.
const SIZES: Sizes =
    Sizes { bytes: 2_000, time: Duration::from_millis(100), split_after: Duration::from_secs(30) };
/// More than any record here, and a marker with it, costs.
const RECORD_BYTES: usize = 1_500;
const STATUS_INTERVAL: Duration = Duration::from_secs(10);
const DEAD_LETTERS: &str = "dead";

#[derive(Debug)]
pub(super) struct World {
    pub(super) rng: Rng,
    now: Duration,
    postgres: Postgres,
    kafka: Kafka,
    ledger: Ledger,
    policies: Policies,
    /// What the process remembers of refusals from session to session.
    refused: HashMap<Identity, Poison>,
    apart: Option<Lsn>,
    delivery: Delivery,
    // The session.
    relay: Relay,
    walsender: Walsender,
    /// Sent to the server, not there yet.
    statuses: VecDeque<StatusUpdate>,
    last_status: Duration,
    listening: bool,
    /// The last that was reported in this session.
    reported: Lsn,
    /// What the checkpoints cover that Kafka has ever acknowledged.
    checkpointed: Lsn,
    checkpoint_in_flight: Option<Lsn>,
    /// What has happened, so that a test can tell that it does.
    pub(super) seen: BTreeSet<&'static str>,
}

fn start(
    delivery: Delivery,
    postgres: &Postgres,
    kafka: &Kafka,
    policies: Policies,
    (refused, apart): (HashMap<Identity, Poison>, Option<Lsn>),
    now: Duration,
) -> Relay {
    let options = Options {
        delivery,
        source: source_to("${aggregatetype}"),
        policies,
        dead_letter_topic: DEAD_LETTERS.into(),
        dead_letter_source: "1/slot".into(),
        in_flight_limit_bytes: LIMIT_BYTES,
        status_interval: STATUS_INTERVAL,
        silence_limit: Duration::from_mins(1),
    };
    let past = Past { checkpoint: kafka.checkpoint, refused, parked: kafka.parked.clone(), apart };
    let mut relay = Relay::new(options, Lsn(postgres.confirmed), now);
    relay.recall(past);
    relay
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let (postgres, now) = (Postgres::new(&mut rng), Duration::ZERO);
        let delivery = if rng.bool() { Delivery::ExactlyOnce(SIZES) } else { Delivery::AtLeastOnce };
        let kafka = Kafka::new(postgres.confirmed, delivery != Delivery::AtLeastOnce);
        let all = [Policy::Halt, Policy::DeadLetter, Policy::ParkKey, Policy::ParkKey, Policy::Skip];
        let mut policies = Policies::default();
        for kind in Kind::CONFIGURABLE {
            policies = policies.with(kind, all[rng.usize(..all.len())]);
        }
        Self {
            relay: start(delivery, &postgres, &kafka, policies, (HashMap::new(), None), now),
            walsender: Walsender::new(&postgres),
            reported: Lsn(postgres.confirmed),
            checkpointed: kafka.checkpoint.lsn,
            checkpoint_in_flight: None,
            rng,
            now,
            postgres,
            kafka,
            ledger: Ledger::default(),
            policies,
            refused: HashMap::new(),
            apart: None,
            delivery,
            statuses: VecDeque::new(),
            last_status: now,
            listening: false,
            seen: BTreeSet::new(),
        }
    }

    pub(super) fn step(&mut self) {
        self.now += Duration::from_millis(self.rng.u64(..40));
        match self.rng.u16(..1000) {
            0..150 => self.postgres.commit(&mut self.rng),
            150..170 => self.postgres.write_elsewhere(&mut self.rng),
            170..480 => self.read(),
            480..530 => self.keepalive(),
            530..690 => self.arrive(),
            690..700 => self.arrive_late(),
            700..820 => self.hear_kafka(),
            820..840 => self.hear_of_commit(),
            840..870 => self.write_checkpoint(),
            870..920 => self.tell_status(),
            920..950 => self.status_arrives(),
            950..955 => self.crash(),
            955..960 => self.lose_session(),
            960..963 => self.crash_postgres(),
            963..970 => self.postgres.save_slot(),
            970..974 => self.toggle_kafka(),
            974..980 => self.wait_for_deadline(),
            980..984 => self.redrive(),
            984..985 => self.shut_down_postgres(),
            985..987 => self.relay.set_hurry(self.rng.bool()),
            987..989 => self.set_listening(false),
            989..999 => self.replay(),
            _ => self.set_listening(true),
        }
        self.check();
    }

    fn check(&mut self) {
        let in_flight = self.relay.progress().in_flight_bytes();
        assert!(in_flight < LIMIT_BYTES + RECORD_BYTES, "{in_flight} bytes are in flight");
        let waits = in_flight > 0 || self.relay.is_committing() || self.relay.next_deadline() <= self.now;
        assert!(waits || self.relay.wants_input(), "it waits for nothing");
        let confirmed = self.relay.confirmed();
        assert!(confirmed >= self.reported, "the confirmed LSN goes back");
        let covered = self.checkpointed.max(self.reported);
        assert!(confirmed <= covered, "{confirmed} would be confirmed, and checkpoints cover {covered}");
        assert!(!self.relay.is_silent(self.now) || self.listening, "the watchdog rests while nobody listens");
    }

    fn set_listening(&mut self, listening: bool) {
        self.listening = listening;
        self.relay.set_listening(listening, self.now);
    }

    fn read(&mut self) {
        if !self.listening || !self.relay.wants_input() {
            if self.listening {
                self.seen.insert("input is paused at the bound");
            }
            return;
        }
        let Some(sent) = self.walsender.read(&self.postgres, &mut self.rng) else { return };
        let passed_over = self.relay.passed_over();
        let told = match self.relay.handle_wal(Lsn(sent.start), &sent.bytes, self.now) {
            Ok(None) => None,
            Ok(Some(Outgoing { ticket, record, is_dead_letter })) => {
                assert_eq!(is_dead_letter, record.topic == DEAD_LETTERS);
                Some((ticket, row_id(record.row_id), record.identity, is_dead_letter))
            }
            Err(halt) => return self.halt(&halt),
        };
        if self.relay.passed_over() > passed_over {
            self.seen.insert("what is published is passed over");
        }
        self.excuse_diverted();
        let Some((ticket, id, identity, is_dead_letter)) = told else { return };
        let row = self.postgres.row(id);
        assert_eq!(identity, row.identity, "{id:?} is told by another identity");
        if row.nature == Nature::TooLarge && !is_dead_letter {
            self.seen.insert("a record is refused before it is sent");
            let poison = Poison::TooLarge { topic: "k".into(), bytes: None, limit_bytes: None };
            match self.relay.refuse(ticket, &sent.bytes, poison) {
                Ok(Some(out)) => {
                    assert!(out.is_dead_letter && out.ticket == ticket);
                    self.kafka.send(Report::Settled(ticket), Item::DeadLetter(row));
                }
                Ok(None) => {}
                Err(halt) => return self.halt(&halt),
            }
            self.excuse_diverted();
        } else {
            let item = if is_dead_letter { Item::DeadLetter(row) } else { Item::Record(row) };
            self.kafka.send(Report::Settled(ticket), item);
        }
        self.send_markers();
    }

    /// Rows that policies keep out of the topic.
    fn excuse_diverted(&mut self) {
        for diversion in self.relay.take_diversions() {
            let id = diversion.what.split(' ').nth(2).expect("outbox row ID");
            if diversion.policy != Policy::ParkKey {
                self.ledger.excuse(row_id(id));
            }
            self.seen.insert(match diversion.policy {
                Policy::ParkKey => "a row is parked",
                Policy::DeadLetter => "a row is dead-lettered",
                _ => "a row is left out",
            });
        }
    }

    fn send_markers(&mut self) {
        for marker in self.relay.take_markers() {
            self.kafka.send(Report::Settled(marker.ticket), Item::Marker(marker.key, marker.parked));
        }
    }

    fn keepalive(&mut self) {
        if !self.listening {
            return;
        }
        let end = self.walsender.keepalive(&self.postgres, &mut self.rng);
        if self.relay.is_in_transaction() {
            self.seen.insert("a keepalive comes in the midst of a transaction");
        }
        let asks = self.rng.bool();
        self.relay.handle_keepalive(Lsn(end), asks, self.now).expect("the log is its own");
        assert!(!asks || self.relay.next_deadline() <= self.now, "an answer is due at once");
    }

    fn arrive(&mut self) {
        let log = self.rng.usize(..LOGS);
        if let Some(row) = self.kafka.arrive(log) {
            self.ledger.arrived(row);
        }
    }

    fn arrive_late(&mut self) {
        if let Some(row) = self.kafka.arrive_late(&mut self.rng) {
            self.seen.insert("a record of a dead producer arrives late");
            self.ledger.arrived(row);
        }
    }

    fn hear_kafka(&mut self) {
        match self.kafka.report(&mut self.rng) {
            None => {}
            Some(Report::Settled(ticket)) => self.relay.handle_settled(ticket).expect("it is in flight"),
            Some(Report::Checkpointed) => {
                self.relay.handle_checkpointed();
                if self.delivery == Delivery::AtLeastOnce {
                    let lsn = self.checkpoint_in_flight.take().expect("one was in flight");
                    self.checkpointed = self.checkpointed.max(lsn);
                }
            }
            Some(Report::Refused(OutboxRow { identity, .. })) => {
                self.seen.insert("the broker refuses a record");
                self.refused.insert(identity, Poison::Refused { topic: "k".into(), why: "old".into() });
                self.lose_session();
            }
        }
    }

    fn write_checkpoint(&mut self) {
        if self.relay.is_in_transaction()
            && self.relay.transaction_age(self.now).is_some_and(|age| age >= SIZES.split_after)
        {
            self.ledger.late(self.walsender.commit_lsn(&self.postgres));
        }
        if let Some(checkpoint) = self.relay.take_checkpoint(self.now) {
            // What a checkpoint says is true when it is written, or committed: a new session relies on it.
            if self.delivery == Delivery::AtLeastOnce {
                self.ledger.confirmed(checkpoint.lsn.0, &self.postgres, &self.kafka);
            }
            assert_eq!(self.checkpoint_in_flight.replace(checkpoint.lsn), None, "one at a time");
            self.kafka.send(Report::Checkpointed, Item::Checkpoint(checkpoint));
        }
        if self.relay.take_commit() {
            self.kafka.ask_to_commit();
        }
    }

    fn hear_of_commit(&mut self) {
        let Some(rows) = self.kafka.commit() else { return };
        self.ledger.committed(&rows, &self.postgres);
        self.ledger.confirmed(self.kafka.checkpoint.lsn.0, &self.postgres, &self.kafka);
        self.relay.handle_committed();
        let lsn = self.checkpoint_in_flight.take().expect("one was in flight");
        self.checkpointed = self.checkpointed.max(lsn);
    }

    fn tell_status(&mut self) {
        let Some(status) = self.relay.take_status(self.now) else { return };
        assert!(status.confirmed >= self.reported && status.received >= status.confirmed);
        assert!(status.received.0 <= self.postgres.lsn, "more is received than was written");
        self.ledger.confirmed(status.confirmed.0, &self.postgres, &self.kafka);
        self.reported = status.confirmed;
        self.last_status = self.now;
        self.statuses.push_back(status);
    }

    fn status_arrives(&mut self) {
        if let Some(status) = self.statuses.pop_front() {
            // As the server does: it never goes back by itself.
            self.postgres.confirmed = self.postgres.confirmed.max(status.confirmed.0);
        }
    }

    /// Nothing happens but time: the next status update is in time, also with Kafka away and input paused.
    fn wait_for_deadline(&mut self) {
        let deadline = self.relay.next_deadline();
        assert!(deadline <= self.last_status.max(self.now) + STATUS_INTERVAL, "status updates come too late");
        self.now = self.now.max(deadline);
        if self.relay.is_silent(self.now) {
            return self.lose_session();
        }
        self.write_checkpoint();
        self.tell_status();
        assert!(self.now < self.last_status + STATUS_INTERVAL, "a status update is missing");
    }
}

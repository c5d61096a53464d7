//! What fails, and what people and servers do about it.

use std::time::Duration;

use super::{World, start};
use crate::{
    Lsn,
    poison::Policy,
    relay::{Delivery, Halt},
    sim::{
        kafka::{Item, LOGS, PARTITIONS, Report, aggregate},
        postgres::{KEYS, Walsender},
    },
};

impl World {
    /// The relay stops, and will again, until a person decides otherwise.
    pub(super) fn halt(&mut self, halt: &Halt) {
        let Halt::Poison { poison, .. } = halt else { panic!("{halt}") };
        assert_eq!(self.policies.of(poison.kind()), Policy::Halt);
        if let Some(transaction) = self.relay.entangled() {
            self.seen.insert("a row halts behind others in one of Kafka's transactions");
            assert_ne!(self.apart, Some(transaction), "what is before it is committed");
            self.apart = Some(transaction);
            return self.lose_session();
        }
        self.seen.insert("the relay halts");
        if let Delivery::ExactlyOnce(_) = self.delivery
            && self.relay.is_in_transaction()
        {
            // What is before it is committed.
            let commit_lsn = self.walsender.commit_lsn(&self.postgres);
            self.ledger.confirmed(commit_lsn, &self.postgres, &self.kafka);
        }
        if self.rng.bool() {
            let others = [Policy::DeadLetter, Policy::ParkKey, Policy::Skip];
            self.policies = self.policies.with(poison.kind(), others[self.rng.usize(..3)]);
        }
        self.crash();
    }

    pub(super) fn toggle_kafka(&mut self) {
        self.kafka.is_away = !self.kafka.is_away;
        // It comes back without what was sent to it.
        if !self.kafka.is_away && self.rng.bool() {
            self.seen.insert("Kafka comes back without what was sent to it");
            self.lose_session();
        }
    }

    /// The process dies: it remembers nothing.
    pub(super) fn crash(&mut self) {
        self.refused.clear();
        self.lose_session();
    }

    pub(super) fn crash_postgres(&mut self) {
        if self.postgres.crash() {
            self.seen.insert("Postgres forgets what was confirmed");
        }
        self.lose_session();
    }

    /// The connection is cut, or a delivery fails: a new session with a new producer. What the relay told the server
    /// arrives in part.
    pub(super) fn lose_session(&mut self) {
        for _ in 0..self.rng.usize(..=self.statuses.len()) {
            self.status_arrives();
        }
        if self.checkpoint_in_flight.is_some() {
            self.seen.insert("a session ends with a checkpoint on its way");
        }
        if !self.statuses.is_empty() {
            self.seen.insert("a status update is lost");
        }
        if self.relay.is_in_transaction() {
            self.seen.insert("a session ends in the midst of a transaction");
        }
        self.statuses.clear();
        let asked = self.relay.is_committing();
        let rows = self.kafka.lose_producer(&mut self.rng);
        if !rows.is_empty() {
            assert!(asked);
            self.seen.insert("a commit is not heard of");
            self.ledger.committed(&rows, &self.postgres);
        }
        if self.kafka.checkpoint.part.is_some() {
            self.seen.insert("a session begins with a transaction that is published in part");
        }
        let memory = (self.refused.clone(), self.apart);
        self.relay = start(self.delivery, &self.postgres, &self.kafka, self.policies, memory, self.now);
        self.walsender = Walsender::new(&self.postgres);
        if self.postgres.log.iter().any(|t| t.commit_lsn == self.postgres.confirmed) {
            self.seen.insert("a transaction begins where the confirmed one ends");
        }
        if self.kafka.checkpoint.lsn.0 > self.postgres.confirmed {
            self.seen.insert("the checkpoint is ahead of the slot");
        }
        self.reported = Lsn(self.postgres.confirmed);
        self.last_status = self.now;
        self.checkpoint_in_flight = None;
        self.checkpointed = self.checkpointed.max(self.kafka.checkpoint.lsn);
        self.set_listening(true);
    }

    /// Somebody has a key's dead letters published and frees it: while all that was read is settled, because a dead
    /// letter of an open transaction would be left behind.
    pub(super) fn redrive(&mut self) {
        if self.kafka.is_away || !self.relay.is_at_rest() || self.relay.passes_over() {
            return;
        }
        let key = self.rng.usize(..KEYS);
        if self.relay.parking().is_parked(&aggregate(key)) {
            self.redrive_key(key);
            self.seen.insert("a parked key is redriven");
        }
    }

    /// Somebody has a record published once more, between two transactions of the stream.
    pub(super) fn replay(&mut self) {
        if self.relay.is_in_transaction() || !self.relay.wants_input() || self.relay.passes_over() {
            return;
        }
        // So small that a small transaction still fits beside it: one that has to wait for Kafka's acknowledgements may be split.
        let ticket = self.relay.begin_own(1, self.now);
        self.kafka.send(Report::Settled(ticket), Item::Replayed(self.rng.usize(..PARTITIONS)));
        self.seen.insert("a record is replayed");
    }

    fn redrive_key(&mut self, key: usize) {
        let settled = self.relay.progress().confirmed();
        if self.delivery == Delivery::AtLeastOnce {
            for row in self.kafka.redrive(key, settled) {
                self.ledger.arrived(row);
            }
        } else {
            // They, and that they are published, are committed together.
            self.relay.set_hold(true);
            for row in self.kafka.letters(key, settled) {
                // A real one leaves the rest for later when there are many.
                let ticket = self.relay.begin_own(1, self.now);
                self.kafka.send(Report::Settled(ticket), Item::Redriven(row));
            }
            self.relay.set_hold(false);
        }
        self.relay.free(&aggregate(key), self.now);
        self.send_markers();
    }

    /// A fast shutdown: the server sends the rest, and waits until all of it is confirmed. Then it starts again.
    pub(super) fn shut_down_postgres(&mut self) {
        self.kafka.is_away = false;
        self.set_listening(true);
        for _ in 0..1_000_000 {
            if self.postgres.confirmed >= self.postgres.lsn {
                self.postgres.save_slot();
                if self.postgres.confirmed > u64::from(u32::MAX) {
                    self.seen.insert("LSNs cross 4 GB");
                }
                return self.lose_session();
            }
            self.go_on();
            self.check();
        }
        panic!("stuck: confirmed {:X} of {:X}", self.postgres.confirmed, self.postgres.lsn);
    }

    /// Nothing fails.
    fn go_on(&mut self) {
        self.now += Duration::from_millis(100);
        self.read();
        if self.walsender.is_caught_up(&self.postgres) {
            self.relay.handle_keepalive(Lsn(self.postgres.lsn), true, self.now).expect("the log is its own");
        }
        for log in 0..LOGS {
            if let Some(row) = self.kafka.arrive(log) {
                self.ledger.arrived(row);
            }
        }
        self.hear_kafka();
        self.write_checkpoint();
        self.hear_of_commit();
        self.tell_status();
        self.status_arrives();
    }

    /// Nothing fails any more, and what is parked is redriven: everything must arrive and be confirmed.
    pub(in crate::sim) fn settle_down(&mut self) {
        for _ in 0..3 {
            self.shut_down_postgres();
            while self.relay.passes_over() {
                self.go_on();
            }
            while !self.relay.is_at_rest() {
                self.go_on();
            }
            (0..KEYS).for_each(|key| self.redrive_key(key));
            while !self.relay.is_at_rest() {
                self.go_on();
            }
        }
        self.ledger.finish(&self.postgres);
    }
}

//! Which LSN may be confirmed: the end of the last commit that is settled together with all before it.
//!
//! A record is *settled* when Kafka has acknowledged it. Until then it, its transaction and everything behind
//! it in commit order stay here, and so does the credit in bytes that it took; what is here is therefore what a
//! crash would repeat, and both are bounded alike.

use std::{collections::VecDeque, time::Duration};

use crate::{Lsn, checkpoint::Mark};

/// Identifies a record in flight; they count up by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

#[derive(Debug)]
struct InFlight {
    bytes: usize,
    since: Duration,
    settled: bool,
}

#[derive(Debug)]
struct Commit {
    end_lsn: Lsn,
    /// None: it is not a transaction's.
    mark: Option<Mark>,
    /// The first ticket that is not part of it: settled when every ticket below is.
    end_ticket: u64,
}

/// Records in flight and the commits they belong to, in commit order.
#[derive(Debug)]
pub struct Progress {
    /// The ticket of `records.front()`; every one below is settled.
    first: u64,
    records: VecDeque<InFlight>,
    commits: VecDeque<Commit>,
    confirmed: Lsn,
    /// The last transaction that is confirmed.
    last: Option<Mark>,
    in_flight_bytes: usize,
    /// Of all that are not in flight any more.
    settled_bytes: u64,
    now: Duration,
}

/// A ticket that is not in flight was settled: a bug of the caller, or a delivery told twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotInFlight(pub Ticket);

impl Progress {
    /// Nothing in flight, and everything up to `confirmed` settled earlier.
    pub fn new(confirmed: Lsn) -> Self {
        Self {
            first: 0,
            records: VecDeque::new(),
            commits: VecDeque::new(),
            confirmed,
            last: None,
            in_flight_bytes: 0,
            settled_bytes: 0,
            now: Duration::ZERO,
        }
    }

    /// Says what time it is: what begins from now on began then.
    pub fn set_now(&mut self, now: Duration) {
        self.now = now;
    }

    /// A record of `bytes` is about to be handed to Kafka.
    pub fn begin_record(&mut self, bytes: usize) -> Ticket {
        let ticket = Ticket(self.next_ticket());
        self.records.push_back(InFlight { bytes, since: self.now, settled: false });
        self.in_flight_bytes += bytes;
        ticket
    }

    /// What was begun since the last call is complete and ends at `end_lsn`; the transaction that it was, if it was one.
    pub fn commit(&mut self, end_lsn: Lsn, mark: Option<Mark>) {
        let end_ticket = self.next_ticket();
        match self.commits.back_mut() {
            // A commit that brought no record of ours is settled with the one before it.
            Some(last) if last.end_ticket == end_ticket => {
                last.end_lsn = last.end_lsn.max(end_lsn);
                last.mark = mark.or(last.mark);
            }
            _ => self.commits.push_back(Commit { end_lsn, mark, end_ticket }),
        }
        self.advance();
    }

    /// Kafka has acknowledged the record.
    pub fn settle(&mut self, ticket: Ticket) -> Result<(), NotInFlight> {
        let index = ticket.0.checked_sub(self.first).and_then(|i| usize::try_from(i).ok());
        let record = index.and_then(|i| self.records.get_mut(i)).filter(|r| !r.settled);
        record.ok_or(NotInFlight(ticket))?.settled = true;
        while let Some(front) = self.records.front().filter(|r| r.settled) {
            self.in_flight_bytes -= front.bytes;
            self.settled_bytes += front.bytes as u64;
            self.records.pop_front();
            self.first += 1;
        }
        self.advance();
        Ok(())
    }

    /// The server has nothing for us up to `wal_end`, told outside any transaction. Nothing happens unless
    /// nothing is in flight.
    pub fn idle_until(&mut self, wal_end: Lsn) {
        if self.is_idle() {
            self.confirmed = self.confirmed.max(wal_end);
        }
    }

    fn advance(&mut self) {
        while let Some(front) = self.commits.front().filter(|c| c.end_ticket <= self.first) {
            self.confirmed = self.confirmed.max(front.end_lsn);
            self.last = front.mark.or(self.last);
            self.commits.pop_front();
        }
    }

    /// What may be confirmed. Never goes backwards.
    pub fn confirmed(&self) -> Lsn {
        self.confirmed
    }

    /// The last transaction of what may be confirmed, if there was one.
    pub fn last(&self) -> Option<Mark> {
        self.last
    }

    /// Whether nothing is in flight.
    pub fn is_idle(&self) -> bool {
        self.records.is_empty() && self.commits.is_empty()
    }

    /// Bytes of credit taken.
    pub fn in_flight_bytes(&self) -> usize {
        self.in_flight_bytes
    }

    /// Bytes of credit of all records so far that are settled, and wait behind none that is not.
    pub fn settled_bytes(&self) -> u64 {
        self.settled_bytes
    }

    /// When the oldest record in flight began.
    pub fn oldest(&self) -> Option<Duration> {
        self.records.front().map(|record| record.since)
    }

    /// Every ticket below it is settled.
    pub fn first_ticket(&self) -> u64 {
        self.first
    }

    /// The ticket of the next record that begins.
    pub fn next_ticket(&self) -> u64 {
        self.first + self.records.len() as u64
    }

    /// Records that are not settled, or wait behind one that is not.
    pub fn in_flight_records(&self) -> usize {
        self.records.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mark(lsn: u64) -> Mark {
        Mark { commit_lsn: Lsn(lsn - 1), committed_at_us: 7 }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Record(usize),
        Commit,
        /// Settles the n-th record that is not settled yet.
        Settle(prop::sample::Index),
        SettleUnknown(u64),
        Idle,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0_usize..100).prop_map(Step::Record),
            3 => Just(Step::Commit),
            5 => any::<prop::sample::Index>().prop_map(Step::Settle),
            1 => any::<u64>().prop_map(Step::SettleUnknown),
            1 => Just(Step::Idle),
        ]
    }

    /// The same, said naively: every record and commit ever seen, looked through from the start each time.
    #[derive(Default)]
    struct Model {
        /// Bytes, settled.
        records: Vec<(usize, bool)>,
        /// End LSN, number of records up to and including it.
        commits: Vec<(u64, usize)>,
        idle: u64,
    }

    impl Model {
        fn settled_prefix(&self) -> usize {
            self.records.iter().take_while(|r| r.1).count()
        }

        fn last(&self) -> Option<u64> {
            let prefix = self.settled_prefix();
            self.commits.iter().take_while(|c| c.1 <= prefix).map(|c| c.0).max()
        }

        fn confirmed(&self) -> u64 {
            self.last().unwrap_or(0).max(self.idle)
        }
    }

    proptest! {
        #[test]
        fn equals_the_naive_model_and_never_goes_back(steps in prop::collection::vec(step(), 0..200)) {
            let (mut progress, mut model) = (Progress::new(Lsn::ZERO), Model::default());
            let mut lsn = 0;
            let mut open = false;
            for step in steps {
                let before = progress.confirmed();
                match step {
                    Step::Record(bytes) => {
                        progress.set_now(Duration::from_secs(model.records.len() as u64));
                        let ticket = progress.begin_record(bytes);
                        prop_assert_eq!(ticket.0, model.records.len() as u64);
                        model.records.push((bytes, false));
                        open = true;
                    }
                    Step::Commit => {
                        lsn += 10;
                        progress.commit(Lsn(lsn), Some(mark(lsn)));
                        model.commits.push((lsn, model.records.len()));
                        open = false;
                    }
                    Step::Settle(index) => {
                        let unsettled: Vec<_> = (0..model.records.len()).filter(|i| !model.records[*i].1).collect();
                        if unsettled.is_empty() { continue; }
                        let chosen = unsettled[index.index(unsettled.len())];
                        prop_assert_eq!(progress.settle(Ticket(chosen as u64)), Ok(()));
                        prop_assert!(progress.settle(Ticket(chosen as u64)).is_err());
                        model.records[chosen].1 = true;
                    }
                    Step::SettleUnknown(n) => {
                        let ticket = n.saturating_add(model.records.len() as u64);
                        prop_assert_eq!(progress.settle(Ticket(ticket)), Err(NotInFlight(Ticket(ticket))));
                    }
                    Step::Idle => {
                        lsn += 10;
                        if open { continue; }
                        progress.idle_until(Lsn(lsn));
                        if model.settled_prefix() == model.records.len() { model.idle = lsn; }
                    }
                }
                prop_assert!(progress.confirmed() >= before);
                prop_assert_eq!(progress.confirmed(), Lsn(model.confirmed()));
                prop_assert_eq!(progress.last(), model.last().map(mark));
                let prefix = model.settled_prefix();
                prop_assert_eq!(progress.in_flight_bytes(), model.records[prefix..].iter().map(|r| r.0).sum::<usize>());
                prop_assert_eq!(progress.in_flight_records(), model.records.len() - prefix);
                let settled_bytes: usize = model.records[..prefix].iter().map(|r| r.0).sum();
                prop_assert_eq!(progress.settled_bytes(), settled_bytes as u64);
                let oldest = (prefix < model.records.len()).then_some(Duration::from_secs(prefix as u64));
                prop_assert_eq!(progress.oldest(), oldest);
            }
        }
    }

    #[test]
    fn a_commit_whose_end_equals_the_next_commits_is_confirmed_once_both_are_settled() {
        let mut p = Progress::new(Lsn(1));
        let a = p.begin_record(1);
        p.commit(Lsn(10), None);
        let b = p.begin_record(1);
        p.commit(Lsn(20), None);
        p.settle(b).unwrap();
        assert_eq!(p.confirmed(), Lsn(1));
        p.settle(a).unwrap();
        assert_eq!(p.confirmed(), Lsn(20));
        assert!(p.is_idle());
    }
}

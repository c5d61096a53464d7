//! Transactions of Postgres on their way to Kafka: since when, and which of them have arrived.

use std::{collections::VecDeque, time::Duration};

use crate::checkpoint::Mark;

/// A transaction that brought records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivery {
    /// When its first record was handed out, on the caller's clock.
    pub begun: Duration,
    /// When it was committed, in microseconds since Postgres' epoch (2000-01-01), by the server's clock.
    pub committed_at_us: i64,
}

/// Those that are not in Kafka yet, in commit order. Each has a record that is, so the bound of these bounds them, too.
#[derive(Debug, Default)]
pub(crate) struct Deliveries {
    /// The one that is being read.
    open: Option<Delivery>,
    /// Those that have ended, each with the first ticket that is not part of it.
    ended: VecDeque<(u64, Delivery)>,
}

impl Deliveries {
    /// A record of this transaction was handed out.
    pub(crate) fn add(&mut self, of: Mark, now: Duration) {
        self.open.get_or_insert(Delivery { begun: now, committed_at_us: of.committed_at_us });
    }

    /// The transaction that is being read has ended before this ticket.
    pub(crate) fn end(&mut self, end_ticket: u64) {
        self.ended.extend(self.open.take().map(|delivery| (end_ticket, delivery)));
    }

    /// The next one of which nothing is left, when every ticket below `settled` is done with.
    pub(crate) fn take(&mut self, settled: u64) -> Option<Delivery> {
        let is_done = self.ended.front().is_some_and(|(end_ticket, _)| *end_ticket <= settled);
        if is_done { self.ended.pop_front().map(|(_, delivery)| delivery) } else { None }
    }

    /// The one that was committed first.
    pub(crate) fn oldest(&self) -> Option<Delivery> {
        self.ended.front().map(|(_, delivery)| *delivery).or(self.open)
    }
}

//! Kafka's transactions: when the open one ends.
//!
//! One is open at a time. It takes records until it is closed, which is when its checkpoint is written; once everything
//! in it is acknowledged it is committed; and only then does the next one take records. A transaction of Postgres that
//! fits goes into one of Kafka's as a whole.

use std::time::Duration;

/// How large Kafka's transactions become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// One is closed that has so many bytes, by [cost](crate::record::Record::cost_bytes). A transaction of Postgres that
    /// is no larger is not split for it, so one of Kafka's has at most twice as many, and a record.
    pub bytes: usize,
    /// One is closed that is so old.
    pub time: Duration,
    /// A transaction of Postgres whose end does not come for so long is split: well below Kafka's `transaction.timeout.ms`.
    pub split_after: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It takes records.
    Filling,
    /// Its checkpoint is written, and acknowledged or not.
    Closed { has_checkpoint: bool },
    /// Kafka was asked to commit it.
    Committing,
}

/// The Kafka transactions of a session.
#[derive(Debug)]
pub(crate) struct Transactions {
    sizes: Sizes,
    stage: Stage,
    /// When its first record was added; None where it has none.
    since: Option<Duration>,
    bytes: usize,
    /// Those of the transactions of Postgres that have ended.
    earlier_bytes: usize,
    /// What comes next has to be in another one.
    is_cut: bool,
    /// The records that come are to stay together.
    is_held: bool,
    /// Do not wait for more.
    hurries: bool,
}

impl Transactions {
    pub(crate) fn new(sizes: Sizes) -> Self {
        Self {
            sizes,
            stage: Stage::Filling,
            since: None,
            bytes: 0,
            earlier_bytes: 0,
            is_cut: false,
            is_held: false,
            hurries: false,
        }
    }

    /// A record was made that goes into the open one.
    pub(crate) fn add(&mut self, bytes: usize, now: Duration) {
        self.since.get_or_insert(now);
        self.bytes += bytes;
    }

    /// A transaction of Postgres begins, which may have to be `apart` from what came before it.
    pub(crate) fn begin(&mut self, apart: bool) {
        self.earlier_bytes = self.bytes;
        self.is_cut = apart && self.since.is_some();
    }

    /// Whether the transaction of Postgres that is being read shares the open one with an earlier one.
    pub(crate) fn has_earlier(&self) -> bool {
        self.earlier_bytes > 0
    }

    /// Whether the open one has no record, and none is on its way to be committed.
    pub(crate) fn is_empty(&self) -> bool {
        self.stage == Stage::Filling && self.since.is_none()
    }

    /// Whether records may come.
    pub(crate) fn takes(&self, in_transaction: bool) -> bool {
        self.stage == Stage::Filling && !self.is_cut && !self.is_full(in_transaction)
    }

    fn is_full(&self, in_transaction: bool) -> bool {
        let own = if in_transaction { self.bytes - self.earlier_bytes } else { self.bytes };
        own >= self.sizes.bytes && !self.is_held
    }

    /// When the open one has to be closed, if it has records.
    pub(crate) fn deadline(&self, in_transaction: bool) -> Option<Duration> {
        let since = self.since.filter(|_| self.stage == Stage::Filling && !self.is_held)?;
        if self.is_cut || self.is_full(in_transaction) || (self.hurries && !in_transaction) {
            return Some(Duration::ZERO);
        }
        Some(since + if in_transaction { self.sizes.split_after } else { self.sizes.time })
    }

    /// For how long it has had records.
    pub(crate) fn age(&self, now: Duration) -> Option<Duration> {
        self.since.map(|since| now.saturating_sub(since))
    }

    /// Whether it has been open for so long that it must not wait for more.
    pub(crate) fn is_old(&self, now: Duration) -> bool {
        self.age(now).is_some_and(|age| age >= self.sizes.split_after)
    }

    pub(crate) fn is_filling(&self) -> bool {
        self.stage == Stage::Filling
    }

    /// Whether not to wait for more before closing.
    pub(crate) fn set_hurry(&mut self, hurries: bool) {
        self.hurries = hurries;
    }

    /// Whether the records that come have to be committed together, whatever their number.
    pub(crate) fn set_hold(&mut self, is_held: bool) {
        self.is_held = is_held;
    }

    /// Its checkpoint is written.
    pub(crate) fn close(&mut self) {
        self.stage = Stage::Closed { has_checkpoint: false };
    }

    /// Kafka has acknowledged its checkpoint.
    pub(crate) fn handle_checkpointed(&mut self) {
        if self.stage == (Stage::Closed { has_checkpoint: false }) {
            self.stage = Stage::Closed { has_checkpoint: true };
        }
    }

    /// Whether it is to be committed now; true once. All its records have to be acknowledged.
    pub(crate) fn take_commit(&mut self) -> bool {
        let ready = self.stage == (Stage::Closed { has_checkpoint: true });
        if ready {
            self.stage = Stage::Committing;
        }
        ready
    }

    /// Kafka has committed it.
    pub(crate) fn handle_committed(&mut self) {
        let Self { sizes, is_held, hurries, .. } = *self;
        *self = Self { is_held, hurries, ..Self::new(sizes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn transactions() -> Transactions {
        Transactions::new(Sizes { bytes: 100, time: ms(20), split_after: ms(5000) })
    }

    #[test]
    fn one_is_closed_for_its_age_or_its_bytes() {
        let mut open = transactions();
        assert_eq!(open.deadline(false), None);
        open.add(10, ms(7));
        open.add(10, ms(9));
        assert_eq!(open.deadline(false), Some(ms(27)));
        open.add(80, ms(10));
        assert_eq!((open.deadline(false), open.takes(false)), (Some(Duration::ZERO), false));
    }

    #[test]
    fn a_transaction_of_postgres_that_fits_is_not_split() {
        let mut open = transactions();
        open.add(90, ms(0));
        open.begin(false);
        open.add(99, ms(1));
        assert!(open.takes(true) && open.has_earlier());
        assert_eq!(open.deadline(true), Some(ms(5000)));
        assert_eq!(open.deadline(false), Some(Duration::ZERO), "once it has ended");
        open.add(1, ms(2));
        assert!(!open.takes(true), "a larger one is");
    }

    #[test]
    fn nothing_is_added_between_closing_and_committed() {
        let mut open = transactions();
        open.add(10, ms(0));
        open.close();
        assert!(!open.takes(false) && !open.is_empty() && !open.take_commit());
        open.handle_checkpointed();
        assert!(open.take_commit() && !open.take_commit() && !open.takes(false));
        open.handle_committed();
        assert!(open.takes(false) && open.is_empty());
    }

    #[test]
    fn what_is_held_together_waits_and_what_is_in_a_hurry_does_not() {
        let mut open = transactions();
        open.set_hold(true);
        open.add(1000, ms(0));
        assert_eq!((open.deadline(false), open.takes(false)), (None, true));
        open.set_hold(false);
        open.set_hurry(true);
        assert_eq!(open.deadline(false), Some(Duration::ZERO));
        let mut open = transactions();
        open.set_hurry(true);
        open.add(1, ms(0));
        open.begin(false);
        assert_eq!(open.deadline(true), Some(ms(5000)), "a transaction is read to its end");
        open.begin(true);
        assert_eq!(
            (open.deadline(true), open.takes(true)),
            (Some(Duration::ZERO), false),
            "unless it is to be apart"
        );
    }
}

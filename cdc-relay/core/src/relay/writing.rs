//! What is written down in Kafka, and when: checkpoints, and the transactions that they end; and what has arrived.

use std::time::Duration;

use super::{CHECKPOINT_INTERVAL, RENEWAL_INTERVAL, Relay};
use crate::{Checkpoint, Delivery, Lsn, transactions::Transactions};

impl Relay {
    /// The position to write down in Kafka now, if it is time. At-least-once, everything up to it is settled;
    /// exactly-once, it is the last record of the open transaction and covers the others, and no more of them come
    /// before that is [committed](Self::handle_committed).
    pub fn take_checkpoint(&mut self, now: Duration) -> Option<Checkpoint> {
        if self.checkpoint_deadline().is_none_or(|deadline| now < deadline) {
            return None;
        }
        let checkpoint = self.next_checkpoint()?;
        if let Some(transactions) = &mut self.transactions {
            transactions.close();
        }
        self.checkpoint_in_flight = Some(checkpoint);
        self.last_checkpoint = Some(now);
        Some(checkpoint)
    }

    pub(super) fn next_checkpoint(&self) -> Option<Checkpoint> {
        let before = self.checkpoint?;
        if self.transactions.is_none() {
            let lsn = self.progress.confirmed();
            let last = self.progress.last().or(before.last);
            return Some(if lsn > before.lsn { Checkpoint { lsn, part: None, last } } else { before });
        }
        let lsn = self.handled.max(before.lsn);
        Some(match self.source.next_change().filter(|next| next.seq > 0) {
            Some(next) => Checkpoint { lsn, part: Some(next), last: self.last_begun },
            // Nothing new: that a part was published must not be forgotten.
            None if lsn == before.lsn => before,
            None => Checkpoint { lsn, part: None, last: self.last_ended },
        })
    }

    pub(super) fn checkpoint_deadline(&self) -> Option<Duration> {
        if self.checkpoint.is_none() || self.checkpoint_in_flight.is_some() {
            return None;
        }
        let in_transaction = self.source.is_in_transaction();
        if let Some(transactions) = &self.transactions
            && (in_transaction || !transactions.is_empty())
        {
            return transactions.deadline(in_transaction);
        }
        let interval = if self.is_covered() { RENEWAL_INTERVAL } else { CHECKPOINT_INTERVAL };
        match self.last_checkpoint {
            Some(last) => Some(last + interval),
            None => Some(if self.is_covered() { self.began + interval } else { Duration::ZERO }),
        }
    }

    /// Kafka has acknowledged the checkpoint.
    pub fn handle_checkpointed(&mut self) {
        match &mut self.transactions {
            Some(transactions) => transactions.handle_checkpointed(),
            None => self.take_over_checkpoint(),
        }
    }

    pub(super) fn take_over_checkpoint(&mut self) {
        if let Some(checkpoint) = self.checkpoint_in_flight.take() {
            self.checkpoint = Some(checkpoint);
        }
    }

    /// Whether Kafka's transaction is to be committed now: everything in it is acknowledged. True once.
    pub fn take_commit(&mut self) -> bool {
        let is_acknowledged = self.progress.in_flight_records() == 0;
        is_acknowledged && self.transactions.as_mut().is_some_and(Transactions::take_commit)
    }

    /// Kafka has committed the transaction.
    pub fn handle_committed(&mut self) {
        if let Some(transactions) = &mut self.transactions {
            transactions.handle_committed();
        }
        // Nothing was handed out between its closing and now.
        self.committed_ticket = self.progress.first_ticket();
        self.take_over_checkpoint();
        if !self.source.is_in_transaction() {
            self.progress.idle_until(self.handled);
        }
    }

    /// Whether one of Kafka's transactions is closed and not committed yet.
    pub fn is_committing(&self) -> bool {
        self.transactions.as_ref().is_some_and(|t| !t.is_filling())
    }

    /// Whether Kafka's transaction is not to wait for more records.
    pub fn set_hurry(&mut self, hurries: bool) {
        if let Some(transactions) = &mut self.transactions {
            transactions.set_hurry(hurries);
        }
    }

    /// Exactly-once: whether the records that come are to be committed together, whatever their number.
    pub fn set_hold(&mut self, is_held: bool) {
        if let Some(transactions) = &mut self.transactions {
            transactions.set_hold(is_held);
        }
    }

    /// Whether the records that are held together have been for about as long as Kafka's transaction may be open.
    pub fn is_held_long(&self, now: Duration) -> bool {
        self.transactions.as_ref().is_some_and(|t| t.is_old(now))
    }

    /// For how long Kafka's transaction has been open.
    pub fn transaction_age(&self, now: Duration) -> Option<Duration> {
        self.transactions.as_ref().and_then(|t| t.age(now))
    }

    /// Whether what becomes of several records becomes of all of them.
    pub fn is_exactly_once(&self) -> bool {
        self.transactions.is_some()
    }

    /// The commit LSN of the transaction that is being read, where Kafka's holds what is before it as well.
    pub fn entangled(&self) -> Option<Lsn> {
        let next = self.source.next_change()?;
        self.transactions.as_ref().filter(|t| t.has_earlier()).map(|_| next.commit_lsn)
    }

    /// Whether an acknowledged checkpoint covers everything that may be confirmed.
    pub fn is_covered(&self) -> bool {
        self.checkpoint.is_some_and(|checkpoint| self.progress.confirmed() <= checkpoint.lsn)
    }

    /// Whether everything that was enqueued is acknowledged, and committed where it has to be.
    pub fn is_settled(&self) -> bool {
        self.progress.is_idle() && self.transactions.as_ref().is_none_or(Transactions::is_empty)
    }

    /// Whether Kafka has something of ours that it has not acknowledged, or not committed. What is not yet due to be
    /// written down it does not have: on a busy server there is always some of that.
    pub fn awaits_kafka(&self) -> bool {
        !self.is_settled() || self.checkpoint_in_flight.is_some()
    }

    /// The next transaction of Postgres, in commit order, that is delivered: everything that it brought is acknowledged,
    /// and committed where it has to be. To be asked until there is none.
    pub fn take_delivery(&mut self) -> Option<Delivery> {
        self.deliveries.take(self.delivered_ticket())
    }

    /// Every record whose ticket is below it is acknowledged, and committed where it has to be.
    pub fn delivered_ticket(&self) -> u64 {
        if self.is_exactly_once() { self.committed_ticket } else { self.progress.first_ticket() }
    }

    /// The first transaction of Postgres that brought records and is not delivered.
    pub fn oldest_delivery(&self) -> Option<Delivery> {
        self.deliveries.oldest()
    }

    /// For how long the oldest record has waited to be acknowledged, and committed where it has to be.
    pub fn longest_wait(&self, now: Duration) -> Option<Duration> {
        let acknowledged = self.progress.oldest().map(|since| now.saturating_sub(since));
        acknowledged.max(self.transaction_age(now))
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            Delivery as Mode, Options,
            tests::{feed, options, row, started_with},
        },
        *,
    };
    use crate::{pgoutput::tests::encode, transactions::Sizes};

    /// Kafka takes the checkpoint, and commits it where it has to be.
    fn take(relay: &mut Relay, now: Duration) -> Checkpoint {
        let checkpoint = relay.take_checkpoint(now).unwrap();
        assert_eq!(relay.take_checkpoint(now + RENEWAL_INTERVAL), None, "one at a time");
        relay.handle_checkpointed();
        if relay.is_exactly_once() {
            assert!(relay.take_commit());
            relay.handle_committed();
        }
        checkpoint
    }

    #[test]
    fn a_checkpoint_that_says_nothing_new_is_written_again_every_day() {
        let sizes = Sizes { bytes: 1 << 20, time: Duration::ZERO, split_after: Duration::from_secs(5) };
        for delivery in [Mode::AtLeastOnce, Mode::ExactlyOnce(sizes)] {
            let mut relay = started_with(Options { delivery, ..options() }, Duration::ZERO);
            // The outbox was never written to.
            assert_eq!(relay.take_checkpoint(RENEWAL_INTERVAL.saturating_sub(CHECKPOINT_INTERVAL)), None);
            let mut now = RENEWAL_INTERVAL;
            assert_eq!(take(&mut relay, now), Lsn(1).into());
            // And no more.
            feed(&mut relay, &encode::begin(50, 7));
            let ticket = feed(&mut relay, &row("e1", None)).unwrap();
            feed(&mut relay, &encode::commit(50, 60, 7));
            relay.handle_settled(ticket).unwrap();
            now += CHECKPOINT_INTERVAL;
            let last = take(&mut relay, now);
            assert_eq!((last.lsn, last.part), (Lsn(60), None));
            for day in 1..4 {
                let due = now + RENEWAL_INTERVAL;
                assert!(relay.next_deadline() <= due, "nobody would look");
                assert_eq!(
                    relay.take_checkpoint(due.saturating_sub(Duration::from_millis(1))),
                    None,
                    "day {day}"
                );
                assert_eq!(take(&mut relay, due), last, "day {day}: what it says is not lost");
                now = due;
            }
        }
    }
}

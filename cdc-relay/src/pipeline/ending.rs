//! How a session ends: by a stop that was asked for, by a Postgres that shuts down, or before a row that halts.

use std::{sync::atomic::Ordering, time::Duration};

use super::{PENDING_RETRY, Session};
use crate::error::{Error, Kind};

/// What is in flight may hold up a Postgres that shuts down for so long.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

impl Session<'_> {
    /// Whether somebody waits until everything is settled.
    pub(super) fn hurries(&self) -> bool {
        self.shared.stopping() || self.postgres_stops_since.is_some() || self.redrive.is_some()
    }

    /// Whether Postgres shuts down and waits for what is in flight. Nothing more is read then; once all of it is
    /// acknowledged, reading goes on, and the server ends the stream by itself.
    ///
    /// # Errors
    /// Kafka takes too long: the session ends, so that Postgres can.
    pub(super) fn lets_postgres_stop(&mut self) -> Result<bool, Error> {
        if !self.shared.postgres_stops.load(Ordering::Relaxed) {
            self.postgres_stops_since = None;
            return Ok(false);
        }
        let now = self.now();
        let since = *self.postgres_stops_since.get_or_insert(now);
        if now >= since + SHUTDOWN_GRACE && !self.relay.is_at_rest() {
            return Err(Error::new(
                Kind::PostgresAway,
                "Postgres shuts down, and Kafka has not acknowledged what is in flight in time",
            ));
        }
        // A transaction that is read in part would hold up what Kafka's has of those before it.
        Ok(self.pending.is_some() || !self.relay.is_settled() && !self.relay.is_in_transaction())
    }

    /// Whether nothing is left to do before a stop. While what earlier sessions wrote down is unknown, nothing was
    /// begun.
    pub(super) fn is_drained(&self) -> bool {
        !self.is_admitted
            || (self.pending.is_none()
                && self.redrive.is_none()
                && self.replay.is_none()
                && self.relay.is_at_rest())
    }

    /// What was enqueued before the row that halts us is still acknowledged and confirmed, so that the next start,
    /// or whoever skips the row by hand, begins right at its transaction.
    pub(super) fn settle_before_halt(&mut self) {
        self.pending = None;
        self.relay.set_listening(false, self.now());
        if self.relay.is_exactly_once() && self.relay.is_in_transaction() {
            // What is open is of its transaction alone, and is not to be seen.
            return;
        }
        self.relay.set_hurry(true);
        let until = self.now() + self.shared.settings.drain_grace;
        // The row itself may be in flight to us and unknown to the producer, so the producer is asked.
        loop {
            // A second failure says no more than the first.
            let kept = self.keep_parking().and_then(|()| self.settle());
            let kept = kept.and_then(|()| self.keep_position()).and_then(|()| self.feed_back());
            let is_committed = !self.relay.is_exactly_once() || self.relay.is_settled();
            let done =
                self.producer.is_empty() && (!self.is_admitted || self.relay.is_covered() && is_committed);
            if kept.is_err() || done || self.now() >= until {
                return;
            }
            self.wakeups.wait(PENDING_RETRY);
        }
    }

    /// The end of a session that another may not follow for long: who takes the slot next does not wait for Kafka.
    pub(super) fn leave(self) {
        drop(self.stream);
        self.producer.abort();
    }

    /// The end that was asked for: the last status, and the slot is free.
    pub(super) fn finish(mut self) -> Result<(), Error> {
        let (left, is_drained) = (self.relay.progress().in_flight_records(), self.is_drained());
        let status = self.relay.final_status(self.now());
        let told = self.stream.finish(status);
        self.producer.abort();
        tracing::info!(confirmed_lsn = %status.confirmed, "stopped");
        if let Err(e) = told {
            tracing::warn!(
                "the server may not know the last confirmed LSN, and would repeat what it covers: {e}"
            );
        }
        if left > 0 {
            let what =
                format!("Kafka has not acknowledged {left} records; they are read again at the next start");
            return Err(Error::new(Kind::GaveUp, what));
        }
        if !is_drained {
            let what = "stopped in the middle of a transaction, or before Kafka had the checkpoint; what is not confirmed is \
                        read again at the next start";
            return Err(Error::new(Kind::GaveUp, what));
        }
        Ok(())
    }
}

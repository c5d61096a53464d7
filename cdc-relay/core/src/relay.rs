//! The state machine between the replication stream and Kafka.
//!
//! `handle_*` takes what happened and the time; [`Relay::handle_wal`] hands back the record to enqueue,
//! [`Relay::take_checkpoint`] the position to write down in Kafka, [`Relay::take_commit`] whether to commit Kafka's
//! transaction, [`Relay::take_status`] the status update to send. Time is a [`Duration`] since an arbitrary start.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

mod writing;

pub use crate::disposal::{Diversion, Halt};
use crate::{
    Checkpoint, Lsn, Outgoing,
    checkpoint::{Mark, Passage},
    deliveries::Deliveries,
    disposal::Disposal,
    parking::{Key, Marker, Parking},
    poison::{Poison, Policies},
    progress::{Progress, Ticket},
    record::{Headers, Identity},
    source::{self, Source, Step},
    transactions::{Sizes, Transactions},
};

/// Between two checkpoints. Each costs a small record, and only what one covers can be confirmed.
const CHECKPOINT_INTERVAL: Duration = Duration::from_millis(250);
/// A checkpoint that says nothing new is written again after so long: Kafka forgets producers, and their transactional
/// ids (`transactional.id.expiration.ms`, a week by default), that are not heard of.
const RENEWAL_INTERVAL: Duration = Duration::from_hours(24);

/// What is promised of each row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// It is in Kafka; after a crash or a rewind, perhaps twice.
    AtLeastOnce,
    /// It is in one committed transaction of Kafka, together with the checkpoint that says so.
    ExactlyOnce(Sizes),
}

/// What the state machine has to know.
#[derive(Debug, Clone)]
pub struct Options {
    pub delivery: Delivery,
    pub source: source::Options,
    pub policies: Policies,
    /// Where rows go whose policy is to dead-letter or to park.
    pub dead_letter_topic: String,
    /// Whose dead letters they are: their `dlq.source`.
    pub dead_letter_source: String,
    /// Input pauses while this many bytes, or more, are in flight. One record may exceed it.
    pub in_flight_limit_bytes: usize,
    /// The longest time between two status updates: well below the server's `wal_sender_timeout`.
    pub status_interval: Duration,
    /// The server is taken for dead when nothing came for so long although we read.
    pub silence_limit: Duration,
}

/// What earlier sessions wrote down.
#[derive(Debug, Clone, Default)]
pub struct Past {
    /// The last checkpoint.
    pub checkpoint: Checkpoint,
    /// Rows that Kafka refused after they were enqueued.
    pub refused: HashMap<Identity, Poison>,
    /// Aggregates that are parked, and the first row of each that was.
    pub parked: BTreeMap<Key, Identity>,
    /// The commit LSN of a transaction that is not to share one of Kafka's with those before it, because it may halt.
    pub apart: Option<Lsn>,
}

/// A standby status update
/// (<https://www.postgresql.org/docs/current/protocol-replication.html>).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusUpdate {
    /// What has been read.
    pub received: Lsn,
    /// What may be forgotten by the server.
    pub confirmed: Lsn,
}

/// One replication session's state. A new session starts with a new one.
#[derive(Debug)]
pub struct Relay {
    options: Options,
    source: Source,
    progress: Progress,
    deliveries: Deliveries,
    /// Every ticket below it is committed; exactly-once only.
    committed_ticket: u64,
    disposal: Disposal,
    /// None: at-least-once.
    transactions: Option<Transactions>,
    /// What is passed over because it is published; None before that is known.
    passage: Option<Passage>,
    apart: Option<Lsn>,
    /// Where the stream begins, and when it did.
    start: Lsn,
    began: Duration,
    received: Lsn,
    /// Every transaction that ended before it has been handled.
    handled: Lsn,
    /// The transactions that began, and that ended, last.
    last_begun: Option<Mark>,
    last_ended: Option<Mark>,
    /// The checkpoint that Kafka has; None until it is known.
    checkpoint: Option<Checkpoint>,
    /// The checkpoint that Kafka has not acknowledged, or not committed, yet.
    checkpoint_in_flight: Option<Checkpoint>,
    last_checkpoint: Option<Duration>,
    /// Whether the caller reads what the server sends.
    listening: bool,
    last_heard: Duration,
    last_status: Duration,
    reported: Lsn,
    reply_wanted: bool,
    ignored_changes: u64,
    passed_over: u64,
}

impl Relay {
    /// A session that starts now, everything up to `confirmed` (the slot's confirmed flush LSN) having been settled
    /// earlier. It wants no input and writes no checkpoint before it [recalls](Self::recall) its past.
    pub fn new(options: Options, confirmed: Lsn, now: Duration) -> Self {
        Self {
            source: Source::new(options.source.clone()),
            disposal: Disposal {
                policies: options.policies,
                dead_letter_topic: options.dead_letter_topic.clone(),
                dead_letter_source: options.dead_letter_source.clone(),
                parking: Parking::default(),
                refused: HashMap::new(),
                refused_now: None,
                diversions: Vec::new(),
                markers: Vec::new(),
                headers: Headers::default(),
            },
            transactions: match options.delivery {
                Delivery::AtLeastOnce => None,
                Delivery::ExactlyOnce(sizes) => Some(Transactions::new(sizes)),
            },
            passage: None,
            apart: None,
            options,
            progress: Progress::new(confirmed),
            deliveries: Deliveries::default(),
            committed_ticket: 0,
            start: confirmed,
            began: now,
            received: confirmed,
            handled: confirmed,
            last_begun: None,
            last_ended: None,
            checkpoint: None,
            checkpoint_in_flight: None,
            last_checkpoint: None,
            listening: false,
            last_heard: now,
            last_status: now,
            reported: confirmed,
            // The first status update goes out at once: it tells the server who we are and where we stand.
            reply_wanted: true,
            ignored_changes: 0,
            passed_over: 0,
        }
    }

    /// What earlier sessions wrote down, once it is known. Nothing may have been handled yet.
    pub fn recall(&mut self, past: Past) {
        self.checkpoint = Some(past.checkpoint);
        (self.last_begun, self.last_ended) = (past.checkpoint.last, past.checkpoint.last);
        self.apart = past.apart;
        self.passage = Some(Passage::new(past.checkpoint, self.start));
        self.disposal.parking = Parking::new(past.parked);
        self.disposal.refused = past.refused;
    }

    /// One message of the stream, at `start` in the log. What comes back is to be enqueued. To be called only while
    /// the relay [wants input](Self::wants_input).
    pub fn handle_wal<'a>(
        &'a mut self,
        start: Lsn,
        bytes: &'a [u8],
        now: Duration,
    ) -> Result<Option<Outgoing<'a>>, Halt> {
        self.last_heard = now;
        self.progress.set_now(now);
        self.received = self.received.max(start);
        match self.source.handle(start, bytes)? {
            Step::Nothing => Ok(None),
            Step::PassedOver => {
                self.ignored_changes += 1;
                Ok(None)
            }
            Step::Begin(mark) => {
                self.last_begun = Some(mark);
                if let Some(transactions) = &mut self.transactions {
                    transactions.begin(self.apart == Some(mark.commit_lsn));
                }
                self.passage.as_mut().map_or(Ok(()), |passage| passage.begin(mark)).map(|()| None)
            }
            Step::Commit { end_lsn } => {
                self.received = self.received.max(end_lsn);
                self.handled = self.handled.max(end_lsn);
                self.last_ended = self.last_begun;
                self.progress.commit(end_lsn, self.last_begun);
                self.deliveries.end(self.progress.next_ticket());
                Ok(None)
            }
            Step::Row(drafted) | Step::Lone { drafted, .. }
                if self.passage.as_ref().is_some_and(|p| p.covers(drafted.record.identity)) =>
            {
                self.passed_over += 1;
                Ok(None)
            }
            Step::Row(drafted) => {
                let outgoing = self.disposal.dispose(drafted, &mut self.progress, None, true)?;
                add(self.transactions.as_mut(), outgoing.as_ref(), now);
                if let Some(of) = self.last_begun.filter(|_| outgoing.is_some()) {
                    self.deliveries.add(of, now);
                }
                Ok(outgoing)
            }
            Step::Lone { drafted, end_lsn } => {
                let outgoing = self.disposal.dispose(drafted, &mut self.progress, None, true)?;
                add(self.transactions.as_mut(), outgoing.as_ref(), now);
                self.handled = self.handled.max(end_lsn);
                self.progress.commit(end_lsn, None);
                Ok(outgoing)
            }
        }
    }

    /// The record that [`handle_wal`](Self::handle_wal) made of these bytes, once more: for a caller that could
    /// not enqueue it then. Nothing may have been handled in between. None when it turned out to be left out.
    pub fn repeat<'a>(&'a mut self, ticket: Ticket, bytes: &'a [u8]) -> Result<Option<Outgoing<'a>>, Halt> {
        let drafted = self.source.repeat(bytes)?;
        self.disposal.dispose(drafted, &mut self.progress, Some(ticket), false)
    }

    /// Kafka would not take the record that these bytes became: what its policy makes of it instead.
    pub fn refuse<'a>(
        &'a mut self,
        ticket: Ticket,
        bytes: &'a [u8],
        poison: Poison,
    ) -> Result<Option<Outgoing<'a>>, Halt> {
        let drafted = self.source.repeat(bytes)?;
        self.disposal.refused_now = Some((drafted.record.identity, poison));
        self.disposal.dispose(drafted, &mut self.progress, Some(ticket), true)
    }

    /// A keepalive: the server has sent everything up to `wal_end`.
    ///
    /// # Errors
    /// The log is not the one that was published.
    pub fn handle_keepalive(
        &mut self,
        wal_end: Lsn,
        reply_requested: bool,
        now: Duration,
    ) -> Result<(), Halt> {
        self.hear(reply_requested, now);
        self.received = self.received.max(wal_end);
        if !self.source.is_in_transaction() {
            if let Some(passage) = &mut self.passage {
                passage.idle_until(wal_end)?;
            }
            // What is passed over says nothing new, and a part that is published may lie behind it.
            if !self.passes_over() {
                self.handled = self.handled.max(wal_end);
                self.progress.idle_until(wal_end);
            }
        }
        Ok(())
    }

    /// Something came that is handled later.
    pub fn hear(&mut self, reply_requested: bool, now: Duration) {
        self.last_heard = now;
        self.reply_wanted |= reply_requested;
    }

    /// Kafka has acknowledged a record.
    pub fn handle_settled(&mut self, ticket: Ticket) -> Result<(), Halt> {
        self.progress.settle(ticket).map_err(Halt::UnknownTicket)
    }

    /// The markers to write because aggregates were parked or freed.
    pub fn take_markers(&mut self) -> Vec<Marker> {
        std::mem::take(&mut self.disposal.markers)
    }

    /// What the server may be told: settled, and covered by a checkpoint. Never goes backwards.
    pub fn confirmed(&self) -> Lsn {
        // A checkpoint may be ahead of what a server remembers that crashed.
        let covered = self.checkpoint.unwrap_or_default().lsn;
        // What is passed over is not ours to confirm before it is known to be what was published.
        if self.passes_over() {
            return self.reported;
        }
        self.progress.confirmed().min(covered).max(self.reported)
    }

    /// Whether to read on. False at the bound of what may be in flight, before the past is known, and from when one of
    /// Kafka's transactions is full until it is committed.
    pub fn wants_input(&self) -> bool {
        let in_transaction = self.source.is_in_transaction();
        self.checkpoint.is_some()
            && self.progress.in_flight_bytes() < self.options.in_flight_limit_bytes
            && self.transactions.as_ref().is_none_or(|t| t.takes(in_transaction))
    }

    /// Whether the caller reads what the server sends. While it does not, for whatever reason, the server's
    /// silence means nothing and the watchdog rests.
    pub fn set_listening(&mut self, listening: bool, now: Duration) {
        if listening && !self.listening {
            self.last_heard = now;
        }
        self.listening = listening;
    }

    /// Whether the server has been silent for too long.
    pub fn is_silent(&self, now: Duration) -> bool {
        self.listening && now.saturating_sub(self.last_heard) >= self.options.silence_limit
    }

    /// When [`take_checkpoint`](Self::take_checkpoint), [`take_status`](Self::take_status) or
    /// [`is_silent`](Self::is_silent) next has to be asked.
    pub fn next_deadline(&self) -> Duration {
        let silence = self.listening.then(|| self.last_heard + self.options.silence_limit);
        [silence, self.checkpoint_deadline()]
            .into_iter()
            .flatten()
            .fold(self.status_deadline(), Duration::min)
    }

    fn status_deadline(&self) -> Duration {
        // Checkpoints come a few times a second at most, so what they cover is told at once.
        if self.reply_wanted || self.confirmed() > self.reported {
            Duration::ZERO
        } else {
            self.last_status + self.options.status_interval
        }
    }

    /// The status update to send now, if one is due.
    pub fn take_status(&mut self, now: Duration) -> Option<StatusUpdate> {
        (now >= self.status_deadline()).then(|| self.final_status(now))
    }

    /// The status update as it is, due or not: the last one before a clean stop.
    pub fn final_status(&mut self, now: Duration) -> StatusUpdate {
        let confirmed = self.confirmed();
        self.reply_wanted = false;
        self.last_status = now;
        self.reported = confirmed;
        StatusUpdate { received: self.received.max(confirmed), confirmed }
    }

    /// Whether a transaction has been read in part.
    pub fn is_in_transaction(&self) -> bool {
        self.source.is_in_transaction()
    }

    /// Whether everything that was read is settled, and covered.
    pub fn is_at_rest(&self) -> bool {
        self.is_settled() && !self.is_in_transaction() && self.is_covered()
    }

    /// Whether the stream is where earlier sessions have published everything.
    pub fn passes_over(&self) -> bool {
        self.passage.as_ref().is_some_and(|passage| !passage.is_over())
    }

    /// What is in flight.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// What has been read.
    pub fn received(&self) -> Lsn {
        self.received
    }

    /// Rows so far that were published before, and are not again.
    pub fn passed_over(&self) -> u64 {
        self.passed_over
    }

    /// Changes so far that were not inserts into the outbox.
    pub fn ignored_changes(&self) -> u64 {
        self.ignored_changes
    }

    /// The rows that did not go the usual way since the last call.
    pub fn take_diversions(&mut self) -> Vec<Diversion> {
        std::mem::take(&mut self.disposal.diversions)
    }

    /// The aggregates that are parked.
    pub fn parking(&self) -> &Parking {
        &self.disposal.parking
    }

    /// A record of the caller's own, of so many bytes, that is in flight until it is [settled](Self::handle_settled). To be
    /// called only while the relay [wants input](Self::wants_input), or is [held](Self::set_hold), and reads no transaction. It
    /// is not ordered with what was read: who needs that waits until the relay is [at rest](Self::is_at_rest).
    pub fn begin_own(&mut self, bytes: usize, now: Duration) -> Ticket {
        if let Some(transactions) = &mut self.transactions {
            transactions.add(bytes, now);
        }
        self.progress.set_now(now);
        // What is before it need not wait for it: an idle outbox pins no log meanwhile.
        self.progress.commit(self.handled, None);
        self.progress.begin_record(bytes)
    }

    /// Frees an aggregate: its later rows go to their own topic again. [`take_markers`](Self::take_markers) hands
    /// out what has to be written. Whether it was parked.
    pub fn free(&mut self, key: &Key, now: Duration) -> bool {
        self.progress.set_now(now);
        let was_parked = self.disposal.free(key, &mut self.progress);
        if let Some(transactions) = self.transactions.as_mut().filter(|_| was_parked) {
            transactions.add(key.cost_bytes(), now);
        }
        was_parked
    }
}

fn add(transactions: Option<&mut Transactions>, outgoing: Option<&Outgoing<'_>>, now: Duration) {
    if let (Some(transactions), Some(outgoing)) = (transactions, outgoing) {
        transactions.add(outgoing.record.cost_bytes(), now);
    }
}

#[cfg(test)]
#[path = "relay_tests.rs"]
mod tests;

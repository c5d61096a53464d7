//! The state machine between the replication stream and Kafka.
//!
//! `handle_*` takes what happened and the time; [`Relay::handle_wal`] hands back the record to enqueue,
//! [`Relay::take_checkpoint`] the position to write down in Kafka, [`Relay::take_status`] the status update to
//! send. Time is a [`Duration`] since an arbitrary start.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

pub use crate::disposal::{Diversion, Halt};
use crate::{
    Lsn, Outgoing,
    disposal::Disposal,
    parking::{Key, Marker, Parking},
    poison::{Poison, Policies},
    progress::{Progress, Ticket},
    record::{Headers, Identity},
    source::{self, Source, Step},
};

/// Between two checkpoints. Each costs a small record, and only what one covers can be confirmed.
const CHECKPOINT_INTERVAL: Duration = Duration::from_millis(250);

/// What the state machine has to know.
#[derive(Debug, Clone)]
pub struct Options {
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
    /// The LSN of the last checkpoint.
    pub checkpoint: Lsn,
    /// Rows that Kafka refused after they were enqueued.
    pub refused: HashMap<Identity, Poison>,
    /// Aggregates that are parked, and the first row of each that was.
    pub parked: BTreeMap<Key, Identity>,
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
    disposal: Disposal,
    received: Lsn,
    /// The checkpoint that Kafka has; None until it is known.
    checkpoint: Option<Lsn>,
    /// The checkpoint that Kafka has not acknowledged yet.
    checkpoint_in_flight: Option<Lsn>,
    last_checkpoint: Option<Duration>,
    /// Whether the caller reads what the server sends.
    listening: bool,
    last_heard: Duration,
    last_status: Duration,
    reported: Lsn,
    reply_wanted: bool,
    ignored_changes: u64,
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
            options,
            progress: Progress::new(confirmed),
            received: confirmed,
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
        }
    }

    /// What earlier sessions wrote down, once it is known. Nothing may have been handled yet.
    pub fn recall(&mut self, past: Past) {
        self.checkpoint = Some(past.checkpoint);
        self.disposal.parking = Parking::new(past.parked);
        self.disposal.refused = past.refused;
    }

    /// One message of the stream, at `start` in the log. What comes back is to be enqueued.
    pub fn handle_wal<'a>(
        &'a mut self,
        start: Lsn,
        bytes: &'a [u8],
        now: Duration,
    ) -> Result<Option<Outgoing<'a>>, Halt> {
        self.last_heard = now;
        self.received = self.received.max(start);
        match self.source.handle(start, bytes)? {
            Step::Nothing => Ok(None),
            Step::PassedOver => {
                self.ignored_changes += 1;
                Ok(None)
            }
            Step::Commit { end_lsn } => {
                self.received = self.received.max(end_lsn);
                self.progress.commit(end_lsn);
                Ok(None)
            }
            Step::Row(drafted) => self.disposal.dispose(drafted, &mut self.progress, None, true),
            Step::Lone { drafted, end_lsn } => {
                let outgoing = self.disposal.dispose(drafted, &mut self.progress, None, true)?;
                self.progress.commit(end_lsn);
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
    pub fn handle_keepalive(&mut self, wal_end: Lsn, reply_requested: bool, now: Duration) {
        self.last_heard = now;
        self.received = self.received.max(wal_end);
        self.reply_wanted |= reply_requested;
        if !self.source.is_in_transaction() {
            self.progress.idle_until(wal_end);
        }
    }

    /// Kafka has acknowledged a record.
    pub fn handle_settled(&mut self, ticket: Ticket) -> Result<(), Halt> {
        self.progress.settle(ticket).map_err(Halt::UnknownTicket)
    }

    /// The markers to write because aggregates were parked or freed.
    pub fn take_markers(&mut self) -> Vec<Marker> {
        std::mem::take(&mut self.disposal.markers)
    }

    /// The position to write down in Kafka now, if it is time: everything up to it is settled.
    pub fn take_checkpoint(&mut self, now: Duration) -> Option<Lsn> {
        let due = self.checkpoint_deadline().is_some_and(|deadline| now >= deadline);
        due.then(|| {
            let lsn = self.progress.confirmed();
            self.checkpoint_in_flight = Some(lsn);
            self.last_checkpoint = Some(now);
            lsn
        })
    }

    fn checkpoint_deadline(&self) -> Option<Duration> {
        let wanted = self.checkpoint.is_some() && !self.is_covered() && self.checkpoint_in_flight.is_none();
        wanted.then(|| self.last_checkpoint.map_or(Duration::ZERO, |last| last + CHECKPOINT_INTERVAL))
    }

    /// Kafka has acknowledged the checkpoint.
    pub fn handle_checkpointed(&mut self) {
        if let Some(lsn) = self.checkpoint_in_flight.take() {
            self.checkpoint = self.checkpoint.max(Some(lsn));
        }
    }

    /// What the server may be told: settled, and covered by a checkpoint. Never goes backwards.
    pub fn confirmed(&self) -> Lsn {
        // A checkpoint may be ahead of what a server remembers that crashed.
        self.progress.confirmed().min(self.checkpoint.unwrap_or_default()).max(self.reported)
    }

    /// Whether to read on. False at the bound of what may be in flight, and before the past is known.
    pub fn wants_input(&self) -> bool {
        self.checkpoint.is_some() && self.progress.in_flight_bytes() < self.options.in_flight_limit_bytes
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

    /// Whether an acknowledged checkpoint covers everything that may be confirmed.
    pub fn is_covered(&self) -> bool {
        self.checkpoint.is_some_and(|checkpoint| self.progress.confirmed() <= checkpoint)
    }

    /// Whether everything that was read is settled, and covered.
    pub fn is_at_rest(&self) -> bool {
        self.progress.is_idle() && !self.is_in_transaction() && self.is_covered()
    }

    /// What is in flight.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// What has been read.
    pub fn received(&self) -> Lsn {
        self.received
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

    /// A record of the caller's own, of so many bytes, that is in flight until it is [settled](Self::handle_settled).
    /// Nothing that was read may be in flight: the relay is [at rest](Self::is_at_rest), and input paused.
    pub fn begin_own(&mut self, bytes: usize) -> Ticket {
        self.progress.begin_record(bytes)
    }

    /// Frees an aggregate: its later rows go to their own topic again. [`take_markers`](Self::take_markers) hands
    /// out what has to be written. Whether it was parked.
    pub fn free(&mut self, key: &Key) -> bool {
        self.disposal.free(key, &mut self.progress)
    }
}

#[cfg(test)]
#[path = "relay_tests.rs"]
mod tests;

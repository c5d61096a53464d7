//! The state machine between the replication stream and Kafka.
//!
//! `handle_*` takes what happened and the time; [`Relay::handle_wal`] hands back the record to enqueue,
//! [`Relay::take_status`] the status update to send. Time is a [`Duration`] since an arbitrary start.

use std::{
    collections::HashMap,
    fmt::{self, Write as _},
    time::Duration,
};

use crate::{
    Lsn,
    outbox::{OutboxTable, Poison, Shape},
    pgoutput::{self, DecodeError, Message, Row},
    progress::{NotInFlight, Progress, Ticket},
    record::{Outgoing, OwnHeader, PositionText, read_own_headers},
    route::TopicTemplate,
};

/// What the scratch for a decoded payload may keep from row to row, in bytes.
const SCRATCH_KEPT_BYTES: usize = 1 << 20;
/// Between two status updates that only tell progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// From the Unix epoch to Postgres' (2000-01-01), in microseconds.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// What the state machine has to know.
#[derive(Debug, Clone)]
pub struct Options {
    pub table: OutboxTable,
    pub topic: TopicTemplate,
    /// Input pauses while this many bytes, or more, are in flight. One record may exceed it.
    pub in_flight_limit_bytes: usize,
    /// The longest time between two status updates: well below the server's `wal_sender_timeout`.
    pub status_interval: Duration,
    /// The server is taken for dead when nothing came for so long although we read.
    pub silence_limit: Duration,
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

/// Why the relay must not go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Halt {
    /// Bytes that are not pgoutput's.
    Undecodable { commit_lsn: Lsn, seq: u64, error: DecodeError },
    /// Messages in an order that pgoutput does not send.
    OutOfProtocol(&'static str),
    /// A row that cannot become a record.
    Poison { commit_lsn: Lsn, seq: u64, row_id: Option<String>, poison: Poison },
    /// A delivery report for a record that is not in flight.
    UnknownTicket(NotInFlight),
}

impl fmt::Display for Halt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Undecodable { commit_lsn, seq, error } => {
                write!(
                    f,
                    "change {seq} of the transaction committed at {commit_lsn} cannot be decoded: {error}"
                )
            }
            Self::OutOfProtocol(what) => write!(f, "the replication stream is out of protocol: {what}"),
            Self::Poison { commit_lsn, seq, row_id, poison } => {
                let id = row_id.as_deref().unwrap_or("unknown");
                write!(
                    f,
                    "outbox row {id} (commit LSN {commit_lsn}, change {seq}) cannot be published: {poison}"
                )
            }
            Self::UnknownTicket(NotInFlight(ticket)) => {
                write!(f, "Kafka reported the delivery of record {} which is not in flight", ticket.0)
            }
        }
    }
}

impl std::error::Error for Halt {}

/// The transaction that is being read.
#[derive(Debug)]
struct Open {
    commit_lsn: Lsn,
    committed_at_ms: i64,
    /// The ordinal of the next change, counting everything pgoutput sends inside the transaction.
    next_seq: u64,
}

/// One replication session's state. A new session starts with a new one.
#[derive(Debug)]
pub struct Relay {
    options: Options,
    progress: Progress,
    open: Option<Open>,
    /// The shape of each relation seen; None where it is not the outbox.
    relations: HashMap<u32, Option<Shape>>,
    received: Lsn,
    /// Whether the caller reads what the server sends.
    listening: bool,
    last_heard: Duration,
    last_status: Duration,
    reported: Lsn,
    reply_wanted: bool,
    ignored_changes: u64,
    // Scratch that keeps its capacity from row to row.
    topic: String,
    payload: Vec<u8>,
    position: PositionText,
    own_headers: Vec<OwnHeader>,
}

impl Relay {
    /// A session that starts now, everything up to `confirmed` having been settled earlier.
    pub fn new(options: Options, confirmed: Lsn, now: Duration) -> Self {
        Self {
            options,
            progress: Progress::new(confirmed),
            open: None,
            relations: HashMap::new(),
            received: confirmed,
            listening: true,
            last_heard: now,
            last_status: now,
            reported: confirmed,
            // The first status update goes out at once: it tells the server who we are and where we stand.
            reply_wanted: true,
            ignored_changes: 0,
            topic: String::new(),
            payload: Vec::new(),
            position: PositionText::default(),
            own_headers: Vec::new(),
        }
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
        let message = pgoutput::decode(bytes).map_err(|error| {
            let (commit_lsn, seq) = self.open.as_ref().map_or((start, 0), |o| (o.commit_lsn, o.next_seq));
            Halt::Undecodable { commit_lsn, seq, error }
        })?;
        match message {
            Message::Begin { commit_lsn, committed_at_us, .. } => self.begin(commit_lsn, committed_at_us)?,
            Message::Commit { commit_lsn, end_lsn, .. } => self.commit(commit_lsn, end_lsn)?,
            Message::Relation(relation) => {
                let shape = self.options.table.is(relation).then(|| self.options.table.shape(relation));
                self.relations.insert(relation.oid, shape);
            }
            Message::Insert { relation_oid, row } => return self.insert(relation_oid, row),
            // A non-transactional message can come at any time, so it is outside a transaction's count.
            Message::Origin { .. }
            | Message::Type { .. }
            | Message::LogicalMessage { transactional: false, .. } => {}
            Message::Update { .. }
            | Message::Delete { .. }
            | Message::Truncate { .. }
            | Message::LogicalMessage { .. } => self.pass_over()?,
        }
        Ok(None)
    }

    fn begin(&mut self, commit_lsn: Lsn, committed_at_us: i64) -> Result<(), Halt> {
        if self.open.is_some() {
            return Err(Halt::OutOfProtocol("a transaction begins inside another"));
        }
        let committed_at_ms = committed_at_us.saturating_add(POSTGRES_EPOCH_US) / 1000;
        self.open = Some(Open { commit_lsn, committed_at_ms, next_seq: 0 });
        self.position.commit_lsn.clear();
        // Writing to a String cannot fail.
        let _ = write!(self.position.commit_lsn, "{commit_lsn}");
        Ok(())
    }

    fn commit(&mut self, commit_lsn: Lsn, end_lsn: Lsn) -> Result<(), Halt> {
        match self.open.take() {
            Some(open) if open.commit_lsn == commit_lsn => {
                self.received = self.received.max(end_lsn);
                self.progress.commit(end_lsn);
                Ok(())
            }
            Some(_) => Err(Halt::OutOfProtocol("a commit does not belong to the transaction before it")),
            None => Err(Halt::OutOfProtocol("a commit without a begin")),
        }
    }

    /// Counts a change of the open transaction, and leaves its ordinal as text.
    fn count_change(&mut self) -> Result<(), Halt> {
        let open = self.open.as_mut().ok_or(Halt::OutOfProtocol("a change outside a transaction"))?;
        self.position.seq.clear();
        let _ = write!(self.position.seq, "{}", open.next_seq);
        open.next_seq += 1;
        Ok(())
    }

    /// A change that is not an insert into the outbox: counted, and nothing else.
    fn pass_over(&mut self) -> Result<(), Halt> {
        self.count_change()?;
        self.ignored_changes += 1;
        Ok(())
    }

    fn insert<'a>(&'a mut self, relation_oid: u32, row: Row<'a>) -> Result<Option<Outgoing<'a>>, Halt> {
        if matches!(self.relations.get(&relation_oid), Some(None)) {
            self.pass_over()?;
            return Ok(None);
        }
        self.count_change()?;
        self.outgoing(relation_oid, row, None).map(Some)
    }

    /// The record that [`handle_wal`](Self::handle_wal) made of these bytes, once more: for a caller that could
    /// not enqueue it then. Nothing may have been handled in between.
    pub fn repeat<'a>(&'a mut self, ticket: Ticket, bytes: &'a [u8]) -> Result<Outgoing<'a>, Halt> {
        match pgoutput::decode(bytes) {
            Ok(Message::Insert { relation_oid, row }) => self.outgoing(relation_oid, row, Some(ticket)),
            _ => Err(Halt::OutOfProtocol("what is to be repeated is not an insert")),
        }
    }

    /// The record for a row, which is the last change that was counted. It takes its credit unless it already
    /// has its ticket.
    fn outgoing<'a>(
        &'a mut self,
        relation_oid: u32,
        row: Row<'a>,
        ticket: Option<Ticket>,
    ) -> Result<Outgoing<'a>, Halt> {
        let Some(Some(shape)) = self.relations.get(&relation_oid) else {
            return Err(Halt::OutOfProtocol("a row of a relation that was not described"));
        };
        let open = self.open.as_ref().ok_or(Halt::OutOfProtocol("a row outside a transaction"))?;
        let (commit_lsn, seq) = (open.commit_lsn, open.next_seq.saturating_sub(1));
        let poison = |poison| Halt::Poison { commit_lsn, seq, row_id: shape.id_of(row), poison };
        if self.payload.capacity() > SCRATCH_KEPT_BYTES {
            self.payload = Vec::new();
        }
        let outbox_row = shape.read(row, &mut self.payload).map_err(poison)?;
        if !self.options.topic.render(&outbox_row, &mut self.topic) {
            return Err(poison(Poison::UnroutableTopic(self.topic.clone())));
        }
        read_own_headers(&outbox_row, &mut self.own_headers).map_err(poison)?;
        let mut outgoing = Outgoing {
            ticket: Ticket(0),
            topic: &self.topic,
            row: outbox_row,
            committed_at_ms: open.committed_at_ms,
            position: &self.position,
            own_headers: &self.own_headers,
        };
        outgoing.ticket = ticket.unwrap_or_else(|| self.progress.begin_record(outgoing.cost_bytes()));
        Ok(outgoing)
    }

    /// A keepalive: the server has sent everything up to `wal_end`.
    pub fn handle_keepalive(&mut self, wal_end: Lsn, reply_requested: bool, now: Duration) {
        self.last_heard = now;
        self.received = self.received.max(wal_end);
        self.reply_wanted |= reply_requested;
        if self.open.is_none() {
            self.progress.idle_until(wal_end);
        }
    }

    /// Kafka has acknowledged a record.
    pub fn handle_settled(&mut self, ticket: Ticket) -> Result<(), Halt> {
        self.progress.settle(ticket).map_err(Halt::UnknownTicket)
    }

    /// Whether to read on. False at the bound of what may be in flight.
    pub fn wants_input(&self) -> bool {
        self.progress.in_flight_bytes() < self.options.in_flight_limit_bytes
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

    /// When [`take_status`](Self::take_status) or [`is_silent`](Self::is_silent) next has to be asked.
    pub fn next_deadline(&self) -> Duration {
        let status = self.status_deadline();
        if self.listening { status.min(self.last_heard + self.options.silence_limit) } else { status }
    }

    fn status_deadline(&self) -> Duration {
        if self.reply_wanted {
            Duration::ZERO
        } else if self.progress.confirmed() > self.reported {
            self.last_status + PROGRESS_INTERVAL.min(self.options.status_interval)
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
        let confirmed = self.progress.confirmed();
        self.reply_wanted = false;
        self.last_status = now;
        self.reported = confirmed;
        StatusUpdate { received: self.received.max(confirmed), confirmed }
    }

    /// Whether a transaction has been read in part.
    pub fn is_in_transaction(&self) -> bool {
        self.open.is_some()
    }

    /// What is in flight, and what may be confirmed.
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
}

#[cfg(test)]
#[path = "relay_tests.rs"]
mod tests;

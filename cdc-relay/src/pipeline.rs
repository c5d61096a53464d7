//! THE loop: from the slot to Kafka and back to the slot, on one plain thread.
//!
//! A session takes the slot, reads in Kafka what earlier ones wrote down, begins at the slot's confirmed LSN with a
//! new producer and an empty state machine, and lasts until something fails or a stop is asked for. What a failed
//! session had not confirmed is read again by the next.

mod beginning;
mod ending;
mod telling;

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use relay_core::{Lsn, Relay, poison::Poison, progress::Ticket, record::Identity};

use self::telling::Told;
use crate::{
    admin::State,
    ahead::Ahead,
    desk::{Hands, Progress},
    diversions::Diversions,
    dlq::redrive::Redrive,
    error::{Error, Kind},
    kafka::{Done, Producer},
    ledger::{Reader, Writer},
    placing::{Placed, place, place_again},
    position::System,
    replay::publish::Replay,
    replication::{
        pace::Pace,
        stream::{Event, ReplicationStream},
    },
    shared::Shared,
    start::{Memory, STATUS_INTERVAL},
    wait::Wakeups,
};

/// At most so many events between two looks at the acknowledgements and the clock.
const EVENTS_PER_ROUND: usize = 1024;
/// How soon a record that could not be enqueued is tried again.
const PENDING_RETRY: Duration = Duration::from_millis(100);
/// A session that has had nothing to do for so long is well.
const WELL_AFTER: Duration = Duration::from_secs(10);
/// A round that took longer may have been interrupted by a frozen process or machine.
const FROZEN_AFTER: Duration = Duration::from_secs(1);

/// One session, from its first connection to its end.
struct Session<'a> {
    shared: &'a Shared,
    wakeups: &'a Wakeups,
    started: Instant,
    stream: ReplicationStream,
    system: System,
    confirmed_at_start: Lsn,
    producer: Producer,
    relay: Relay,
    /// What earlier sessions wrote down is being read; nothing is read from the slot until then.
    reader: Option<Reader>,
    /// Whether that was read, and fits the slot.
    is_admitted: bool,
    writer: Writer,
    diversions: Diversions,
    refused: HashMap<Identity, Poison>,
    /// The record that Kafka could not take yet, as it came: its ticket and its message. Nothing is read while
    /// there is one.
    pending: Option<(Ticket, Vec<u8>)>,
    /// While one is under way, input may be paused.
    redrive: Option<Redrive>,
    /// Published once more, beside the stream.
    replay: Option<Replay>,
    /// Read while one of Kafka's transactions is committed.
    ahead: Ahead,
    /// See [`Memory::apart`].
    apart: Option<Lsn>,
    /// Scratch for acknowledgements.
    acknowledged: Vec<Ticket>,
    told: Told,
    pace: Pace,
    /// When the last round began.
    last_round: Duration,
    /// When Postgres was first seen to shut down.
    postgres_stops_since: Option<Duration>,
    /// Whether Kafka has acknowledged something, or a while has passed with nothing to do.
    is_well: bool,
    /// When Kafka last acknowledged something, or nothing waited for it.
    waiting_since: Duration,
}

/// How a session ended.
pub(crate) struct End {
    /// Ok only when a stop was asked for.
    pub(crate) result: Result<(), Error>,
    /// Whether anything went well before: an acknowledgement, or a while with nothing to do. A session alone
    /// proves nothing, because it may fail at once, for ever.
    pub(crate) was_well: bool,
}

/// Runs one session to its end.
pub(crate) fn session(shared: &Shared, wakeups: &Wakeups, memory: &mut Memory) -> End {
    match beginning::begin(shared, wakeups, memory) {
        Err(error) => End { result: Err(error), was_well: false },
        Ok(mut session) => {
            let mut result = session.run();
            let was_well = session.is_well;
            memory.transaction_age = session.relay.transaction_age(session.now());
            shared.redrives.close();
            shared.replays.desk.close();
            match &result {
                Ok(()) => session.give_up("the relay stops"),
                Err(e) => session.give_up(&format!("the relay's session ended: {e}")),
            }
            result = match result {
                Ok(()) => session.finish(),
                // Once: what halts again is not of that transaction, or has nothing before it.
                Err(e)
                    if e.kind == Kind::Halted
                        && session.relay.entangled().is_some_and(|t| memory.apart != Some(t)) =>
                {
                    memory.apart = session.relay.entangled();
                    let what = format!("what was committed before this is published first: {e}");
                    Err(Error::new(Kind::Entangled, what))
                }
                Err(e) if e.kind == Kind::Halted => {
                    session.settle_before_halt();
                    // How this ends changes nothing about the halt.
                    let _ = session.finish();
                    Err(e)
                }
                Err(e) => {
                    if shared.stopping() || !e.kind.is_retried_soon() {
                        session.leave();
                    }
                    Err(e)
                }
            };
            End { result, was_well }
        }
    }
}

impl Session<'_> {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Ends well when a stop was asked for and all is drained, or the grace for it is over.
    fn run(&mut self) -> Result<(), Error> {
        // When the stop was asked for.
        let mut draining: Option<Duration> = None;
        loop {
            self.wake_up()?;
            self.admit()?;
            self.settle()?;
            self.relay.set_hurry(self.hurries());
            self.keep_position()?;
            if self.shared.stopping() {
                let since = *draining.get_or_insert_with(|| self.now());
                if self.is_drained() || self.now() >= since + self.shared.settings.drain_grace {
                    return Ok(());
                }
                self.shared.health.not_ready("draining", "");
                self.shared.metrics.enter(State::Draining);
            }
            self.feed_back()?;
            // A transaction that has been read in part is read to its end even while draining: only then can
            // what Kafka has of it be confirmed, and need not be repeated.
            let wanted =
                !self.lets_postgres_stop()? && (!self.pauses(draining) || self.relay.is_in_transaction());
            let read = wanted && self.pending.is_none() && self.relay.wants_input();
            let ahead = wanted && self.relay.is_committing() && self.ahead.has_room();
            self.relay.set_listening(read || ahead, self.now());
            let mut progressed = if read { self.read()? } else { self.retry_pending()? };
            if ahead {
                progressed |= self.read_ahead()?;
            }
            progressed |= self.redrive(draining.is_some())?;
            progressed |= self.replay(draining.is_some())?;
            self.keep_parking()?;
            self.tell(draining);
            if !progressed {
                self.wait(read || ahead);
            }
        }
    }

    /// A process that was frozen may wake up without its slot, and is not to write down anything then. The stream does not
    /// tell it: behind rows that fill the socket, its end does not show. So the server is asked.
    fn wake_up(&mut self) -> Result<(), Error> {
        let frozen = self.now() > self.last_round + FROZEN_AFTER;
        if frozen && !self.holds_slot()? {
            return Err(Error::new(Kind::PostgresAway, "the slot is no longer ours after a standstill"));
        }
        // Not before the question, which may have taken a while.
        self.last_round = self.now();
        Ok(())
    }

    /// Whether no new transaction is read.
    fn pauses(&self, draining: Option<Duration>) -> bool {
        draining.is_some() || self.redrive.as_ref().is_some_and(Redrive::pauses_input)
    }

    /// Goes on with the redrive that is under way or asked for. Whether anything came of it.
    fn redrive(&mut self, stopping: bool) -> Result<bool, Error> {
        if self.redrive.is_none() {
            // A letter of what is passed over could be left behind.
            // And what waits for the producer would have to wait for the redrive, and that for it.
            if self.relay.passes_over() || self.replay.as_ref().is_some_and(Replay::has_pending) {
                return Ok(false);
            }
            let Some(job) = self.shared.redrives.take() else { return Ok(false) };
            self.redrive = Some(Redrive::start(job, self.shared, &self.relay, self.now())?);
        }
        let (mut hands, redrive, _) = self.hands(stopping);
        let Some(redrive) = redrive else { return Ok(false) };
        let progress = redrive.go_on(&mut hands)?;
        if progress == Progress::Over
            && let Some(redrive) = self.redrive.take()
        {
            self.shared.redrives.open(self.writer.owner.key());
            redrive.answer();
        }
        Ok(progress != Progress::Waits)
    }

    /// Goes on with the replay that is under way or asked for. Whether anything came of it.
    fn replay(&mut self, stopping: bool) -> Result<bool, Error> {
        // A redrive waits until nothing is in flight.
        if self.redrive.is_some() || self.pending.is_some() {
            return Ok(false);
        }
        if self.replay.is_none() {
            let Some(job) = self.shared.replays.desk.take() else { return Ok(false) };
            let (mut hands, ..) = self.hands(stopping);
            self.replay = Some(Replay::start(job, &mut hands)?);
        }
        let (mut hands, _, replay) = self.hands(stopping);
        let Some(replay) = replay else { return Ok(false) };
        let progress = replay.go_on(&mut hands)?;
        if progress == Progress::Over
            && let Some(replay) = self.replay.take()
        {
            self.shared.replays.desk.open(self.writer.owner.key());
            replay.answer();
        }
        Ok(progress != Progress::Waits)
    }

    /// What was asked for and is under way ends with the session.
    fn give_up(&mut self, why: &str) {
        if let Some(mut redrive) = self.redrive.take() {
            redrive.give_up(why);
            redrive.answer();
        }
        if let Some(mut replay) = self.replay.take() {
            replay.give_up(why);
            // So that what is behind it can still be confirmed. The ticket is ours, so there is no error.
            let _ = replay.leave(&mut self.relay);
            replay.answer();
        }
    }

    fn hands(&mut self, stopping: bool) -> (Hands<'_>, Option<&mut Redrive>, Option<&mut Replay>) {
        let hurry = stopping || self.postgres_stops_since.is_some();
        let now = self.now();
        let Self { shared, relay, producer, redrive, replay, .. } = self;
        (Hands { shared, relay, producer, now, hurry }, redrive.as_mut(), replay.as_mut())
    }

    /// Writes down in Kafka what is settled, before Postgres is told.
    fn keep_position(&mut self) -> Result<(), Error> {
        if let Some(checkpoint) = self.relay.take_checkpoint(self.now()) {
            // It may have been frozen since the round began.
            self.wake_up()?;
            self.producer.write(&self.writer.checkpoint(&self.shared.settings, checkpoint), None)?;
        }
        if self.relay.take_commit() {
            self.producer.commit();
        }
        Ok(())
    }

    /// Takes what Kafka has acknowledged.
    fn settle(&mut self) -> Result<(), Error> {
        if self.producer.take_reports(&mut self.acknowledged)? {
            self.relay.handle_checkpointed();
        }
        let is_acknowledged = !self.acknowledged.is_empty();
        let mut is_delivered = is_acknowledged && !self.relay.is_exactly_once();
        match self.producer.take_done()? {
            Some(Done::Fenced) => self.reader = Some(Reader::start(self.shared, self.writer.owner.clone())?),
            Some(Done::Committed) => {
                self.relay.handle_committed();
                self.shared.metrics.transactions.inc();
                is_delivered = true;
            }
            Some(Done::Aborted) | None => {}
        }
        let now = self.now();
        for ticket in &self.acknowledged {
            self.relay.handle_settled(*ticket)?;
        }
        self.shared.metrics.acknowledged.inc_by(self.acknowledged.len() as u64);
        if is_acknowledged || is_delivered {
            self.tell_published(now);
        }
        let idle = self.is_admitted && self.pending.is_none() && !self.relay.awaits_kafka();
        self.is_well |= is_delivered || (idle && now >= WELL_AFTER);
        if is_acknowledged || is_delivered || idle {
            self.waiting_since = now;
        }
        let waited = now.saturating_sub(self.waiting_since);
        if self.shared.settings.give_up_after.is_some_and(|limit| waited >= limit) {
            let what = format!("Kafka has acknowledged nothing for {} s", waited.as_secs());
            return Err(Error::new(Kind::GaveUp, what));
        }
        Ok(())
    }

    /// Sends the status update that is due, and notices a silent server.
    fn feed_back(&mut self) -> Result<(), Error> {
        let now = self.now();
        if self.stream.wants_write() {
            self.stream.flush()?;
        }
        if !self.stream.wants_write()
            && let Some(status) = self.relay.take_status(now)
        {
            self.stream.send_status(status)?;
        }
        if self.relay.is_silent(now) {
            return Err(Error::new(Kind::PostgresAway, "the server has said nothing for too long"));
        }
        Ok(())
    }

    /// Handles what was read and reads more, until the socket is empty or something else is due. Whether there
    /// was anything.
    fn read(&mut self) -> Result<bool, Error> {
        // The time of the read: what one read brings is handled in a few milliseconds.
        let mut now = self.now();
        for _ in 0..EVENTS_PER_ROUND {
            let event = match self.ahead.take() {
                Some(event) => Some(event),
                None => self.stream.next_event()?,
            };
            match event {
                None => {
                    if !self.stream.fill()? {
                        return Ok(self.pace.drained(self.stream.behind()));
                    }
                    now = self.now();
                }
                Some(Event::Keepalive { wal_end, reply_requested }) => {
                    self.relay.handle_keepalive(wal_end, reply_requested, now)?;
                }
                Some(Event::Wal { start, message }) => {
                    self.pace.message();
                    let placed = place(&mut self.relay, &mut self.producer, start, message, now)?;
                    if let Placed::Later(ticket) = placed {
                        self.pending = Some((ticket, message.to_vec()));
                        return Ok(true);
                    }
                }
            }
            if !self.relay.wants_input() || now >= self.relay.next_deadline() {
                break;
            }
        }
        Ok(true)
    }

    /// Reads what the next of Kafka's transactions takes, and handles nothing of it. Whether there was anything.
    fn read_ahead(&mut self) -> Result<bool, Error> {
        let now = self.now();
        for _ in 0..EVENTS_PER_ROUND {
            let Some(event) = self.stream.next_event()? else {
                return Ok(self.stream.fill()? || self.pace.drained(self.stream.behind()));
            };
            let asks = matches!(event, Event::Keepalive { reply_requested: true, .. });
            if matches!(event, Event::Wal { .. }) {
                self.pace.message();
            }
            self.relay.hear(asks, now);
            self.ahead.push(&event);
            if !self.ahead.has_room() {
                break;
            }
        }
        Ok(true)
    }

    fn retry_pending(&mut self) -> Result<bool, Error> {
        let Some((ticket, message)) = &self.pending else { return Ok(false) };
        let placed = place_again(&mut self.relay, &mut self.producer, *ticket, message)?;
        let done = matches!(placed, Placed::Done);
        if done {
            self.pending = None;
        }
        Ok(done)
    }

    /// Waits for whatever comes first.
    fn wait(&self, read: bool) {
        let write = self.stream.wants_write();
        // A status update that is due waits for the socket to take the one before it.
        let deadline =
            if write { STATUS_INTERVAL } else { self.relay.next_deadline().saturating_sub(self.now()) };
        // A wait that has gone on for longer than that was none.
        let mut timeout = deadline.min(FROZEN_AFTER / 2).min(self.until_late());
        if self.pending.is_some()
            || self.redrive.is_some()
            || self.replay.is_some()
            || self.shared.stopping()
            || self.postgres_stops_since.is_some()
        {
            timeout = timeout.min(PENDING_RETRY);
        }
        self.wakeups.wait_with(self.stream.fd(), read, write, timeout);
    }

    /// Writes down which aggregates were parked or freed.
    fn keep_parking(&mut self) -> Result<(), Error> {
        for marker in self.relay.take_markers() {
            let entry = self.writer.parked(&self.shared.settings, &marker.key, marker.parked);
            self.producer.write(&entry, Some(marker.ticket))?;
        }
        Ok(())
    }
}

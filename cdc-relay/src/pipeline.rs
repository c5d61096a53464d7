//! THE loop: from the slot to Kafka and back to the slot, on one plain thread.
//!
//! A session begins at the slot's confirmed LSN with a new producer and an empty state machine, and lasts until
//! something fails or a stop is asked for. What a failed session had not confirmed is read again by the next.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use relay_core::{Relay, progress::Ticket, relay::Options};
use service::{Failure, Health, exit};

use crate::{
    admin::Metrics,
    config::Settings,
    error::{Error, Kind, Policy},
    kafka::{Batch, Producer},
    replication::{
        connection::Connection,
        handshake::Purpose,
        stream::{Event, ReplicationStream},
    },
    slot::{self, Position},
    wait::{Waker, Wakeups},
};

/// After the socket was drained under load: long enough for the server to gather rows into one write, short
/// enough not to leave its socket full.
const NAP: Duration = Duration::from_micros(200);
/// At most so many events between two looks at the acknowledgements and the clock.
const EVENTS_PER_ROUND: usize = 1024;
/// How soon a record that could not be enqueued is tried again.
const PENDING_RETRY: Duration = Duration::from_millis(100);
/// How often a standby tries the slot.
const STANDBY_INTERVAL: Duration = Duration::from_millis(500);
/// A session that has had nothing to do for so long is well.
const WELL_AFTER: Duration = Duration::from_secs(10);
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LIMIT: Duration = Duration::from_secs(5);
/// The longest time between two status updates, whatever the server would allow.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);

/// What the pipeline shares with the rest of the process.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    pub(crate) settings: Arc<Settings>,
    pub(crate) metrics: Metrics,
    pub(crate) health: Health,
    pub(crate) waker: Waker,
    /// Set, and the waker woken, to ask for a stop.
    pub(crate) stop: Arc<AtomicBool>,
}

impl Shared {
    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// What one session leaves to the next.
struct Course {
    backoff: Duration,
    unwell_since: Option<Instant>,
    batch: Batch,
    /// Whether the slot may still have to be made.
    first: bool,
}

/// Runs sessions until a stop is asked for or an error ends the process.
pub(crate) fn run(shared: &Shared, wakeups: &Wakeups) -> Result<(), Failure> {
    let mut course =
        Course { backoff: BACKOFF_FIRST, unwell_since: None, batch: Batch::default(), first: true };
    while !shared.stopping() {
        let Err(error) = session(shared, wakeups, &mut course) else { return Ok(()) };
        shared.metrics.streaming.set(0);
        shared.metrics.error(error.kind);
        if error.kind == Kind::BatchTooLarge {
            course.batch = course.batch.smaller(&shared.settings.kafka);
        }
        match error.kind.policy() {
            Policy::Stop(_) => return Err(error.into_failure()),
            _ if shared.stopping() => {
                let what =
                    format!("stopped without a clean end, what was not confirmed is read again: {error}");
                return Err(Failure::new(exit::Kind::GaveUp, what));
            }
            Policy::StandBy => {
                if shared.metrics.standby.set(1) == 0 {
                    tracing::info!("standing by: {error}");
                }
                shared.health.ready("standby");
                course.unwell_since = None;
                wakeups.wait(STANDBY_INTERVAL);
            }
            Policy::Retry => {
                let since = *course.unwell_since.get_or_insert_with(Instant::now);
                if shared.settings.give_up_after.is_some_and(|limit| since.elapsed() >= limit) {
                    let seconds = since.elapsed().as_secs();
                    let what = format!("nothing went on for {seconds} s, the last error: {error}");
                    return Err(Failure::new(exit::Kind::GaveUp, what));
                }
                shared.health.not_ready("reconnecting", error.message.clone());
                tracing::warn!(retry_in_ms = course.backoff.as_millis(), "{error}");
                pause(shared, wakeups, course.backoff.mul_f64(0.5 + fastrand::f64() / 2.0));
                course.backoff = (course.backoff * 2).min(BACKOFF_LIMIT);
            }
        }
    }
    Ok(())
}

/// Waits for the whole time, unless a stop is asked for.
fn pause(shared: &Shared, wakeups: &Wakeups, time: Duration) {
    let until = Instant::now() + time;
    while !shared.stopping() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        wakeups.wait(left);
    }
}

/// One session, from its first connection to its end.
struct Session<'a> {
    shared: &'a Shared,
    wakeups: &'a Wakeups,
    started: Instant,
    stream: ReplicationStream,
    producer: Producer,
    relay: Relay,
    /// The record that Kafka could not take yet, as it came: its ticket and its message. Nothing is read while
    /// there is one.
    pending: Option<(Ticket, Vec<u8>)>,
    /// Scratch for acknowledgements.
    acknowledged: Vec<Ticket>,
    ignored_before: u64,
    /// Whether rows have come since the last nap.
    busy: bool,
    /// When Kafka last acknowledged something, or a while had passed with nothing to do.
    well_at: Option<Duration>,
}

/// Ends well only when a stop was asked for.
fn session(shared: &Shared, wakeups: &Wakeups, course: &mut Course) -> Result<(), Error> {
    let settings = &*shared.settings;
    if settings.create_slot && course.first {
        slot::init(settings)?;
    }
    course.first = false;
    let (stream, position) = take_slot(settings)?;
    let producer =
        Producer::new(&settings.kafka, course.batch, shared.waker.clone(), shared.metrics.clone())?;
    let options = Options {
        table: settings.table.clone(),
        topic: settings.topic.clone(),
        in_flight_limit_bytes: settings.in_flight_limit_bytes,
        status_interval: status_interval(position.wal_sender_timeout_ms),
        // The server may be busy decoding, and looks at our requests for a reply no sooner than it would care.
        silence_limit: settings.silence_limit.max(Duration::from_millis(position.wal_sender_timeout_ms)),
    };
    shared.metrics.sessions.inc();
    shared.metrics.standby.set(0);
    shared.metrics.streaming.set(1);
    shared.health.ready("streaming");
    tracing::info!(slot = settings.slot, confirmed_lsn = %position.confirmed, "streaming");
    let mut session = Session {
        shared,
        wakeups,
        started: Instant::now(),
        stream,
        producer,
        relay: Relay::new(options, position.confirmed, Duration::ZERO),
        pending: None,
        acknowledged: Vec::new(),
        ignored_before: 0,
        busy: false,
        well_at: None,
    };
    let result = session.run();
    // Only what went well proves that the cause is gone: a session alone may fail at once, for ever.
    if session.well_at.is_some() {
        (course.backoff, course.unwell_since) = (BACKOFF_FIRST, None);
    }
    result.and_then(|()| session.finish())
}

/// Takes the slot, then looks at where it stands: before, another process could still move it.
fn take_slot(settings: &Settings) -> Result<(ReplicationStream, Position), Error> {
    let mut connection = Connection::connect(&settings.postgres, Purpose::Sql, settings.connect_timeout)?;
    let stream = ReplicationStream::start(
        &settings.postgres,
        &settings.slot,
        &settings.publication,
        settings.connect_timeout,
    );
    match stream {
        Ok(stream) => Ok((stream, slot::verify(&mut connection, settings)?)),
        // What the server refuses in few words, a look at the slot explains.
        Err(e) if matches!(e.kind.policy(), Policy::Stop(_)) => {
            slot::verify(&mut connection, settings).and(Err(e))
        }
        Err(e) => Err(e),
    }
}

/// A third of what the server waits for, so that one lost update is not the end.
fn status_interval(wal_sender_timeout_ms: u64) -> Duration {
    match wal_sender_timeout_ms {
        0 => STATUS_INTERVAL,
        ms => Duration::from_millis((ms / 3).max(1)).min(STATUS_INTERVAL),
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
            self.settle()?;
            if self.shared.stopping() {
                let since = *draining.get_or_insert_with(|| self.now());
                if self.is_drained() || self.now() >= since + self.shared.settings.drain_grace {
                    return Ok(());
                }
                self.shared.health.not_ready("draining", "");
            }
            self.feed_back()?;
            // A transaction that has been read in part is read to its end even while draining: only then can
            // what Kafka has of it be confirmed, and need not be repeated.
            let wanted = draining.is_none() || self.relay.is_in_transaction();
            let read = wanted && self.pending.is_none() && self.relay.wants_input();
            self.relay.set_listening(read, self.now());
            let progressed = if read { self.read()? } else { self.retry_pending()? };
            self.tell();
            if !progressed {
                self.wait(read);
            }
        }
    }

    /// Takes what Kafka has acknowledged.
    fn settle(&mut self) -> Result<(), Error> {
        self.producer.take_reports(&mut self.acknowledged)?;
        let now = self.now();
        for ticket in &self.acknowledged {
            self.relay.handle_settled(*ticket)?;
        }
        self.shared.metrics.acknowledged.inc_by(self.acknowledged.len() as u64);
        let idle = self.pending.is_none() && self.relay.progress().in_flight_records() == 0;
        if !self.acknowledged.is_empty() || (idle && now >= WELL_AFTER) {
            self.well_at = Some(now);
        }
        let unwell = now.saturating_sub(self.well_at.unwrap_or_default());
        if !idle && self.shared.settings.give_up_after.is_some_and(|limit| unwell >= limit) {
            let what = format!("Kafka has acknowledged nothing for {} s", unwell.as_secs());
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
        for _ in 0..EVENTS_PER_ROUND {
            let now = self.started.elapsed();
            match self.stream.next_event()? {
                None => {
                    if !self.stream.fill()? {
                        // Drained. Under load, let the server gather rows into its next write.
                        let nap = std::mem::take(&mut self.busy);
                        if nap {
                            std::thread::sleep(NAP);
                        }
                        return Ok(nap);
                    }
                }
                Some(Event::Keepalive { wal_end, reply_requested }) => {
                    self.relay.handle_keepalive(wal_end, reply_requested, now);
                }
                Some(Event::Wal { start, message }) => {
                    self.busy = true;
                    if let Some(record) = self.relay.handle_wal(start, message, now)? {
                        if !self.producer.offer(&record)? {
                            self.pending = Some((record.ticket, message.to_vec()));
                            return Ok(true);
                        }
                        self.shared.metrics.records.inc();
                    }
                }
            }
            if !self.relay.wants_input() || now >= self.relay.next_deadline() {
                break;
            }
        }
        Ok(true)
    }

    fn retry_pending(&mut self) -> Result<bool, Error> {
        let Some((ticket, message)) = &self.pending else { return Ok(false) };
        let taken = self.producer.offer(&self.relay.repeat(*ticket, message)?)?;
        if taken {
            self.pending = None;
            self.shared.metrics.records.inc();
        }
        Ok(taken)
    }

    fn is_drained(&self) -> bool {
        self.pending.is_none()
            && self.relay.progress().in_flight_records() == 0
            && !self.relay.is_in_transaction()
    }

    /// Waits for whatever comes first.
    fn wait(&self, read: bool) {
        let write = self.stream.wants_write();
        // A status update that is due waits for the socket to take the one before it.
        let deadline =
            if write { STATUS_INTERVAL } else { self.relay.next_deadline().saturating_sub(self.now()) };
        let mut timeout = deadline.min(STATUS_INTERVAL);
        if self.pending.is_some() || self.shared.stopping() {
            timeout = timeout.min(PENDING_RETRY);
        }
        self.wakeups.wait_with(self.stream.fd(), read, write, timeout);
    }

    /// The end that was asked for: the last status, and the slot is free.
    fn finish(mut self) -> Result<(), Error> {
        let left = self.relay.progress().in_flight_records();
        let status = self.relay.final_status(self.now());
        let told = self.stream.finish(status);
        self.shared.metrics.streaming.set(0);
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
        Ok(())
    }

    fn tell(&mut self) {
        let as_gauge = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let (metrics, progress) = (&self.shared.metrics, self.relay.progress());
        metrics.in_flight_records.set(as_gauge(progress.in_flight_records() as u64));
        metrics.in_flight_bytes.set(as_gauge(progress.in_flight_bytes() as u64));
        metrics.confirmed_lsn.set(as_gauge(progress.confirmed().0));
        metrics.received_lsn.set(as_gauge(self.relay.received().0));
        let ignored = self.relay.ignored_changes();
        metrics.ignored_changes.inc_by(ignored - self.ignored_before);
        self.ignored_before = ignored;
    }
}

//! What was in the outboxes before the slot: read from the snapshot that the slot's creation exported, and published
//! before anything of the stream.
//!
//! It goes the way of the stream, as one transaction that commits right before the slot begins. What it publishes is in
//! no transaction of Kafka: an interrupted backfill starts over with another snapshot, and repeats.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use relay_core::{
    Lsn, Relay,
    checkpoint::Mark,
    progress::Ticket,
    relay::{Delivery, Options, Past},
    source,
};

use crate::{
    admin::Metrics,
    clock,
    config::Settings,
    diversions::Diversions,
    error::{Error, Kind},
    kafka::Producer,
    ledger::{Ledger, Writer},
    placing::{Placed, place, place_again},
    replication::{connection::Connection, encode::Encoder},
    snapshot::{Column, OrderBy, Snapshot},
    start::Memory,
    wait::{self, Wakeups},
};

/// How long the server may take for the next row: it may have to sort them all first.
const READ_TIMEOUT: Duration = Duration::from_hours(1);
/// How often what Kafka says is looked at while nothing else can be done.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Between two lines of the log about how far it is.
const TELL_INTERVAL: Duration = Duration::from_secs(5);
/// So many rows are read between two looks at what Kafka has acknowledged.
const ROWS_PER_LOOK: u64 = 256;
/// How often it starts over by itself where Kafka refused a record after it was enqueued.
const ATTEMPTS_LIMIT: usize = 10;

/// What is to be published.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) order: OrderBy,
    /// A condition of SQL: only rows that meet it.
    pub(crate) filter: Option<String>,
}

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Backfilled {
    pub(crate) rows: u64,
    /// Of those, the rows that a policy left out, dead-lettered or parked.
    pub(crate) diverted: u64,
}

/// Whether the rows could be read, before anything is changed.
///
/// # Errors
/// A column or a right is missing, or the condition is no SQL.
pub(crate) fn rehearse(connection: &mut Connection, settings: &Settings, plan: &Plan) -> Result<(), Error> {
    if settings.source.outboxes.is_empty() {
        let what = "there is no outbox table, and messages leave no rows that could be published";
        return Err(Error::new(Kind::Misconfigured, what));
    }
    let mut snapshot = Snapshot::begin(connection, settings, plan.filter.as_deref(), None)?;
    for outbox in &settings.source.outboxes {
        let columns = snapshot.columns(outbox)?;
        let order = format!("{} LIMIT 0", plan.order.clause(outbox));
        snapshot.read(outbox, &columns, &order, &[], |_| Ok(())).map_err(|e| {
            match e.sqlstate.as_deref() {
                Some("42703") => Error { kind: Kind::Misconfigured, ..e }
                    .hint("look at --order-by and --where: columns of each outbox"),
                _ => e,
            }
        })?;
    }
    snapshot.end()
}

/// Publishes what the snapshot has, and waits until Kafka has acknowledged all of it. `begins_at` is where the slot
/// begins.
///
/// # Errors
/// What ends the relay, too; and an interruption.
pub(crate) fn publish(
    connection: &mut Connection,
    settings: &Settings,
    plan: &Plan,
    exported: &str,
    (begins_at, ledger, writer): (Lsn, &Ledger, &Writer),
    stop: &AtomicBool,
) -> Result<Backfilled, Error> {
    connection.set_answer_timeout(READ_TIMEOUT)?;
    let mut memory = Memory::default();
    let mut snapshot = Snapshot::begin(connection, settings, plan.filter.as_deref(), Some(exported))?;
    let count = snapshot.count()?;
    for attempt in 1.. {
        let mut backfill = Backfill::new(settings, begins_at, ledger, writer, &memory, stop)?;
        backfill.count = count;
        let result = backfill.run(&mut snapshot, plan);
        let done = backfill.done;
        drop(backfill);
        match result {
            Ok(()) => {
                snapshot.end()?;
                return Ok(done);
            }
            Err(e) if e.refused.is_some() || matches!(e.kind, Kind::BatchTooLarge | Kind::BatchRefused) => {
                memory.learn(&e, settings)?;
                if attempt >= ATTEMPTS_LIMIT {
                    return Err(e);
                }
                tracing::warn!("the backfill starts over, and repeats what it has published: {e}");
            }
            Err(e) => return Err(e),
        }
    }
    Ok(Backfilled::default())
}

/// The commit LSN that the rows have. No commit's record begins there: such positions are multiples of eight.
pub(crate) fn commit_lsn(begins_at: Lsn) -> Lsn {
    Lsn(begins_at.0.saturating_sub(1))
}

/// One way through the rows.
struct Backfill<'a> {
    settings: &'a Settings,
    stop: &'a AtomicBool,
    producer: Producer,
    relay: Relay,
    writer: &'a Writer,
    wakeups: Wakeups,
    diversions: Diversions,
    started: Instant,
    told: Instant,
    /// The transaction that the rows are of, and where it ends.
    mark: Mark,
    end: Lsn,
    count: u64,
    done: Backfilled,
    acknowledged: Vec<Ticket>,
}

impl<'a> Backfill<'a> {
    fn new(
        settings: &'a Settings,
        begins_at: Lsn,
        ledger: &Ledger,
        writer: &'a Writer,
        memory: &Memory,
        stop: &'a AtomicBool,
    ) -> Result<Self, Error> {
        let internal = |e| Error::new(Kind::Internal, format!("cannot make a pipe: {e}"));
        let (waker, wakeups) = wait::pair().map_err(internal)?;
        let metrics = Metrics::default();
        let producer = Producer::new(&settings.kafka, memory.batch, waker, metrics.clone(), None)?;
        let commit_lsn = commit_lsn(begins_at);
        let mark = Mark { commit_lsn, committed_at_us: clock::postgres_now_us() };
        let options = Options {
            delivery: Delivery::AtLeastOnce,
            source: source::Options { messages: None, ..settings.source.clone() },
            policies: settings.policies,
            dead_letter_topic: settings.dead_letter_topic.clone(),
            dead_letter_source: writer.owner.key(),
            in_flight_limit_bytes: settings.in_flight_limit_bytes,
            // There is no stream to be told, and none that could fall silent.
            status_interval: Duration::MAX,
            silence_limit: Duration::MAX,
        };
        let mut relay = Relay::new(options, commit_lsn, Duration::ZERO);
        relay.recall(Past {
            checkpoint: commit_lsn.into(),
            refused: memory.refused.clone(),
            parked: ledger.parked.clone(),
            apart: None,
        });
        let now = Instant::now();
        Ok(Self {
            settings,
            stop,
            producer,
            relay,
            writer,
            wakeups,
            diversions: Diversions::new(metrics),
            started: now,
            told: now,
            mark,
            end: begins_at,
            count: 0,
            done: Backfilled::default(),
            acknowledged: Vec::new(),
        })
    }

    fn run(&mut self, snapshot: &mut Snapshot<'_>, plan: &Plan) -> Result<(), Error> {
        let mut encoder = Encoder::default();
        self.take(encoder.begin(self.mark))?;
        for (oid, outbox) in (1..).zip(&self.settings.source.outboxes) {
            let columns = snapshot.columns(outbox)?;
            let described = columns.iter().map(|Column { name, type_oid }| (name.as_str(), *type_oid));
            self.take(encoder.relation(oid, outbox.name(), described))?;
            snapshot.read(outbox, &columns, &plan.order.clause(outbox), &[], |values| {
                self.take(encoder.insert(oid, values))?;
                self.done.rows += 1;
                if self.done.rows.is_multiple_of(ROWS_PER_LOOK) { self.look() } else { Ok(()) }
            })?;
        }
        self.take(encoder.commit(self.mark, self.end))?;
        while self.relay.awaits_kafka() {
            self.wait()?;
        }
        self.look()
    }

    /// Hands one message to Kafka, once there is room for it.
    fn take(&mut self, message: &[u8]) -> Result<(), Error> {
        while !self.relay.wants_input() {
            self.wait()?;
        }
        let now = self.started.elapsed();
        let (relay, producer) = (&mut self.relay, &mut self.producer);
        let mut placed = place(relay, producer, self.mark.commit_lsn, message, now)?;
        while let Placed::Later(ticket) = placed {
            self.wait()?;
            placed = place_again(&mut self.relay, &mut self.producer, ticket, message)?;
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<(), Error> {
        self.wakeups.wait(LOOK_INTERVAL);
        self.look()
    }

    /// Takes what Kafka has acknowledged, and says now and then how far it is.
    fn look(&mut self) -> Result<(), Error> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::new(Kind::GaveUp, "interrupted"));
        }
        self.producer.take_reports(&mut self.acknowledged)?;
        for ticket in &self.acknowledged {
            self.relay.handle_settled(*ticket)?;
        }
        while self.relay.take_delivery().is_some() {}
        for marker in self.relay.take_markers() {
            let entry = self.writer.parked(self.settings, &marker.key, marker.parked);
            self.producer.write(&entry, Some(marker.ticket))?;
        }
        for diversion in self.relay.take_diversions() {
            self.done.diverted += 1;
            self.diversions.tell(&diversion);
        }
        if self.told.elapsed() >= TELL_INTERVAL {
            self.told = Instant::now();
            let in_flight = self.relay.progress().in_flight_records();
            tracing::info!(rows = self.done.rows, of = self.count, in_flight, "backfill");
        }
        Ok(())
    }
}

//! How a session begins: the slot is taken, a rival fenced, the past read, and only then the stream.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use relay_core::{
    Lsn, Relay,
    relay::{Delivery, Past},
};

use super::{Session, telling::Told};
use crate::{
    admin::State,
    ahead::Ahead,
    diversions::Diversions,
    error::{Error, Kind},
    faults::{self, Fault},
    kafka::{Producer, Transactional},
    ledger::{Owner, Reader, Writer},
    position,
    replication::{connection::Connection, handshake::Purpose, pace::Pace},
    shared::Shared,
    slot::Slot,
    start::{Memory, relay_options, take_slot},
    wait::Wakeups,
};

pub(super) fn begin<'a>(
    shared: &'a Shared,
    wakeups: &'a Wakeups,
    memory: &mut Memory,
) -> Result<Session<'a>, Error> {
    let settings = &*shared.settings;
    // Whoever is frozen from here on looks whether the slot is still there.
    let started = Instant::now();
    let (stream, system, position, partitions) = take_slot(settings)?;
    shared.streams_from(&stream.place);
    memory.refused.retain(|row, _| row.commit_lsn >= position.confirmed);
    let owner = Owner { system: system.identifier.clone(), slot: settings.slot.clone() };
    let sizes = match settings.delivery {
        Delivery::AtLeastOnce => None,
        Delivery::ExactlyOnce(sizes) => Some(sizes),
    };
    let transactional =
        sizes.map(|_| Transactional { id: owner.transactional_id(), timeout: settings.transaction_timeout });
    let (waker, metrics) = (shared.waker.clone(), shared.metrics.clone());
    let producer = Producer::new(&settings.kafka, memory.batch, waker, metrics, transactional)?;
    // What a producer before ours has committed is known only once it can commit no more.
    let reader = if sizes.is_some() {
        producer.fence();
        None
    } else {
        Some(Reader::start(shared, owner.clone())?)
    };
    let options = relay_options(settings, &owner, &position, partitions);
    shared.postgres_stops.store(false, Ordering::Relaxed);
    shared.metrics.sessions.inc();
    shared.metrics.enter(State::Connecting);
    shared.health.not_ready("starting", "reading the checkpoint from Kafka");
    let now = started.elapsed();
    Ok(Session {
        shared,
        wakeups,
        started,
        stream,
        writer: Writer::new(owner, system.timeline),
        system,
        confirmed_at_start: position.confirmed,
        producer,
        relay: Relay::new(options, position.confirmed, now),
        reader,
        is_admitted: false,
        diversions: Diversions::new(shared.metrics.clone()),
        refused: memory.refused.clone(),
        pending: None,
        redrive: None,
        replay: None,
        ahead: Ahead::new(sizes.map_or(0, |sizes| sizes.bytes)),
        apart: memory.apart,
        acknowledged: Vec::new(),
        told: Told::default(),
        pace: Pace::new(),
        last_round: Duration::ZERO,
        postgres_stops_since: None,
        is_well: false,
        waiting_since: now,
    })
}

impl Session<'_> {
    /// Starts reading the slot once it is known what earlier sessions wrote down, and it fits.
    pub(super) fn admit(&mut self) -> Result<(), Error> {
        let Some(ledger) = self.reader.as_ref().and_then(Reader::take) else { return Ok(()) };
        self.reader = None;
        let ledger = ledger?;
        let position = match position::judge(&ledger, self.confirmed_at_start, &self.system) {
            // Then another has gone on meanwhile, and it is what we know of the server that is old.
            Err(_) if !self.holds_slot()? => {
                let what = "the slot was lost before what earlier sessions wrote down was read";
                return Err(Error::new(Kind::PostgresAway, what));
            }
            judged => judged?,
        };
        let mut checkpoint = position::resume(&ledger, position, &self.shared.settings)?;
        if self.relay.is_exactly_once() && faults::has(Fault::ResumeBehind) {
            (checkpoint.lsn, checkpoint.last) = (Lsn(checkpoint.lsn.0 + 1), None);
        }
        // One that goes back supersedes what is beyond it.
        let goes_back = ledger.checkpoint.as_ref().is_some_and(|entry| checkpoint.lsn < entry.lsn);
        self.writer.generation = ledger.generation() + u64::from(goes_back);
        let refused = std::mem::take(&mut self.refused);
        let past = Past { checkpoint, refused, parked: ledger.parked, apart: self.apart };
        self.relay.recall(past);
        self.is_admitted = true;
        // Kafka has just told us.
        self.shared.metrics.kafka_up.set(Some(1.0));
        self.shared.metrics.enter(State::Streaming);
        self.shared.health.ready("streaming");
        self.shared.redrives.open(self.writer.owner.key());
        self.shared.replays.desk.open(self.writer.owner.key());
        let (slot, confirmed) = (&self.shared.settings.slot, self.confirmed_at_start);
        tracing::info!(slot, confirmed_lsn = %confirmed, checkpoint_lsn = %checkpoint.lsn, "streaming");
        Ok(())
    }

    /// Asks the server whether our stream has the slot: that it has ended may not have reached us.
    pub(super) fn holds_slot(&self) -> Result<bool, Error> {
        let settings = &*self.shared.settings;
        let place = self.stream.place.clone();
        let mut connection =
            Connection::connect_to(&settings.postgres, place, Purpose::Sql, settings.connect_timeout)?;
        let slot = Slot::look(&mut connection, &settings.slot)?;
        Ok(slot.is_some_and(|slot| slot.active_pid.is_some() && slot.active_pid == self.stream.pid))
    }
}

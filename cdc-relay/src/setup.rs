//! What `init` makes, and what `accept-gap` gives up: the only ways to a first checkpoint, or to one that does not
//! follow from the last.

use std::{
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use relay_core::{Lsn, relay::Delivery};

use crate::{
    backfill::{self, Backfilled, Plan},
    config::Settings,
    creation,
    error::{Error, Kind},
    foreign::{self, Foreign},
    kafka::{NewTopic, create_topics},
    ledger::{Checkpoint, Ledger, Owner, Writer},
    position::{self, Beyond, System},
    publication::{self, Made},
    replication::{connection::Connection, handshake::Purpose, stream::identify},
    scribe::{KAFKA_TIMEOUT, Scribe, no_answer},
    slot::{self, Failover, Slot},
};

/// How long listing what exists only in Kafka may take.
const LIST_TIMEOUT: Duration = Duration::from_secs(600);
/// How long another `init` may take that came first.
const LOCK_TIMEOUT: Duration = Duration::from_secs(600);

/// Both sides of the position, looked at by one process at a time.
pub(crate) struct Desk<'a> {
    settings: &'a Settings,
    /// Holds an advisory lock until it is dropped.
    connection: Connection,
    pub(crate) system: System,
    pub(crate) ledger: Ledger,
    /// The relay's own topics, and whether they were made now.
    pub(crate) topics: Vec<(String, Made)>,
    /// Who may write as nobody else of this slot can.
    scribe: Option<Scribe<'a>>,
}

/// What `init` found and made.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) publication: Made,
    pub(crate) slot: Made,
    pub(crate) confirmed: Lsn,
    pub(crate) failover: Failover,
    pub(crate) checkpoint: Made,
    /// What a backfill publishes that was published before.
    pub(crate) repeats: Option<String>,
}

impl<'a> Desk<'a> {
    /// Connects to both, makes the relay's own topics where they are missing, and reads what was written down.
    pub(crate) fn open(settings: &'a Settings) -> Result<Self, Error> {
        let mut desk = Self::connect(settings)?;
        desk.read()?;
        Ok(desk)
    }

    /// The same for [`accept`](Self::accept). With exactly-once delivery nothing can be added any more to what is read, by
    /// a relay that was frozen in the midst of a transaction and wakes up.
    ///
    /// # Errors
    /// Somebody streams from the slot; as [`Scribe::fence`].
    pub(crate) fn open_to_accept(settings: &'a Settings) -> Result<Self, Error> {
        let mut desk = Self::connect(settings)?;
        // Whoever takes the slot from now on fences us in its turn, and nothing is accepted.
        desk.slot()?;
        if settings.delivery != Delivery::AtLeastOnce {
            desk.scribe = Some(Scribe::fence(settings, &desk.owner())?);
        }
        desk.read()?;
        Ok(desk)
    }

    fn connect(settings: &'a Settings) -> Result<Self, Error> {
        let mut connection = Connection::connect(&settings.postgres, Purpose::Sql, settings.connect_timeout)?;
        connection.set_answer_timeout(LOCK_TIMEOUT)?;
        let lock = format!("cdc-relay {}", settings.slot);
        connection.query("SELECT pg_advisory_lock(hashtextextended($1, 0))", &[&lock])?;
        let mut replication =
            connection.beside(&settings.postgres, Purpose::Replication, settings.connect_timeout)?;
        let system = identify(&mut replication)?;
        let topics = make_topics(settings)?;
        Ok(Self { settings, connection, system, ledger: Ledger::default(), topics, scribe: None })
    }

    fn read(&mut self) -> Result<(), Error> {
        let (settings, since) = (self.settings, Instant::now());
        let patience = || if since.elapsed() < KAFKA_TIMEOUT { Ok(()) } else { Err(no_answer(settings)) };
        self.ledger = Ledger::read(settings, &self.owner(), &patience)?;
        Ok(())
    }

    fn owner(&self) -> Owner {
        Owner { system: self.system.identifier.clone(), slot: self.settings.slot.clone() }
    }

    /// Makes publication, slot and first checkpoint, in this order, so that the slot's first change is already published
    /// and its first LSN is written down.
    ///
    /// # Errors
    /// Halted when a checkpoint says that there was a slot, and there is none any more. Refused when another program, such as the
    /// relay that this one is to follow, streams from a slot that has no checkpoint: that would soon be behind.
    pub(crate) fn init(mut self) -> Result<Report, Error> {
        let settings = self.settings;
        let publication = publication::make(&mut self.connection, settings)?;
        if self.ledger.checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.backfilling) {
            // With the reason and the choices.
            self.position(Lsn::ZERO)?;
        }
        let (slot, confirmed) = if let Some(confirmed) = slot::find_slot(&mut self.connection, settings)? {
            let holder = Slot::look(&mut self.connection, &settings.slot)?.and_then(|slot| slot.active_pid);
            if let Some(pid) = holder.filter(|_| self.ledger.checkpoint.is_none()) {
                return Err(held(settings, &pid));
            }
            (Made::Existed, confirmed)
        } else {
            if let Some(checkpoint) = &self.ledger.checkpoint {
                return Err(dropped(settings, checkpoint));
            }
            (Made::Created, creation::make_slot(&mut self.connection, settings, settings.failover)?)
        };
        let failover = slot::switch_failover_on(&mut self.connection, settings)?;
        let checkpoint = if self.ledger.checkpoint.is_some() {
            Made::Existed
        } else {
            // Beside a relay that may run, which is not to be fenced: what it writes covers this, too.
            self.write_checkpoint(confirmed, 0)?;
            Made::Created
        };
        Ok(Report { publication, slot, confirmed, failover, checkpoint, repeats: None })
    }

    /// Makes a slot, publishes what was in the outboxes when it was made, and then writes the first checkpoint. What an
    /// interrupted backfill left is done again from its beginning.
    ///
    /// # Errors
    /// Refused where there is a slot that rows are published from.
    pub(crate) fn backfill(mut self, plan: &Plan, stop: &AtomicBool) -> Result<(Report, Backfilled), Error> {
        let settings = self.settings;
        let publication = publication::make(&mut self.connection, settings)?;
        backfill::rehearse(&mut self.connection, settings, plan)?;
        let mut failover = settings.failover;
        let slot = self.slot()?;
        let begun = self.ledger.checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.backfilling);
        if let Some(slot) = slot.as_ref().filter(|_| !begun) {
            return Err(exists(settings, slot.is_lost));
        }
        let repeats = self.ledger.checkpoint.as_ref().map(repeats);
        if let Some(repeats) = &repeats {
            tracing::warn!(
                "the backfill begins with a new slot: {repeats}. Consumers know it by its header id"
            );
        }
        if let Some(slot) = slot {
            failover |= slot.is_failover;
            self.connection.query("SELECT pg_drop_replication_slot($1)", &[&settings.slot])?;
        }
        let mut writer = Writer::new(self.owner(), self.system.timeline);
        writer.generation = self.ledger.checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.generation + 1);
        writer.backfilling = true;
        // Before there is a slot that could be taken for one whose rows were published.
        Scribe::new(settings)?.write(&writer.checkpoint(settings, self.system.wal_end.into()))?;
        let (begins_at, exported) =
            creation::make_exporting_slot(&mut self.connection, settings, failover, stop)?;
        let under = backfill::commit_lsn(begins_at);
        Scribe::new(settings)?.write(&writer.checkpoint(settings, under.into()))?;
        let mut reader =
            self.connection.beside(&settings.postgres, Purpose::Sql, settings.connect_timeout)?;
        let place = (begins_at, &self.ledger, &writer);
        let done = backfill::publish(&mut reader, settings, plan, &exported.snapshot, place, stop);
        let done = done.map_err(|e| unfinished(settings, e))?;
        drop(exported);
        writer.backfilling = false;
        Scribe::new(settings)?.write(&writer.checkpoint(settings, begins_at.into()))?;
        let failover = if failover { Failover::On } else { Failover::Off };
        let (slot, checkpoint) = (Made::Created, Made::Created);
        Ok((Report { publication, slot, confirmed: begins_at, failover, checkpoint, repeats }, done))
    }

    /// The slot as it is.
    pub(crate) fn slot(&mut self) -> Result<Option<Slot>, Error> {
        let name = &self.settings.slot;
        let slot = Slot::look(&mut self.connection, name)?;
        let Some(found) = &slot else { return Ok(None) };
        found.check_kind(name)?;
        if let Some(pid) = &found.active_pid {
            let what = format!("slot {name:?} is in use by the server's process {pid}");
            return Err(Error::new(Kind::SlotInUse, what).hint("stop every relay of this slot first"));
        }
        Ok(slot)
    }

    /// Up to where everything is published, for a slot that is confirmed up to there, or what is in doubt about it.
    pub(crate) fn position(&self, confirmed: Lsn) -> Result<relay_core::Checkpoint, position::Doubt> {
        position::judge(&self.ledger, confirmed, &self.system)
    }

    /// The events that exist only in Kafka, from `beyond` on.
    pub(crate) fn foreign(&mut self, beyond: Beyond) -> Result<Foreign, Error> {
        let since = Instant::now();
        let limit = || Error::new(Kind::GaveUp, format!("not read in {} s", LIST_TIMEOUT.as_secs()));
        let patience = || if since.elapsed() < LIST_TIMEOUT { Ok(()) } else { Err(limit()) };
        let owner = self.owner();
        foreign::find(self.settings, &owner, &mut self.connection, beyond, &patience)
    }

    /// Makes a slot where there is none, or none that can be used any more, synchronised to standbys if that one was;
    /// its confirmed LSN.
    pub(crate) fn make_slot_again(&mut self, drop_first: bool) -> Result<Lsn, Error> {
        publication::make(&mut self.connection, self.settings)?;
        let mut failover = self.settings.failover;
        if failover {
            slot::check_failover_version(&mut self.connection)?;
        }
        if drop_first {
            let old = Slot::look(&mut self.connection, &self.settings.slot)?;
            failover |= old.is_some_and(|slot| slot.is_failover);
            self.connection.query("SELECT pg_drop_replication_slot($1)", &[&self.settings.slot])?;
        }
        creation::make_slot(&mut self.connection, self.settings, failover)
    }

    /// The end of the log.
    pub(crate) fn wal_end(&mut self) -> Result<Lsn, Error> {
        let rows = self.connection.simple_query("SELECT pg_current_wal_flush_lsn()")?;
        let lsn = rows.first().and_then(|r| r.first()?.as_deref()?.parse().ok());
        lsn.ok_or_else(|| Error::new(Kind::Internal, "the server does not say where its log ends"))
    }

    /// Moves the slot on; its new confirmed LSN.
    pub(crate) fn advance(&mut self, to: Lsn) -> Result<Lsn, Error> {
        let sql = "SELECT end_lsn FROM pg_replication_slot_advance($1, $2::pg_lsn)";
        self.connection.query(sql, &[&self.settings.slot, &to.to_string()])?;
        let gone = || Error::new(Kind::Halted, "the slot is gone");
        slot::find_slot(&mut self.connection, self.settings)?.ok_or_else(gone)
    }

    /// Writes a checkpoint that does not follow from the last one, and supersedes it.
    pub(crate) fn accept(&mut self, lsn: Lsn) -> Result<(), Error> {
        self.write_checkpoint(lsn, self.ledger.generation() + 1)
    }

    fn write_checkpoint(&mut self, lsn: Lsn, generation: u64) -> Result<(), Error> {
        let mut writer = Writer::new(self.owner(), self.system.timeline);
        writer.generation = generation;
        let scribe = self.scribe.take().map_or_else(|| Scribe::new(self.settings), Ok)?;
        scribe.write(&writer.checkpoint(self.settings, lsn.into()))
    }
}

/// What is published again after this checkpoint by a backfill.
fn repeats(last: &Checkpoint) -> String {
    let Checkpoint { at, lsn, .. } = last;
    if last.backfilling {
        format!(
            "what the backfill of {at}, which was interrupted, had published, under the lsn header {lsn}, is published again"
        )
    } else {
        format!(
            "of these rows, what the slot before it had published, up to {lsn} of {at}, is published again"
        )
    }
}

fn held(settings: &Settings, pid: &str) -> Error {
    let slot = &settings.slot;
    let what = format!(
        "slot {slot:?} has no checkpoint of ours, and server process {pid} streams from it: what that one confirms from now on, no \
         checkpoint would cover"
    );
    Error::new(Kind::Refused, what).hint(
        "stop whatever streams from it, then run this again (SELECT * FROM pg_stat_activity WHERE pid = … says who it is)",
    )
}

fn exists(settings: &Settings, is_lost: bool) -> Error {
    let slot = &settings.slot;
    let what = if is_lost {
        format!("slot {slot:?} is lost, and still there: a backfill begins with a new one")
    } else {
        format!(
            "slot {slot:?} exists: a backfill comes before the slot, which has what is committed from then on"
        )
    };
    Error::new(Kind::Refused, what).hint(format!(
        "to start over with what is in the outbox (all of it, or what --where says), which repeats what is published of that: stop every \
         relay of it, SELECT pg_drop_replication_slot('{slot}'), then run this again"
    ))
}

/// What is left when a backfill ends before its end.
fn unfinished(settings: &Settings, error: Error) -> Error {
    let hint = error.hint.as_deref().map(|hint| format!("{hint}. ")).unwrap_or_default();
    let slot = &settings.slot;
    error.hint(format!(
        "{hint}Then run `cdc-relay init --backfill` again: it starts over with a new slot, and repeats. Until then slot {slot:?} keeps the \
         server's log; to give up: SELECT pg_drop_replication_slot('{slot}')"
    ))
}

fn dropped(settings: &Settings, checkpoint: &Checkpoint) -> Error {
    let what = format!(
        "slot {:?} was dropped: its last checkpoint is {}, of {}, and what was committed since then is not in a new slot",
        settings.slot, checkpoint.lsn, checkpoint.at
    );
    Error::new(Kind::Halted, what)
        .hint("take what is missing from the outbox table; then `cdc-relay accept-gap` makes a new slot")
}

fn make_topics(settings: &Settings) -> Result<Vec<(String, Made)>, Error> {
    let mut topics = vec![NewTopic { name: &settings.kafka.checkpoint_topic, is_compacted: true }];
    if settings.may_dead_letter() {
        topics.push(NewTopic { name: &settings.dead_letter_topic, is_compacted: false });
    }
    if settings.may_park() {
        topics.push(NewTopic { name: &settings.parked_keys_topic, is_compacted: true });
    }
    let made = create_topics(&settings.kafka, &topics)?;
    let told = |(topic, created): (&NewTopic<'_>, bool)| {
        (topic.name.to_owned(), if created { Made::Created } else { Made::Existed })
    };
    Ok(topics.iter().zip(made).map(told).collect())
}

//! What `init` makes, and what `accept-gap` gives up: the only two ways to a first checkpoint, or to one that does not
//! follow from the last.

use std::time::{Duration, Instant};

use relay_core::Lsn;

use crate::{
    admin::Metrics,
    config::Settings,
    error::{Error, Kind},
    foreign::{self, Foreign},
    kafka::{Batch, Entry, NewTopic, Producer, create_topics},
    ledger::{Checkpoint, Ledger, Owner, Writer},
    position::{self, Beyond, System},
    publication::{self, Made},
    replication::{connection::Connection, handshake::Purpose, stream::identify},
    slot::{self, Failover, Slot},
    wait,
};

/// How long Kafka may take to answer.
const KAFKA_TIMEOUT: Duration = Duration::from_secs(30);
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
}

/// What `init` found and made.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) publication: Made,
    pub(crate) slot: Made,
    pub(crate) confirmed: Lsn,
    pub(crate) failover: Failover,
    pub(crate) checkpoint: Made,
}

impl<'a> Desk<'a> {
    /// Connects to both, makes the relay's own topics where they are missing, and reads what was written down.
    pub(crate) fn open(settings: &'a Settings) -> Result<Self, Error> {
        let mut connection = Connection::connect(&settings.postgres, Purpose::Sql, settings.connect_timeout)?;
        connection.set_answer_timeout(LOCK_TIMEOUT)?;
        let lock = format!("cdc-relay {}", settings.slot);
        connection.query("SELECT pg_advisory_lock(hashtextextended($1, 0))", &[&lock])?;
        let mut replication =
            connection.beside(&settings.postgres, Purpose::Replication, settings.connect_timeout)?;
        let system = identify(&mut replication)?;
        let topics = make_topics(settings)?;
        let since = Instant::now();
        let patience = || if since.elapsed() < KAFKA_TIMEOUT { Ok(()) } else { Err(no_answer(settings)) };
        let owner = Owner { system: system.identifier.clone(), slot: settings.slot.clone() };
        let ledger = Ledger::read(settings, &owner, &patience)?;
        Ok(Self { settings, connection, system, ledger, topics })
    }

    /// Makes publication, slot and first checkpoint, in this order, so that the slot's first change is already published
    /// and its first LSN is written down.
    ///
    /// # Errors
    /// Halted when a checkpoint says that there was a slot, and there is none any more.
    pub(crate) fn init(mut self) -> Result<Report, Error> {
        let settings = self.settings;
        let publication = publication::make(&mut self.connection, settings)?;
        let (slot, confirmed) = if let Some(confirmed) = slot::find_slot(&mut self.connection, settings)? {
            (Made::Existed, confirmed)
        } else {
            if let Some(checkpoint) = &self.ledger.checkpoint {
                return Err(dropped(settings, checkpoint));
            }
            (Made::Created, slot::make_slot(&mut self.connection, settings, settings.failover)?)
        };
        let failover = slot::switch_failover_on(&mut self.connection, settings)?;
        let checkpoint = if self.ledger.checkpoint.is_some() {
            Made::Existed
        } else {
            self.write_checkpoint(confirmed, 0)?;
            Made::Created
        };
        Ok(Report { publication, slot, confirmed, failover, checkpoint })
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

    /// What is in doubt about a slot that is there.
    pub(crate) fn doubt(&self, confirmed: Lsn) -> Option<position::Doubt> {
        position::judge(&self.ledger, confirmed, &self.system).err()
    }

    /// The events that exist only in Kafka, from `beyond` on.
    pub(crate) fn foreign(&mut self, beyond: Beyond) -> Result<Foreign, Error> {
        let since = Instant::now();
        let limit = || Error::new(Kind::GaveUp, format!("not read in {} s", LIST_TIMEOUT.as_secs()));
        let patience = || if since.elapsed() < LIST_TIMEOUT { Ok(()) } else { Err(limit()) };
        let owner = Owner { system: self.system.identifier.clone(), slot: self.settings.slot.clone() };
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
        slot::make_slot(&mut self.connection, self.settings, failover)
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
    pub(crate) fn accept(&self, lsn: Lsn) -> Result<(), Error> {
        self.write_checkpoint(lsn, self.ledger.generation() + 1)
    }

    fn write_checkpoint(&self, lsn: Lsn, generation: u64) -> Result<(), Error> {
        let owner = Owner { system: self.system.identifier.clone(), slot: self.settings.slot.clone() };
        let mut writer = Writer::new(owner, self.system.timeline);
        writer.generation = generation;
        put(self.settings, &writer.checkpoint(self.settings, lsn.into()))
    }
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

/// Writes one entry and waits until Kafka has it.
fn put(settings: &Settings, entry: &Entry) -> Result<(), Error> {
    let internal = |e| Error::new(Kind::Internal, format!("cannot make a pipe: {e}"));
    let (waker, wakeups) = wait::pair().map_err(internal)?;
    let mut producer = Producer::new(&settings.kafka, Batch::default(), waker, Metrics::default(), None)?;
    producer.write(entry, None)?;
    let (until, mut none) = (Instant::now() + KAFKA_TIMEOUT, Vec::new());
    while !producer.take_reports(&mut none)? {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(no_answer(settings));
        }
        wakeups.wait(left);
    }
    Ok(())
}

pub(crate) fn no_answer(settings: &Settings) -> Error {
    let what =
        format!("Kafka at {} has not answered in {} s", settings.kafka.brokers, KAFKA_TIMEOUT.as_secs());
    Error::new(Kind::DeliveryFailed, what)
        .hint("check kafka.brokers and kafka.properties, and whether Kafka runs")
}

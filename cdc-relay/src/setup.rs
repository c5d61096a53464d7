//! What `init` makes, and what `accept-gap` gives up: the only two ways to a first checkpoint, or to one that does not
//! follow from the last.

use std::time::{Duration, Instant};

use relay_core::{Lsn, relay::Delivery};

use crate::{
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

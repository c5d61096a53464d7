//! What a session starts from: the slot, the settings, and what earlier sessions left.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

use relay_core::{Lsn, poison::Poison, record::Identity, relay::Options, source};

use crate::{
    config::Settings,
    error::{Error, Kind},
    kafka::Batch,
    ledger::Owner,
    position::System,
    publication,
    replication::{connection::Connection, handshake::Purpose, stream::ReplicationStream},
    slot::{self, Position, Slot},
};

/// The longest time between two status updates, whatever the server would allow.
pub(crate) const STATUS_INTERVAL: Duration = Duration::from_secs(10);
/// The most rows whose refusal is remembered: each costs a session, so that many are a sign of something else.
const REFUSED_LIMIT: usize = 1000;
/// How often our transactions may be ended by others within so long.
const FENCED_LIMIT: usize = 5;
const FENCED_WITHIN: Duration = Duration::from_mins(10);

/// Schema and name of each partition of an outbox.
type Partitions = HashSet<(String, String)>;

/// What one session leaves to the next.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) batch: Batch,
    /// What it was before single records were sent to find the one that is refused.
    size_before: Option<Batch>,
    /// Rows that Kafka refused after they were enqueued.
    pub(crate) refused: HashMap<Identity, Poison>,
    /// The transaction, by its commit LSN, that halts and is to be read with what is before it committed.
    pub(crate) apart: Option<Lsn>,
    /// For how long the last session's transaction had been open when it ended.
    pub(crate) transaction_age: Option<Duration>,
    /// When our transactions were ended by others, lately.
    fenced: VecDeque<Instant>,
}

impl Memory {
    /// Takes from an error what the next session can do better.
    ///
    /// # Errors
    /// [`REFUSED_LIMIT`] is reached.
    pub(crate) fn learn(&mut self, error: &Error, settings: &Settings) -> Result<(), Error> {
        let Settings { kafka, transaction_timeout, .. } = settings;
        let transaction_timeout = *transaction_timeout;
        match error.kind {
            Kind::BatchTooLarge => self.batch = self.batch.smaller(kafka),
            Kind::BatchRefused => {
                self.size_before.get_or_insert(self.batch);
                self.batch = Batch::Single;
            }
            // The one is found that the others were refused for.
            Kind::RecordRefused => self.batch = self.size_before.take().unwrap_or(self.batch),
            // One that was open for too long was ended for that.
            Kind::Fenced if self.transaction_age.is_none_or(|age| age < transaction_timeout) => {
                self.learn_fenced(error)?;
            }
            _ => {}
        }
        if let Some(refused) = &error.refused {
            let (identity, poison) = &**refused;
            self.refused.insert(*identity, poison.clone());
        }
        if self.refused.len() > REFUSED_LIMIT {
            let what =
                format!("Kafka has refused {REFUSED_LIMIT} rows after they were enqueued, the last: {error}");
            return Err(Error::new(Kind::Halted, what)
                .hint("mend the topic, or what writes to the outbox, then start again"));
        }
        Ok(())
    }
}

impl Memory {
    /// Another relay has the slot: what fenced us was its right.
    pub(crate) fn stand_by(&mut self) {
        self.fenced.clear();
    }

    /// The coordinator's time-out fences as a rival does, and a successor has the slot, too. So it is tried again, but
    /// not for ever: two relays that each believe to have the slot would go on taking it from one another.
    fn learn_fenced(&mut self, error: &Error) -> Result<(), Error> {
        let now = Instant::now();
        self.fenced.retain(|at| now.saturating_duration_since(*at) < FENCED_WITHIN);
        self.fenced.push_back(now);
        if self.fenced.len() <= FENCED_LIMIT {
            return Ok(());
        }
        let what =
            format!("{error}, {} times in {} minutes", self.fenced.len(), FENCED_WITHIN.as_secs() / 60);
        Err(Error::new(Kind::Halted, what).hint(
            "look for a second relay with a slot of this name on a copy of this database: it has the same system identifier, and so the \
             same transactional.id. If there is none, transactions stay open for longer than transactions.timeout_seconds",
        ))
    }
}

/// What the state machine has to know for a session on this slot.
pub(crate) fn relay_options(
    settings: &Settings,
    owner: &Owner,
    position: &Position,
    partitions: Partitions,
) -> Options {
    Options {
        delivery: settings.delivery,
        source: source::Options { partitions, ..settings.source.clone() },
        policies: settings.policies,
        dead_letter_topic: settings.dead_letter_topic.clone(),
        dead_letter_source: owner.key(),
        in_flight_limit_bytes: settings.in_flight_limit_bytes,
        status_interval: status_interval(position.wal_sender_timeout_ms),
        // The server may be busy decoding, and looks at our requests for a reply no sooner than it would care.
        silence_limit: settings.silence_limit.max(Duration::from_millis(position.wal_sender_timeout_ms)),
    }
}

/// Takes the slot, then looks at where it stands: before, another process could still move it.
///
/// # Errors
/// [`Kind::SlotInUse`] while another process holds it; but one that could never become ours is named at once.
pub(crate) fn take_slot(
    settings: &Settings,
) -> Result<(ReplicationStream, System, Position, Partitions), Error> {
    let mut connection = Connection::connect(&settings.postgres, Purpose::Sql, settings.connect_timeout)?;
    let slot = Slot::look(&mut connection, &settings.slot)?;
    if let Some(pid) = slot.and_then(|slot| slot.active_pid) {
        slot::verify(&mut connection, settings)?;
        let what = format!("slot {:?} is held by server process {pid}", settings.slot);
        return Err(Error::new(Kind::SlotInUse, what));
    }
    let (was_standby, _) = look_at_log(&mut connection)?;
    let stream = connection
        .beside(&settings.postgres, Purpose::Replication, settings.connect_timeout)
        .and_then(|beside| {
            let messages = settings.source.messages.is_some();
            ReplicationStream::start(beside, &settings.slot, &settings.publication, messages)
        });
    match stream {
        Ok((stream, mut system)) => {
            // What the server told of itself was so before the slot was ours. Until then another relay may have had it, and
            // published what the log had got meanwhile.
            let (is_standby, wal_end) = look_at_log(&mut connection)?;
            system.wal_end = system.wal_end.max(wal_end);
            if was_standby && !is_standby {
                // Our checkpoints would tell of the timeline that it has left.
                let what = format!("Postgres at {} was promoted while the session began", connection.place());
                return Err(Error::new(Kind::PostgresAway, what));
            }
            let position = slot::verify(&mut connection, settings)?;
            let partitions = publication::partitions(&mut connection, settings)?;
            Ok((stream, system, position, partitions))
        }
        // What the server refuses in few words, a look at the slot explains.
        Err(e) if e.kind != Kind::PostgresAway => slot::verify(&mut connection, settings).and(Err(e)),
        Err(e) => Err(e),
    }
}

/// Whether the server is a standby, and where its log ends; a standby's, how far it has got with it.
fn look_at_log(connection: &mut Connection) -> Result<(bool, Lsn), Error> {
    let sql = "SELECT pg_is_in_recovery()::text, \
               CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END";
    let rows = connection.simple_query(sql)?;
    let Some([Some(is_standby), Some(wal_end)]) = rows.first().map(Vec::as_slice) else {
        return Err(Error::new(Kind::PostgresAway, "the server does not say where its log ends"));
    };
    let odd = |e| Error::new(Kind::Internal, format!("the end of the server's log: {e}"));
    Ok((is_standby == "true", wal_end.parse().map_err(odd)?))
}

/// A third of what the server waits for, so that one lost update is not the end.
fn status_interval(wal_sender_timeout_ms: u64) -> Duration {
    match wal_sender_timeout_ms {
        0 => STATUS_INTERVAL,
        ms => Duration::from_millis((ms / 3).max(1)).min(STATUS_INTERVAL),
    }
}

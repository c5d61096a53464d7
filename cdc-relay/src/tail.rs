//! The changes as they come, through a temporary slot of our own: the relay's is not touched, and this one is gone with the
//! connection.

use std::time::{Duration, Instant};

use relay_core::{
    Lsn, StatusUpdate,
    source::{Drafted, Options, Source, Step, StreamError},
};

use crate::{
    config::Settings,
    error::{Error, Kind},
    publication,
    replication::{
        connection::Connection,
        handshake::Purpose,
        stream::{Event, ReplicationStream, quote_identifier},
    },
    slot,
    start::STATUS_INTERVAL,
    wait,
};

/// The stream of a temporary slot.
pub(crate) struct Tail {
    stream: ReplicationStream,
    source: Source,
    /// Everything before it was handed out, as far as whole transactions go.
    done: Lsn,
    /// When the server was told of it last.
    told: Instant,
    /// When the server said something last.
    heard: Instant,
    silence_limit: Duration,
}

impl Tail {
    /// Makes the slot, which begins with the next transaction. The server waits for those that are open.
    ///
    /// # Errors
    /// Refused, with the right that is missing; Postgres away, also where a transaction is open for longer than the
    /// connect timeout.
    pub(crate) fn open(settings: &Settings) -> Result<Self, Error> {
        let mut connection = Connection::connect(&settings.postgres, Purpose::Sql, settings.connect_timeout)?;
        publication::verify(&mut connection, settings)?;
        slot::check_synchronous(&mut connection)?;
        let partitions = publication::partitions(&mut connection, settings)?;
        let mut beside =
            connection.beside(&settings.postgres, Purpose::Replication, settings.connect_timeout)?;
        let name = format!("cdc_relay_tail_{}_{:08x}", std::process::id(), fastrand::u32(..));
        let sql = format!(
            "CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL pgoutput NOEXPORT_SNAPSHOT",
            quote_identifier(&name)
        );
        beside.simple_query(&sql).map_err(|e| explain(e, settings))?;
        let messages = settings.source.messages.is_some();
        let (stream, _) = ReplicationStream::start(beside, &name, &settings.publication, messages)?;
        Ok(Self {
            stream,
            source: Source::new(Options { partitions, ..settings.source.clone() }),
            done: Lsn::ZERO,
            told: Instant::now(),
            heard: Instant::now(),
            silence_limit: settings.silence_limit,
        })
    }

    /// Hands rows over as they come, until `take` says that it is enough.
    ///
    /// # Errors
    /// The server ends the stream or falls silent, or the stream cannot be followed.
    pub(crate) fn follow(
        mut self,
        mut take: impl FnMut(&Drafted<'_>) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        loop {
            while let Some(event) = self.stream.next_event()? {
                self.heard = Instant::now();
                let mut asked = false;
                match event {
                    Event::Keepalive { wal_end, reply_requested } => {
                        asked = reply_requested;
                        if !self.source.is_in_transaction() {
                            self.done = self.done.max(wal_end);
                        }
                    }
                    Event::Wal { start, message } => {
                        match self.source.handle(start, message).map_err(broken)? {
                            Step::Row(drafted) | Step::Lone { drafted, .. } => {
                                if !take(&drafted)? {
                                    return Ok(());
                                }
                            }
                            Step::Commit { end_lsn } => self.done = self.done.max(end_lsn),
                            Step::Nothing | Step::PassedOver | Step::Begin(_) => {}
                        }
                    }
                }
                if asked {
                    self.tell()?;
                }
            }
            if self.stream.wants_write() {
                self.stream.flush()?;
            } else if self.told.elapsed() >= STATUS_INTERVAL {
                self.tell()?;
            }
            if self.heard.elapsed() >= self.silence_limit {
                return Err(Error::new(Kind::PostgresAway, "the server has said nothing for too long"));
            }
            if !self.stream.fill()? {
                let left = STATUS_INTERVAL.saturating_sub(self.told.elapsed());
                wait::for_socket(self.stream.fd(), self.stream.wants_write(), left);
            }
        }
    }

    /// Lets the server forget what was handed out. It answers.
    fn tell(&mut self) -> Result<(), Error> {
        self.told = Instant::now();
        self.stream.send_status(StatusUpdate { received: self.done, confirmed: self.done })
    }
}

#[expect(clippy::needless_pass_by_value, reason = "as map_err hands it over")]
fn broken(error: StreamError) -> Error {
    Error::new(Kind::Halted, error.to_string())
}

fn explain(error: Error, settings: &Settings) -> Error {
    if error.sqlstate.as_deref() == Some("42501") {
        let role = quote_identifier(&settings.postgres.user);
        return Error { kind: Kind::Refused, ..error }
            .hint(format!("let a superuser run: ALTER ROLE {role} REPLICATION"));
    }
    if error.kind == Kind::PostgresAway && error.sqlstate.is_none() {
        return error.hint(
            "a new slot begins when every transaction that is open has ended. The longest: SELECT pid, xact_start, query FROM \
             pg_stat_activity WHERE backend_xid IS NOT NULL ORDER BY xact_start. postgres.connect_timeout_seconds is how long \
             this waits",
        );
    }
    error
}

//! The orders database. What belongs together is one statement, which is a transaction of its own: one round trip.
//!
//! `orders.rs` writes and reads orders, `messages.rs` messages, `keys.rs` the answers to idempotent requests,
//! `instances.rs` the fleet.

mod instances;
mod keys;
mod messages;
mod orders;

use std::{fmt, sync::Arc, time::Duration};

use prometheus_client::metrics::counter::Counter;
use sqlx::{
    Postgres,
    postgres::{PgArguments, PgConnection},
    query::Query,
};
use tokio::time::timeout;

pub(crate) use self::{
    instances::{Heartbeat, Instance},
    keys::{Answer, Key},
    messages::{MAX_COUNT, MessageFilter},
    orders::{Decision, Filter},
};
use crate::{
    error::{Error, Written},
    pool::Pool,
};

/// `admin_shutdown`: somebody ended this connection, not the server.
const ADMIN_SHUTDOWN: &str = "57P01";

/// What the schema must be able to parse.
pub(crate) fn statements() -> impl Iterator<Item = &'static str> {
    keys::STATEMENTS
        .into_iter()
        .chain(orders::STATEMENTS)
        .chain(messages::STATEMENTS)
        .chain(instances::STATEMENTS)
}

/// The statements, each on a connection of the pool and with a bound.
#[derive(Debug)]
pub(crate) struct Store {
    pool: Arc<Pool>,
    answer_timeout: Duration,
    retries: Counter,
}

/// Something new, with ids that stay the same however often it is tried: by them it is recognised.
trait New: Sync {
    /// Writes it, and the answer for the key.
    fn insert(
        &self,
        connection: &mut PgConnection,
        key: Option<&Key>,
        answer: &Answer,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Whether it is there, from an attempt whose end was not heard.
    fn is_written(
        &self,
        connection: &mut PgConnection,
    ) -> impl Future<Output = Result<bool, sqlx::Error>> + Send;

    /// What the client is told when it is not, but something else of the same id is.
    fn duplicate(&self, error: &sqlx::Error) -> Error {
        refused(error, Written::Nothing)
    }
}

/// How a statement failed.
enum Trouble {
    /// No connection: the statement was not sent.
    NotSent(sqlx::Error),
    /// The connection was lost, or the answer did not come: the statement may have taken effect.
    Lost(sqlx::Error),
    /// The answer did not come in time; the connection is closed.
    Silent,
    /// The server refused; it took no effect.
    Refused(sqlx::Error),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotSent(e) | Self::Lost(e) | Self::Refused(e) => f.write_str(&describe(e)),
            Self::Silent => f.write_str("no answer in time"),
        }
    }
}

impl Store {
    pub(crate) fn new(pool: Arc<Pool>, answer_timeout: Duration, retries: Counter) -> Self {
        Self { pool, answer_timeout, retries }
    }

    fn writing(&self) -> Retry<'_> {
        Retry { store: self, writes: true, doubt: false, left: self.pool.max_connections() }
    }

    fn reading(&self) -> Retry<'_> {
        Retry { writes: false, ..self.writing() }
    }

    /// Writes something new, once: gives back the answer after the commit, or the one that was given before for the
    /// same key.
    async fn once(&self, new: &impl New, key: Option<&Key>, answer: &Answer) -> Result<Answer, Error> {
        let mut retry = self.writing();
        loop {
            let doubt = retry.doubt;
            let work = async |c: &mut PgConnection| {
                let Err(error) = new.insert(c, key, answer).await else { return Ok(Ok(answer.clone())) };
                if !is_duplicate(&error) {
                    return Err(error);
                }
                if let Some(known) = keys::known(c, key).await? {
                    return Ok(known);
                }
                if doubt && new.is_written(c).await? {
                    return Ok(Ok(answer.clone()));
                }
                Ok(Err(new.duplicate(&error)))
            };
            match self.with_connection(work).await {
                Ok(done) => return done,
                Err(trouble) => retry.after(trouble)?,
            }
        }
    }

    /// Runs a statement that nobody waits for; gives back how many rows it wrote.
    async fn chore(&self, statement: Query<'_, Postgres, PgArguments>) -> Result<u64, String> {
        let done = self.with_connection(async |c| statement.execute(c).await).await;
        done.map(|done| done.rows_affected()).map_err(|trouble| trouble.to_string())
    }

    /// Runs statements on a connection of the pool, all within the time for an answer.
    async fn with_connection<T>(
        &self,
        statement: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, Trouble> {
        let mut lease = self.pool.acquire().await.map_err(Trouble::NotSent)?;
        match timeout(self.answer_timeout, statement(&mut lease.connection)).await {
            Ok(Ok(answer)) => {
                lease.give_back();
                Ok(answer)
            }
            Ok(Err(e)) if is_lost(&e) => Err(Trouble::Lost(e)),
            Ok(Err(e)) => Err(Trouble::Refused(e)),
            Err(_) => Err(Trouble::Silent),
        }
    }
}

/// Whether work that failed on one connection is tried again on another: as often as there may be dead ones. That is
/// safe for what only reads, and for what recognises its own, by ids that stay the same.
struct Retry<'a> {
    store: &'a Store,
    writes: bool,
    /// Whether an attempt so far may have taken effect.
    doubt: bool,
    left: u32,
}

impl Retry<'_> {
    /// What is known after all attempts so far.
    fn written(&self) -> Written {
        if self.doubt { Written::Unknown } else { Written::Nothing }
    }

    /// Returns if the work is to be tried again.
    ///
    /// # Errors
    /// What the client is told instead.
    fn after(&mut self, trouble: Trouble) -> Result<(), Error> {
        match trouble {
            Trouble::Lost(e) => {
                self.doubt = self.writes;
                self.store.retries.inc();
                tracing::debug!(error = describe(&e), "lost the connection, trying another");
            }
            Trouble::Silent => {
                self.doubt = self.writes;
                return Err(unavailable(self.written(), "no answer in time"));
            }
            // Killed while it was being made, as a person or a failover does to all of them.
            Trouble::NotSent(e) if sqlstate(&e).as_deref() == Some(ADMIN_SHUTDOWN) => {}
            Trouble::NotSent(e) => return Err(unavailable(self.written(), &describe(&e))),
            Trouble::Refused(e) => return Err(refused(&e, self.written())),
        }
        let Some(left) = self.left.checked_sub(1) else {
            return Err(unavailable(self.written(), "every connection was lost"));
        };
        self.left = left;
        Ok(())
    }
}

/// The error in one line, without secrets: SQLSTATE and message where the server spoke.
pub(crate) fn describe(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(e) => format!("{} ({})", e.message(), e.code().unwrap_or_default()),
        sqlx::Error::PoolTimedOut => "no connection in time: the database is away or all are busy".into(),
        other => other.to_string(),
    }
}

fn sqlstate(error: &sqlx::Error) -> Option<String> {
    error.as_database_error().and_then(sqlx::error::DatabaseError::code).map(Into::into)
}

/// Whether the connection is gone. The administrator's shutdown (57P01 to 57P03) may come after the commit; 25P03 and 25P04
/// come to who has held a transaction open for too long.
fn is_lost(error: &sqlx::Error) -> bool {
    match sqlstate(error) {
        Some(code) => {
            code.starts_with("57P") || code.starts_with("08") || matches!(code.as_str(), "25P03" | "25P04")
        }
        None => matches!(error, sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_)),
    }
}

fn is_duplicate(error: &sqlx::Error) -> bool {
    sqlstate(error).as_deref() == Some("23505")
}

fn unavailable(written: Written, why: &str) -> Error {
    tracing::warn!(why, ?written, "the database does not serve us");
    Error::Unavailable(written)
}

/// What the server refused is either a state of the server, which passes or which its operator ends, or a bug
/// of ours.
fn refused(error: &sqlx::Error, written: Written) -> Error {
    let code = sqlstate(error).unwrap_or_default();
    let class = code.get(..2).unwrap_or_default();
    // Cancelled by a timeout or a person, out of resources, rolled back by concurrency, a standby, no
    // permission or schema, no such role or database.
    let passes = matches!(class, "57" | "53" | "40" | "42" | "28" | "3D" | "58")
        || matches!(code.as_str(), "25006" | "55P03");
    if passes {
        return unavailable(written, &describe(error));
    }
    tracing::error!(error = describe(error), "a statement failed");
    Error::Internal
}

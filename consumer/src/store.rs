//! The consumer's database: opened and migrated at the start, then one transaction for each batch.

use std::{sync::Arc, time::Duration};

use service::{Failure, exit::Kind};
use sqlx::{
    ConnectOptions, Connection, PgConnection, PgPool,
    migrate::{MigrateError, Migrator},
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    config::Settings,
    decide::{Backoff, Fault, Poison, Reason},
    event::Event,
    handlers::Handler,
    inbox,
};

static MIGRATIONS: Migrator = sqlx::migrate!();

/// How long one connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the answer to a liveness question may take.
const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// Applies batches of events, each in one transaction with its inbox rows.
pub(crate) struct Store {
    pool: PgPool,
    group: String,
    handler: Arc<dyn Handler>,
    apply_timeout: Duration,
}

impl Store {
    /// Connects and migrates; waits for a database that does not answer, up to the configured time.
    ///
    /// # Errors
    /// 69 when the database refuses us for good, 75 when the time is over.
    pub(crate) async fn open(settings: &Settings) -> Result<Self, Failure> {
        let options = settings
            .postgres
            .clone()
            .application_name(&format!("consumer-{}", settings.kafka.group))
            .disable_statement_logging();
        let give_up = Instant::now() + settings.start_timeout;
        let backoff = Backoff { first: Duration::from_millis(200), max: Duration::from_secs(3) };
        let mut attempt = 1;
        loop {
            let error = match migrate(&options).await {
                Ok(()) => break,
                Err(e) => refusal(&e, &options)?,
            };
            if Instant::now() >= give_up {
                return Err(Failure::new(
                    Kind::GaveUp,
                    format!("the database {} did not become usable: {error}", address(&options)),
                )
                .hint(
                    "start it, or correct postgres.url; postgres.start_timeout_seconds is how long we wait",
                ));
            }
            tracing::warn!(attempt, error, database = address(&options), "waiting for the database");
            sleep(backoff.after(attempt, fastrand::f64())).await;
            attempt += 1;
        }
        let pool = PgPoolOptions::new()
            .max_connections(settings.connections_max)
            .acquire_timeout(CONNECT_TIMEOUT)
            .connect_lazy_with(options);
        Ok(Self {
            pool,
            group: settings.kafka.group.clone(),
            handler: settings.handler.handler(),
            apply_timeout: settings.limits.apply_timeout,
        })
    }

    /// Applies those of `events` that the group has not applied yet, all or none, and gives back their indices.
    pub(crate) async fn apply(&self, events: &[Event]) -> Result<Vec<usize>, Fault> {
        let mut connection = self.pool.acquire().await.map_err(|e| fault(&e))?;
        if let Ok(applied) = timeout(self.apply_timeout, self.apply_on(&mut connection, events)).await {
            return applied.map_err(|e| fault(&e));
        }
        // Somewhere in the middle of the protocol: such a connection cannot go back to the others.
        connection.close_on_drop();
        Err(Fault::database(format!("no answer within {} s", self.apply_timeout.as_secs())))
    }

    async fn apply_on(&self, connection: &mut PgConnection, events: &[Event]) -> sqlx::Result<Vec<usize>> {
        let mut transaction = connection.begin().await?;
        let fresh = inbox::claim(&mut transaction, &self.group, events).await?;
        if !fresh.is_empty() {
            let events: Vec<&Event> = fresh.iter().map(|i| &events[*i]).collect();
            self.handler.apply(&mut transaction, &events).await?;
        }
        transaction.commit().await?;
        Ok(fresh)
    }

    /// Whether the database answers; if not, why.
    pub(crate) async fn ping(&self) -> Result<(), String> {
        let query = sqlx::query("SELECT 1").execute(&self.pool);
        match timeout(PING_TIMEOUT, query).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(e)) => Err(e.to_string()),
            Err(_) => Err(format!("no answer within {} s", PING_TIMEOUT.as_secs())),
        }
    }
}

/// Migrates over a connection of its own, because the pool hides why a connection fails. Several instances may
/// do so at once: the migrator holds an advisory lock.
async fn migrate(options: &PgConnectOptions) -> Result<(), MigrateError> {
    let connecting = timeout(CONNECT_TIMEOUT, PgConnection::connect_with(options));
    let mut connection = connecting.await.map_err(|_| sqlx::Error::PoolTimedOut)??;
    // Or every start tells that the migrator's own table is there already.
    sqlx::query("SET client_min_messages = warning").execute(&mut connection).await?;
    MIGRATIONS.run_direct(None, &mut connection, false).await?;
    connection.close().await?;
    Ok(())
}

/// The failure that an error at the start is for good, or else its text.
fn refusal(error: &MigrateError, options: &PgConnectOptions) -> Result<String, Failure> {
    let refused = |message: String, hint: String| Err(Failure::new(Kind::Refused, message).hint(hint));
    let source = match error {
        MigrateError::Execute(e) | MigrateError::ExecuteMigration(e, _) => e,
        MigrateError::VersionMissing(_)
        | MigrateError::VersionMismatch(_)
        | MigrateError::VersionTooNew(..)
        | MigrateError::Dirty(_) => {
            return refused(
                format!("the tables in {} are not those of this version: {error}", address(options)),
                "run the version of the consumer that made them, or give this one another database".into(),
            );
        }
        _ => return Ok(error.to_string()),
    };
    let code = source.as_database_error().and_then(sqlx::error::DatabaseError::code);
    match code.as_deref() {
        Some(code) if code.starts_with("28") => refused(
            format!("Postgres refuses {}: {source}", address(options)),
            "correct the user in postgres.url and the password (CONSUMER_POSTGRES__PASSWORD), or pg_hba.conf"
                .into(),
        ),
        Some("3D000") => refused(
            format!("{source} (at {})", address(options)),
            "create it (CREATE DATABASE … OWNER consumer), or correct postgres.url".into(),
        ),
        Some(code) if code.starts_with("42") => refused(
            format!("cannot create the consumer's tables in {}: {source}", address(options)),
            "the consumer's role must own its database, or hold CREATE on the schema public".into(),
        ),
        _ => Ok(source.to_string()),
    }
}

/// Where the database is, without its password.
fn address(options: &PgConnectOptions) -> String {
    let database = options.get_database().unwrap_or_else(|| options.get_username());
    format!("{}@{}:{}/{database}", options.get_username(), options.get_host(), options.get_port())
}

fn fault(error: &sqlx::Error) -> Fault {
    match error {
        sqlx::Error::Database(e) => Fault::from_sqlstate(e.code().as_deref().unwrap_or("XX000"), e.message()),
        sqlx::Error::Encode(e) => Fault::Record(Poison::new(Reason::DatabaseRefused, e.to_string())),
        other => Fault::database(other),
    }
}

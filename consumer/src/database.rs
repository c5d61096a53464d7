//! A database at the start: waited for, and its tables made or, where they are somebody else's, looked at.

use std::time::Duration;

use service::{Failure, exit::Kind};
use sqlx::{
    ConnectOptions, Connection, PgConnection, PgPool,
    migrate::{MigrateError, Migrator},
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::time::{Instant, sleep, timeout};

use crate::{decide::Backoff, handler::Tables};

static MIGRATIONS: Migrator = sqlx::migrate!();

/// How long one connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where it is and how long to wait for it.
#[derive(Debug, Clone)]
pub(crate) struct Database {
    pub(crate) options: PgConnectOptions,
    pub(crate) connections_max: u32,
    pub(crate) start_timeout: Duration,
}

impl Database {
    /// Connections that are made when they are needed. `name` is what the server knows us by.
    pub(crate) fn pool(&self, name: &str) -> PgPool {
        PgPoolOptions::new()
            .max_connections(self.connections_max)
            .acquire_timeout(CONNECT_TIMEOUT)
            .connect_lazy_with(self.options(name))
    }

    fn options(&self, name: &str) -> PgConnectOptions {
        self.options.clone().application_name(name).disable_statement_logging()
    }

    /// One connection, at once or not at all, for a command that a person waits for.
    ///
    /// # Errors
    /// 69 when the database refuses us for good, 75 when it does not answer.
    pub(crate) async fn connect(&self, name: &str, tables: Tables) -> Result<PgConnection, Failure> {
        let connecting = timeout(CONNECT_TIMEOUT, PgConnection::connect_with(&self.options(name))).await;
        match connecting {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err(self.failure(error, tables)),
            Err(_) => Err(self.failure(sqlx::Error::PoolTimedOut, tables)),
        }
    }

    /// What an error is to a command that cannot go on after it.
    pub(crate) fn failure(&self, error: sqlx::Error, tables: Tables) -> Failure {
        let missing = ["42P01", "42703"];
        let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
        if code.is_some_and(|code| missing.contains(&&*code)) {
            let why =
                format!("the tables in {} are not those of this version: {error}", address(&self.options));
            let hint = match tables {
                Tables::Ours => "make them: consumer migrate (every start of a consumer does, too)".into(),
                Tables::Theirs { .. } => remedy(&self.options, tables),
            };
            return Failure::new(Kind::Refused, why).hint(hint);
        }
        match refusal(&MigrateError::Execute(error), &self.options, tables) {
            Err(failure) => failure,
            Ok(error) => {
                let why =
                    format!("the database {} does not do what is asked: {error}", address(&self.options));
                Failure::new(Kind::GaveUp, why).hint("start it, or correct postgres.url")
            }
        }
    }

    /// Makes or checks the tables; waits for a database that does not answer, up to the configured
    /// time.
    ///
    /// # Errors
    /// 69 when the database refuses us for good, 75 when the time is over.
    pub(crate) async fn prepare(
        &self,
        name: &str,
        tables: Tables,
        schema: &'static str,
    ) -> Result<(), Failure> {
        let options = self.options(name);
        let give_up = Instant::now() + self.start_timeout;
        let backoff = Backoff { first: Duration::from_millis(200), max: Duration::from_secs(3) };
        let mut attempt = 1;
        loop {
            let error = match prepare(&options, tables, schema).await {
                Ok(missing) if missing.is_empty() => return Ok(()),
                Ok(missing) => return Err(lacking(&missing, &options, tables)),
                Err(e) => refusal(&e, &options, tables)?,
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
    }
}

/// Makes or checks the tables, over a connection of its own, because the pool hides why a connection fails. What is
/// missing and not ours to make is given back. Several instances may do so at once: the migrator holds an advisory
/// lock.
async fn prepare(
    options: &PgConnectOptions,
    tables: Tables,
    schema: &'static str,
) -> Result<Vec<String>, MigrateError> {
    let connecting = timeout(CONNECT_TIMEOUT, PgConnection::connect_with(options));
    let mut connection = connecting.await.map_err(|_| sqlx::Error::PoolTimedOut)??;
    let missing = match tables {
        Tables::Ours => {
            // Or every start tells that the migrator's own table is there already.
            sqlx::query("SET client_min_messages = warning").execute(&mut connection).await?;
            MIGRATIONS.run_direct(None, &mut connection, false).await?;
            Vec::new()
        }
        Tables::Theirs { needed, .. } => {
            let (tables, privileges): (Vec<&str>, Vec<&str>) = needed.iter().copied().unzip();
            sqlx::query_scalar(
                "SELECT privilege || ' on ' || name FROM unnest($1::text[], $2::text[]) AS needed (name, privilege)
                 WHERE NOT coalesce(has_any_column_privilege(to_regclass(name), privilege), false)",
            )
            .bind(tables)
            .bind(privileges)
            .fetch_all(&mut connection)
            .await?
        }
    };
    if !schema.is_empty() && missing.is_empty() {
        let mut transaction = connection.begin().await?;
        // One instance at a time: two that make a table at once would both find it missing.
        sqlx::query("SELECT pg_advisory_xact_lock(hashtextextended('consumer schema', 0))")
            .execute(&mut *transaction)
            .await?;
        sqlx::raw_sql(schema).execute(&mut *transaction).await?;
        transaction.commit().await?;
    }
    connection.close().await?;
    Ok(missing)
}

/// The failure that tables are which somebody else has to make.
fn lacking(missing: &[String], options: &PgConnectOptions, tables: Tables) -> Failure {
    let why = format!("in {} there is no {}", address(options), missing.join(", no "));
    Failure::new(Kind::Refused, why).hint(remedy(options, tables))
}

/// How the tables, and what we may do with them, come about.
fn remedy(options: &PgConnectOptions, tables: Tables) -> String {
    match tables {
        Tables::Ours => {
            "the consumer's role must own its database, or hold CREATE on it and on its schema public \
                         (and own the tables that are there)"
                .into()
        }
        Tables::Theirs { made_by, .. } => format!(
            "apply the schema: psql -v ON_ERROR_STOP=1 -f {made_by} postgres://postgres@{}:{}/{} (as the superuser); \
             or correct postgres.url",
            options.get_host(),
            options.get_port(),
            options.get_database().unwrap_or("orders")
        ),
    }
}

/// The failure that an error at the start is for good, or else its text.
fn refusal(error: &MigrateError, options: &PgConnectOptions, tables: Tables) -> Result<String, Failure> {
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
            format!("cannot make or use the consumer's tables in {}: {source}", address(options)),
            remedy(options, tables),
        ),
        _ => Ok(source.to_string()),
    }
}

/// Where the database is, without its password.
fn address(options: &PgConnectOptions) -> String {
    let database = options.get_database().unwrap_or_else(|| options.get_username());
    format!("{}@{}:{}/{database}", options.get_username(), options.get_host(), options.get_port())
}

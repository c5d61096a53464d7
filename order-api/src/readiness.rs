//! Watches the database on a connection of its own, so that a busy pool does not look like a lost database,
//! and says so at `/health/ready`. The API does not migrate; it only looks whether the schema is there.

use std::time::Duration;

use prometheus_client::metrics::gauge::Gauge;
use service::{Health, shutdown::Shutdown};
use sqlx::{Connection, Executor, PgConnection, postgres::PgConnectOptions};
use tokio::time::timeout;

use crate::store;

/// What `postgres/init.sql` gives the role, as `table privilege`; the answer lists what is missing.
const CHECK: &str = "
SELECT current_setting('transaction_read_only') = 'on',
       coalesce(string_agg(t || ' (' || p || ')', ', '), '')
FROM (VALUES ('orders', 'SELECT'), ('orders', 'INSERT'), ('order_items', 'SELECT'), ('order_items', 'INSERT'),
             ('orders', 'UPDATE'), ('order_items', 'UPDATE'), ('messages', 'UPDATE'), ('order_items', 'DELETE'), ('order_events', 'SELECT'), ('order_events', 'INSERT'), ('outbox', 'INSERT'),
             ('messages', 'SELECT'), ('messages', 'INSERT'), ('message_acks', 'SELECT'),
             ('idempotency_keys', 'SELECT'), ('idempotency_keys', 'INSERT'), ('idempotency_keys', 'DELETE'),
             ('instances', 'SELECT'), ('instances', 'INSERT'), ('instances', 'UPDATE'), ('instances', 'DELETE'))
     AS needed (t, p)
-- Some have the privilege on those columns alone that change.
WHERE coalesce(NOT CASE p WHEN 'DELETE' THEN has_table_privilege(to_regclass('public.' || t), p)
                          ELSE has_any_column_privilege(to_regclass('public.' || t), p) END, true)";

/// Everything the watch needs.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) options: PgConnectOptions,
    pub(crate) interval: Duration,
    /// The longest one look may take.
    pub(crate) timeout: Duration,
    pub(crate) health: Health,
    pub(crate) up: Gauge,
}

/// Why the database cannot serve us: a word for the state and what to do.
struct Trouble(&'static str, String);

impl Watch {
    /// Looks until the stop is asked for.
    pub(crate) async fn run(self, shutdown: Shutdown) {
        let mut connection = None;
        let mut known: Option<String> = None;
        loop {
            let looked = timeout(self.timeout, self.look(&mut connection)).await.unwrap_or_else(|_| {
                Err(Trouble("database_unavailable", format!("no answer within {:?}", self.timeout)))
            });
            match looked {
                Ok(()) => {
                    self.health.ready("serving");
                    self.up.set(1);
                    if known.as_deref() != Some("") {
                        tracing::info!(database = self.place(), "the database serves us");
                        known = Some(String::new());
                    }
                }
                Err(Trouble(state, detail)) => {
                    connection = None;
                    self.up.set(0);
                    let detail = format!("{}: {detail}", self.place());
                    // Once, not once a second.
                    if known.as_ref() != Some(&detail) {
                        tracing::error!(state, detail, "not ready");
                        known = Some(detail.clone());
                    }
                    self.health.not_ready(state, detail);
                }
            }
            tokio::select! {
                () = tokio::time::sleep(self.interval) => {}
                () = shutdown.requested() => break,
            }
        }
        self.health.not_ready("draining", "asked to stop");
    }

    /// Where the database is, without secrets.
    fn place(&self) -> String {
        let o = &self.options;
        let database = o.get_database().unwrap_or_else(|| o.get_username());
        format!("{}@{}:{}/{database}", o.get_username(), o.get_host(), o.get_port())
    }

    async fn look(&self, connection: &mut Option<PgConnection>) -> Result<(), Trouble> {
        let away = |e: sqlx::Error| Trouble("database_unavailable", store::describe(&e));
        let open = match connection {
            Some(open) => open,
            None => connection.insert(PgConnection::connect_with(&self.options).await.map_err(away)?),
        };
        let (read_only, missing): (bool, String) =
            sqlx::query_as(CHECK).fetch_one(&mut *open).await.map_err(away)?;
        if read_only {
            return Err(Trouble("database_read_only", "the server takes no writes; is it a standby?".into()));
        }
        if !missing.is_empty() {
            return Err(self.schema(&format!("the role lacks {missing}")));
        }
        // Parsing the statements finds what else they need, such as columns.
        for sql in store::statements() {
            if let Err(e) = open.prepare(sqlx::SqlSafeStr::into_sql_str(sql)).await {
                return Err(if e.as_database_error().is_some() {
                    self.schema(&store::describe(&e))
                } else {
                    away(e)
                });
            }
        }
        Ok(())
    }

    fn schema(&self, what: &str) -> Trouble {
        let o = &self.options;
        Trouble(
            "schema_missing",
            format!(
                "{what}; apply the schema: psql -v ON_ERROR_STOP=1 -f postgres/init.sql \
                 postgres://postgres@{}:{}/{}",
                o.get_host(),
                o.get_port(),
                o.get_database().unwrap_or("orders"),
            ),
        )
    }
}

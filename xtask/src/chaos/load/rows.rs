//! A writer of outbox rows, over a connection of its own.

use std::time::Duration;

use fastrand::Rng;
use sqlx::{Connection, PgConnection};

use super::{
    LoadReport,
    gate::Gate,
    plan::{AGGREGATE_TYPE, PREFIX, Plan, Row, Step},
};
use crate::chaos::connection;

/// The rest between two transactions: what the rate follows from, some 150 rows a second and writer.
const REST_MILLISECONDS: std::ops::Range<u64> = 10..70;
/// How long a transaction may take.
const TRANSACTION_LIMIT: Duration = Duration::from_secs(10);
/// The rest before a new connection.
const BACKOFF: Duration = Duration::from_millis(200);

const INSERT: &str = "INSERT INTO public.outbox (id, aggregatetype, aggregateid, type, payload, headers, traceparent) \
     SELECT id, $1, key, kind, payload::jsonb, headers::jsonb, traceparent \
     FROM unnest($2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[]) \
          WITH ORDINALITY AS row (id, key, kind, payload, headers, traceparent, number) ORDER BY number";

/// Writes until it is stopped.
pub(super) fn write(url: &str, mut random: Rng, gate: &Gate) -> LoadReport {
    let mut report = LoadReport::default();
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        report.broken += 1;
        return report;
    };
    let mut connection: Option<PgConnection> = None;
    while gate.pass(Duration::from_millis(random.u64(REST_MILLISECONDS))) {
        let plan = Plan::draw(&mut random);
        let done = runtime.block_on(async {
            if connection.is_none() {
                connection = connection::open(url).await.ok();
            }
            let connection = connection.as_mut()?;
            connection::within(TRANSACTION_LIMIT, carry_out(connection, &plan)).await.ok()
        });
        match done {
            Some(()) if plan.committed => report.committed += 1,
            Some(()) => report.rolled_back += 1,
            None => {
                report.broken += 1;
                connection = None;
                gate.pass(BACKOFF);
            }
        }
    }
    if let Some(connection) = connection {
        // Whether it hears of it is of no account.
        let _ = runtime.block_on(connection::within(TRANSACTION_LIMIT, connection.close()));
    }
    report
}

async fn carry_out(connection: &mut PgConnection, plan: &Plan) -> sqlx::Result<()> {
    execute(connection, "BEGIN").await?;
    for step in &plan.steps {
        match step {
            Step::Insert(rows) => insert(connection, rows).await?,
            Step::Delete(ids) => {
                sqlx::query("DELETE FROM public.outbox WHERE id = ANY ($1)")
                    .bind(ids)
                    .execute(&mut *connection)
                    .await?;
            }
            Step::Message { transactional } => {
                sqlx::query("SELECT pg_logical_emit_message($1, $2, 'not an outbox row')")
                    .bind(transactional)
                    .bind(PREFIX)
                    .execute(&mut *connection)
                    .await?;
            }
            Step::Savepoint => execute(connection, "SAVEPOINT here").await?,
            Step::RollBackTo => execute(connection, "ROLLBACK TO SAVEPOINT here").await?,
            Step::Release => execute(connection, "RELEASE SAVEPOINT here").await?,
        }
    }
    execute(connection, if plan.committed { "COMMIT" } else { "ROLLBACK" }).await
}

async fn execute(connection: &mut PgConnection, sql: &'static str) -> sqlx::Result<()> {
    sqlx::raw_sql(sql).execute(connection).await.map(drop)
}

async fn insert(connection: &mut PgConnection, rows: &[Row]) -> sqlx::Result<()> {
    fn column<'r, T>(rows: &'r [Row], of: impl Fn(&'r Row) -> T) -> Vec<T> {
        rows.iter().map(of).collect()
    }
    sqlx::query(INSERT)
        .bind(AGGREGATE_TYPE)
        .bind(column(rows, |row| row.id))
        .bind(column(rows, |row| row.key.as_str()))
        .bind(column(rows, |row| row.kind))
        .bind(column(rows, |row| row.payload.as_deref()))
        .bind(column(rows, |row| row.headers.as_deref()))
        .bind(column(rows, |row| row.traceparent.as_deref()))
        .execute(connection)
        .await
        .map(drop)
}

//! A writer of outbox rows, over connections of its own.

use std::time::Duration;

use fastrand::Rng;
use sqlx::{Connection, PgConnection};
use tokio::task::JoinSet;

use super::{
    LoadReport,
    gate::Gate,
    plan::{OUTBOX_PREFIX, PREFIX, Plan, Row, Step},
};
use crate::chaos::connection;

/// The rest between transactions: what the rate follows from, some 150 rows a second and writer.
const REST_MILLISECONDS: std::ops::Range<u64> = 20..120;
/// How many transactions end at once where more than one does.
const AT_ONCE: u64 = 5;
/// How long a transaction may take.
const TRANSACTION_LIMIT: Duration = Duration::from_secs(10);
/// The rest before a new connection.
const BACKOFF: Duration = Duration::from_millis(200);

const INSERT: &str = "INSERT INTO public.outbox (id, aggregatetype, aggregateid, type, payload, headers, traceparent) \
     SELECT id, $1, key, kind, payload::jsonb, headers::jsonb, traceparent \
     FROM unnest($2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[]) \
          WITH ORDINALITY AS row (id, key, kind, payload, headers, traceparent, number) ORDER BY number";
const EMIT: &str = "SELECT pg_logical_emit_message(true, $1, message) \
     FROM unnest($2::text[]) WITH ORDINALITY AS row (message, number) ORDER BY number";

/// Writes until it is stopped.
pub(super) fn write(url: &str, aggregate_type: &str, mut random: Rng, gate: &Gate) -> LoadReport {
    let mut report = LoadReport::default();
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        report.broken += 1;
        return report;
    };
    let mut connections: Vec<PgConnection> = Vec::new();
    while gate.pass(Duration::from_millis(random.u64(REST_MILLISECONDS))) {
        let count = if random.u32(0..4) == 0 { AT_ONCE } else { 1 };
        let plans: Vec<Plan> = (0..count).map(|_| Plan::draw(&mut random)).collect();
        if runtime.block_on(carry_out(url, aggregate_type, &mut connections, &plans)).is_some() {
            let committed = plans.iter().filter(|plan| plan.committed).count() as u64;
            report.committed += committed;
            report.rolled_back += count - committed;
        } else {
            report.broken += 1;
            connections.clear();
            gate.pass(BACKOFF);
        }
    }
    for connection in connections {
        // Whether it hears of it is of no account.
        let _ = runtime.block_on(connection::within(TRANSACTION_LIMIT, connection.close()));
    }
    report
}

/// Transactions that end at once: as a rule nothing is between their commits in the log, and one ends where the next one's
/// commit begins. None where a server did not do it.
async fn carry_out(
    url: &str,
    aggregate_type: &str,
    connections: &mut Vec<PgConnection>,
    plans: &[Plan],
) -> Option<()> {
    while connections.len() < plans.len() {
        connections.push(connection::open(url).await.ok()?);
    }
    for (connection, plan) in connections.iter_mut().zip(plans) {
        connection::within(TRANSACTION_LIMIT, begin(connection, aggregate_type, plan)).await.ok()?;
    }
    let mut ending = JoinSet::new();
    for (mut connection, plan) in connections.drain(..plans.len()).zip(plans) {
        let end = if plan.committed { "COMMIT" } else { "ROLLBACK" };
        ending.spawn(async move {
            let ended = connection::within(TRANSACTION_LIMIT, execute(&mut connection, end)).await;
            ended.map(|()| connection)
        });
    }
    while let Some(ended) = ending.join_next().await {
        connections.push(ended.ok()?.ok()?);
    }
    Some(())
}

async fn begin(connection: &mut PgConnection, aggregate_type: &str, plan: &Plan) -> sqlx::Result<()> {
    execute(connection, "BEGIN").await?;
    for step in &plan.steps {
        match step {
            Step::Insert(rows) => insert(connection, aggregate_type, rows).await?,
            Step::Emit(rows) => {
                let messages: Vec<String> = rows.iter().map(|row| row.message(aggregate_type)).collect();
                sqlx::query(EMIT).bind(OUTBOX_PREFIX).bind(messages).execute(&mut *connection).await?;
            }
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
    Ok(())
}

async fn execute(connection: &mut PgConnection, sql: &'static str) -> sqlx::Result<()> {
    sqlx::raw_sql(sql).execute(connection).await.map(drop)
}

async fn insert(connection: &mut PgConnection, aggregate_type: &str, rows: &[Row]) -> sqlx::Result<()> {
    fn column<'r, T>(rows: &'r [Row], of: impl Fn(&'r Row) -> T) -> Vec<T> {
        rows.iter().map(of).collect()
    }
    sqlx::query(INSERT)
        .bind(aggregate_type)
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

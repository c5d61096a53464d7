//! What is written into the log, and the slot that has all of it before it.

use clap::ValueEnum;
use sqlx::{AssertSqlSafe, PgConnection};

use super::servers::{Servers, execute};
use crate::failure::{Explain, Result};

/// The slot that stays where a workload begins; every measurement gets a copy of it.
pub(super) const BASE_SLOT: &str = "bench_base";
/// Rows that one statement writes, where transactions are smaller: after each, progress is told.
const ROWS_PER_STATEMENT: u64 = 20_000;

/// The names that `--workload` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    /// 300,000 transactions of one row with a jsonb payload of 500 bytes
    Single,
    /// 1,000,000 rows in transactions of 1,000
    Thousand,
    /// 200,000 rows with a bytea payload of 512 bytes, in transactions of 100
    Bytea,
    /// One transaction of 1,000,000 rows
    Big,
    /// Rows that come one at a time: what pacing costs them
    Idle,
    /// 5,000 rows, 500 a second: how late a consumer of committed records sees each
    Steady,
}

/// A workload's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) rows: u64,
    pub(super) rows_per_transaction: u64,
    bytea: bool,
}

/// A workload that was written.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) shape: Shape,
    /// The end of its last transaction.
    pub(super) end_lsn: String,
    /// How much log it is.
    pub(super) wal_bytes: i64,
}

impl Workload {
    /// All of them, in the order in which they run.
    pub(super) const ALL: [Self; 6] =
        [Self::Single, Self::Thousand, Self::Bytea, Self::Big, Self::Idle, Self::Steady];

    /// As on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::Thousand => "thousand",
            Self::Bytea => "bytea",
            Self::Big => "big",
            Self::Idle => "idle",
            Self::Steady => "steady",
        }
    }

    /// Its size, for a part or a multiple of the full one.
    pub(super) fn shape(self, factor: f64) -> Shape {
        let (rows, rows_per_transaction, bytea) = match self {
            Self::Single => (300_000, 1, false),
            Self::Thousand => (1_000_000, 1_000, false),
            Self::Bytea => (200_000, 100, true),
            Self::Big => (1_000_000, 1_000_000, false),
            Self::Idle => (1_000, 1, false),
            Self::Steady => (5_000, 1, false),
        };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the factor is bounded")]
        let rows = (f64::from(rows) * factor).ceil().max(1.0) as u64;
        Shape { rows, rows_per_transaction: rows_per_transaction.min(rows), bytea }
    }
}

/// Makes an empty outbox, its publication and the base slot.
pub(super) async fn prepare(connection: &mut PgConnection, shape: Shape) -> Result<()> {
    let payload = if shape.bytea { "bytea" } else { "jsonb" };
    for sql in [
        "DROP PUBLICATION IF EXISTS cdc_relay".to_owned(),
        "DROP TABLE IF EXISTS outbox".to_owned(),
        // Debezium's default table. Cleaning it up behind us would disturb what is measured.
        format!(
            "CREATE TABLE outbox (id uuid PRIMARY KEY, aggregatetype text NOT NULL, aggregateid text NOT NULL, \
             type text NOT NULL, payload {payload}) WITH (autovacuum_enabled = false)"
        ),
        "CREATE PUBLICATION cdc_relay FOR TABLE outbox WITH (publish = 'insert')".to_owned(),
        "CHECKPOINT".to_owned(),
        format!("SELECT pg_create_logical_replication_slot('{BASE_SLOT}', 'pgoutput')"),
    ] {
        execute(connection, sql).await?;
    }
    Ok(())
}

/// Makes the outbox and writes a workload into it.
pub(super) async fn write(servers: &Servers, name: &str, shape: Shape) -> Result<Written> {
    let mut connection = servers.connect().await?;
    let step = servers.progress.step(format!("writing workload {name}"));
    prepare(&mut connection, shape).await?;
    execute(&mut connection, "SET synchronous_commit = off".to_owned()).await?;
    let mut done = 0;
    while done < shape.rows {
        let rows = ROWS_PER_STATEMENT.max(shape.rows_per_transaction).min(shape.rows - done);
        let sql = statement(shape, done + 1, done + rows);
        // As long as it takes: a million rows in one statement are a workload.
        sqlx::raw_sql(AssertSqlSafe(sql))
            .execute(&mut connection)
            .await
            .explain(|| format!("write the workload {name}"))?;
        done += rows;
        step.detail(format!("{done} of {} rows", shape.rows));
    }
    let end: (String, i64) = sqlx::query_as(
        "SELECT lsn::text, pg_wal_lsn_diff(lsn, (SELECT confirmed_flush_lsn FROM pg_replication_slots \
         WHERE slot_name = $1))::int8 FROM pg_current_wal_insert_lsn() lsn",
    )
    .bind(BASE_SLOT)
    .fetch_one(&mut connection)
    .await
    .explain(|| "ask for the end of the log".to_owned())?;
    // What was committed asynchronously is flushed with it, and no checkpoint follows while we measure.
    execute(&mut connection, "CHECKPOINT".to_owned()).await?;
    step.done(&format!("workload {name}: {} rows, {:.0} MiB of log", shape.rows, mib(end.1)));
    Ok(Written { shape, end_lsn: end.0, wal_bytes: end.1 })
}

#[expect(clippy::cast_precision_loss, reason = "for a person to read")]
fn mib(bytes: i64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Writes rows `from` to `to`, in the workload's transactions.
fn statement(shape: Shape, from: u64, to: u64) -> String {
    let payload = if shape.bytea {
        "decode(repeat(md5(n::text), 32), 'hex')".to_owned()
    } else {
        // As text, which is how it is sent, it has 500 bytes, give or take the digits of n.
        format!(
            "('{{\"n\": ' || n || ', \"digest\": \"' || md5(n::text) || '\", \"text\": \"{}\"}}')::jsonb",
            "Quattro stagioni, ".repeat(24)
        )
    };
    let step = shape.rows_per_transaction;
    format!(
        "DO $$ BEGIN FOR head IN {from}..{to} BY {step} LOOP \
         INSERT INTO outbox SELECT gen_random_uuid(), 'order', 'order-' || n % 10000, 'OrderCreated', {payload} \
         FROM generate_series(head, least(head + {step} - 1, {to})) n; \
         COMMIT; END LOOP; END $$"
    )
}

/// One row, committed before this returns.
pub(super) async fn insert(connection: &mut PgConnection, number: u64) -> Result<()> {
    let shape = Shape { rows: 1, rows_per_transaction: 1, bytea: false };
    execute(connection, statement(shape, number, number)).await
}

/// Removes the base slot, so that the server may forget the log.
pub(super) async fn forget(servers: &Servers) -> Result<()> {
    let mut connection = servers.connect().await?;
    execute(&mut connection, format!("SELECT pg_drop_replication_slot('{BASE_SLOT}')")).await?;
    execute(&mut connection, "TRUNCATE outbox".to_owned()).await?;
    execute(&mut connection, "CHECKPOINT".to_owned()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_workload_keeps_its_transactions_where_it_can() {
        let thousand = Workload::Thousand.shape(0.01);
        assert_eq!((thousand.rows, thousand.rows_per_transaction), (10_000, 1_000));
        let big = Workload::Big.shape(0.001);
        assert_eq!((big.rows, big.rows_per_transaction), (1_000, 1_000));
        assert_eq!(Workload::Single.shape(0.000_001).rows, 1);
    }

    #[test]
    fn the_names_are_those_of_the_command_line() {
        for workload in Workload::ALL {
            let value = workload.to_possible_value().unwrap();
            assert_eq!(value.get_name(), workload.name());
        }
    }
}

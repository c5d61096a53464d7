//! What is written into the log, and the slot that has all of it before it.

use std::{collections::HashMap, sync::Arc};

use clap::ValueEnum;
use sqlx::{AssertSqlSafe, PgConnection};

use super::servers::{Servers, execute};
use crate::failure::{Explain, Result};

/// The slot that stays where a workload begins; every measurement gets a copy of it.
pub(super) const BASE_SLOT: &str = "bench_base";
/// How many keys there are.
const KEYS: u64 = 10_000;
/// From so many bytes on Postgres compresses a row, or moves it out of line (`TOAST_TUPLE_THRESHOLD`).
const COMPRESSED_BYTES: u32 = 1_900;
/// Rows that one statement writes, where transactions are smaller: after each, progress is told.
const ROWS_PER_STATEMENT: u64 = 20_000;

/// The names that `--workload` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    /// 1,000,000 transactions of one row with a jsonb payload of 500 bytes
    Single,
    /// 1,000,000 such rows in transactions of 1,000
    Thousand,
    /// 1,000,000 transactions of one row with a jsonb payload of 200 bytes
    Small,
    /// 500,000 transactions of one row with a jsonb payload of 2,000 bytes that does not compress
    Large,
    /// 200,000 rows with a bytea payload of 512 bytes, in transactions of 100
    Bytea,
}

/// A workload's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) rows: u64,
    pub(super) rows_per_transaction: u64,
    pub(super) bytea: bool,
    /// As it is sent, give or take the digits of the row's number.
    pub(super) payload_bytes: u32,
}

impl Shape {
    /// So many rows of 500 bytes, in transactions of so many.
    pub(super) const fn of(rows: u64, rows_per_transaction: u64) -> Self {
        Self { rows, rows_per_transaction, bytea: false, payload_bytes: 500 }
    }
}

/// A workload that was written.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) shape: Shape,
    /// The end of its last transaction.
    pub(super) end_lsn: String,
    /// How much log it is.
    pub(super) wal_bytes: i64,
    pub(super) outbox: Arc<Outbox>,
}

/// The rows' ids, and the order in which they were written.
#[derive(Debug, Default)]
pub(super) struct Outbox(HashMap<u128, u32>);

impl Outbox {
    /// Of ids in their order.
    pub(super) fn of(ids: impl IntoIterator<Item = u128>) -> Self {
        Self(ids.into_iter().zip(0..).collect())
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Which of the rows it is, counted from 0.
    pub(super) fn place(&self, id: u128) -> Option<u32> {
        self.0.get(&id).copied()
    }

    async fn read(connection: &mut PgConnection) -> Result<Self> {
        // Nothing was ever deleted, so the places in the table are in the order of writing.
        let ids: Vec<uuid::Uuid> = sqlx::query_scalar("SELECT id FROM outbox ORDER BY ctid")
            .fetch_all(connection)
            .await
            .explain(|| "read the rows' ids".to_owned())?;
        Ok(Self::of(ids.iter().map(uuid::Uuid::as_u128)))
    }
}

impl Workload {
    /// All of them, in the order in which they run.
    pub(super) const ALL: [Self; 5] = [Self::Single, Self::Thousand, Self::Small, Self::Large, Self::Bytea];

    /// As on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::Thousand => "thousand",
            Self::Small => "small",
            Self::Large => "large",
            Self::Bytea => "bytea",
        }
    }

    /// Its size, for a part or a multiple of the full one.
    pub(super) fn shape(self, factor: f64) -> Shape {
        let shape = match self {
            Self::Single => Shape::of(1_000_000, 1),
            Self::Thousand => Shape::of(1_000_000, 1_000),
            Self::Small => Shape { payload_bytes: 200, ..Shape::of(1_000_000, 1) },
            Self::Large => Shape { payload_bytes: 2_000, ..Shape::of(500_000, 1) },
            Self::Bytea => Shape { bytea: true, payload_bytes: 512, ..Shape::of(200_000, 100) },
        };
        let rows = scaled(shape.rows, factor);
        Shape { rows, rows_per_transaction: shape.rows_per_transaction.min(rows), ..shape }
    }
}

/// A part or a multiple of a number of rows, but at least one.
pub(crate) fn scaled(rows: u64, factor: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "the factor is bounded"
    )]
    let rows = (rows as f64 * factor).ceil().max(1.0) as u64;
    rows
}

/// Makes an empty outbox, its publication and the base slot.
pub(super) async fn prepare(connection: &mut PgConnection, shape: Shape) -> Result<()> {
    let payload = if shape.bytea { "bytea" } else { "jsonb" };
    for sql in [
        // Of a scenario that failed.
        format!(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '{BASE_SLOT}'"
        ),
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
    let outbox = Arc::new(Outbox::read(&mut connection).await?);
    step.done(&format!("workload {name}: {} rows, {:.0} MiB of log", shape.rows, mib(end.1)));
    Ok(Written { shape, end_lsn: end.0, wal_bytes: end.1, outbox })
}

#[expect(clippy::cast_precision_loss, reason = "for a person to read")]
fn mib(bytes: i64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Writes rows `from` to `to`, in the workload's transactions.
fn statement(shape: Shape, from: u64, to: u64) -> String {
    let (payload, step) = (payload(shape), shape.rows_per_transaction);
    format!(
        "DO $$ BEGIN FOR head IN {from}..{to} BY {step} LOOP \
         INSERT INTO outbox SELECT gen_random_uuid(), 'order', 'order-' || n % {KEYS}, 'OrderCreated', {payload} \
         FROM generate_series(head, least(head + {step} - 1, {to})) n; \
         COMMIT; END LOOP; END $$"
    )
}

/// The payload of row `n`.
fn payload(shape: Shape) -> String {
    if shape.bytea {
        return format!("decode(repeat(md5(n::text), {}), 'hex')", shape.payload_bytes / 16);
    }
    let text = "Quattro stagioni, ".repeat(shape.payload_bytes as usize / 18 + 1);
    // What else there is has 72 bytes.
    let length = shape.payload_bytes as usize - 72;
    let text = if shape.payload_bytes < COMPRESSED_BYTES {
        text[..length].to_owned()
    } else {
        // A sum of digests, so that Postgres does not shorten it.
        let digests = format!(
            "SELECT string_agg(md5((n * 100 + i)::text), '') FROM generate_series(1, {}) i",
            length / 32
        );
        format!("' || ({digests}) || '")
    };
    format!("('{{\"n\": ' || n || ', \"digest\": \"' || md5(n::text) || '\", \"text\": \"{text}\"}}')::jsonb")
}

/// One row, committed before this returns.
pub(super) async fn insert(connection: &mut PgConnection, number: u64) -> Result<()> {
    execute(connection, statement(Shape::of(1, 1), number, number)).await
}

/// Writes rows `from` to `to` at a rate, each in its own transaction: row `from + k` is due k / `rate` seconds after `start`,
/// in microseconds since the Unix epoch. The server itself looks at the clock, so that no client is in the way; it writes what is
/// due, and looks again after a millisecond.
pub(super) fn paced(start_us: u128, rate: u32, from: u64, to: u64) -> String {
    let payload = payload(Shape::of(1, 1));
    format!(
        "DO $$ DECLARE n bigint := {from}; due bigint; BEGIN LOOP \
         due := least({from} + floor((extract(epoch FROM clock_timestamp()) * 1000000 - {start_us}) * {rate} / 1000000), {to}); \
         WHILE n <= due LOOP INSERT INTO outbox VALUES (gen_random_uuid(), 'order', 'order-' || n % {KEYS}, 'OrderCreated', \
         {payload}); COMMIT; n := n + 1; END LOOP; \
         EXIT WHEN n > {to}; PERFORM pg_sleep(0.0005); END LOOP; END $$"
    )
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
        let few = Workload::Thousand.shape(0.000_1);
        assert_eq!((few.rows, few.rows_per_transaction), (100, 100));
        assert_eq!(Workload::Single.shape(0.000_000_1).rows, 1);
    }

    #[test]
    fn the_names_are_those_of_the_command_line() {
        for workload in Workload::ALL {
            let value = workload.to_possible_value().unwrap();
            assert_eq!(value.get_name(), workload.name());
        }
    }
}

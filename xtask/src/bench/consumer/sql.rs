//! The arm `sql`: the rows that the consumer left behind, put into the same tables in transactions of as many events over as
//! many connections, by the fastest statements we know. A row that the consumer writes several times (an order, by each of
//! its events) is put there once, as it is in the end, with the order's last event. What the consumer deletes again (what it
//! publishes through its outbox) is not written at all. So this is more than any consumer could reach.
//!
//! The fastest is COPY. One `INSERT … SELECT FROM unnest(…)` for each table, all of a transaction in one message, took 18 to
//! 20 CPU seconds of Postgres for a million events, where COPY took 15 to 17. That holds for a Unix socket: over TCP the
//! client does not set `TCP_NODELAY`, and each of COPY's short messages waits until the one before is acknowledged, which
//! left a third of the rate.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::Arc,
    time::{Duration, Instant},
};

use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::{task::JoinSet, time::timeout};

use super::{Bench, events::Events, report::Run};
use crate::{
    bench::usage::Usage,
    failure::{Explain, Failure, Result},
};

/// The tables that a consumer leaves rows in, each with the column that tells whose row it is: an event's, or an order's.
const TABLES: [(&str, &str); 4] = [
    ("inbox", "event_id"),
    ("{handler}_orders", "order_id"),
    ("{handler}_tasks", "event_id"),
    ("aggregate_versions", "aggregate_id"),
];
/// How long reading or writing all rows may take.
const LIMIT: Duration = Duration::from_secs(900);

/// The statements of one transaction, each with its rows.
type Transaction = Vec<(Arc<str>, String)>;

/// The transactions of each connection, in order, and what [`look`] finds in each table in the end.
pub(super) struct Rows {
    connections: Vec<Vec<Transaction>>,
    sums: Vec<(i64, String)>,
}

impl Rows {
    /// Takes them from the consumer's database.
    pub(super) async fn read(bench: &Bench<'_>, database: &str) -> Result<Self> {
        let reading = async {
            let mut connection = bench.connect("postgres", database).await?;
            let sums = look(bench, &mut connection).await?;
            let batches = batches(bench, &mut connection).await?;
            Ok::<_, Failure>((sums, batches))
        };
        let (sums, batches) = timeout(LIMIT, reading).await.explain(|| "read the rows".to_owned())??;
        let partitions = usize::try_from(bench.events.partitions).unwrap_or(0);
        let mut connections = vec![Vec::new(); partitions];
        for ((connection, _), transaction) in batches {
            if let Some(transactions) = usize::try_from(connection).ok().and_then(|c| connections.get_mut(c))
            {
                transactions.push(transaction);
            }
        }
        Ok(Self { connections, sums })
    }
}

/// Puts the rows into a database whose tables are there and empty.
pub(super) async fn write(bench: &Bench<'_>, rows: Rows, database: &str) -> Result<Run> {
    let transactions: usize = rows.connections.iter().map(Vec::len).sum();
    let mut ready = Vec::new();
    for transactions in rows.connections {
        ready.push((bench.connect("consumer", database).await?, transactions));
    }
    let own = Usage::of(std::process::id()).unwrap_or_default();
    let since = Instant::now();
    let mut connections = JoinSet::new();
    for (mut connection, transactions) in ready {
        connections.spawn(async move {
            for statements in transactions {
                let mut transaction = connection.begin().await?;
                for (statement, rows) in statements {
                    let mut copy = transaction.copy_in_raw(&statement).await?;
                    copy.send(rows.into_bytes()).await?;
                    copy.finish().await?;
                }
                transaction.commit().await?;
            }
            Ok::<_, sqlx::Error>(connection)
        });
    }
    let done = timeout(LIMIT, connections.join_all()).await.explain(|| "copy the rows".to_owned())?;
    let seconds = since.elapsed().as_secs_f64();
    let own_after = Usage::of(std::process::id()).unwrap_or_default();
    let connections = done.into_iter().collect::<std::result::Result<Vec<_>, _>>();
    // Open until their backends have been looked at.
    let connections = connections.explain(|| "copy the rows".to_owned())?;
    let postgres = bench.backends_cpu_seconds(database).await?;
    drop(connections);
    let found = look(bench, &mut bench.connect("postgres", database).await?).await?;
    if found != rows.sums {
        return Err(Failure::new(format!(
            "the rows are not those of the consumer: by table, their number and the sum of their hashes are {found:?} \
             instead of {:?}",
            rows.sums
        )));
    }
    #[expect(clippy::cast_precision_loss, reason = "no count of events comes near 2^52")]
    let events_per_transaction = bench.events.count as f64 / transactions as f64;
    Ok(Run {
        events_per_transaction,
        cpu_seconds: own_after.cpu_seconds - own.cpu_seconds,
        postgres_cpu_seconds: postgres,
        ..Run::of(bench.events.count, seconds)
    })
}

fn tables(bench: &Bench<'_>) -> impl Iterator<Item = (String, &'static str)> {
    let handler = bench.args.handler.name();
    TABLES.into_iter().map(move |(table, key)| (table.replace("{handler}", &handler), key))
}

/// Of each table how many rows it has, and a sum of their hashes.
async fn look(bench: &Bench<'_>, connection: &mut PgConnection) -> Result<Vec<(i64, String)>> {
    let mut found = Vec::new();
    for (table, _) in tables(bench) {
        let sql = format!("SELECT count(*), sum(hashtextextended(t::text, 0))::text FROM {table} t");
        let sums: (i64, Option<String>) = sqlx::query_as(AssertSqlSafe(sql))
            .fetch_one(&mut *connection)
            .await
            .explain(|| format!("look at the rows of {table}"))?;
        found.push((sums.0, sums.1.unwrap_or_default()));
    }
    Ok(found)
}

/// The transactions, by connection and number.
async fn batches(
    bench: &Bench<'_>,
    connection: &mut PgConnection,
) -> Result<BTreeMap<(i32, i32), Transaction>> {
    let what = || "read the rows".to_owned();
    sqlx::raw_sql("CREATE TEMP TABLE places (key text, connection int, batch int, ordinal int)")
        .execute(&mut *connection)
        .await
        .explain(what)?;
    let mut copy = connection.copy_in_raw("COPY places FROM STDIN").await.explain(what)?;
    copy.send(places(bench.events, bench.batch_records).into_bytes()).await.explain(what)?;
    copy.finish().await.explain(what)?;
    sqlx::raw_sql("ANALYZE places").execute(&mut *connection).await.explain(what)?;
    let mut batches: BTreeMap<(i32, i32), Transaction> = BTreeMap::new();
    for (table, key) in tables(bench) {
        let columns: Vec<String> = sqlx::query_scalar(
            "SELECT quote_ident(attname) FROM pg_attribute
             WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
        )
        .bind(&table)
        .fetch_all(&mut *connection)
        .await
        .explain(what)?;
        let statement: Arc<str> = format!("COPY {table} ({}) FROM STDIN", columns.join(", ")).into();
        let rows: Vec<(i32, i32, String)> = sqlx::query_as(AssertSqlSafe(lines(&table, key, &columns)))
            .fetch_all(&mut *connection)
            .await
            .explain(what)?;
        for (connection, batch, rows) in rows {
            batches.entry((connection, batch)).or_default().push((Arc::clone(&statement), rows));
        }
    }
    Ok(batches)
}

/// A query for a table's rows in COPY's text format, those of one transaction together: connection, batch, rows.
fn lines(table: &str, key: &str, columns: &[String]) -> String {
    // https://www.postgresql.org/docs/current/sql-copy.html#SQL-COPY-FILE-FORMATS-TEXT
    let escaped = columns.iter().map(|column| {
        [(r"\\", r"\\\\"), (r"\t", r"\\t"), (r"\n", r"\\n"), (r"\r", r"\\r")]
            .into_iter()
            .fold(format!("t.{column}::text"), |text, (from, to)| {
                format!("replace({text}, E'{from}', E'{to}')")
            })
    });
    let escaped = escaped.collect::<Vec<_>>().join(", ");
    format!(
        r"SELECT connection, batch, string_agg(array_to_string(ARRAY[{escaped}], E'\t', E'\\N') || E'\n', '' ORDER BY ordinal)
          FROM {table} t JOIN places ON places.key = t.{key}::text GROUP BY connection, batch"
    )
}

/// Where each event's rows are written, and each order's, as lines for COPY. A partition is a connection, and so many of
/// its events are a batch.
fn places(events: Events, batch_records: u64) -> String {
    let mut next = vec![0_u64; usize::try_from(events.partitions).unwrap_or(0)];
    let (mut lines, mut orders) = (String::new(), BTreeMap::new());
    let mut line = |key: &str, connection: u32, ordinal: u64| {
        // Into a string nothing fails.
        let _ = writeln!(lines, "{key}\t{connection}\t{}\t{ordinal}", ordinal / batch_records);
    };
    for event in events.all() {
        let partition = event.partition(events.partitions);
        let Some(next) = usize::try_from(partition).ok().and_then(|p| next.get_mut(p)) else { continue };
        line(&event.id(), partition, *next);
        orders.insert(event.order_id(), (partition, *next));
        *next += 1;
    }
    for (order, (partition, ordinal)) in orders {
        line(&order, partition, ordinal);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_event_has_a_place_and_an_order_has_its_last_events() {
        let events = Events { count: 50_001, partitions: 3 };
        let text = places(events, 500);
        let mut found: BTreeMap<&str, (u32, u64, u64)> = BTreeMap::new();
        let mut sizes: BTreeMap<(u32, u64), u64> = BTreeMap::new();
        for (number, line) in (0..).zip(text.lines()) {
            let fields: Vec<&str> = line.split('\t').collect();
            let place = (fields[1].parse().unwrap(), fields[2].parse().unwrap(), fields[3].parse().unwrap());
            assert_eq!(found.insert(fields[0], place), None, "twice");
            if number < events.count {
                *sizes.entry((place.0, place.1)).or_default() += 1;
            }
        }
        assert_eq!(found.len() as u64, events.count + events.orders());
        // All but each partition's last batch are full.
        for ((partition, batch), size) in &sizes {
            assert!(
                *size == 500 || !sizes.contains_key(&(*partition, batch + 1)),
                "{partition} {batch} {size}"
            );
            assert!(*size <= 500);
        }
        let mut last = BTreeMap::new();
        for event in events.all() {
            last.insert(event.order_id(), event.id());
        }
        for (order, event) in last {
            assert_eq!(found[order.as_str()], found[event.as_str()]);
        }
    }
}

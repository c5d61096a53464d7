//! The arm `consumer`: the repository's own, with a new group and a new database.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use sqlx::AssertSqlSafe;

use super::{Bench, TOPIC, report::Run, running::Running};
use crate::{
    bench::usage::Usage,
    failure::{Explain, Failure, Result},
};

/// How long one run may take.
const LIMIT: Duration = Duration::from_secs(900);
/// How often the consumer is asked how far it is: so much too late the end is seen at most.
const ASK_INTERVAL: Duration = Duration::from_millis(20);

/// Has the consumer apply the whole topic to a database, whose tables are there and empty, and looks at what it made.
pub(super) async fn apply(bench: &Bench<'_>, group: &str, database: &str) -> Result<Run> {
    let broker = bench.broker_cpu_seconds();
    let since = Instant::now();
    let mut running = Running::start(bench, TOPIC, group, database)?;
    let end = loop {
        let counts = running.counts().await?;
        if counts.processed >= bench.events.count {
            break SystemTime::now();
        }
        if counts.dead_lettered > 0 {
            return Err(running.failed("the consumer dead-lettered an event"));
        }
        if since.elapsed() > LIMIT {
            let (done, seconds) = (counts.processed, LIMIT.as_secs());
            return Err(running.failed(&format!("the consumer has applied {done} events in {seconds} s")));
        }
        tokio::time::sleep(ASK_INTERVAL).await;
    };
    let usage = Usage::of(running.pid()).unwrap_or_default();
    let (broker, postgres) =
        (bench.broker_cpu_seconds() - broker, bench.backends_cpu_seconds(database).await?);
    running.stop().await?;
    verify(bench, database).await?;
    let mut connection = bench.connect("postgres", database).await?;
    // A batch is one transaction, and `now()` is when it began.
    let (start, transactions): (f64, i64) = sqlx::query_as(
        "SELECT extract(epoch FROM min(applied_at))::float8, count(DISTINCT applied_at) FROM inbox",
    )
    .fetch_one(&mut connection)
    .await
    .explain(|| "ask when the first event was applied".to_owned())?;
    let end = end.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let run = Run::of(bench.events.count, end - start);
    #[expect(clippy::cast_precision_loss, reason = "no count of events comes near 2^52")]
    let events_per_transaction = bench.events.count as f64 / transactions as f64;
    Ok(Run {
        events_per_transaction,
        cpu_seconds: usage.cpu_seconds,
        postgres_cpu_seconds: postgres,
        broker_cpu_seconds: broker,
        peak_rss_bytes: usage.peak_rss_bytes,
        ..run
    })
}

/// Every event applied once, every order as its events say.
async fn verify(bench: &Bench<'_>, database: &str) -> Result<()> {
    let what = || "look at what the consumer made".to_owned();
    let mut connection = bench.connect("postgres", database).await?;
    let handler = bench.args.handler.name();
    for table in ["inbox".to_owned(), format!("{handler}_tasks")] {
        let count: i64 = sqlx::query_scalar(AssertSqlSafe(format!("SELECT count(*) FROM {table}")))
            .fetch_one(&mut connection)
            .await
            .explain(what)?;
        if u64::try_from(count).ok() != Some(bench.events.count) {
            return Err(Failure::new(format!(
                "there were {} events, and {table} has {count} rows: an event was applied twice or not at all",
                bench.events.count
            )));
        }
    }
    let sql = format!("SELECT status, count(*), sum(version)::bigint FROM {handler}_orders GROUP BY status");
    let rows: Vec<(String, i64, i64)> =
        sqlx::query_as(AssertSqlSafe(sql)).fetch_all(&mut connection).await.explain(what)?;
    let found: BTreeMap<String, (u64, u64)> = rows
        .into_iter()
        .map(|(status, orders, versions)| (status, (orders.unsigned_abs(), versions.unsigned_abs())))
        .collect();
    let expected = bench.events.projection();
    if found == expected {
        return Ok(());
    }
    Err(Failure::new(format!(
        "{handler}_orders is not what the events make: by status, orders and the sum of their versions are {found:?} \
         instead of {expected:?}"
    )))
}

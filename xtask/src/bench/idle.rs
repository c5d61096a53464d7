//! What a publisher costs while nothing happens, and what it holds of the log while only others write.

use std::time::Duration;

use serde::Serialize;
use sqlx::PgConnection;

use super::{
    Bench,
    arm::walsender,
    numbers::Spread,
    plot::{Bar, Chart},
    publisher::Publisher,
    section::{Section, head},
    servers::execute,
    trial::{Trial, failure, nothing},
    usage::Usage,
};
use crate::failure::{Explain, Failure, Result};

/// Who has just started is busy.
const SETTLE: Duration = Duration::from_secs(10);
/// How long nothing happens.
const IDLE: Duration = Duration::from_secs(60);
/// What others write then, in MiB.
const ELSEWHERE_MIB: u64 = 64;
/// How long a publisher may take to let the log go. What a server needs itself it logs every 15 seconds.
const LET_GO: Duration = Duration::from_secs(20);

/// What was seen of one publisher.
#[derive(Debug, Clone, Copy, Serialize)]
struct Round {
    arm: &'static str,
    /// Of one processor, while nothing happens.
    cpu_percent: f64,
    walsender_cpu_percent: f64,
    rss_bytes: u64,
    /// From the slot's confirmed flush LSN, and from its restart LSN, to the end of the log, after others have written.
    unconfirmed_bytes: i64,
    retained_bytes: i64,
}

/// Every publisher once.
pub(super) async fn idle(bench: &Bench<'_>) -> Result<Section> {
    let (mut rounds, mut failures) = (Vec::new(), Vec::new());
    for (arm, publisher) in bench.arms.publishers() {
        let step = bench.servers.progress.step(format!("idle, {arm}"));
        let (round, failed) = one(bench, arm, publisher).await?;
        step.done(&format!("idle, {arm}: {:.2} % of a processor", round.cpu_percent));
        rounds.push(round);
        failures.extend(failed);
    }
    let seconds = IDLE.mul_f64(bench.times.min(1.0)).as_secs_f64();
    let title = format!("{seconds:.0} s without an event, then {ELSEWHERE_MIB} MiB of log of other tables");
    let mut section = Section::of("idle", title, &rounds)?;
    section.notes.push(format!(
        "CPU in percent of one processor (a tick of 10 ms is {:.3}); log after {} s, from the slot's confirmed flush LSN \
         (UNCONFIRMED) and its restart LSN (RETAINED) to its end",
        1.0 / seconds,
        LET_GO.mul_f64(bench.times.min(1.0)).as_secs()
    ));
    section.table = head(["ARM", "CPU %", "WALSENDER %", "RSS MIB", "UNCONFIRMED KIB", "RETAINED KIB"]);
    section.table.extend(rounds.iter().map(|round| {
        vec![
            round.arm.to_owned(),
            format!("{:.2}", round.cpu_percent),
            format!("{:.2}", round.walsender_cpu_percent),
            (round.rss_bytes >> 20).to_string(),
            (round.unconfirmed_bytes >> 10).to_string(),
            (round.retained_bytes >> 10).to_string(),
        ]
    }));
    let chart = |title: &str, of: &dyn Fn(&Round) -> (f64, String)| {
        let bars = rounds.iter().map(|round| {
            let (value, label) = of(round);
            Bar { name: round.arm.to_owned(), parts: vec![value], spread: None::<Spread>, label }
        });
        Chart { title: title.to_owned(), bars: bars.collect() }
    };
    #[expect(clippy::cast_precision_loss, reason = "no process has 2^52 bytes")]
    let memory = |round: &Round| {
        let mib = round.rss_bytes as f64 / f64::from(1 << 20);
        (mib, format!("{mib:.0} MiB"))
    };
    section.charts = vec![
        chart("CPU without an event, in percent of a processor", &|round| {
            (round.cpu_percent, format!("{:.2} %", round.cpu_percent))
        }),
        chart("Memory without an event", &memory),
    ];
    section.failures = failures;
    Ok(section)
}

async fn one(bench: &Bench<'_>, arm: &'static str, publisher: &Publisher) -> Result<(Round, Option<String>)> {
    let mut trial = Trial::start(bench.servers, publisher, bench.number()).await?;
    let part = bench.times.min(1.0);
    tokio::time::sleep(SETTLE.mul_f64(part)).await;
    let sender = walsender(&mut trial.connection, &trial.slot).await?;
    let usage =
        |pid: Option<u32>| pid.and_then(Usage::of).ok_or_else(|| Failure::new(format!("{arm} does not run")));
    let pid = trial.running.child.id();
    let (before, sender_before) = (usage(pid)?, usage(sender)?);
    let idle = IDLE.mul_f64(part);
    tokio::time::sleep(idle).await;
    let (after, sender_after) = (usage(pid)?, usage(sender)?);
    let percent =
        |before: Usage, after: Usage| (after.cpu_seconds - before.cpu_seconds) * 100.0 / idle.as_secs_f64();
    elsewhere(&mut trial.connection).await?;
    tokio::time::sleep(LET_GO.mul_f64(part)).await;
    let (unconfirmed_bytes, retained_bytes) = held(&mut trial.connection, &trial.slot).await?;
    let round = Round {
        arm,
        cpu_percent: percent(before, after),
        walsender_cpu_percent: percent(sender_before, sender_after),
        rss_bytes: after.rss_bytes,
        unconfirmed_bytes,
        retained_bytes,
    };
    Ok((round, failure(arm, trial.end().await?)))
}

/// Writes a table that is nobody's business.
async fn elsewhere(connection: &mut PgConnection) -> Result<()> {
    execute(connection, "CREATE TABLE elsewhere (filler text STORAGE PLAIN)".to_owned()).await?;
    for _ in 0..ELSEWHERE_MIB {
        let sql = "INSERT INTO elsewhere SELECT repeat('x', 1000) FROM generate_series(1, 1000)";
        execute(connection, sql.to_owned()).await?;
    }
    execute(connection, "DROP TABLE elsewhere".to_owned()).await
}

async fn held(connection: &mut PgConnection, slot: &str) -> Result<(i64, i64)> {
    sqlx::query_as(
        "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)::int8, \
         pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::int8 FROM pg_replication_slots WHERE slot_name = $1",
    )
    .bind(slot)
    .fetch_optional(connection)
    .await
    .explain(|| format!("look at the slot {slot}"))?
    .ok_or_else(nothing)
}

//! The slot's disk quota: the log that the slot needs is removed, the relay says so, and a person accepts it.

use std::{future::Future, time::Duration};

use rustix::process::Signal;
use sqlx::PgConnection;

use super::{
    faults::{connect, hold},
    stage::Stage,
};
use crate::{
    ending,
    failure::{Explain, Failure, Result},
    logs,
};

/// How much log a slot may hold while the quota is on.
const QUOTA: &str = "64MB";
/// How many segments of log (16 MiB each) are filled at the most, until the slot has lost its own.
const SEGMENTS_MAX: u32 = 64;
/// How long the relay may take to say that its slot is lost.
const HALT_LIMIT: Duration = Duration::from_secs(30);
/// How long the relays may take to have everything confirmed, and to stop.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// Where in the log it says so, counted from the end.
const LAST_LINES: usize = 20;
/// The exit code of a halt, and what the relay says of a lost slot.
const HALTED: i32 = 65;
const NAMED: &str = "is lost: the server has removed the log that it still needed";

/// Nobody writes to the outbox while this runs, so nothing is lost with the log. `drain` is called after each segment:
/// whoever has a slot of their own must not lose it as well. Says how much it took.
pub(super) async fn fill<F: Future<Output = Result<()>>>(
    stage: &Stage,
    drain: impl FnMut() -> F,
) -> Result<String> {
    let mut relays = Vec::new();
    for actor in stage.instances("cdc-relay") {
        let mut held = hold(stage, actor).await?;
        held.signal(Signal::TERM);
        held.ended(STOP_LIMIT).await?;
        relays.push((actor, held));
    }
    let mut connection = connect(stage).await?;
    set(&mut connection, &format!("ALTER SYSTEM SET max_slot_wal_keep_size = '{QUOTA}'")).await?;
    let segments = lose(&mut connection, drain).await?;
    // Whichever is started says it.
    for (actor, held) in relays.iter_mut().take(1) {
        held.start().await?;
        let status = held.ended(HALT_LIMIT).await?;
        let says = logs::tail(&actor.spec.log, LAST_LINES).iter().any(|line| line.contains(NAMED));
        if !says || status.and_then(|status| status.code()) != Some(HALTED) {
            let how = status.map(ending::describe).unwrap_or_default();
            let what =
                format!("a lost slot, and {} did not halt with code {HALTED} and {NAMED:?}", actor.spec.name);
            let failure = logs::with_tail(Failure::new(format!("{what}: {how}")), &actor.spec.log);
            stage.violation(failure.to_string());
        }
    }
    set(&mut connection, "ALTER SYSTEM RESET max_slot_wal_keep_size").await?;
    stage.relay(&["accept-gap", "--yes"]).await?;
    for (_, held) in &mut relays {
        held.start().await?;
    }
    Ok(format!("after {segments} segments of log"))
}

/// Fills segments of the log until the slot has lost what it needs; how many that took.
async fn lose<F: Future<Output = Result<()>>>(
    connection: &mut PgConnection,
    mut drain: impl FnMut() -> F,
) -> Result<u32> {
    // Nothing that anybody decodes. The rest of the segment is filled with nothing; the checkpoint removes what is over
    // the quota.
    const SEGMENT: [&str; 3] =
        ["SELECT pg_logical_emit_message(false, 'chaos', 'ballast')", "SELECT pg_switch_wal()", "CHECKPOINT"];
    for segments in 0..=SEGMENTS_MAX {
        if is_lost(connection).await? {
            return Ok(segments);
        }
        for sql in SEGMENT {
            execute(connection, sql).await?;
        }
        drain().await?;
    }
    Err(Failure::new(format!("{SEGMENTS_MAX} segments of log did not use up the slot's {QUOTA}")))
}

async fn set(connection: &mut PgConnection, sql: &str) -> Result<()> {
    execute(connection, sql).await?;
    execute(connection, "SELECT pg_reload_conf()").await
}

async fn execute(connection: &mut PgConnection, sql: &str) -> Result<()> {
    let done = sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(connection).await;
    done.map(drop).explain(|| format!("run {sql}"))
}

async fn is_lost(connection: &mut PgConnection) -> Result<bool> {
    let status: Option<Option<String>> =
        sqlx::query_scalar("SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'cdc_relay'")
            .fetch_optional(connection)
            .await
            .explain(|| "look at the slot".to_owned())?;
    Ok(status.flatten().as_deref() == Some("lost"))
}

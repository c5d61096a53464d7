//! What pacing costs a row that comes alone: the time from its commit until the session has decoded it, with pacing
//! and without.

use std::{path::Path, process::Stdio, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::{
    Bench,
    arm::walsender,
    relay::relay_env,
    section::{Section, head},
    servers::{Servers, execute},
    workload::{self, BASE_SLOT, Shape, scaled},
};
use crate::{
    failure::{Explain, Failure, Result},
    logs,
    spec::open_log,
};

/// How many rows there are.
const ROWS: u64 = 1_000;
/// Between two rows: much longer than any pacing, so that each row finds the session at rest.
const INTERVAL: Duration = Duration::from_millis(5);
/// How long one side may take.
const LIMIT: Duration = Duration::from_secs(600);
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Times from commit to decoded, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Latency {
    count: u64,
    p50: u32,
    p90: u32,
    p99: u32,
    max: u32,
}

/// What the session prints, as far as it is of interest here.
#[derive(Debug, Deserialize)]
struct Probe {
    commit_to_decoded_us: Latency,
}

/// Both sides of one round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Round {
    paced: Latency,
    eager: Latency,
}

/// Both, in turn.
pub(super) async fn pacing(bench: &Bench<'_>) -> Result<Section> {
    let shape = Shape::of(scaled(ROWS, bench.factor), 1);
    let mut rounds = Vec::new();
    for round in 1..=bench.rounds {
        let what = format!("pacing, round {round} of {}", bench.rounds);
        let step = bench.servers.progress.step(&what);
        let paced = side(bench.servers, &bench.arms.relay, shape, false).await?;
        let eager = side(bench.servers, &bench.arms.relay, shape, true).await?;
        rounds.push(Round { paced, eager });
        step.done(&what);
    }
    let title = "what pacing costs a row that comes alone".to_owned();
    let mut section = Section::of("pacing", title, &rounds)?;
    section.notes.push(format!("microseconds from commit to decoded, {} rows a round", shape.rows));
    section.table = head(["SESSION", "ROUND", "P50", "P90", "P99", "MAX"]);
    for (number, Round { paced, eager }) in (1..).zip(&rounds) {
        for (name, latency) in [("paced", paced), ("without pacing", eager)] {
            let Latency { p50, p90, p99, max, .. } = latency;
            let row = [
                name.to_owned(),
                number.to_string(),
                p50.to_string(),
                p90.to_string(),
                p99.to_string(),
                max.to_string(),
            ];
            section.table.push(row.to_vec());
        }
    }
    Ok(section)
}

async fn side(servers: &Servers, relay: &Path, shape: Shape, eager: bool) -> Result<Latency> {
    let mut connection = servers.connect().await?;
    workload::prepare(&mut connection, shape).await?;
    let log = servers.layout.log("pacing");
    let mut command = Command::new(relay);
    relay_env(&mut command, servers, BASE_SLOT);
    command.args(["probe", "--json", "--latency", "--rows", &shape.rows.to_string()]);
    command.args(eager.then_some("--eager"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(open_log(&log)?).kill_on_drop(true);
    let mut child = command.spawn().explain(|| "start cdc-relay probe".to_owned())?;
    let writing = async {
        while walsender(&mut connection, BASE_SLOT).await?.is_none() {
            if child.try_wait().is_ok_and(|ended| ended.is_some()) {
                return Ok(());
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        for number in 1..=shape.rows {
            workload::insert(&mut connection, number).await?;
            tokio::time::sleep(INTERVAL).await;
        }
        Ok(())
    };
    let late = || logs::with_tail(Failure::new("the session did not end in time"), &log);
    tokio::time::timeout(LIMIT, writing).await.map_err(|_| late())??;
    let output = tokio::time::timeout(LIMIT, child.wait_with_output()).await.map_err(|_| late())?;
    let output = output.explain(|| "wait for cdc-relay probe".to_owned())?;
    if !output.status.success() {
        return Err(logs::with_tail(Failure::new("cdc-relay probe failed"), &log));
    }
    let probe: Probe =
        serde_json::from_slice(&output.stdout).explain(|| "read the probe's result".to_owned())?;
    execute(&mut connection, format!("SELECT pg_drop_replication_slot('{BASE_SLOT}')")).await?;
    Ok(probe.commit_to_decoded_us)
}

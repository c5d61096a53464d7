//! What pacing costs a row that comes alone: the time from its commit until the session has decoded it, with pacing
//! and without.

use std::{path::Path, process::Stdio, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::{
    arm::walsender,
    relay::relay_env,
    servers::{Servers, execute},
    workload::{self, BASE_SLOT, Shape},
};
use crate::{
    failure::{Explain, Failure, Result},
    logs,
    spec::open_log,
};

/// Between two rows: much longer than any pacing, so that each row finds the session at rest.
const INTERVAL: Duration = Duration::from_millis(5);
/// How long one side may take.
const LIMIT: Duration = Duration::from_secs(600);
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Times from commit to decoded, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Latency {
    pub(super) count: u64,
    pub(super) p50: u32,
    pub(super) p90: u32,
    pub(super) p99: u32,
    pub(super) max: u32,
}

/// What the session prints, as far as it is of interest here.
#[derive(Debug, Deserialize)]
struct Probe {
    commit_to_decoded_us: Latency,
}

/// Both sides of one round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Round {
    pub(super) paced: Latency,
    pub(super) eager: Latency,
}

/// Runs one round.
pub(super) async fn round(servers: &Servers, relay: &Path, shape: Shape) -> Result<Round> {
    let paced = side(servers, relay, shape, false).await?;
    let eager = side(servers, relay, shape, true).await?;
    Ok(Round { paced, eager })
}

async fn side(servers: &Servers, relay: &Path, shape: Shape, eager: bool) -> Result<Latency> {
    let mut connection = servers.connect().await?;
    workload::prepare(&mut connection, shape).await?;
    let log = servers.layout.log("idle");
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
    let late = || logs::with_tail(Failure::new("the idle session did not end in time"), &log);
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

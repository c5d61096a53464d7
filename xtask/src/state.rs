//! `.stack/state.json`: what runs, for the commands that come later, even if the supervisor was killed.

use std::{
    fs::{self, File},
    path::PathBuf,
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::{
    endpoints::Endpoints,
    failure::{Explain, Failure, Result},
    identity::Identity,
    layout::Layout,
    spec::Layer,
};

/// How long a lock may be held by nobody in particular.
const LOCK_LIMIT: Duration = Duration::from_secs(2);
/// How long a supervisor that was killed may take to be gone.
const DYING_LIMIT: Duration = Duration::from_millis(1000);
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// What a supervisor writes down whenever something changes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct State {
    pub supervisor: Identity,
    /// Everything was ready once.
    pub ready: bool,
    /// The data folder of Postgres: the working folder of all its processes.
    pub cluster: PathBuf,
    pub endpoints: Endpoints,
    pub processes: Vec<Entry>,
}

/// One process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub name: String,
    pub service: String,
    pub layer: Layer,
    /// The process now, or the last one.
    pub identity: Option<Identity>,
    pub phase: Phase,
    pub port: u16,
    pub log: PathBuf,
    pub restarts: u32,
}

/// Where a process is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Phase {
    Starting,
    Ready,
    /// It died, and is started again in a moment.
    Waiting {
        why: String,
    },
    /// It died in a way that starting again does not mend.
    Down {
        why: String,
    },
    /// It was told to.
    Stopped,
}

impl Phase {
    /// One word for it.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Waiting { .. } => "waiting",
            Self::Down { .. } => "down",
            Self::Stopped => "stopped",
        }
    }
}

/// The state as it was last written, if there is one.
pub(crate) fn read(layout: &Layout) -> Option<State> {
    serde_json::from_slice(&fs::read(layout.state()).ok()?).ok()
}

/// The state of the stack that runs; fails with what to do when none does.
pub(crate) fn running(layout: &Layout) -> Result<State> {
    let none = || Failure::new(format!("no stack runs in {}", layout.dir.display())).hint("cargo xtask up");
    if lock_unless_alive_for(layout, Duration::ZERO)?.is_some() {
        return Err(none());
    }
    read(layout).ok_or_else(none)
}

/// The lock that a supervisor holds as long as it lives, however it ends; `None` if another holds it.
pub(crate) fn lock(layout: &Layout) -> Result<Option<File>> {
    lock_unless_alive_for(layout, DYING_LIMIT)
}

/// The lock, unless its holder lives and goes on living for so long.
fn lock_unless_alive_for(layout: &Layout, limit: Duration) -> Result<Option<File>> {
    let path = layout.dir.join("lock");
    let file = File::create(&path).explain(|| format!("create {}", path.display()))?;
    let since = Instant::now();
    loop {
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Ok(Some(file));
        }
        // A command that looks whether a stack runs holds it for a moment, and so does a supervisor that has been
        // killed: on a busy machine it lives on a little. Only one that stays alive, or that has not written its state
        // for a while, counts.
        let supervised = read(layout).is_some_and(|state| state.supervisor.alive());
        if since.elapsed() > if supervised { limit } else { LOCK_LIMIT } {
            return Ok(None);
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_is_held_for_a_moment_is_waited_for_and_one_that_stays_is_not() {
        let dir = std::env::temp_dir().join(format!("xtask-lock-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let layout = Layout {
            root: dir.clone(),
            dir: dir.clone(),
            downloads: dir.clone(),
            run: dir.clone(),
            user: None,
        };
        let held = lock(&layout).unwrap().expect("nobody else has it");
        let dropping = std::thread::spawn(move || {
            std::thread::sleep(LOCK_LIMIT / 4);
            drop(held);
        });
        let held = lock(&layout).unwrap().expect("it becomes free");
        dropping.join().unwrap();
        assert!(lock(&layout).unwrap().is_none());
        drop(held);
        fs::remove_dir_all(&dir).unwrap();
    }
}

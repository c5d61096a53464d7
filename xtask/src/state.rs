//! `.stack/state.json`: what runs, for the commands that come later, even if the supervisor was killed.

use std::{
    fs::{self, File},
    path::PathBuf,
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
    if lock(layout)?.is_some() {
        return Err(none());
    }
    read(layout).ok_or_else(none)
}

/// The lock that a supervisor holds as long as it lives, however it ends; `None` if another holds it.
pub(crate) fn lock(layout: &Layout) -> Result<Option<File>> {
    let path = layout.dir.join("lock");
    let file = File::create(&path).explain(|| format!("create {}", path.display()))?;
    Ok(flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok().then_some(file))
}

//! What the supervisor knows of every process: told to the terminal, to files, and to whoever waits for it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::{
    endpoints::{self, Process},
    failure::Result,
    identity::Identity,
    layout::Layout,
    progress::Progress,
    spec::Spec,
    state::{Entry, Phase, State},
};

/// The supervisor's table of processes.
#[derive(Debug)]
pub(crate) struct Desk {
    pub layout: Layout,
    pub progress: Progress,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
}

impl Desk {
    pub(crate) fn new(layout: Layout, progress: Progress, state: State) -> Self {
        Self { layout, progress, state: Mutex::new(state), changed: watch::channel(0).0 }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state as it is now.
    pub(crate) fn state(&self) -> State {
        self.lock().clone()
    }

    /// Told whenever something changes.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The phase and the number of restarts of a process.
    pub(crate) fn phase(&self, name: &str) -> Option<(Phase, u32)> {
        let state = self.lock();
        state
            .processes
            .iter()
            .find(|entry| entry.name == name)
            .map(|entry| (entry.phase.clone(), entry.restarts))
    }

    /// A process of the stack, not started yet.
    pub(crate) fn add(&self, spec: &Spec) -> Result<()> {
        self.update(|state| {
            state.processes.push(Entry {
                name: spec.name.clone(),
                service: spec.service.clone(),
                layer: spec.layer,
                identity: None,
                phase: Phase::Starting,
                port: spec.port,
                log: spec.log.clone(),
                restarts: 0,
            });
            state.processes.sort_by_key(|entry| entry.layer);
        })
    }

    /// Another life of this process began.
    pub(crate) fn spawned(&self, name: &str, identity: Identity) {
        self.change(name, |entry| {
            entry.identity = Some(identity);
            entry.phase = Phase::Starting;
        });
    }

    /// It is in another phase now.
    pub(crate) fn now(&self, name: &str, phase: Phase) {
        self.change(name, |entry| {
            entry.restarts += u32::from(matches!(phase, Phase::Waiting { .. }));
            entry.phase = phase;
        });
    }

    /// Everything is ready: from now on `endpoints.json` exists.
    pub(crate) fn all_ready(&self) -> Result<()> {
        self.update(|state| state.ready = true)
    }

    fn change(&self, name: &str, how: impl FnOnce(&mut Entry)) {
        let result = self.update(|state| {
            if let Some(entry) = state.processes.iter_mut().find(|entry| entry.name == name) {
                how(entry);
            }
        });
        if let Err(failure) = result {
            self.progress.line(&format!("  {failure}"));
        }
    }

    fn update(&self, how: impl FnOnce(&mut State)) -> Result<()> {
        let mut state = self.lock();
        how(&mut state);
        state.endpoints.processes = state.processes.iter().map(process).collect();
        let mut result = endpoints::write_json(&self.layout.state(), &*state);
        if state.ready && result.is_ok() {
            result = endpoints::write_json(&self.layout.endpoints(), &state.endpoints);
        }
        drop(state);
        self.changed.send_modify(|count| *count += 1);
        result
    }
}

fn process(entry: &Entry) -> Process {
    let gone = matches!(entry.phase, Phase::Down { .. } | Phase::Stopped);
    let identity = entry.identity.as_ref().filter(|_| !gone);
    Process {
        name: entry.name.clone(),
        pid: identity.map(|identity| identity.pid),
        log: entry.log.display().to_string(),
        port: entry.port,
        state: entry.phase.word().to_owned(),
        restarts: entry.restarts,
    }
}

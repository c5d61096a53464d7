//! One process of the stage: only who holds it may end or start it, so whoever finds it ended knows that nobody here
//! did that.

use std::{process::ExitStatus, time::Duration};

use rustix::process::Signal;
use tokio::{
    process::Child,
    sync::{Mutex, MutexGuard},
    time::timeout,
};

use crate::{
    ending,
    failure::{Explain, Failure, Result},
    identity, logs, postgres,
    spec::{Layer, Spec},
};

/// How long a process may take to go when it is killed.
const KILLED_LIMIT: Duration = Duration::from_secs(20);
/// How long a process may take until it is ready.
const READY_LIMIT: Duration = Duration::from_secs(90);

/// A process that the campaign keeps running.
#[derive(Debug)]
pub(super) struct Actor {
    pub(super) spec: Spec,
    mark: (&'static str, String),
    child: Mutex<Option<Child>>,
}

/// The right to end and start a process.
#[derive(Debug)]
pub(super) struct Held<'a> {
    actor: &'a Actor,
    child: MutexGuard<'a, Option<Child>>,
}

impl Actor {
    pub(super) fn new(spec: Spec, mark: (&'static str, String)) -> Self {
        Self { spec, mark, child: Mutex::new(None) }
    }

    /// Waits until nobody else holds it.
    pub(super) async fn hold(&self) -> Held<'_> {
        Held { actor: self, child: self.child.lock().await }
    }

    /// Unless somebody holds it.
    pub(super) fn try_hold(&self) -> Option<Held<'_>> {
        self.child.try_lock().ok().map(|child| Held { actor: self, child })
    }

    /// Returns when it is ready; fails with the end of its log when it takes too long.
    pub(super) async fn ready(&self) -> Result<()> {
        timeout(READY_LIMIT, self.spec.ready()).await.map_err(|_| {
            let why = format!("{} is not ready after {} s", self.spec.name, READY_LIMIT.as_secs());
            logs::with_tail(Failure::new(why), &self.spec.log)
        })
    }
}

impl Held<'_> {
    /// Starts it. It must not run.
    pub(super) async fn start(&mut self) -> Result<()> {
        if self.actor.spec.layer == Layer::Postgres {
            postgres::clear_remains(&self.actor.spec.cwd).await;
        }
        *self.child = Some(self.actor.spec.spawn((self.actor.mark.0, self.actor.mark.1.clone()))?);
        Ok(())
    }

    /// Sends a signal, if it runs.
    pub(super) fn signal(&self, signal: Signal) {
        // The child is not waited for yet, so its id is still its own.
        if let Some(pid) = self.child.as_ref().and_then(Child::id) {
            identity::send(pid, signal);
        }
    }

    /// Waits for its end, and kills it after `limit`; how it ended, if it ran.
    pub(super) async fn ended(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let Some(mut child) = self.child.take() else { return Ok(None) };
        if timeout(limit, child.wait()).await.is_err() {
            let _ = child.start_kill();
        }
        // One that has ended is waited for at once.
        let waited = timeout(KILLED_LIMIT, child.wait()).await;
        let waited =
            waited.map_err(|_| Failure::new(format!("{} cannot be killed", self.actor.spec.name)))?;
        waited.map(Some).explain(|| format!("wait for {}", self.actor.spec.name))
    }

    /// kill -9, and waits for the end.
    pub(super) async fn kill(&mut self) -> Result<()> {
        self.signal(Signal::KILL);
        self.ended(KILLED_LIMIT).await.map(drop)
    }

    /// How it ended by itself, if it has; it is not running then.
    pub(super) fn ended_by_itself(&mut self) -> Option<String> {
        let status = self.child.as_mut()?.try_wait();
        let status = status.ok()??;
        *self.child = None;
        let name = &self.actor.spec.name;
        let failure = Failure::new(format!("{name} ended by itself: {}", ending::describe(status)));
        Some(logs::with_tail(failure, &self.actor.spec.log).to_string())
    }
}

//! The processes of one supervisor: starting them, waiting for them, stopping them in the reverse order.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot},
    task::{JoinHandle, JoinSet},
    time::{Instant, timeout_at},
};

use crate::{
    desk::Desk,
    failure::{Failure, Result},
    keeper::{self, Asked, Order},
    logs,
    spec::{Layer, Spec},
    state::Phase,
};

/// How long a process may take until it is ready.
const READY_LIMIT: Duration = Duration::from_secs(90);
/// After this many deaths in a row before it was ever ready, waiting for a process is pointless.
const DEATHS_MAX: u32 = 4;
/// Orders that may wait for one keeper.
const ORDERS: usize = 8;

/// All keepers of a supervisor.
#[derive(Debug)]
pub(crate) struct Crew {
    desk: Arc<Desk>,
    members: Mutex<Vec<Member>>,
}

#[derive(Debug)]
struct Member {
    name: String,
    service: String,
    layer: Layer,
    log: PathBuf,
    orders: mpsc::Sender<Asked>,
    keeper: JoinHandle<()>,
}

impl Crew {
    pub(crate) fn new(desk: Arc<Desk>) -> Self {
        Self { desk, members: Mutex::new(Vec::new()) }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a process and keeps it running.
    pub(crate) fn hire(&self, spec: Spec) -> Result<()> {
        self.desk.add(&spec)?;
        let (orders, inbox) = mpsc::channel(ORDERS);
        let (name, service, layer, log) =
            (spec.name.clone(), spec.service.clone(), spec.layer, spec.log.clone());
        let keeper = tokio::spawn(keeper::keep(spec, self.desk.clone(), inbox));
        self.lock().push(Member { name, service, layer, log, orders, keeper });
        Ok(())
    }

    /// Waits until a process is ready; fails if it never will be, with the end of its log.
    pub(crate) async fn ready(&self, name: &str) -> Result<()> {
        let log = self.lock().iter().find(|member| member.name == name).map(|member| member.log.clone());
        let log = log.ok_or_else(|| Failure::new(format!("there is no process {name}")))?;
        let mut changes = self.desk.changes();
        let deadline = Instant::now() + READY_LIMIT;
        let died_before = self.desk.phase(name).map_or(0, |(_, restarts)| restarts);
        loop {
            changes.mark_unchanged();
            let failed = match self.desk.phase(name) {
                Some((Phase::Ready, _)) => return Ok(()),
                Some((Phase::Down { why } | Phase::Waiting { why }, restarts))
                    if restarts >= died_before + DEATHS_MAX =>
                {
                    Some(format!("{name} does not start: {why}"))
                }
                Some((Phase::Down { why }, _)) => Some(format!("{name} does not start: {why}")),
                Some((Phase::Stopped, _)) | None => Some(format!("{name} was stopped")),
                Some(_) => None,
            };
            if let Some(why) = failed {
                return Err(logs::with_tail(Failure::new(why), &log));
            }
            if timeout_at(deadline, changes.changed()).await.is_err() {
                let why = format!("{name} is not ready after {} s", READY_LIMIT.as_secs());
                return Err(logs::with_tail(Failure::new(why), &log));
            }
        }
    }

    /// Tells a process, or all instances of a service; returns the names of those that were told.
    pub(crate) async fn tell(&self, who: &str, order: Order) -> Result<Vec<String>> {
        let told: Vec<(String, mpsc::Sender<Asked>)> = self
            .lock()
            .iter()
            .filter(|member| member.name == who || member.service == who)
            .map(|member| (member.name.clone(), member.orders.clone()))
            .collect();
        if told.is_empty() {
            let names: Vec<String> = self.lock().iter().map(|member| member.name.clone()).collect();
            return Err(Failure::new(format!("there is no process {who:?}"))
                .hint(format!("there are {}", names.join(", "))));
        }
        for (_, orders) in &told {
            ask(orders, order).await;
        }
        Ok(told.into_iter().map(|(name, _)| name).collect())
    }

    /// Stops everything, the last layer first; the processes of one layer at the same time, because the last
    /// Kafka broker of three could not shut down in order any more.
    pub(crate) async fn stop_all(&self, order: Order) {
        let mut layers: Vec<Layer> = self.lock().iter().map(|member| member.layer).collect();
        layers.sort_unstable();
        layers.dedup();
        while let Some(layer) = layers.pop() {
            let (leaving, staying) = self.lock().drain(..).partition(|member| member.layer == layer);
            *self.lock() = staying;
            let leaving: Vec<Member> = leaving;
            let mut stopping = JoinSet::new();
            for member in leaving {
                stopping.spawn(async move {
                    ask(&member.orders, order).await;
                    let _ = member.keeper.await;
                });
            }
            while stopping.join_next().await.is_some() {}
        }
    }
}

/// Returns when the order is carried out.
async fn ask(orders: &mpsc::Sender<Asked>, order: Order) {
    let (done, carried_out) = oneshot::channel();
    if orders.send((order, done)).await.is_ok() {
        let _ = carried_out.await;
    }
}

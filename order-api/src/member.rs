//! This instance's own place in the fleet: its heartbeats, written down without a detour over HTTP.

use std::{sync::Arc, time::Duration};

use chrono::{SubsecRound, Utc};
use service::{Failure, Health, fleet::instance_name};

use crate::{
    error::Error,
    routes::Context,
    store::{Answer, Heartbeat},
};

/// How often we look whether the database has come, before the first heartbeat.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How long the last heartbeat may hold up the end.
const FAREWELL: Duration = Duration::from_secs(1);

/// This instance.
#[derive(Debug)]
pub(crate) struct Member {
    context: Arc<Context>,
    health: Health,
    /// All but the state.
    heartbeat: Heartbeat,
}

impl Member {
    /// Names it.
    ///
    /// # Errors
    /// 64 for a name that cannot be one.
    pub(crate) fn new(context: &Arc<Context>, health: &Health) -> Result<Arc<Self>, Failure> {
        let heartbeat = Heartbeat {
            id: instance_name(&context.fleet.instance)?,
            service: "order-api".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            started: Utc::now().trunc_subsecs(6),
            state: String::new(),
        };
        Ok(Arc::new(Self { context: Arc::clone(context), health: health.clone(), heartbeat }))
    }

    /// Writes a heartbeat down every interval, for ever. Not while the database is away, which is told elsewhere.
    pub(crate) async fn stay(self: Arc<Self>) {
        let Some(interval) = self.context.fleet.interval() else { return };
        loop {
            if self.health.is_ready() {
                self.tell(self.health.state()).await;
                tokio::time::sleep(interval).await;
            } else {
                tokio::time::sleep(interval.min(LOOK_INTERVAL)).await;
            }
        }
    }

    /// Writes down that it has stopped, if that goes fast.
    pub(crate) async fn leave(&self) {
        if self.context.fleet.interval().is_some() {
            // It becomes stale by itself.
            let _ = tokio::time::timeout(FAREWELL, self.tell("stopped".into())).await;
        }
    }

    async fn tell(&self, state: String) {
        let heartbeat = Heartbeat { state, ..self.heartbeat.clone() };
        let store = &self.context.store;
        let told =
            store.heartbeat(&heartbeat, self.context.fleet.forget_after(), None, |_| Ok(Answer::none()));
        match told.await {
            Ok(_) => {}
            Err(Error::FleetFull(_)) => tracing::warn!("there are too many instances to register this one"),
            Err(error) => tracing::debug!(?error, "cannot write the heartbeat down"),
        }
    }
}

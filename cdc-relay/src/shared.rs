//! What the relay's threads share.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use service::Health;

use crate::{admin::Metrics, config::Settings, dlq, replay, replication::place::Place, wait::Waker};

/// Who this process is: host and process id.
pub(crate) fn instance() -> String {
    format!("{}/{}", rustix::system::uname().nodename().to_string_lossy(), std::process::id())
}

/// Cloning shares it.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    pub(crate) settings: Arc<Settings>,
    pub(crate) metrics: Metrics,
    pub(crate) health: Health,
    pub(crate) waker: Waker,
    /// Set, and the waker woken, to ask for a stop.
    pub(crate) stop: Arc<AtomicBool>,
    /// Set, and the waker woken, when Postgres seems to shut down.
    pub(crate) postgres_stops: Arc<AtomicBool>,
    /// Which server the last session streamed from: the one to watch.
    pub(crate) server: Arc<Mutex<Option<Place>>>,
    /// Where a redrive is asked for.
    pub(crate) redrives: Arc<dlq::api::Desk>,
    /// Where a replay is asked for.
    pub(crate) replays: Arc<replay::api::Replays>,
}

impl Shared {
    pub(crate) fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Says which server is streamed from now.
    pub(crate) fn streams_from(&self, server: &Place) {
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(server.clone());
    }

    /// Which server is to be watched; None where any will do.
    pub(crate) fn server(&self) -> Option<Place> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

//! The drain: SIGTERM or SIGINT asks once; whoever holds a [`Shutdown`] finishes what it has and stops.

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::{Failure, exit::Kind};

/// A request to stop that any number of tasks can wait for. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Shutdown(watch::Receiver<bool>);

/// Asks every [`Shutdown`] of its pair to stop.
#[derive(Debug, Clone)]
pub struct Trigger(watch::Sender<bool>);

impl Trigger {
    /// Asks for the stop. Asking twice is the same as once.
    pub fn request(&self) {
        self.0.send_replace(true);
    }
}

impl Shutdown {
    /// A shutdown that only its trigger can ask for.
    pub fn manual() -> (Trigger, Self) {
        let (tx, rx) = watch::channel(false);
        (Trigger(tx), Self(rx))
    }

    /// A shutdown that SIGTERM and SIGINT ask for, besides its trigger. Needs a running tokio runtime.
    pub fn on_signals() -> Result<(Trigger, Self), Failure> {
        let failed = |e| Failure::new(Kind::Internal, format!("cannot listen for signals: {e}"));
        let mut term = signal(SignalKind::terminate()).map_err(failed)?;
        let mut int = signal(SignalKind::interrupt()).map_err(failed)?;
        let (trigger, shutdown) = Self::manual();
        let on_signal = trigger.clone();
        tokio::spawn(async move {
            let name = tokio::select! {
                _ = term.recv() => "SIGTERM",
                _ = int.recv() => "SIGINT",
            };
            tracing::info!(signal = name, "asked to stop, draining");
            on_signal.request();
        });
        Ok((trigger, shutdown))
    }

    /// Whether the stop has been asked for.
    pub fn is_requested(&self) -> bool {
        *self.0.borrow()
    }

    /// Resolves when the stop is asked for, at once if it already was.
    pub async fn requested(&self) {
        let mut rx = self.0.clone();
        // The sender being gone means that nobody can ask any more; then there is nothing to wait for.
        if rx.wait_for(|asked| *asked).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

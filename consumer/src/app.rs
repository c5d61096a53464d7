//! The service put together: build, then run until stopped.

use std::sync::Arc;

use service::{Failure, Health, health, http, metrics, shutdown::Shutdown};
use tokio::net::TcpListener;

use crate::{
    assignment::Assignment,
    config::Settings,
    dlq::DeadLetters,
    group,
    handlers::{Handler, Name, acks::Acks, fulfillment::Fulfillment, messages::Messages, pharmacy::Pharmacy},
    metrics::Metrics,
    run::Shared,
    store::Store,
};

/// A service that has its port and nothing else yet.
pub(crate) struct App {
    settings: Settings,
    listener: TcpListener,
    health: Health,
}

impl App {
    /// Takes the port, so that health can be asked while the servers are waited for.
    pub(crate) async fn build(settings: Settings, health: Health) -> Result<Self, Failure> {
        let listener = http::bind(&settings.listen).await?;
        Ok(Self { settings, listener, health })
    }

    /// Runs until asked to stop, and drains.
    pub(crate) async fn run_until_stopped(self, shutdown: Shutdown) -> Result<(), Failure> {
        match self.settings.handler {
            Name::Pharmacy => self.run(Pharmacy, shutdown).await,
            Name::Fulfillment => self.run(Fulfillment, shutdown).await,
            Name::Messages => {
                let group = self.settings.kafka.group.clone();
                self.run(Messages { group }, shutdown).await
            }
            Name::Acks => self.run(Acks, shutdown).await,
        }
    }

    async fn run<H: Handler>(self, handler: H, shutdown: Shutdown) -> Result<(), Failure> {
        let Self { settings, listener, health } = self;
        let mut registry = metrics::registry("consumer");
        let metrics = Metrics::new(&mut registry);
        if let Ok(address) = listener.local_addr() {
            tracing::info!(%address, handler = settings.handler.as_str(), group = settings.kafka.group, "starting");
        }
        // Served until the very end, also while we drain: it ends with its owner.
        let (_until_the_end, served) = Shutdown::manual();
        let router = health::router(health.clone(), Arc::new(registry));
        let serving = tokio::spawn(http::serve(listener, router, http::Limits::default(), served));

        health.not_ready("waiting_for_database", "connecting");
        let group = settings.kafka.group.clone();
        let name = format!("consumer-{group}");
        let pool = tokio::select! {
            pool = settings.database.open(&name, H::TABLES) => pool?,
            () = shutdown.requested() => return Ok(()),
        };
        let store = Store { pool, group, handler, apply_timeout: settings.limits.apply_timeout };
        health.not_ready("joining", "");
        let dead_letters = DeadLetters::new(&settings.kafka)?;
        let (consumer, events) = group::join(&settings.kafka)?;
        let shared = Arc::new(Shared { store, dead_letters, metrics, limits: settings.limits });
        let outcome = Assignment::new(consumer, events, shared, health)?.run(shutdown).await;
        serving.abort();
        outcome
    }
}

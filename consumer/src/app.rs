//! The service put together: build, then run until stopped.

use std::sync::Arc;

use service::{Failure, Health, health, http, metrics, shutdown::Shutdown};
use tokio::net::TcpListener;

use crate::{
    assignment::Assignment, config::Settings, delivery, dlq::DeadLetters, group, handler::Handler,
    metrics::Metrics, offer::Traits, run::Shared, store::Store,
};

/// A service that has its port and nothing else yet.
pub(crate) struct App {
    pub(crate) settings: Settings,
    traits: Traits,
    listener: TcpListener,
    health: Health,
}

impl App {
    /// Takes the port, so that health can be asked while the servers are waited for.
    pub(crate) async fn build(settings: Settings, traits: Traits, health: Health) -> Result<Self, Failure> {
        let listener = http::bind(&settings.listen).await?;
        Ok(Self { settings, traits, listener, health })
    }

    /// Runs a handler until asked to stop, and drains.
    pub(crate) async fn run<H: Handler>(self, handler: H, shutdown: Shutdown) -> Result<(), Failure> {
        let Self { settings, traits, listener, health } = self;
        let mut registry = metrics::registry("consumer");
        let metrics = Metrics::new(&mut registry);
        if let Ok(address) = listener.local_addr() {
            tracing::info!(%address, handler = settings.handler, group = settings.kafka.group, "starting");
        }
        // Served until the very end, also while we drain: it ends with its owner.
        let (_until_the_end, served) = Shutdown::manual();
        let group = settings.kafka.group.clone();
        let name = format!("consumer-{group}");
        let pool = settings.database.pool(&name);
        let router = health::router(health.clone(), Arc::new(registry)).merge(handler.router(pool.clone()));
        let serving = tokio::spawn(http::serve(listener, router, http::Limits::default(), served));

        health.not_ready("waiting_for_database", "connecting");
        tokio::select! {
            prepared = settings.database.prepare(&name, traits.tables, traits.schema) => prepared?,
            () = shutdown.requested() => return Ok(()),
        };
        let redrive_topic = delivery::redrive_topic(&group);
        let (policy, apply_timeout) = (settings.policy.clone(), settings.limits.apply_timeout);
        let store = Store { pool, group, handler, policy, apply_timeout };
        health.not_ready("joining", "");
        let dead_letters = Some(DeadLetters::new(&settings.kafka)?);
        let (consumer, events) = group::join(&settings.kafka)?;
        let shared =
            Arc::new(Shared { store, dead_letters, metrics, limits: settings.limits, redrive_topic });
        let outcome = Assignment::new(consumer, events, shared, health)?.run(shutdown).await;
        serving.abort();
        outcome
    }
}

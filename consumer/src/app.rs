//! The service put together: build, then run until stopped.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use service::{Failure, Health, health, http, metrics, shutdown::Shutdown};
use tokio::net::TcpListener;

use crate::{
    assignment::Assignment,
    config::Settings,
    delivery,
    dlq::DeadLetters,
    group::{self, Ended},
    handler::Handler,
    metrics::Metrics,
    offer::Traits,
    run::Shared,
    store::Store,
};

/// How often a member that was fenced joins again, in how much time: where another lives by its name, one of the two has
/// to end.
const RETURNS_MAX: usize = 3;
const RETURNS_WINDOW: Duration = Duration::from_mins(10);

/// When a member that was fenced has joined again.
#[derive(Default)]
struct Returns(Vec<Instant>);

impl Returns {
    /// Whether it may do so once more; it counts if so.
    fn one_more(&mut self, now: Instant) -> bool {
        self.0.retain(|at| now.duration_since(*at) < RETURNS_WINDOW);
        if self.0.len() >= RETURNS_MAX {
            return false;
        }
        self.0.push(now);
        true
    }
}

/// A service that has its port and nothing else yet.
pub(crate) struct App {
    pub(crate) settings: Settings,
    traits: Traits,
    /// Nothing for one that works beside the live consumers: it serves nobody, and its tables are there.
    listener: Option<TcpListener>,
    health: Health,
}

impl App {
    /// Takes the port, so that health can be asked while the servers are waited for.
    pub(crate) async fn build(settings: Settings, traits: Traits, health: Health) -> Result<Self, Failure> {
        let listener = http::bind(&settings.listen).await?;
        Ok(Self { settings, traits, listener: Some(listener), health })
    }

    /// Works beside the live consumers, on tables that are there: it serves nobody and sends no dead letters.
    pub(crate) fn beside(settings: Settings, traits: Traits, health: Health) -> Self {
        Self { settings, traits, listener: None, health }
    }

    /// Runs a handler until asked to stop, and drains.
    pub(crate) async fn run<H: Handler>(self, handler: H, shutdown: Shutdown) -> Result<(), Failure> {
        let Self { settings, traits, listener, health } = self;
        let mut registry = metrics::registry("consumer");
        let metrics = Metrics::new(&mut registry);
        let group = settings.kafka.group.clone();
        let name = format!("consumer-{group}");
        let pool = settings.database.pool(&name);
        let is_live = listener.is_some();
        let mut serving = None;
        // Served until the very end, also while we drain: it ends with its owner.
        let (_until_the_end, served) = Shutdown::manual();
        if let Some(listener) = listener {
            if let Ok(address) = listener.local_addr() {
                tracing::info!(%address, handler = settings.handler, group, "starting");
            }
            let queries = handler.router(pool.clone());
            let router = health::router(health.clone(), Arc::new(registry)).merge(queries);
            serving = Some(tokio::spawn(http::serve(listener, router, http::Limits::default(), served)));
            health.not_ready("waiting_for_database", "connecting");
            tokio::select! {
                prepared = settings.database.prepare(&name, traits.tables, traits.schema) => prepared?,
                () = shutdown.requested() => return Ok(()),
            };
        }
        let redrive_topic = delivery::redrive_topic(&group);
        let (policy, apply_timeout) = (settings.policy.clone(), settings.limits.apply_timeout);
        let store = Store { pool, group, handler, policy, apply_timeout };
        health.not_ready("joining", "");
        let dead_letters = is_live.then(|| DeadLetters::new(&settings.kafka)).transpose()?;
        let shared =
            Arc::new(Shared { store, dead_letters, metrics, limits: settings.limits, redrive_topic });
        let mut returns = Returns::default();
        let outcome = loop {
            let (consumer, events) = group::join(&settings.kafka)?;
            let assignment = Assignment::new(consumer, events, shared.clone(), health.clone())?;
            match assignment.run(shutdown.clone()).await {
                Ok(()) => break Ok(()),
                Err(Ended::Failed(failure)) => break Err(failure),
                Err(Ended::Fenced(failure)) => {
                    if shutdown.is_requested() || !returns.one_more(Instant::now()) {
                        break Err(failure);
                    }
                    tracing::warn!("joining the group again: {}", failure.message);
                    health.not_ready("joining", failure.message);
                }
            }
        };
        if let Some(serving) = serving {
            serving.abort();
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_is_fenced_again_and_again_does_not_return() {
        let (mut returns, start) = (Returns::default(), Instant::now());
        assert!((0..3).all(|n| returns.one_more(start + Duration::from_secs(n))));
        assert!(!returns.one_more(start + Duration::from_secs(4)));
        assert!(returns.one_more(start + RETURNS_WINDOW));
        assert!(!returns.one_more(start + RETURNS_WINDOW));
    }
}

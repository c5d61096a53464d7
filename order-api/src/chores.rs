//! What is done again and again beside the requests. Every instance does all of it; what one is at, the others leave.

use std::{sync::Arc, time::Duration};

use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval_at},
};

use crate::{config::IdempotencyConfig, routes::Context, store::Store};

/// Everything the chores need.
#[derive(Debug)]
pub(crate) struct Chores {
    pub(crate) context: Arc<Context>,
    pub(crate) idempotency: IdempotencyConfig,
}

impl Chores {
    /// Starts them; they end when the set is dropped.
    pub(crate) fn start(self) -> JoinSet<()> {
        let Self { context, idempotency } = self;
        let mut chores = JoinSet::new();
        if let Some(tokens) = &context.tokens {
            chores.spawn(Arc::clone(tokens).watch());
        }
        let shared = Arc::clone(&context);
        chores.spawn(async move {
            let mut ticks = ticks(idempotency.clean_interval());
            loop {
                ticks.tick().await;
                forget_keys(&shared.store, idempotency.keep()).await;
            }
        });
        chores.spawn(async move {
            let mut ticks = ticks(context.messages.redeliver_interval());
            let mut known = None;
            loop {
                ticks.tick().await;
                let trouble = redeliver(&context).await.err();
                // Once, not once a second.
                if let Some(why) = trouble.as_ref().filter(|_| trouble != known) {
                    tracing::warn!(why, "cannot look after messages");
                }
                known = trouble;
            }
        });
        chores
    }
}

fn ticks(every: Duration) -> tokio::time::Interval {
    let mut ticks = interval_at(Instant::now() + every, every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Cleans up answers that have been kept for long enough.
async fn forget_keys(store: &Store, older_than: Duration) {
    loop {
        match store.forget_keys(older_than).await {
            Ok(0) => return,
            Ok(count) => tracing::debug!(count, "forgot answers to idempotent requests"),
            Err(why) => {
                tracing::warn!(why, "cannot clean up answers to idempotent requests");
                return;
            }
        }
    }
}

/// Puts messages whose time is up in the outbox again, or gives them up, and counts what there is then.
async fn redeliver(context: &Context) -> Result<(), String> {
    let Context { store, metrics, messages, .. } = context;
    // What is wrong with one of them does not keep the others, nor the numbers, from being looked at.
    let redelivered = loop {
        match store.redeliver_due(messages.max_attempts).await {
            Ok(0) => break Ok(()),
            Ok(count) => {
                metrics.messages_redelivered.inc_by(count);
                tracing::info!(count, "put messages in the outbox again that were not acknowledged in time");
            }
            Err(why) => break Err(why),
        }
    };
    let given_up = loop {
        match store.give_up_due(messages.max_attempts).await {
            Ok(0) => break Ok(()),
            Ok(count) => {
                metrics.messages_given_up.inc_by(count);
                tracing::warn!(count, "messages are undelivered: see GET /api/messages?state=undelivered");
            }
            Err(why) => break Err(why),
        }
    };
    let (waiting, undelivered) = store.count_messages().await?;
    metrics.messages_waiting.set(waiting);
    metrics.messages_undelivered.set(undelivered);
    redelivered.and(given_up)
}

//! What is done again and again beside the requests. Every instance does all of it; what one is at, the others leave.

use std::{sync::Arc, time::Duration};

use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval},
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
        chores.spawn(async move {
            let mut ticks = ticks(idempotency.clean_interval());
            loop {
                ticks.tick().await;
                forget_keys(&context.store, idempotency.keep()).await;
            }
        });
        chores
    }
}

fn ticks(every: Duration) -> tokio::time::Interval {
    let mut ticks = interval(every);
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

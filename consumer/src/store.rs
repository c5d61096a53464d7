//! One transaction for each batch: the inbox's rows, and what the handler writes.

use std::{collections::HashSet, time::Duration};

use sqlx::{Connection, PgConnection, PgPool};
use tokio::time::timeout;

use crate::{
    decide::{Fault, Poison, Reason},
    handler::Handler,
    inbox,
};

/// How long the answer to a liveness question may take.
const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// Applies batches of events, each in one transaction with its inbox rows.
pub(crate) struct Store<H> {
    pub(crate) pool: PgPool,
    pub(crate) group: String,
    pub(crate) handler: H,
    /// A batch that takes longer is given up.
    pub(crate) apply_timeout: Duration,
}

impl<H: Handler> Store<H> {
    /// Applies those of `events` that the group has not applied yet, all or none, and gives back their indices.
    pub(crate) async fn apply(&self, events: &[H::Event]) -> Result<Vec<usize>, Fault> {
        let mut connection = self.pool.acquire().await?;
        if let Ok(applied) = timeout(self.apply_timeout, self.apply_on(&mut connection, events)).await {
            return applied;
        }
        // Somewhere in the middle of the protocol: such a connection cannot go back to the others.
        connection.close_on_drop();
        Err(Fault::database(format!("no answer within {} s", self.apply_timeout.as_secs())))
    }

    async fn apply_on(
        &self,
        connection: &mut PgConnection,
        events: &[H::Event],
    ) -> Result<Vec<usize>, Fault> {
        let mut transaction = connection.begin().await?;
        let fresh = inbox::claim(&mut transaction, &self.group, events).await?;
        if !fresh.is_empty() {
            let events: Vec<&H::Event> = fresh.iter().map(|i| &events[*i]).collect();
            self.handler.apply(&mut transaction, &events).await?;
        }
        if fresh.len() < events.len() {
            let fresh: HashSet<usize> = fresh.iter().copied().collect();
            let repeated = events.iter().enumerate().filter(|(i, _)| !fresh.contains(i));
            let repeated: Vec<&H::Event> = repeated.map(|(_, event)| event).collect();
            self.handler.repeated(&mut transaction, &repeated).await?;
        }
        transaction.commit().await?;
        Ok(fresh)
    }

    /// Whether the database answers; if not, why.
    pub(crate) async fn ping(&self) -> Result<(), String> {
        let query = sqlx::query("SELECT 1").execute(&self.pool);
        match timeout(PING_TIMEOUT, query).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(e)) => Err(e.to_string()),
            Err(_) => Err(format!("no answer within {} s", PING_TIMEOUT.as_secs())),
        }
    }
}

impl From<sqlx::Error> for Fault {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(e) => {
                Self::from_sqlstate(e.code().as_deref().unwrap_or("XX000"), e.message())
            }
            sqlx::Error::Encode(e) => Self::Record(Poison::new(Reason::DatabaseRefused, e.to_string())),
            other => Self::database(other),
        }
    }
}

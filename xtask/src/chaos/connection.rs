//! Connections that give up in time: what is at the other end is killed on purpose.

use std::time::Duration;

use sqlx::{Connection, PgConnection};

use crate::failure::{Explain, Result};

/// How long a server may take to let us in.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Connects.
pub(crate) async fn open(url: &str) -> Result<PgConnection> {
    within(CONNECT_LIMIT, PgConnection::connect(url)).await.explain(|| "connect to Postgres".to_owned())
}

/// Waits for an answer no longer than that.
pub(crate) async fn within<T>(
    limit: Duration,
    asking: impl Future<Output = sqlx::Result<T>>,
) -> sqlx::Result<T> {
    tokio::time::timeout(limit, asking).await.unwrap_or_else(|_| {
        let why = format!("no answer in {} s", limit.as_secs());
        Err(sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, why)))
    })
}

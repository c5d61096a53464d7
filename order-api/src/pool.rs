//! Connections to the database: bounded in number and in the time to get one. Not the library's pool, because
//! that pings every connection when it is given back: a second round trip for each statement, and one that
//! waits without bound when the server is gone without a word.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};

/// Makes connections when they are needed and keeps them.
#[derive(Debug)]
pub(crate) struct Pool {
    options: PgConnectOptions,
    /// The last one given back is the next one used: it is the likeliest to be alive and warm.
    idle: Mutex<Vec<PgConnection>>,
    /// One for each connection there may be in use or in the making.
    permits: Semaphore,
    max_connections: u32,
    acquire_timeout: Duration,
}

/// A connection in use. It is closed when it is dropped, unless it was given back: one whose statement failed
/// or was cut short (the client went away, the time was up) may be in any state.
#[derive(Debug)]
pub(crate) struct Lease<'a> {
    pub(crate) connection: PgConnection,
    pool: &'a Pool,
    _permit: SemaphorePermit<'a>,
}

impl Pool {
    pub(crate) fn new(options: PgConnectOptions, max_connections: u32, acquire_timeout: Duration) -> Self {
        Self {
            options,
            idle: Mutex::default(),
            permits: Semaphore::new(max_connections as usize),
            max_connections,
            acquire_timeout,
        }
    }

    /// A connection, which may have died since it was last used.
    ///
    /// # Errors
    /// Why there is none: the server refuses, or the time was up.
    pub(crate) async fn acquire(&self) -> Result<Lease<'_>, sqlx::Error> {
        let acquiring = async {
            let permit = self.permits.acquire().await.map_err(|_| sqlx::Error::PoolClosed)?;
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let connection = match idle {
                Some(connection) => connection,
                None => PgConnection::connect_with(&self.options).await?,
            };
            Ok(Lease { connection, pool: self, _permit: permit })
        };
        timeout(self.acquire_timeout, acquiring).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
    }

    pub(crate) fn max_connections(&self) -> u32 {
        self.max_connections
    }

    /// How many wait to be used.
    pub(crate) fn idle(&self) -> usize {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// How many are in use or in the making.
    pub(crate) fn busy(&self) -> usize {
        (self.max_connections as usize).saturating_sub(self.permits.available_permits())
    }
}

impl Lease<'_> {
    /// Keeps the connection for the next one who needs it.
    pub(crate) fn give_back(self) {
        self.pool.idle.lock().unwrap_or_else(PoisonError::into_inner).push(self.connection);
    }
}

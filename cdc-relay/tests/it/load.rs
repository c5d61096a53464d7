//! Rows that are written while a test does something else.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use sqlx::{Connection as _, Executor as _, PgConnection};

use crate::database::{Database, counted};

/// Rows at a time, each its own transaction.
const ROWS: usize = 50;
/// Between them, so that the servers of all tests have time for others.
const PAUSE: Duration = Duration::from_millis(25);

/// A writer on a connection of its own.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    writer: Option<JoinHandle<usize>>,
}

impl Load {
    /// Inserts rows as [`Database::insert`] does, counted from `first`, until it is [stopped](Self::stop).
    pub(crate) fn start(database: &Database, kind: &str, first: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, options, kind) = (Arc::clone(&stop), database.options.clone(), kind.to_owned());
        let write = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut connection = PgConnection::connect_with(&options).await.unwrap();
                let mut next = first;
                while !stopped.load(Ordering::Relaxed) {
                    let rows = sqlx::AssertSqlSafe(counted(&kind, next, ROWS));
                    connection.execute(rows).await.unwrap();
                    next += ROWS;
                    tokio::time::sleep(PAUSE).await;
                }
                next
            })
        };
        Self { stop, writer: Some(std::thread::spawn(write)) }
    }

    /// The number that would come next.
    pub(crate) fn stop(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.writer.take().unwrap().join().unwrap()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

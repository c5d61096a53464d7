//! A publisher that runs on a slot of its own, with rows that come at a rate and somebody who sees them arrive.

use std::{
    ops::RangeInclusive,
    time::{Duration, Instant, SystemTime},
};

use sqlx::{AssertSqlSafe, PgConnection};
use tokio::task::JoinHandle;

use super::{
    arm::{copy_slot, drop_slot},
    contents::{Contents, Loss},
    observer::Observer,
    publisher::{END_LIMIT, Publisher, Ready, Running},
    servers::Servers,
    workload::{self, Shape},
};
use crate::{
    failure::{Explain, Failure, Result},
    topics,
};

const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// How long nothing must come until all that comes twice is taken to have come.
const QUIET: Duration = Duration::from_millis(300);
/// So long before its first row is due, a load is under way.
const HEAD_START: Duration = Duration::from_millis(200);

/// One publisher under way. Rows are numbered from 0 on, over all loads.
pub(super) struct Trial<'a> {
    pub(super) servers: &'a Servers,
    pub(super) connection: PgConnection,
    pub(super) slot: String,
    ready: Ready,
    pub(super) running: Running,
    pub(super) observer: Observer,
    /// From its start until its first row was seen.
    pub(super) first_start: Duration,
    /// The number of the next row.
    next: u64,
}

/// Rows that are written at a rate, and when each is due.
pub(super) struct Load {
    start: Instant,
    rate: u32,
    pub(super) from: u64,
    /// The last row.
    pub(super) to: u64,
    /// Tells when all was written.
    writing: JoinHandle<Result<Instant>>,
}

impl Load {
    /// When row `number` is to be committed.
    pub(super) fn due(&self, number: u64) -> Instant {
        self.start + Duration::from_secs(number - self.from) / self.rate
    }

    /// Waits until all rows are written; how much later than the last one was due.
    pub(super) async fn written(&mut self) -> Result<Duration> {
        let at = (&mut self.writing).await.explain(|| "write the rows".to_owned())??;
        Ok(at.saturating_duration_since(self.due(self.to)))
    }
}

impl<'a> Trial<'a> {
    /// Starts it, and waits until it publishes.
    pub(super) async fn start(servers: &'a Servers, publisher: &Publisher, number: usize) -> Result<Self> {
        let mut connection = servers.connect().await?;
        workload::prepare(&mut connection, Shape::of(1, 1)).await?;
        let slot = copy_slot(&mut connection, number).await?;
        let mut ready = publisher.init(servers, &slot, number).await?;
        let observer = Observer::start(Contents::of(&servers.kafka, &ready.topic)?);
        workload::insert(&mut connection, 0).await?;
        let since = Instant::now();
        let running = ready.run()?;
        let first_start = Duration::ZERO;
        let mut trial = Self { servers, connection, slot, ready, running, observer, first_start, next: 1 };
        trial.until_seen(1).await?;
        trial.first_start = since.elapsed();
        Ok(trial)
    }

    /// Begins to write so many rows.
    pub(super) async fn load(&mut self, rate: u32, rows: u64) -> Result<Load> {
        let mut connection = self.servers.connect().await?;
        let (from, to) = (self.next, self.next + rows - 1);
        self.next = to + 1;
        let (start, at) = (Instant::now() + HEAD_START, SystemTime::now() + HEAD_START);
        let at = at.duration_since(SystemTime::UNIX_EPOCH).explain(|| "look at the clock".to_owned())?;
        let sql = workload::paced(at.as_micros(), rate, from, to);
        let write = async move {
            let written = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await;
            written.map(|_| Instant::now()).explain(|| "write rows at a rate".to_owned())
        };
        Ok(Load { start, rate, from, to, writing: tokio::spawn(write) })
    }

    /// Waits until the consumer has seen so many rows.
    ///
    /// # Errors
    /// The publisher has ended, or no row has come for [`END_LIMIT`].
    pub(super) async fn until_seen(&mut self, rows: u64) -> Result<()> {
        let (mut before, mut since) = (0, Instant::now());
        loop {
            let count = self.observer.look();
            if count >= rows {
                return Ok(());
            }
            self.running.look()?;
            self.observer.check().await?;
            if count > before {
                (before, since) = (count, Instant::now());
            }
            if since.elapsed() > END_LIMIT {
                return Err(self.running.failed(format!("a consumer sees {count} rows of {rows}")));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// What rows of a load took from when they were due until they were seen, in microseconds.
    pub(super) fn took(&self, load: &Load, rows: RangeInclusive<u64>) -> Vec<u32> {
        let took = rows.filter_map(|row| {
            let seen = self.observer.first(row)?;
            let took = seen.saturating_duration_since(load.due(row));
            Some(u32::try_from(took.as_micros()).unwrap_or(u32::MAX))
        });
        took.collect()
    }

    /// Kills it and starts it again. When it was killed.
    pub(super) async fn kill(&mut self) -> Result<Instant> {
        self.running.child.kill().await.explain(|| "kill a publisher".to_owned())?;
        let at = Instant::now();
        self.running = self.ready.run()?;
        Ok(at)
    }

    /// Ends it, and says what is wrong with what it published.
    pub(super) async fn end(mut self) -> Result<Loss> {
        self.running.end().await?;
        let mut before = u64::MAX;
        while before != self.observer.records() {
            before = self.observer.records();
            tokio::time::sleep(QUIET).await;
            self.observer.look();
        }
        let loss = self.observer.loss(self.next - 1);
        self.observer.end().await?;
        drop_slot(&mut self.connection, &self.slot).await?;
        workload::forget(self.servers).await?;
        topics::delete(&self.servers.kafka, &self.ready.topic).await?;
        Ok(loss)
    }
}

/// What must not be, of an arm's rows.
pub(super) fn failure(arm: &str, loss: Loss) -> Option<String> {
    (loss.lost() > 0).then(|| {
        let Loss { missing, out_of_order, foreign, .. } = loss;
        format!("{arm}: {missing} rows are missing, {out_of_order} out of order, {foreign} nobody's")
    })
}

/// Says that nothing was measured, of whatever it is.
pub(super) fn nothing() -> Failure {
    Failure::new("nothing was measured")
}

//! How late whoever reads committed records sees a row: at a steady rate that waits for nobody.
//!
//! Each row has its time, however late the one before it was; what it took is counted from that time. So a stop of
//! anything counts against all rows that it holds up.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rdkafka::{Message, error::KafkaError};
use serde::{Deserialize, Serialize};

use super::{
    arm::{copy_slot, drop_slot},
    contents::Contents,
    numbers::percentile,
    relay::{END_LIMIT, Relay, Running},
    servers::Servers,
    workload::{self, Shape},
};
use crate::failure::{Explain, Failure, Result};

/// Rows per second.
pub(super) const RATE: u32 = 500;
/// Rows before those that count: a relay that has just started is slow.
const WARM_UP_ROWS: u64 = 1_000;
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// How long the consumer waits at most before it looks whether it is still wanted.
const POLL_LIMIT: Duration = Duration::from_millis(100);

/// Times from when a row was due to be committed until a consumer had it, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Round {
    pub(super) arm: &'static str,
    pub(super) count: usize,
    pub(super) p50_us: u32,
    pub(super) p95_us: u32,
    pub(super) p99_us: u32,
    pub(super) max_us: u32,
}

/// The part of a payload that says which row it is of.
#[derive(Debug, Deserialize)]
struct Payload {
    n: usize,
}

/// Runs one round of `shape.rows` rows that count.
pub(super) async fn round(
    servers: &Servers,
    (arm, relay): (&'static str, &Relay),
    shape: Shape,
    number: usize,
) -> Result<Round> {
    let mut connection = servers.connect().await?;
    workload::prepare(&mut connection, shape).await?;
    let slot = copy_slot(&mut connection, number).await?;
    let ready = relay.init(servers, &slot, number).await?;
    let contents = Contents::of(&servers.kafka, &ready.topic)?;
    let mut running = ready.run()?;
    let last = WARM_UP_ROWS + shape.rows;
    let count = Arc::new(AtomicU64::new(0));
    let seen = {
        let count = Arc::clone(&count);
        tokio::task::spawn_blocking(move || watch(&contents, last, &count))
    };
    // Row 0 tells when all of them are there.
    workload::insert(&mut connection, 0).await?;
    until(&mut running, &count, 1).await?;
    let start = Instant::now();
    for number in 1..=last {
        tokio::time::sleep_until(due(start, number).into()).await;
        workload::insert(&mut connection, number).await?;
    }
    until(&mut running, &count, last + 1).await?;
    let seen = seen.await.explain(|| "read the rows".to_owned())??;
    running.end().await?;
    drop_slot(&mut connection, &slot).await?;
    workload::forget(servers).await?;
    let counted = (WARM_UP_ROWS + 1..=last).zip(seen.into_iter().skip(1 + usize_of(WARM_UP_ROWS)));
    let took = counted.filter_map(|(number, seen)| Some(seen?.saturating_duration_since(due(start, number))));
    Ok(Round::of(arm, took))
}

/// When a row is to be committed.
fn due(start: Instant, number: u64) -> Instant {
    start + Duration::from_secs(number) / RATE
}

fn usize_of(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// Waits until the consumer has seen so many rows.
///
/// # Errors
/// The relay has ended, or no row has come for [`END_LIMIT`].
async fn until(running: &mut Running, count: &AtomicU64, rows: u64) -> Result<()> {
    let (mut before, mut since) = (0, Instant::now());
    loop {
        let count = count.load(Ordering::Relaxed);
        if count >= rows {
            return Ok(());
        }
        running.look()?;
        if count > before {
            (before, since) = (count, Instant::now());
        }
        if since.elapsed() > END_LIMIT {
            return Err(running.failed(format!("a consumer sees {count} rows of {rows}")));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// When each of the rows from 0 to `last` was first seen. Ends once all were, or none comes for twice [`END_LIMIT`].
fn watch(contents: &Contents, last: u64, count: &AtomicU64) -> Result<Vec<Option<Instant>>> {
    let reader = contents.read_committed()?;
    let mut seen = vec![None; usize_of(last) + 1];
    let mut since = Instant::now();
    while count.load(Ordering::Relaxed) <= last && since.elapsed() < 2 * END_LIMIT {
        let record = match reader.poll(POLL_LIMIT) {
            None | Some(Err(KafkaError::PartitionEOF(_))) => continue,
            Some(record) => record.explain(|| "read the rows".to_owned())?,
        };
        since = Instant::now();
        let payload: Payload = serde_json::from_slice(record.payload().unwrap_or_default())
            .explain(|| "read a row's payload".to_owned())?;
        let Some(place) = seen.get_mut(payload.n) else {
            return Err(Failure::new(format!("nobody wrote row {}", payload.n)));
        };
        if place.is_none() {
            *place = Some(since);
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(seen)
}

impl Round {
    fn of(arm: &'static str, took: impl Iterator<Item = Duration>) -> Self {
        let mut took: Vec<u32> = took.map(|it| u32::try_from(it.as_micros()).unwrap_or(u32::MAX)).collect();
        took.sort_unstable();
        Self {
            arm,
            count: took.len(),
            p50_us: percentile(&took, 50),
            p95_us: percentile(&took, 95),
            p99_us: percentile(&took, 99),
            max_us: took.last().copied().unwrap_or(0),
        }
    }

    /// For a person.
    pub(super) fn line(&self, round: u32) -> String {
        let ms = |us: u32| format!("{:.1}", f64::from(us) / 1e3);
        format!(
            "steady, round {round}, {}, {} rows at {RATE} a second: due to seen by a consumer p50 {} ms, p95 {} ms, p99 {} \
             ms, at most {} ms",
            self.arm,
            self.count,
            ms(self.p50_us),
            ms(self.p95_us),
            ms(self.p99_us),
            ms(self.max_us)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_due_at_the_rate_and_what_they_took_is_sorted() {
        let start = Instant::now();
        assert_eq!(due(start, u64::from(RATE)), start + Duration::from_secs(1));
        let round = Round::of("relay", (1..=100).rev().map(Duration::from_millis));
        assert_eq!((round.count, round.p95_us, round.max_us), (100, 96_000, 100_000));
    }
}

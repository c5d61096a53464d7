//! One consumer outside of everything, the same for every publisher: when each row was first seen, and what is wrong.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, channel},
    },
    time::{Duration, Instant},
};

use rdkafka::{Message, error::KafkaError};
use serde::Deserialize;
use tokio::task::JoinHandle;

use super::contents::{Contents, Loss};
use crate::failure::{Explain, Failure, Result};

/// How long the consumer waits at most before it looks whether it is still wanted.
const POLL_LIMIT: Duration = Duration::from_millis(50);

/// The part of a payload that says which row it is of.
#[derive(Debug, Deserialize)]
struct Payload {
    n: u64,
}

/// Reads committed records from the beginning of a topic, on a thread of its own.
pub(super) struct Observer {
    /// Row, partition, and when.
    records: Receiver<(u64, i32, Instant)>,
    thread: JoinHandle<Result<()>>,
    stop: Arc<AtomicBool>,
    sightings: Sightings,
}

/// The rows that were seen.
#[derive(Debug, Default)]
struct Sightings {
    first: HashMap<u64, Instant>,
    /// The last row of each partition.
    last: HashMap<i32, u64>,
    duplicates: u64,
    out_of_order: u64,
}

impl Sightings {
    fn take(&mut self, row: u64, partition: i32, at: Instant) {
        if self.first.contains_key(&row) {
            self.duplicates += 1;
            return;
        }
        self.first.insert(row, at);
        let last = self.last.entry(partition).or_default();
        self.out_of_order += u64::from(*last > row);
        *last = row.max(*last);
    }
}

impl Observer {
    pub(super) fn start(contents: Contents) -> Self {
        let (seen, records) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let read = move || -> Result<()> {
            let reader = contents.read_committed()?;
            while !stopped.load(Ordering::Relaxed) {
                let record = match reader.poll(POLL_LIMIT) {
                    None | Some(Err(KafkaError::PartitionEOF(_))) => continue,
                    Some(record) => record.explain(|| "read the rows".to_owned())?,
                };
                let at = Instant::now();
                let payload: Payload = serde_json::from_slice(record.payload().unwrap_or_default())
                    .explain(|| "read a row's payload".to_owned())?;
                if seen.send((payload.n, record.partition(), at)).is_err() {
                    break;
                }
            }
            Ok(())
        };
        Self { records, thread: tokio::task::spawn_blocking(read), stop, sightings: Sightings::default() }
    }

    /// Takes note of what has come; how many rows were seen so far.
    pub(super) fn look(&mut self) -> u64 {
        for (row, partition, at) in self.records.try_iter() {
            self.sightings.take(row, partition, at);
        }
        self.sightings.first.len() as u64
    }

    /// How many records were seen so far, those that came twice included.
    pub(super) fn records(&self) -> u64 {
        self.sightings.first.len() as u64 + self.sightings.duplicates
    }

    /// # Errors
    /// It has ended: why.
    pub(super) async fn check(&mut self) -> Result<()> {
        if self.thread.is_finished() {
            (&mut self.thread).await.explain(|| "read the rows".to_owned())??;
            return Err(Failure::new("the consumer that looks on has ended"));
        }
        Ok(())
    }

    /// When a row was first seen.
    pub(super) fn first(&self, row: u64) -> Option<Instant> {
        self.sightings.first.get(&row).copied()
    }

    /// What is wrong with rows 0 to `last`.
    pub(super) fn loss(&self, last: u64) -> Loss {
        let Sightings { first, duplicates, out_of_order, .. } = &self.sightings;
        Loss {
            missing: (0..=last).filter(|row| !first.contains_key(row)).count() as u64,
            duplicates: *duplicates,
            out_of_order: *out_of_order,
            foreign: first.keys().filter(|row| **row > last).count() as u64,
        }
    }

    /// Ends the thread.
    pub(super) async fn end(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.await.explain(|| "read the rows".to_owned())?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_counts_once_and_behind_the_one_before_it() {
        let (mut sightings, at) = (Sightings::default(), Instant::now());
        for (row, partition) in [(0, 0), (1, 1), (1, 1), (3, 0), (2, 0), (0, 0)] {
            sightings.take(row, partition, at);
        }
        assert_eq!((sightings.first.len(), sightings.duplicates, sightings.out_of_order), (4, 2, 1));
    }
}

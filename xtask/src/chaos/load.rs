//! What is written while servers fail: orders through the API, and rows straight into the outbox.
//!
//! A writer whose server is away tries again a little later. Whether a transaction was committed whose connection broke
//! is not known here, and nobody asks: what was committed, the checker's slot says.

mod gate;
mod orders;
mod plan;
mod rows;

use std::{sync::Arc, thread::JoinHandle};

use self::gate::Gate;
pub(super) use self::plan::OUTBOX_PREFIX;
use crate::{
    chaos::targets::Targets,
    failure::{Explain, Failure, Result},
};

/// Clients of the API.
const ORDER_WRITERS: u64 = 2;
/// Connections that write rows.
const ROW_WRITERS: u64 = 3;

/// Writers that run until they are stopped.
#[derive(Debug)]
pub(crate) struct Load {
    gate: Arc<Gate>,
    writers: Vec<JoinHandle<LoadReport>>,
}

/// What was written, as far as was answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct LoadReport {
    /// Requests that the API carried out.
    pub requests: u64,
    /// Requests that it refused, for instance because the order has moved on.
    pub refused: u64,
    /// Times that a request was sent again.
    pub repeated: u64,
    /// Transactions that were committed.
    pub committed: u64,
    /// Transactions that were rolled back on purpose.
    pub rolled_back: u64,
    /// Transactions and connections that broke.
    pub broken: u64,
}

impl Load {
    /// Starts the writers; what they write follows from the seed.
    pub(crate) fn start(targets: &Targets, seed: u64) -> Result<Self> {
        let mut load = Self { gate: Arc::default(), writers: Vec::new() };
        let mut seeds = fastrand::Rng::with_seed(seed);
        for number in 0..ORDER_WRITERS {
            let (url, random) = (targets.order_api_url.clone(), seeds.fork());
            load.spawn(format!("orders-{number}"), move |gate| orders::write(&url, random, gate))?;
        }
        for number in 0..ROW_WRITERS {
            let (url, random) = (targets.postgres_url.clone(), seeds.fork());
            let aggregate_type = targets.aggregate_type.clone();
            load.spawn(format!("rows-{number}"), move |gate| {
                rows::write(&url, &aggregate_type, random, gate)
            })?;
        }
        Ok(load)
    }

    fn spawn(
        &mut self,
        name: String,
        write: impl FnOnce(&Gate) -> LoadReport + Send + 'static,
    ) -> Result<()> {
        let gate = self.gate.clone();
        let thread = std::thread::Builder::new().name(name).spawn(move || write(&gate));
        self.writers.push(thread.explain(|| "start a writer".to_owned())?);
        Ok(())
    }

    /// Stops the writers and waits for them; what one is at is given up or ends within some seconds.
    pub(crate) async fn stop(mut self) -> Result<LoadReport> {
        self.gate.stop();
        let writers = std::mem::take(&mut self.writers);
        let ending = tokio::task::spawn_blocking(move || {
            let mut all = LoadReport::default();
            for writer in writers {
                all.add(writer.join().map_err(|_| Failure::new("a writer of the load panicked"))?);
            }
            Ok(all)
        });
        ending.await.explain(|| "wait for the writers".to_owned())?
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.gate.stop();
    }
}

impl LoadReport {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.refused += other.refused;
        self.repeated += other.repeated;
        self.committed += other.committed;
        self.rolled_back += other.rolled_back;
        self.broken += other.broken;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_load_without_servers_goes_on_trying_and_stops_when_told() {
        let nobody = "127.0.0.1:1";
        let targets = Targets {
            postgres_url: format!("postgres://nobody@{nobody}/none"),
            order_api_url: format!("http://{nobody}"),
            consumers_url: String::new(),
            aggregate_type: String::new(),
            brokers: String::new(),
            topics: Vec::new(),
        };
        let load = Load::start(&targets, 7).unwrap();
        let report = load.stop().await.unwrap();
        assert_eq!((report.requests, report.committed), (0, 0), "{report:?}");
    }
}

//! `cargo xtask bench`: what the relay, the API and the consumer cost and how fast they are, on servers of their
//! own.

mod api;
mod arm;
mod consumer;
mod contents;
mod drain;
mod host;
mod idle;
mod load;
mod numbers;
mod relay;
mod report;
mod servers;
mod steady;
mod usage;
mod workload;

pub(crate) use self::workload::Workload;
use crate::{cli::Bench, failure::Result};

/// Runs one of the benches.
pub(crate) async fn bench(command: &Bench) -> Result<()> {
    match command {
        Bench::Drain(args) => drain::drain(args).await,
        Bench::Api(args) => api::api(args).await,
        Bench::Consumer(args) => consumer::consumer(args).await,
    }
}

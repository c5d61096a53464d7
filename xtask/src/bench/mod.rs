//! `cargo xtask bench`: what the relay costs and how fast it is, on servers of its own.

mod arm;
mod drain;
mod host;
mod idle;
mod numbers;
mod report;
mod servers;
mod usage;
mod workload;

pub(crate) use self::workload::Workload;
use crate::{cli::Bench, failure::Result};

/// Runs one of the benches.
pub(crate) async fn bench(command: &Bench) -> Result<()> {
    match command {
        Bench::Drain(args) => drain::drain(args).await,
    }
}

//! `cdc-relay`: streams the inserts of an outbox table from a Postgres logical replication slot to Kafka.

mod admin;
mod ahead;
mod audit;
mod backfill;
mod check;
mod cli;
mod clock;
mod config;
mod creation;
mod desk;
mod diversions;
mod dlq;
mod error;
mod faults;
mod foreign;
mod kafka;
mod ledger;
mod monitor;
mod owned_record;
mod pipeline;
mod placing;
mod position;
mod publication;
mod replay;
mod replication;
mod retention;
mod rows;
mod scribe;
mod sessions;
mod setup;
mod shared;
mod slot;
mod snapshot;
mod standby;
mod start;
mod status;
mod tail;
mod wait;
mod wal;

use std::process::ExitCode;

/// librdkafka's allocator too: it allocates each record on the pipeline's thread and frees it on another, which
/// costs most with glibc's (`cargo xtask bench drain --against` compares two builds).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    cli::main()
}

//! The real binary on a real Postgres and a real Kafka, whose addresses come from `cargo xtask test`. Each test
//! has a database, topics and a group of its own.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking; clippy knows test functions, not their helpers"
)]

mod acks;
mod delivery;
mod dlq;
mod group;
mod messages;
mod notify;
mod order_view;
mod outage;
mod parking;
mod pause;
mod poison;
mod programs;
mod rebuild;
mod records;
mod redrive;
mod release;
mod stage;
mod start;
mod status;

//! The whole system under real Postgres and real Kafka: started by `cargo xtask up`, driven over HTTP, looked at
//! in Postgres and Kafka. Run by `cargo xtask test`, which builds what is started here.

// A test that cannot go on fails where it stands.
#![allow(clippy::unwrap_used)]

mod chaos;
mod compose;
mod flow;
mod group;
mod kills;
mod messages;
mod outage;
mod requests;
mod stack;
mod teeth;
mod views;

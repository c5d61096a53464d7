//! The relay on real servers: `cargo xtask test` gives each test its Postgres and its Kafka.

// A test that cannot go on fails where it stands.
#![allow(clippy::unwrap_used)]

mod audit;
mod backfill;
mod begun;
mod certificates;
mod check;
mod checkpoints;
mod commands;
mod database;
mod delivery;
mod dlq;
mod doctor;
mod exactly_once;
mod extremes;
mod failover;
mod failures;
mod faults;
mod hosts;
mod idle;
mod init;
mod kafka_admin;
mod kafka_secure;
mod load;
mod log;
mod metrics;
mod network;
mod open_transactions;
mod pair;
mod pipe;
mod poison;
mod position;
mod privileges;
mod probe;
mod relay;
mod replay;
mod restore;
mod retention;
mod shapes;
mod shapes_refused;
mod shutdown;
mod stack;
mod standby;
mod status;
mod switched;
mod tail;
mod tls;
mod topics;

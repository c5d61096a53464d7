//! The order API on a real Postgres: each test has a database of its own, the service on a free port, and
//! talks HTTP to it as a client does. Run with `cargo xtask test`, which brings the servers.

#![allow(clippy::unwrap_used, reason = "clippy spares test functions only, and these are their helpers")]

mod access_log;
mod commands;
mod compatibility;
mod contracts;
mod create;
mod docs;
mod documented;
mod door;
mod fleet;
mod gate;
mod history;
mod idempotency;
mod limits;
mod messages;
mod outage;
mod process;
mod schema;
mod stage;
mod tokens;

//! The order API: takes orders over HTTP and writes each one, its event and its outbox row in one transaction.
//! It never talks to Kafka; `cdc-relay` publishes what the outbox holds.

pub mod app;
pub mod auth;
mod chores;
pub mod config;
pub mod domain;
mod error;
mod member;
mod metrics;
mod pool;
mod readiness;
mod routes;
mod store;

pub use routes::document;

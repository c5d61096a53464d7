//! What every service of this project does alike, and a user therefore sees alike: configuration, secrets,
//! logs, HTTP, health, metrics, problem+json, who may administer, the
//! heartbeats, tables on a terminal, and the drain on SIGTERM. No domain types live here.

pub mod access;
pub mod config;
pub mod exit;
pub mod fleet;
pub mod health;
pub mod http;
pub mod logs;
pub mod metrics;
pub mod out;
pub mod problem;
pub mod shutdown;
pub mod table;

pub use config::Secret;
pub use exit::Failure;
pub use health::Health;
pub use problem::Problem;

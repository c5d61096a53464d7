//! The relay's decisions, without I/O: what the bytes of a replication stream mean, which record each outbox
//! row becomes, and which LSN may be confirmed. Time comes in as an argument and work goes out as a value, so a
//! test feeds bytes and asserts what comes out.

pub mod checkpoint;
mod deliveries;
mod disposal;
mod draft;
mod headers;
pub mod lsn;
mod message;
pub mod outbox;
pub mod parking;
pub mod pgoutput;
pub mod poison;
pub mod progress;
pub mod record;
pub mod redrive;
pub mod relay;
pub mod route;
mod shape;
pub mod source;
mod timestamp;
pub mod transactions;

pub use checkpoint::Checkpoint;
pub use deliveries::Delivery;
pub use lsn::Lsn;
pub use record::Outgoing;
pub use relay::{Relay, StatusUpdate};

#[cfg(test)]
mod invariants;
#[cfg(test)]
mod sim;

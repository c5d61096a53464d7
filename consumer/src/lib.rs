//! Kafka consumers that apply each event once: an inbox, a version guard, retries, dead letters with redrive, and the
//! operator's commands. A handler says what it reads out of a record and writes its rows; the rest is here.
//!
//! A program of its own is a handler and one line: `fn main() -> ExitCode { consumer::main(vec![Offer::new(…)]) }`.
//! `HANDLERS.md` takes a reader through one.

mod acknowledgement;
mod admin;
mod app;
mod assignment;
mod cli;
mod cluster;
mod config;
mod database;
mod decide;
mod delivery;
mod dlq;
mod event;
mod fields;
mod gate;
mod group;
mod guard;
mod handler;
pub mod handlers;
mod inbox;
mod ledger;
mod metrics;
mod missing;
mod noise;
mod offer;
pub mod outbox;
mod parking;
mod partition;
mod rebuild;
mod record;
mod redrive;
mod run;
mod settle;
mod store;
mod tls;

pub use service::Failure;

pub use crate::{
    cli::main,
    decide::{Cause, Fault, Poison, Reason},
    handler::{Handler, Tables},
    offer::{Offer, Setup},
    record::{Event, Header, Record},
};

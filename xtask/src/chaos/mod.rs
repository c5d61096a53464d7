//! `cargo xtask chaos`: a load, and a checker that says what was lost, repeated or out of order.
#![allow(dead_code, reason = "what drives them follows")]

mod checker;
mod connection;
mod fold;
mod load;
mod targets;
mod verdict;

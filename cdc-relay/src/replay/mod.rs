//! A replay: records are published once more, because somebody asks for it. They are found in the retained outbox by id,
//! aggregate or time, or in the topics by the LSN that their own headers tell.
//!
//! A replayed record is what it was the first time, with a header more: `replayed`, the time of the replay (RFC 3339). One
//! that is made of a row has no headers `lsn` and `seq`, because a row does not tell where in the log it was committed; and
//! where no column is its timestamp, that is the time of the replay. What the stream is still to publish is not overtaken,
//! so the first occurrences of a key stay in commit order: a row that the slot has not confirmed is waited for, one of a parked
//! aggregate is left to a redrive.
//!
//! The active relay carries it out, on its one producer, between the transactions of the stream, which goes on meanwhile.

pub(crate) mod api;
pub(crate) mod finder;
pub(crate) mod publish;
mod reader;
pub(crate) mod selection;

/// The header of a replayed record.
pub(crate) const REPLAYED: &str = "replayed";

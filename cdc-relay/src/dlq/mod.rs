//! Dead letters: what is in the dead-letter topic, and how the active relay redrives it.
//!
//! A letter has the record's key, value and headers as they were to be, and then these:
//!
//! | header | value |
//! |---|---|
//! | `dlq.source` | whose it is: system identifier and slot, `SYSTEM/SLOT`. The record's own headers end before it |
//! | `dlq.reason`, `dlq.error` | the kind of poison, and what it was for a person |
//! | `dlq.table` | the outbox table; none where it was a logical message |
//! | `dlq.topic`, `dlq.partition` | where it was to go; no partition where the key chooses it |
//! | `dlq.lsn`, `dlq.seq` | the commit's LSN and the change's ordinal |
//! | `dlq.at` | when it was written, RFC 3339 |
//! | `dlq.timestamp` | the record's timestamp, in milliseconds since the Unix epoch |
//! | `dlq.length`, `dlq.sha256` | only where the value is cut: of the whole value |
//!
//! What became of a letter is a marker behind it in the same partition: a record without key and value, with
//! `dlq.source`, `dlq.at` and `dlq.redriven` or `dlq.discarded`, whose value is the letter's `PARTITION/OFFSET`.

pub(crate) mod api;
pub(crate) mod archive;
pub(crate) mod letter;
mod reader;
pub(crate) mod redrive;

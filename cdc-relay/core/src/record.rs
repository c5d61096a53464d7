//! The record that a row becomes.

use crate::{Lsn, progress::Ticket};

/// Kafka's and librdkafka's cost of a record beside its own bytes, in bytes: a round figure for the credit.
const OVERHEAD_BYTES: usize = 256;

/// What a row is known by: the LSN of its transaction's commit, and the ordinal of its change, counting from 0
/// every change and message that pgoutput sends inside the transaction. Several changes can share an LSN, so an
/// LSN of a change would not do. A message outside any transaction has its own LSN and 0: no commit shares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Identity {
    pub commit_lsn: Lsn,
    pub seq: u64,
}

/// A row as a record for Kafka, borrowed from the stream and from scratch.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    pub identity: Identity,
    /// The table that the row is of, `schema.name`, for an operator; empty where it is a message.
    pub table: &'a str,
    /// The row's id, for an operator; empty where it cannot be told.
    pub row_id: &'a str,
    pub aggregate_type: &'a str,
    /// Empty where it cannot be told.
    pub aggregate_id: &'a str,
    pub topic: &'a str,
    pub key: Option<&'a [u8]>,
    /// None is a tombstone.
    pub value: Option<&'a [u8]>,
    /// None: by the key.
    pub partition: Option<i32>,
    /// The record's timestamp, in milliseconds since the Unix epoch; 0 is the time at which it is sent.
    pub timestamp_ms: i64,
    pub headers: &'a Headers,
}

/// A record to be enqueued, in the order in which it came, and later
/// [settled](crate::Relay::handle_settled).
#[derive(Debug, Clone, Copy)]
pub struct Outgoing<'a> {
    pub ticket: Ticket,
    pub record: Record<'a>,
    /// Whether this is not the row's own topic but the relay's dead-letter topic.
    pub is_dead_letter: bool,
}

impl Record<'_> {
    /// Which row it is, for an operator: the row's id, and where it is in the log.
    pub fn describe(&self) -> String {
        let id = if self.row_id.is_empty() { "unknown" } else { self.row_id };
        let Identity { commit_lsn, seq } = self.identity;
        match self.table {
            "" => format!("outbox message {id} (commit LSN {commit_lsn}, change {seq})"),
            table => format!("outbox row {id} (commit LSN {commit_lsn}, change {seq}) of {table}"),
        }
    }

    /// What the record takes of the credit in flight, in bytes.
    pub fn cost_bytes(&self) -> usize {
        let length = |bytes: Option<&[u8]>| bytes.map_or(0, <[u8]>::len);
        OVERHEAD_BYTES + self.headers.bytes() + self.topic.len() + length(self.key) + length(self.value)
    }
}

/// A record's headers in order, in two buffers that keep their capacity from record to record.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Headers {
    names: String,
    values: Vec<u8>,
    /// Where each header ends in the two buffers, and whether it has a value.
    ends: Vec<(usize, usize, bool)>,
}

impl Headers {
    /// Forgets all of them.
    pub fn clear(&mut self) {
        self.names.clear();
        self.values.clear();
        self.ends.clear();
    }

    /// Adds one at the end.
    pub fn push(&mut self, name: &str, value: Option<&[u8]>) {
        self.names.push_str(name);
        self.values.extend_from_slice(value.unwrap_or_default());
        self.ends.push((self.names.len(), self.values.len(), value.is_some()));
    }

    /// Adds one with a text value at the end.
    pub fn push_text(&mut self, name: &str, value: &str) {
        self.push(name, Some(value.as_bytes()));
    }

    /// Name and value of each, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Option<&[u8]>)> {
        let mut from = (0, 0);
        self.ends.iter().map(move |&(name_end, value_end, has_value)| {
            let name = &self.names[from.0..name_end];
            let value = &self.values[from.1..value_end];
            from = (name_end, value_end);
            (name, has_value.then_some(value))
        })
    }

    /// The first header of that name: its value, which may be null.
    pub fn get(&self, name: &str) -> Option<Option<&[u8]>> {
        self.iter().find(|(n, _)| *n == name).map(|(_, v)| v)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Names and values together, in bytes.
    pub fn bytes(&self) -> usize {
        self.names.len() + self.values.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn headers_come_out_as_they_went_in(list: Vec<(String, Option<Vec<u8>>)>) {
            let mut headers = Headers::default();
            headers.push_text("left", "over");
            headers.clear();
            for (name, value) in &list {
                headers.push(name, value.as_deref());
            }
            let out: Vec<_> = headers.iter().map(|(n, v)| (n.to_owned(), v.map(<[u8]>::to_vec))).collect();
            prop_assert_eq!(out, list);
        }
    }
}

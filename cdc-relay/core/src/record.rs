//! The record that a row becomes: its key, value, headers and cost.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use crate::{
    outbox::{Field, OutboxRow, Poison},
    progress::Ticket,
};

/// Kafka's and librdkafka's cost of a record beside its own bytes, in bytes: a round figure for the credit.
const OVERHEAD_BYTES: usize = 256;
/// A record for Kafka. It must be enqueued in the order in which it came, and later [settled](crate::Relay::handle_settled).
#[derive(Debug, Clone, Copy)]
pub struct Outgoing<'a> {
    pub ticket: Ticket,
    pub topic: &'a str,
    pub row: OutboxRow<'a>,
    /// The commit time, in milliseconds since the Unix epoch: the record's timestamp.
    pub committed_at_ms: i64,
    pub(crate) position: &'a PositionText,
    pub(crate) own_headers: &'a [OwnHeader],
}

/// A header that the row brought: its name, and its value unless that is JSON's null.
pub(crate) type OwnHeader = (String, Option<String>);

/// The record's identity as text, for its headers.
#[derive(Debug, Default)]
pub(crate) struct PositionText {
    pub(crate) commit_lsn: String,
    pub(crate) seq: String,
}

impl<'a> Outgoing<'a> {
    /// The record's headers, in order: ours, then the row's own.
    pub fn headers(&self) -> impl Iterator<Item = (&'a str, Option<&'a [u8]>)> {
        let row = self.row;
        let traceparent = row.traceparent.map(|t| ("traceparent", Some(t.as_bytes())));
        let ours = [
            ("id", row.id),
            ("type", row.event_type),
            ("aggregatetype", row.aggregate_type),
            ("lsn", self.position.commit_lsn.as_str()),
            ("seq", self.position.seq.as_str()),
        ];
        let own = self.own_headers.iter().map(|(n, v)| (n.as_str(), v.as_deref().map(str::as_bytes)));
        ours.into_iter().map(|(name, value)| (name, Some(value.as_bytes()))).chain(traceparent).chain(own)
    }

    /// Which row it is, for an operator: the row's id, and where it is in the log.
    pub fn describe(&self) -> String {
        let PositionText { commit_lsn, seq } = self.position;
        format!("outbox row {} (commit LSN {commit_lsn}, change {seq})", self.row.id)
    }

    /// What the record takes of the credit in flight, in bytes.
    pub(crate) fn cost_bytes(&self) -> usize {
        let headers: usize = self.headers().map(|(n, v)| n.len() + v.map_or(0, <[u8]>::len)).sum();
        let row = &self.row;
        OVERHEAD_BYTES
            + headers
            + self.topic.len()
            + row.aggregate_id.len()
            + row.payload.map_or(0, <[u8]>::len)
    }
}

/// Names of headers that are the relay's; a row's own header of that name is left out. So is `traceparent` where
/// the column has a value.
const RESERVED_HEADERS: [&str; 5] = ["id", "type", "aggregatetype", "lsn", "seq"];

/// The row's own headers: a JSON object. Text goes as it is, null as a header without a value, anything else as
/// its JSON text.
pub(crate) fn read_own_headers(row: &OutboxRow<'_>, out: &mut Vec<OwnHeader>) -> Result<(), Poison> {
    out.clear();
    let Some(json) = row.headers else { return Ok(()) };
    let bad = |_| Poison::BadColumn(Field::Headers, "is not a JSON object");
    let object: BTreeMap<String, &RawValue> = serde_json::from_str(json).map_err(bad)?;
    for (name, raw) in object {
        if RESERVED_HEADERS.contains(&name.as_str()) || (name == "traceparent" && row.traceparent.is_some()) {
            continue;
        }
        let value = match raw.get() {
            "null" => None,
            text if text.starts_with('"') => Some(serde_json::from_str(text).map_err(bad)?),
            other => Some(other.to_owned()),
        };
        out.push((name, value));
    }
    Ok(())
}

//! A record's headers: ours, CloudEvents', those of columns, and the row's own.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use crate::{
    outbox::{Outbox, Slots, is_cloud_event_header},
    poison::Poison,
    record::Headers,
    shape::{OutboxRow, PayloadKind},
    timestamp,
};

/// CloudEvents' headers in binary content mode
/// (<https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md>).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloudEvents {
    /// `ce_source`: a URI reference to where the events come from.
    pub source: String,
    /// `content-type`; None: by the payload's type.
    pub content_type: Option<String>,
}

/// What the headers are made of.
pub(crate) struct Ingredients<'a> {
    pub(crate) outbox: &'a Outbox,
    pub(crate) row: &'a OutboxRow<'a>,
    pub(crate) slots: &'a Slots<'a>,
    /// The record's identity as text.
    pub(crate) commit_lsn: &'a str,
    pub(crate) seq: &'a str,
    pub(crate) timestamp_ms: i64,
    pub(crate) cloud_events: Option<&'a CloudEvents>,
}

impl Ingredients<'_> {
    /// Writes the headers, in order.
    ///
    /// # Errors
    /// The row's own cannot be read; the others are there.
    pub(crate) fn put(&self, out: &mut Headers) -> Result<(), Poison> {
        let row = self.row;
        out.clear();
        out.push_text("id", row.id);
        out.push_text("type", row.event_type);
        out.push_text("aggregatetype", row.aggregate_type);
        out.push_text("lsn", self.commit_lsn);
        out.push_text("seq", self.seq);
        if let Some(traceparent) = row.traceparent {
            out.push_text("traceparent", traceparent);
        }
        if let Some(cloud_events) = self.cloud_events {
            self.put_cloud_event(out, cloud_events);
        }
        for (slot, name) in self.outbox.headers() {
            out.push(name, self.slots.get(*slot).copied().flatten());
        }
        row.headers.map_or(Ok(()), |json| self.put_own(out, json))
    }

    fn put_cloud_event(&self, out: &mut Headers, cloud_events: &CloudEvents) {
        let row = self.row;
        out.push_text("ce_specversion", "1.0");
        out.push_text("ce_id", row.id);
        out.push_text("ce_source", &cloud_events.source);
        out.push_text("ce_type", row.event_type);
        let mut time = String::new();
        if timestamp::put_rfc3339(&mut time, self.timestamp_ms) {
            out.push_text("ce_time", &time);
        }
        // Where there is a subject, it is not empty.
        if !row.aggregate_id.is_empty() {
            out.push_text("ce_subject", row.aggregate_id);
        }
        // A tombstone has no data that could have a type.
        if row.payload.is_some() {
            let by_kind = match row.payload_kind {
                PayloadKind::Json => "application/json",
                PayloadKind::Text => "text/plain",
                PayloadKind::Bytes => "application/octet-stream",
            };
            out.push_text("content-type", cloud_events.content_type.as_deref().unwrap_or(by_kind));
        }
    }

    /// The row's own headers: a JSON object. Text goes as it is, null as a header without a value, anything else
    /// as its JSON text. What has the name of another header is left out.
    fn put_own(&self, out: &mut Headers, json: &str) -> Result<(), Poison> {
        let bad = |_| Poison::BadHeaders("is not a JSON object");
        let object: BTreeMap<String, &RawValue> = serde_json::from_str(json).map_err(bad)?;
        for (name, raw) in object {
            if self.outbox.reserves_header(&name)
                || (name == "traceparent" && self.row.traceparent.is_some())
                || (self.cloud_events.is_some() && is_cloud_event_header(&name))
            {
                continue;
            }
            match raw.get() {
                "null" => out.push(&name, None),
                text if text.starts_with('"') => {
                    out.push_text(&name, &serde_json::from_str::<String>(text).map_err(bad)?);
                }
                other => out.push_text(&name, other),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::{Field, OutboxTable, SLOTS};

    fn put(
        row: &OutboxRow<'_>,
        header_columns: &[(&str, &str)],
        cloud_events: Option<&CloudEvents>,
    ) -> Vec<(String, Option<String>)> {
        let header_columns = header_columns.iter().map(|(c, h)| ((*c).into(), (*h).into())).collect();
        let outbox = Outbox::new(OutboxTable { header_columns, ..OutboxTable::default() }).unwrap();
        let mut slots = [None; SLOTS];
        slots[Field::AggregateId as usize] = Some(row.aggregate_id.as_bytes());
        let slots = &slots;
        let (commit_lsn, seq) = ("0/1", "0");
        let made =
            Ingredients { outbox: &outbox, row, slots, commit_lsn, seq, timestamp_ms: 1, cloud_events };
        let mut headers = Headers::default();
        made.put(&mut headers).unwrap();
        let text = |v: &[u8]| String::from_utf8(v.to_vec()).unwrap();
        headers.iter().skip(5).map(|(n, v)| (n.to_owned(), v.map(text))).collect()
    }

    fn expected(list: &[(&str, Option<&str>)]) -> Vec<(String, Option<String>)> {
        list.iter().map(|(n, v)| ((*n).to_owned(), v.map(str::to_owned))).collect()
    }

    #[test]
    fn columns_are_headers_and_their_names_are_taken() {
        let row = OutboxRow {
            aggregate_id: "o1",
            headers: Some(r#"{"x-key":"mine","tenant":"mine","lsn":"mine","ce_id":"mine"}"#),
            ..OutboxRow::default()
        };
        let found = put(&row, &[("aggregateid", "x-key"), ("tenant", "tenant")], None);
        let list = [("x-key", Some("o1")), ("tenant", None), ("ce_id", Some("mine"))];
        assert_eq!(found, expected(&list), "NULL is a header without a value");
    }

    #[test]
    fn a_cloud_event_has_its_attributes() {
        let mut row = OutboxRow {
            id: "e1",
            event_type: "OrderCreated",
            aggregate_id: "o1",
            payload: Some(b"{}"),
            payload_kind: PayloadKind::Json,
            headers: Some(r#"{"ce_id":"mine","content-type":"mine","own":"1"}"#),
            ..OutboxRow::default()
        };
        let mut cloud_events = CloudEvents { source: "/orders".into(), content_type: None };
        let mut list = vec![
            ("ce_specversion", Some("1.0")),
            ("ce_id", Some("e1")),
            ("ce_source", Some("/orders")),
            ("ce_type", Some("OrderCreated")),
            ("ce_time", Some("1970-01-01T00:00:00.001Z")),
            ("ce_subject", Some("o1")),
            ("content-type", Some("application/json")),
            ("own", Some("1")),
        ];
        assert_eq!(put(&row, &[], Some(&cloud_events)), expected(&list));
        for (kind, content_type) in
            [(PayloadKind::Text, "text/plain"), (PayloadKind::Bytes, "application/octet-stream")]
        {
            row.payload_kind = kind;
            list[6].1 = Some(content_type);
            assert_eq!(put(&row, &[], Some(&cloud_events)), expected(&list));
        }
        cloud_events.content_type = Some("application/avro".into());
        list[6].1 = Some("application/avro");
        assert_eq!(put(&row, &[], Some(&cloud_events)), expected(&list));
        row.payload = None;
        list.remove(6);
        assert_eq!(put(&row, &[], Some(&cloud_events)), expected(&list), "a tombstone");
    }
}

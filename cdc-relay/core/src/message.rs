//! A message of the table-less outbox, `pg_logical_emit_message(true, 'outbox', '{…}')`, as a row.
//!
//! It is a JSON object with the fields that a row has as columns
//! (<https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION>).

use std::{collections::BTreeMap, ops::Range};

use serde_json::value::RawValue;

use crate::{
    outbox::{Field, Outbox, REQUIRED, Slots},
    poison::Poison,
    shape::{Findings, OutboxRow, PayloadKind, interpret},
};

/// Reads a message: what can be read of it, and why it cannot be a record where that is so. `slots` and `text`,
/// where text with escapes is decoded to, are empty before.
///
/// A payload that is a JSON string is the string's text, as of a `text` column; any other is its JSON text
/// verbatim; null is a tombstone. Other fields are text, a number or a Boolean, or null for none.
pub(crate) fn read<'a>(
    outbox: &Outbox,
    content: &'a [u8],
    slots: &mut Slots<'a>,
    text: &'a mut String,
) -> (OutboxRow<'a>, Findings) {
    let mut findings = Findings::default();
    let Ok(members) = serde_json::from_slice::<BTreeMap<String, &'a RawValue>>(content) else {
        findings.add(Poison::BadMessage("is not a JSON object"));
        return (OutboxRow::default(), findings);
    };
    let mut decoded: Vec<(usize, Range<usize>)> = Vec::new();
    let mut payload_kind = PayloadKind::Json;
    for (slot, name) in outbox.slots() {
        let Some(raw) = members.get(name).map(|raw| raw.get()) else {
            if slot < REQUIRED {
                findings.add(Poison::MissingColumn(name.to_owned()));
            }
            continue;
        };
        let is_payload = slot == Field::Payload as usize;
        let mut bad = |why| findings.add(Poison::BadColumn(name.to_owned(), why));
        match raw.as_bytes() {
            b"null" => {}
            // The object itself is the value; that it is one is seen when it is used.
            _ if slot == Field::Headers as usize => slots[slot] = Some(raw.as_bytes()),
            [b'"', inner @ .., b'"'] => {
                if is_payload {
                    payload_kind = PayloadKind::Text;
                }
                if !inner.contains(&b'\\') {
                    slots[slot] = Some(inner);
                } else if let Ok(value) = serde_json::from_str::<String>(raw) {
                    let start = text.len();
                    text.push_str(&value);
                    decoded.push((slot, start..text.len()));
                } else {
                    // Half of a surrogate pair.
                    bad("is not text");
                }
            }
            [b'{' | b'[', ..] if !is_payload => bad("is not text or a number"),
            other => slots[slot] = Some(other),
        }
    }
    let text: &'a str = text;
    for (slot, range) in decoded {
        slots[slot] = text.get(range).map(str::as_bytes);
    }
    let mut row = interpret(outbox, slots, &mut findings);
    row.payload_kind = payload_kind;
    (row, findings)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{outbox::SLOTS, route::TopicTemplate};

    fn read_text(content: &[u8], check: impl FnOnce(OutboxRow<'_>, Option<Poison>, &Slots<'_>)) {
        let outbox = Outbox::of_messages(TopicTemplate::parse("${tenant}").unwrap()).unwrap();
        let (mut slots, mut text) = ([None; SLOTS], String::new());
        let (row, findings) = read(&outbox, content, &mut slots, &mut text);
        check(row, findings.0, &slots);
    }

    #[test]
    fn a_message_is_the_row_that_it_describes() {
        let content = br#" {"id": 7, "aggregatetype": "order", "aggregateid": "o\"1", "type": "OrderCreated",
            "payload": {"b": 1.50,  "a": ["\u00e4"]}, "headers": {"x": 1}, "traceparent": "00-tp", "partition": 3,
            "topic": "mine", "timestamp": "2026-01-01T00:00:00Z", "tenant": "t\u00e4", "other": [1]} "#;
        read_text(content, |row, poison, slots| {
            let expected = OutboxRow {
                id: "7",
                aggregate_type: "order",
                aggregate_id: "o\"1",
                event_type: "OrderCreated",
                payload: Some(br#"{"b": 1.50,  "a": ["\u00e4"]}"#),
                payload_kind: PayloadKind::Json,
                headers: Some(r#"{"x": 1}"#),
                traceparent: Some("00-tp"),
                partition: Some(3),
                topic: Some("mine"),
                timestamp_ms: Some(1_767_225_600_000),
            };
            assert_eq!((row, poison), (expected, None));
            assert_eq!(slots[crate::outbox::FIELDS], Some("tä".as_bytes()));
        });
    }

    fn with(more: &str) -> Vec<u8> {
        format!(r#"{{"id":"i","aggregatetype":"a","aggregateid":"b","type":"t"{more}}}"#).into_bytes()
    }

    #[test]
    fn a_payload_is_verbatim_and_a_strings_text() {
        for (payload, expected, kind) in [
            ("null", None, PayloadKind::Json),
            ("[1,  2]", Some("[1,  2]"), PayloadKind::Json),
            ("1.0", Some("1.0"), PayloadKind::Json),
            ("true", Some("true"), PayloadKind::Json),
            (r#""plain""#, Some("plain"), PayloadKind::Text),
            (r#""a\nb""#, Some("a\nb"), PayloadKind::Text),
            (r#""""#, Some(""), PayloadKind::Text),
        ] {
            read_text(&with(&format!(r#","payload":{payload}"#)), |row, poison, _| {
                assert_eq!((row.payload, poison), (expected.map(str::as_bytes), None), "{payload}");
                assert!(row.payload.is_none() || row.payload_kind == kind);
            });
        }
    }

    #[test]
    fn what_is_not_a_row_says_why() {
        let bad = |content: &[u8]| {
            let mut why = None;
            read_text(content, |_, poison, _| why = poison);
            why.unwrap()
        };
        for content in [&b""[..], b"x", b"[]", b"{", b"{} {}", b"\xFF", b"{\"id\":\"\xFF\"}", b"null"] {
            assert_eq!(bad(content), Poison::BadMessage("is not a JSON object"));
        }
        assert_eq!(bad(b"{}"), Poison::MissingColumn("id".into()));
        assert_eq!(bad(&with("")), Poison::MissingColumn("payload".into()));
        assert_eq!(bad(br#"{"id":null}"#), Poison::MissingColumn("aggregatetype".into()));
        let full = |more: &str| bad(&with(&format!(r#","payload":1{more}"#)));
        assert_eq!(full(r#","type":null"#), Poison::NullColumn("type".into()));
        for (field, value) in [
            ("id", "[]"),
            ("tenant", "{}"),
            ("partition", "-1"),
            ("partition", "1.0"),
            ("timestamp", "\"soon\""),
            ("topic", "\"\\ud800\""),
        ] {
            let why = full(&format!(r#","{field}":{value}"#));
            assert!(matches!(&why, Poison::BadColumn(name, _) if name == field), "{why:?}");
        }
    }

    proptest! {
        #[test]
        fn reading_is_total(content: Vec<u8>, json in r#"\{("(id|payload|headers|topic)":("[a\\u0-9d"]{0,9}"|[0-9\[\]{}]{0,5}),?){0,5}\}"#) {
            read_text(&content, |_, _, _| ());
            read_text(json.as_bytes(), |_, _, _| ());
        }
    }
}

//! Generic messages, of any topic: each is applied once, which is a row in `messages_applied`, and acknowledged
//! as often as it is delivered, if it asks our group for that. Their headers say what they are:
//!
//! | header | value |
//! |---|---|
//! | `message-id` | a UUID, the same for each delivery |
//! | `attempt` | which delivery it is, from 1 |
//! | `require-ack` | the consumer groups that have to acknowledge it, with commas; absent for none |
//! | `lsn` | the relay's: the commit LSN of this delivery |

use std::collections::BTreeMap;

use serde_json::value::RawValue;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    acknowledgement::{self, Asked},
    decide::{Fault, Poison, Reason},
    fields,
    handler::Handler,
    record::{self, Event, Record},
};

/// A generic message.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Message {
    id: Uuid,
    attempt: i32,
    require_ack: Vec<String>,
    lsn: Option<String>,
    traceparent: Option<String>,
    topic: String,
    key: Option<String>,
    /// JSON, as it came.
    payload: String,
    /// All of the record's headers, as a JSON object of texts.
    headers: String,
}

impl Event for Message {
    fn parse(record: &Record<'_>) -> Result<Self, Poison> {
        let id = record.header("message-id")?.ok_or_else(|| {
            let why = "the record has no header message-id: it is no message of the order API's";
            Poison::new(Reason::NoMessageId, why)
        })?;
        let id = fields::parse_uuid("the header message-id", id)?;
        let attempt = record.header("attempt")?;
        let attempt =
            attempt.ok_or_else(|| Poison::new(Reason::MissingField, "the header attempt is missing"))?;
        let lsn = record.header("lsn")?.map(|lsn| fields::parse_lsn("the header lsn", lsn)).transpose()?;
        let groups = record.header("require-ack")?.unwrap_or_default().split(',').map(str::trim);
        let key = record.key.map(|key| record::text("key", key)).transpose();
        Ok(Self {
            id,
            attempt: fields::parse_attempt("the header attempt", attempt)?,
            require_ack: groups.filter(|group| !group.is_empty()).map(str::to_owned).collect(),
            lsn,
            traceparent: record.header("traceparent")?.map(str::to_owned),
            topic: record.topic.to_owned(),
            key: key?.map(str::to_owned),
            payload: payload(record.value)?,
            headers: headers(record)?,
        })
    }

    fn id(&self) -> Uuid {
        self.id
    }

    fn type_name(&self) -> &'static str {
        "Message"
    }
}

fn payload(value: Option<&[u8]>) -> Result<String, Poison> {
    let value = value.ok_or_else(|| Poison::new(Reason::NoValue, "the record's value is NULL"))?;
    let json: &RawValue = serde_json::from_slice(value)
        .map_err(|e| Poison::new(Reason::NotJson, format!("the value is not JSON: {e}")))?;
    Ok(json.get().to_owned())
}

fn headers(record: &Record<'_>) -> Result<String, Poison> {
    let mut object = BTreeMap::new();
    for (name, value) in record.headers()? {
        object.insert(*name, value.map(|value| record::text(name, value)).transpose()?);
    }
    serde_json::to_string(&object).map_err(|e| Poison::new(Reason::BadValue, e.to_string()))
}

/// Writes `messages_applied` and acknowledges.
pub(crate) struct Messages {
    /// As `require-ack` may name it.
    pub(crate) group: String,
}

/// The inbox already lets a message through only once; the primary key says so again, for a pruned inbox.
const INSERT: &str = "
    INSERT INTO messages_applied (consumer_group, message_id, topic, key, payload, headers, attempt)
    SELECT $1, message_id, topic, key, payload::jsonb, headers::jsonb, attempt
    FROM unnest($2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::integer[])
         AS given (message_id, topic, key, payload, headers, attempt)
    ON CONFLICT (consumer_group, message_id) DO NOTHING";

impl Handler for Messages {
    type Event = Message;

    async fn apply(&self, transaction: &mut PgConnection, events: &[&Message]) -> Result<(), Fault> {
        sqlx::query(INSERT)
            .bind(&self.group)
            .bind(events.iter().map(|m| m.id).collect::<Vec<_>>())
            .bind(events.iter().map(|m| m.topic.as_str()).collect::<Vec<_>>())
            .bind(events.iter().map(|m| m.key.as_deref()).collect::<Vec<_>>())
            .bind(events.iter().map(|m| m.payload.as_str()).collect::<Vec<_>>())
            .bind(events.iter().map(|m| m.headers.as_str()).collect::<Vec<_>>())
            .bind(events.iter().map(|m| m.attempt).collect::<Vec<_>>())
            .execute(&mut *transaction)
            .await?;
        self.acknowledge(transaction, events).await
    }

    /// Whoever sent it again has not heard of our acknowledgement.
    async fn repeated(&self, transaction: &mut PgConnection, events: &[&Message]) -> Result<(), Fault> {
        self.acknowledge(transaction, events).await
    }
}

impl Messages {
    async fn acknowledge(&self, transaction: &mut PgConnection, events: &[&Message]) -> Result<(), Fault> {
        let asked: Vec<Asked<'_>> = events
            .iter()
            .filter(|m| m.require_ack.contains(&self.group))
            .map(|m| Asked {
                message_id: m.id,
                attempt: m.attempt,
                lsn: m.lsn.as_deref(),
                traceparent: m.traceparent.as_deref(),
            })
            .collect();
        Ok(acknowledgement::write(transaction, &self.group, &asked).await?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const ID: &str = "01936d2e-7c01-7a4b-8e55-9f0c1d2e3a41";

    fn record<'a>(headers: &[(&'a str, &'a str)], value: &'a str) -> Record<'a> {
        Record {
            topic: "notifications",
            key: Some(b"k"),
            value: Some(value.as_bytes()),
            headers: Some(headers.iter().map(|(k, v)| (*k, Some(v.as_bytes()))).collect()),
        }
    }

    #[test]
    fn the_headers_say_what_it_is_and_the_payload_stays_as_it_came() {
        let headers = [
            ("id", "x"),
            ("message-id", ID),
            ("attempt", "3"),
            ("require-ack", "a, messages,,b"),
            ("lsn", "1/2AB"),
            ("colour", "red"),
        ];
        let message = Message::parse(&record(&headers, "{\"amount\": 1.10}")).unwrap();
        assert_eq!((message.id().to_string().as_str(), message.attempt), (ID, 3));
        assert_eq!(message.require_ack, ["a", "messages", "b"]);
        assert_eq!((message.lsn.as_deref(), message.payload.as_str()), (Some("1/2AB"), "{\"amount\": 1.10}"));
        let stored: Value = serde_json::from_str(&message.headers).unwrap();
        assert_eq!((&stored["colour"], &stored["attempt"]), (&json!("red"), &json!("3")));
        // Nobody has to acknowledge, and no relay of ours wrote it.
        let plain = Message::parse(&record(&[("message-id", ID), ("attempt", "1")], "null")).unwrap();
        assert_eq!((plain.require_ack, plain.lsn), (vec![], None));
    }

    #[test]
    fn each_kind_of_poison_has_its_reason() {
        let reason = |headers: &[(&str, &str)], value: &str| {
            Message::parse(&record(headers, value)).unwrap_err().reason
        };
        assert_eq!(reason(&[("id", ID), ("attempt", "1")], "{}"), Reason::NoMessageId);
        assert_eq!(reason(&[("message-id", "7"), ("attempt", "1")], "{}"), Reason::BadValue);
        assert_eq!(reason(&[("message-id", ID)], "{}"), Reason::MissingField);
        for attempt in ["0", "-1", "one", "2147483648", "", "1.0"] {
            assert_eq!(
                reason(&[("message-id", ID), ("attempt", attempt)], "{}"),
                Reason::BadValue,
                "{attempt}"
            );
        }
        for lsn in ["", "7", "0/", "/1", "0/123456789", "g/1", "1/2/3"] {
            let headers = [("message-id", ID), ("attempt", "1"), ("lsn", lsn)];
            assert_eq!(reason(&headers, "{}"), Reason::BadValue, "{lsn}");
        }
        let fine = [("message-id", ID), ("attempt", "1")];
        assert_eq!(reason(&fine, "{"), Reason::NotJson);
        let nul = [fine[0], fine[1], ("x", "a\0b")];
        assert_eq!(reason(&nul, "{}"), Reason::NulCharacter);
        let tombstone = Record { value: None, ..record(&fine, "") };
        assert_eq!(Message::parse(&tombstone).unwrap_err().reason, Reason::NoValue);
        let binary_key = Record { key: Some(b"\xff"), ..record(&fine, "{}") };
        assert_eq!(Message::parse(&binary_key).unwrap_err().reason, Reason::BadValue);
    }

    proptest! {
        #[test]
        fn any_record_is_a_message_or_poison(
            values in proptest::collection::vec(proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40)), 4),
            value in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..200)),
        ) {
            let names = ["message-id", "attempt", "lsn", "require-ack"];
            let mut headers: Vec<record::Header<'_>> =
                names.iter().zip(&values).map(|(name, value)| (*name, value.as_deref())).collect();
            headers.extend([("message-id", Some(ID.as_bytes())), ("attempt", Some(&b"1"[..]))]);
            let record = Record { topic: "t", key: None, value: value.as_deref(), headers: Some(headers) };
            let _ = Message::parse(&record);
        }
    }
}

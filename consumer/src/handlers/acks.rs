//! Acknowledgements, into the orders database: who has applied which message, and whether that was the last one it
//! waited for. The contract is `contracts/acks/`.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde_json::value::RawValue;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    acknowledgement,
    decide::{Fault, Poison, Reason},
    fields::{self, Field},
    handler::{Handler, Tables},
    record::{Event, Record},
};

/// A group has applied a message.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ack {
    /// The record's own: a message is acknowledged by several groups, and again with each redelivery.
    id: Uuid,
    message_id: Uuid,
    group: String,
    attempt: i32,
    applied_at: DateTime<Utc>,
    lsn: Option<String>,
}

/// The body with every value still as its JSON text.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    #[serde(borrow)]
    message_id: Option<&'a RawValue>,
    consumer_group: Option<&'a RawValue>,
    attempt: Option<&'a RawValue>,
    applied_at: Option<&'a RawValue>,
    lsn: Option<&'a RawValue>,
}

impl Event for Ack {
    fn parse(record: &Record<'_>) -> Result<Self, Poison> {
        let id = record.header("id")?;
        let id = id.ok_or_else(|| Poison::new(Reason::MissingField, "the header id is missing"))?;
        let value = record.value.ok_or_else(|| Poison::new(Reason::NoValue, "the record's value is NULL"))?;
        let body: Body<'_> = fields::object("the value", value)?;
        let lsn = body.lsn.map(|raw| fields::text(Field("lsn", Some(raw)))).transpose()?;
        let attempt = fields::integer(Field("attempt", body.attempt))?;
        Ok(Self {
            id: fields::parse_uuid("the header id", id)?,
            message_id: fields::uuid(Field("messageId", body.message_id))?,
            group: fields::text(Field("consumerGroup", body.consumer_group))?,
            attempt: fields::parse_attempt("attempt", &attempt.to_string())?,
            applied_at: fields::time(Field("appliedAt", body.applied_at))?,
            lsn: lsn.map(|lsn| fields::parse_lsn("lsn", &lsn)).transpose()?,
        })
    }

    fn id(&self) -> Uuid {
        self.id
    }

    fn type_name(&self) -> &'static str {
        acknowledgement::TYPE
    }
}

/// Writes `message_acks`, and what follows from them in `messages`.
pub(crate) struct Acks;

/// In the order of their ids, so that two of us cannot deadlock. The order API's redelivery takes its messages with
/// SKIP LOCKED, so it does not wait while it holds some.
const LOCK: &str = "
    SELECT message_id, attempt, require_ack FROM messages
    WHERE message_id = ANY ($1) ORDER BY message_id FOR NO KEY UPDATE";

/// Of a group's acknowledgements of one message the first one counts.
const INSERT: &str = "
    INSERT INTO message_acks (message_id, consumer_group, attempt, applied_at, lsn)
    SELECT message_id, consumer_group, attempt, applied_at, lsn::pg_lsn
    FROM unnest($1::uuid[], $2::text[], $3::integer[], $4::timestamptz[], $5::text[])
         WITH ORDINALITY AS given (message_id, consumer_group, attempt, applied_at, lsn, number)
    ORDER BY number
    ON CONFLICT DO NOTHING";

/// Whoever was given up and is acknowledged after all is not undelivered any more.
const COMPLETE: &str = "
    UPDATE messages SET acknowledged_at = now(), due_at = NULL, undelivered_at = NULL
    WHERE message_id = ANY ($1) AND acknowledged_at IS NULL
      AND NOT EXISTS (
          SELECT FROM unnest(messages.require_ack) AS wanted (consumer_group)
          WHERE NOT EXISTS (
              SELECT FROM message_acks AS ack
              WHERE ack.message_id = messages.message_id AND ack.consumer_group = wanted.consumer_group))";

impl Handler for Acks {
    type Event = Ack;

    const TABLES: Tables = Tables::Theirs {
        needed: &[
            ("public.inbox", "SELECT"),
            ("public.inbox", "INSERT"),
            ("public.dead_letters", "SELECT"),
            ("public.dead_letters", "INSERT"),
            ("public.dead_letters", "UPDATE"),
            ("public.consumer_groups", "SELECT"),
            ("public.consumer_groups", "INSERT"),
            ("public.consumer_groups", "UPDATE"),
            ("public.message_acks", "SELECT"),
            ("public.message_acks", "INSERT"),
            ("public.messages", "SELECT"),
            ("public.messages", "UPDATE"),
        ],
        made_by: "postgres/init.sql",
    };

    async fn apply(&self, transaction: &mut PgConnection, events: &[&Ack]) -> Result<(), Fault> {
        let messages: Vec<Uuid> = events.iter().map(|a| a.message_id).collect();
        let rows: Vec<(Uuid, i32, Vec<String>)> =
            sqlx::query_as(LOCK).bind(&messages).fetch_all(&mut *transaction).await?;
        let sent: HashMap<Uuid, (i32, Vec<String>)> =
            rows.into_iter().map(|(id, attempt, groups)| (id, (attempt, groups))).collect();
        for ack in events {
            ack.check(sent.get(&ack.message_id)).map_err(Fault::Record)?;
        }
        sqlx::query(INSERT)
            .bind(&messages)
            .bind(events.iter().map(|a| a.group.as_str()).collect::<Vec<_>>())
            .bind(events.iter().map(|a| a.attempt).collect::<Vec<_>>())
            .bind(events.iter().map(|a| a.applied_at).collect::<Vec<_>>())
            .bind(events.iter().map(|a| a.lsn.as_deref()).collect::<Vec<_>>())
            .execute(&mut *transaction)
            .await?;
        sqlx::query(COMPLETE).bind(&messages).execute(transaction).await?;
        Ok(())
    }
}

impl Ack {
    /// Whether it can be true of the message, which has so many attempts and waits for these groups.
    fn check(&self, message: Option<&(i32, Vec<String>)>) -> Result<(), Poison> {
        let id = self.message_id;
        let Some((sent, groups)) = message else {
            return Err(Poison::new(Reason::UnknownMessage, format!("there is no message {id}")));
        };
        if self.attempt > *sent {
            let why = format!("attempt {} of message {id} is acknowledged, of {sent} sent", self.attempt);
            return Err(Poison::new(Reason::BadValue, why));
        }
        if !groups.contains(&self.group) {
            let group = fields::excerpt(self.group.as_bytes());
            let why = format!("message {id} does not wait for the consumer group {group:?}");
            return Err(Poison::new(Reason::BadValue, why));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const ID: &[u8] = b"01936d2e-7c01-7a4b-8e55-9f0c1d2e3a99";

    fn example() -> Value {
        serde_json::from_str(include_str!("../../../contracts/acks/MessageAcknowledged.example.json"))
            .unwrap()
    }

    fn parse(body: &str) -> Result<Ack, Poison> {
        let headers = Some(vec![("id", Some(ID))]);
        Ack::parse(&Record { topic: "order-acks", key: None, value: Some(body.as_bytes()), headers })
    }

    #[test]
    fn the_golden_example_is_an_acknowledgement() {
        let ack = parse(&example().to_string()).unwrap();
        assert_eq!(ack.id().to_string().as_bytes(), ID);
        assert_eq!(ack.message_id.to_string(), "01936d2e-7c01-7a4b-8e55-9f0c1d2e3a41");
        assert_eq!((ack.group.as_str(), ack.attempt, ack.lsn.as_deref()), ("messages", 2, Some("0/1A2B3C8")));
        assert_eq!(ack.applied_at.to_rfc3339(), "2026-11-21T12:00:00.123456+00:00");
        let mut newer = example();
        newer["why"] = json!("a field that is added");
        newer.as_object_mut().unwrap().remove("lsn");
        assert_eq!(parse(&newer.to_string()).unwrap().lsn, None);
    }

    #[test]
    fn what_the_schema_requires_we_require() {
        let schema: Value =
            serde_json::from_str(include_str!("../../../contracts/acks/MessageAcknowledged.schema.json"))
                .unwrap();
        for field in schema["required"].as_array().unwrap() {
            let field = field.as_str().unwrap();
            let mut body = example();
            body.as_object_mut().unwrap().remove(field);
            let poison = parse(&body.to_string()).unwrap_err();
            assert_eq!(poison.reason, Reason::MissingField, "{field}");
            assert!(poison.error.contains(field), "{}", poison.error);
        }
    }

    #[test]
    fn each_kind_of_poison_has_its_reason() {
        let with = |field: &str, value: Value| {
            let mut body = example();
            body[field] = value;
            parse(&body.to_string()).unwrap_err().reason
        };
        for (field, value) in [
            ("messageId", json!("7")),
            ("attempt", json!(0)),
            ("attempt", json!(2_147_483_648_u32)),
            ("appliedAt", json!("yesterday")),
            ("lsn", json!("12")),
            ("lsn", json!("")),
            ("consumerGroup", json!("")),
        ] {
            assert_eq!(with(field, value.clone()), Reason::BadValue, "{field} {value}");
        }
        for (field, value) in [("attempt", json!("1")), ("lsn", json!(7)), ("messageId", json!([]))] {
            assert_eq!(with(field, value.clone()), Reason::WrongType, "{field} {value}");
        }
        assert_eq!(with("consumerGroup", json!("a\0")), Reason::NulCharacter);
        assert_eq!(parse("nonsense").unwrap_err().reason, Reason::NotJson);
        let body = example().to_string();
        let record = Record { value: Some(body.as_bytes()), headers: Some(vec![]), ..Record::default() };
        assert_eq!(Ack::parse(&record).unwrap_err().reason, Reason::MissingField);
        let record = Record { headers: Some(vec![("id", Some(b"x"))]), ..record };
        assert_eq!(Ack::parse(&record).unwrap_err().reason, Reason::BadValue);
    }

    #[test]
    fn an_acknowledgement_that_cannot_be_true_is_poison() {
        let ack = parse(&example().to_string()).unwrap();
        let waits_for = |attempt: i32, group: &str| (attempt, vec!["other".to_owned(), group.to_owned()]);
        assert_eq!(ack.check(Some(&waits_for(2, "messages"))), Ok(()));
        assert_eq!(ack.check(Some(&waits_for(3, "messages"))), Ok(()));
        assert_eq!(ack.check(None).unwrap_err().reason, Reason::UnknownMessage);
        assert!(ack.check(Some(&waits_for(1, "messages"))).unwrap_err().error.contains("attempt 2"));
        assert!(ack.check(Some(&waits_for(2, "mine"))).unwrap_err().error.contains("messages"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_acknowledgement_or_poison(value in proptest::collection::vec(any::<u8>(), 0..300)) {
            let headers = Some(vec![("id", Some(ID))]);
            let _ = Ack::parse(&Record { topic: "t", key: None, value: Some(&value), headers });
        }
    }
}

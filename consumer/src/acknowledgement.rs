//! Acknowledgements: a group that has applied a message which asks for it says so, in the transaction that applies
//! it, through the outbox of the same database. So nothing is acknowledged that is not applied, and what is applied
//! is acknowledged for certain. The contract is `contracts/acks/`.

use std::collections::HashMap;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Serialize, Serializer};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::outbox::{self, Row};

/// Where acknowledgements go.
pub(crate) const TOPIC: &str = "order-acks";
/// The type of each, as its record's header and the metrics say it.
pub(crate) const TYPE: &str = "MessageAcknowledged";

/// One attempt of a message that asks for an acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Asked<'a> {
    pub(crate) message_id: Uuid,
    pub(crate) attempt: i32,
    /// The commit LSN of that attempt.
    pub(crate) lsn: Option<&'a str>,
    pub(crate) traceparent: Option<&'a str>,
}

/// What is published.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Acknowledgement<'a> {
    message_id: Uuid,
    consumer_group: &'a str,
    attempt: i32,
    #[serde(serialize_with = "micros")]
    applied_at: DateTime<Utc>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lsn: Option<&'a str>,
}

fn micros<S: Serializer>(at: &DateTime<Utc>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&at.to_rfc3339_opts(SecondsFormat::Micros, true))
}

/// Puts an acknowledgement of each into the outbox. The group's inbox holds them all: as applied in this transaction
/// or in an earlier one, which is when `appliedAt` was.
pub(crate) async fn write(
    transaction: &mut PgConnection,
    group: &str,
    asked: &[Asked<'_>],
) -> sqlx::Result<()> {
    if asked.is_empty() {
        return Ok(());
    }
    let applied: Vec<(Uuid, DateTime<Utc>)> = sqlx::query_as(
        "SELECT event_id, applied_at FROM inbox WHERE consumer_group = $1 AND event_id = ANY ($2)",
    )
    .bind(group)
    .bind(asked.iter().map(|a| a.message_id).collect::<Vec<_>>())
    .fetch_all(&mut *transaction)
    .await?;
    let applied: HashMap<Uuid, DateTime<Utc>> = applied.into_iter().collect();
    let mut rows = Vec::with_capacity(asked.len());
    for one in asked {
        let applied_at = *applied.get(&one.message_id).ok_or(sqlx::Error::RowNotFound)?;
        rows.push(row(group, one, applied_at)?);
    }
    outbox::publish(transaction, &rows).await
}

fn row<'a>(group: &str, asked: &Asked<'a>, applied_at: DateTime<Utc>) -> sqlx::Result<Row<'a>> {
    let Asked { message_id, attempt, lsn, traceparent } = *asked;
    let body = Acknowledgement { message_id, consumer_group: group, attempt, applied_at, lsn };
    Ok(Row {
        id: Uuid::now_v7(),
        aggregate_type: "ack",
        aggregate_id: message_id.to_string(),
        event_type: TYPE,
        payload: serde_json::to_string(&body).map_err(|e| sqlx::Error::Encode(e.into()))?,
        traceparent,
        topic: TOPIC,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn what_is_emitted_is_the_golden_example_and_follows_the_schema() {
        let schema: Value =
            serde_json::from_str(include_str!("../../contracts/acks/MessageAcknowledged.schema.json"))
                .unwrap();
        let example: Value =
            serde_json::from_str(include_str!("../../contracts/acks/MessageAcknowledged.example.json"))
                .unwrap();
        let validator = jsonschema::options().should_validate_formats(true).build(&schema).unwrap();
        let applied_at = "2026-11-21T12:00:00.123456Z".parse().unwrap();
        let message_id = "01936d2e-7c01-7a4b-8e55-9f0c1d2e3a41".parse().unwrap();
        let asked = Asked { message_id, attempt: 2, lsn: Some("0/1A2B3C8"), traceparent: None };
        let emitted = row("messages", &asked, applied_at).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&emitted.payload).unwrap(), example);
        assert_eq!((emitted.topic, emitted.aggregate_id), ("order-acks", message_id.to_string()));

        let without = row("messages", &Asked { lsn: None, ..asked }, applied_at).unwrap();
        for body in [&emitted.payload, &without.payload] {
            let body: Value = serde_json::from_str(body).unwrap();
            validator.validate(&body).unwrap_or_else(|e| panic!("{body}: {e}"));
        }
        // The schema is not one that takes anything.
        for (field, wrong) in
            [("attempt", "0"), ("lsn", "\"7\""), ("consumerGroup", "\"\""), ("appliedAt", "1")]
        {
            let mut body = example.clone();
            body[field] = serde_json::from_str(wrong).unwrap();
            assert!(validator.validate(&body).is_err(), "{field}");
        }
    }
}

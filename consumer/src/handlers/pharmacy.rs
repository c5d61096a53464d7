//! The pharmacy's side of the orders: what to prepare, and a task for each thing that happened, which others are told of
//! on `pharmacy-events`. The contract is `contracts/pharmacy/`.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{PgConnection, types::Json};
use uuid::Uuid;

use super::orders::{column, latest, open_tasks};
use crate::{
    decide::Fault,
    event::{Change, OrderEvent},
    handler::Handler,
    outbox::Row,
};

/// Writes `pharmacy_orders` and `pharmacy_tasks`, and publishes the tasks.
pub(crate) struct Pharmacy;

const TOPIC: &str = "pharmacy-events";
const TASK_OPENED: &str = "PharmacyTaskOpened";

/// What is published of a task.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct TaskOpened<'a> {
    event_id: Uuid,
    /// The order.
    aggregate_id: &'a str,
    /// The order's version that it is about; a task is opened once for each.
    version: i64,
    event_type: &'static str,
    occurred_on: DateTime<Utc>,
    /// The order event that it follows from.
    causation_id: Uuid,
    kind: &'static str,
}

/// An event that tells no details leaves those that are there.
const UPSERT_ORDERS: &str = "
    INSERT INTO pharmacy_orders AS mine
        (order_id, status, version, occurred_on, customer_id, currency, total_amount, items)
    SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::timestamptz[], $5::text[], $6::text[],
                         $7::numeric[], $8::jsonb[])
    ON CONFLICT (order_id) DO UPDATE SET
        status = excluded.status, version = excluded.version, occurred_on = excluded.occurred_on,
        customer_id = coalesce(excluded.customer_id, mine.customer_id),
        currency = coalesce(excluded.currency, mine.currency),
        total_amount = coalesce(excluded.total_amount, mine.total_amount),
        items = coalesce(excluded.items, mine.items),
        updated_at = now()";

/// The inbox already lets an event through only once; the primary key says so again, for a pruned inbox.
const INSERT_TASKS: &str = "
    INSERT INTO pharmacy_tasks (event_id, order_id, version, kind)
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::text[])
    ON CONFLICT (event_id) DO NOTHING";

impl Handler for Pharmacy {
    type Event = OrderEvent;

    const PROJECTION: &'static [&'static str] = &["pharmacy_orders", "pharmacy_tasks"];

    async fn apply(&self, transaction: &mut PgConnection, events: &[&OrderEvent]) -> Result<(), Fault> {
        write_orders(transaction, events).await?;
        Ok(open_tasks(transaction, INSERT_TASKS, events, task).await?)
    }

    fn follow_ups<'e>(&self, events: &[&'e OrderEvent]) -> Result<Vec<Row<'e>>, Fault> {
        Ok(events.iter().map(|event| follow_up(event)).collect::<Result<_, _>>()?)
    }
}

async fn write_orders(transaction: &mut PgConnection, events: &[&OrderEvent]) -> sqlx::Result<()> {
    let orders = latest(events);
    sqlx::query(UPSERT_ORDERS)
        .bind(column(&orders, |o| o.event.order_id.as_str()))
        .bind(column(&orders, |o| o.event.change.status().as_str()))
        .bind(column(&orders, |o| o.event.version))
        .bind(column(&orders, |o| o.event.occurred_on))
        .bind(column(&orders, |o| o.details.map(|d| d.customer_id.as_str())))
        .bind(column(&orders, |o| o.details.map(|d| d.currency.as_str())))
        .bind(column(&orders, |o| o.details.map(|d| d.total_amount)))
        .bind(column(&orders, |o| o.details.map(|d| Json(&d.items))))
        .execute(transaction)
        .await?;
    Ok(())
}

/// Tells others of the task that an event opens.
fn follow_up(event: &OrderEvent) -> sqlx::Result<Row<'_>> {
    let id = Uuid::now_v7();
    let body = TaskOpened {
        event_id: id,
        aggregate_id: &event.order_id,
        version: event.version,
        event_type: TASK_OPENED,
        occurred_on: Utc::now(),
        causation_id: event.id,
        kind: task(&event.change),
    };
    Ok(Row {
        id,
        aggregate_type: "pharmacy",
        aggregate_id: event.order_id.clone(),
        event_type: TASK_OPENED,
        payload: serde_json::to_string(&body).map_err(|e| sqlx::Error::Encode(e.into()))?,
        traceparent: None,
        topic: TOPIC,
    })
}

/// What the pharmacy does about a change.
fn task(change: &Change) -> &'static str {
    match change {
        Change::Created(_) => "check_stock",
        Change::Updated { .. } => "check_changes",
        Change::Confirmed { .. } => "prepare",
        Change::Cancelled { .. } => "return_to_stock",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn what_is_published_is_the_golden_example_and_follows_the_schema() {
        let schema: Value =
            serde_json::from_str(include_str!("../../../contracts/pharmacy/PharmacyTaskOpened.schema.json"))
                .unwrap();
        let example: Value =
            serde_json::from_str(include_str!("../../../contracts/pharmacy/PharmacyTaskOpened.example.json"))
                .unwrap();
        let validator = jsonschema::options().should_validate_formats(true).build(&schema).unwrap();
        let event = OrderEvent {
            id: "01936d2e-7c01-7a4b-8e55-9f0c1d2e3a41".parse().unwrap(),
            order_id: "order-1".into(),
            version: 3,
            occurred_on: DateTime::UNIX_EPOCH,
            change: Change::Confirmed { payment_id: "payment-1".into() },
        };
        let row = follow_up(&event).unwrap();
        let mut body: Value = serde_json::from_str(&row.payload).unwrap();
        validator.validate(&body).unwrap_or_else(|e| panic!("{body}: {e}"));
        validator.validate(&example).unwrap_or_else(|e| panic!("{example}: {e}"));
        assert_eq!(body["eventId"], row.id.to_string());
        for given in ["eventId", "occurredOn"] {
            body[given] = example[given].clone();
        }
        assert_eq!(body, example);
        assert_eq!((row.topic, row.aggregate_id.as_str()), ("pharmacy-events", "order-1"));
        // The schema is not one that takes anything.
        for (field, wrong) in [("kind", "x"), ("eventId", "7"), ("version", "1"), ("occurredOn", "soon")] {
            let mut body = example.clone();
            body[field] = wrong.into();
            assert!(validator.validate(&body).is_err(), "{field}");
        }
    }
}

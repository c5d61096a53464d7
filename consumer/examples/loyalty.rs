//! A program of one handler: a point for each order, by customer.

use std::process::ExitCode;

use consumer::{Event, Fault, Handler, Offer, Poison, Reason, Record};
use serde::Deserialize;
use sqlx::PgConnection;
use uuid::Uuid;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct OrderEvent {
    event_id: Uuid,
    aggregate_id: String,
    version: i64,
    event_type: String,
    /// Of those events that tell what was ordered.
    customer_id: Option<String>,
}

impl Event for OrderEvent {
    const VERSIONED: bool = true;

    fn parse(record: &Record<'_>) -> Result<Self, Poison> {
        let value = record.value.ok_or_else(|| Poison::new(Reason::NoValue, "the record's value is NULL"))?;
        serde_json::from_slice(value).map_err(|e| Poison::new(Reason::BadValue, e.to_string()))
    }

    fn id(&self) -> Uuid {
        self.event_id
    }

    fn type_name(&self) -> &'static str {
        if self.event_type == "OrderCreated" { "OrderCreated" } else { "other" }
    }

    fn version(&self) -> Option<(&str, i64)> {
        Some((&self.aggregate_id, self.version))
    }
}

struct Loyalty;

impl Handler for Loyalty {
    type Event = OrderEvent;

    const SCHEMA: &'static str = "
        CREATE TABLE IF NOT EXISTS loyalty_points (customer_id text PRIMARY KEY, points bigint NOT NULL)";
    const PROJECTION: &'static [&'static str] = &["loyalty_points"];

    async fn apply(&self, transaction: &mut PgConnection, events: &[&OrderEvent]) -> Result<(), Fault> {
        let created = events.iter().filter(|event| event.event_type == "OrderCreated");
        let customers: Vec<&str> = created.filter_map(|event| event.customer_id.as_deref()).collect();
        // The whole batch by one statement, in the order of the key: two batches cannot deadlock.
        sqlx::query(
            "INSERT INTO loyalty_points AS mine (customer_id, points)
             SELECT customer, count(*) FROM unnest($1::text[]) AS customer
             GROUP BY customer ORDER BY customer
             ON CONFLICT (customer_id) DO UPDATE SET points = mine.points + excluded.points",
        )
        .bind(customers)
        .execute(transaction)
        .await?;
        Ok(())
    }
}

fn main() -> ExitCode {
    consumer::main(vec![Offer::new("loyalty", Some("order-events"), |_| Ok(Loyalty))])
}

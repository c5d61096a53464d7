//! Fulfillment's side of the orders: where to pick up, for whom, how much, and a task for each thing that
//! happened.

use sqlx::PgConnection;

use super::orders::{column, latest, open_tasks};
use crate::{
    decide::Fault,
    event::{Change, Details, OrderEvent},
    handler::Handler,
};

/// Writes `fulfillment_orders` and `fulfillment_tasks`.
pub(crate) struct Fulfillment;

/// An event that tells no details leaves those that are there.
const UPSERT_ORDERS: &str = "
    INSERT INTO fulfillment_orders AS mine
        (order_id, status, version, occurred_on, customer_id, restaurant_id, total_quantity)
    SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::timestamptz[], $5::text[], $6::text[],
                         $7::bigint[])
    ON CONFLICT (order_id) DO UPDATE SET
        status = excluded.status, version = excluded.version, occurred_on = excluded.occurred_on,
        customer_id = coalesce(excluded.customer_id, mine.customer_id),
        restaurant_id = coalesce(excluded.restaurant_id, mine.restaurant_id),
        total_quantity = coalesce(excluded.total_quantity, mine.total_quantity),
        updated_at = now()";

/// The inbox already lets an event through only once; the primary key says so again, for a pruned inbox.
const INSERT_TASKS: &str = "
    INSERT INTO fulfillment_tasks (event_id, order_id, version, kind)
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::text[])
    ON CONFLICT (event_id) DO NOTHING";

impl Handler for Fulfillment {
    type Event = OrderEvent;

    const PROJECTION: &'static [&'static str] = &["fulfillment_orders", "fulfillment_tasks"];

    async fn apply(&self, transaction: &mut PgConnection, events: &[&OrderEvent]) -> Result<(), Fault> {
        write_orders(transaction, events).await?;
        Ok(open_tasks(transaction, INSERT_TASKS, events, task).await?)
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
        .bind(column(&orders, |o| o.details.map(|d| d.restaurant_id.as_str())))
        .bind(column(&orders, |o| o.details.map(total_quantity)))
        .execute(transaction)
        .await?;
    Ok(())
}

/// Quantities have 32 bits and a value far fewer than 2^31 items, so the sum fits.
fn total_quantity(details: &Details) -> i64 {
    details.items.iter().map(|i| i64::from(i.quantity)).sum()
}

/// What fulfillment does about a change.
fn task(change: &Change) -> &'static str {
    match change {
        Change::Created(_) => "plan",
        Change::Updated { .. } => "replan",
        Change::Confirmed { .. } => "dispatch",
        Change::Cancelled { .. } => "call_off",
    }
}

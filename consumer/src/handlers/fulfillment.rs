//! Fulfillment's side of the orders: where to pick up, for whom, how much, and a task for each thing that
//! happened.

use sqlx::PgConnection;

use super::{
    Handler,
    orders::{latest, open_tasks},
};
use crate::{
    decide::Fault,
    event::{Change, Details, OrderEvent},
};

/// Writes `fulfillment_orders` and `fulfillment_tasks`.
pub(crate) struct Fulfillment;

/// Status and details each have a version of their own, and neither is overwritten by an older one.
const UPSERT_ORDERS: &str = "
    INSERT INTO fulfillment_orders AS mine
        (order_id, status, version, occurred_on, details_version, customer_id, restaurant_id, total_quantity)
    SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::timestamptz[], $5::bigint[], $6::text[],
                         $7::text[], $8::bigint[])
    ON CONFLICT (order_id) DO UPDATE SET
        status = CASE WHEN excluded.version > mine.version THEN excluded.status ELSE mine.status END,
        occurred_on = CASE WHEN excluded.version > mine.version THEN excluded.occurred_on ELSE mine.occurred_on END,
        version = greatest(excluded.version, mine.version),
        customer_id = CASE WHEN excluded.details_version > mine.details_version THEN excluded.customer_id ELSE mine.customer_id END,
        restaurant_id = CASE WHEN excluded.details_version > mine.details_version THEN excluded.restaurant_id ELSE mine.restaurant_id END,
        total_quantity = CASE WHEN excluded.details_version > mine.details_version THEN excluded.total_quantity ELSE mine.total_quantity END,
        details_version = greatest(excluded.details_version, mine.details_version),
        updated_at = now()
    WHERE excluded.version > mine.version OR excluded.details_version > mine.details_version";

/// The inbox already lets an event through only once; the primary key says so again, for a pruned inbox.
const INSERT_TASKS: &str = "
    INSERT INTO fulfillment_tasks (event_id, order_id, version, kind)
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::text[])
    ON CONFLICT (event_id) DO NOTHING";

impl Handler for Fulfillment {
    type Event = OrderEvent;

    async fn apply(&self, transaction: &mut PgConnection, events: &[&OrderEvent]) -> Result<(), Fault> {
        write_orders(transaction, events).await?;
        Ok(open_tasks(transaction, INSERT_TASKS, events, task).await?)
    }
}

async fn write_orders(transaction: &mut PgConnection, events: &[&OrderEvent]) -> sqlx::Result<()> {
    let orders = latest(events);
    sqlx::query(UPSERT_ORDERS)
        .bind(orders.iter().map(|o| o.event.order_id.as_str()).collect::<Vec<_>>())
        .bind(orders.iter().map(|o| o.event.change.status().as_str()).collect::<Vec<_>>())
        .bind(orders.iter().map(|o| o.event.version).collect::<Vec<_>>())
        .bind(orders.iter().map(|o| o.event.occurred_on).collect::<Vec<_>>())
        .bind(orders.iter().map(|o| o.details_version).collect::<Vec<_>>())
        .bind(orders.iter().map(|o| o.details.map(|d| d.customer_id.as_str())).collect::<Vec<_>>())
        .bind(orders.iter().map(|o| o.details.map(|d| d.restaurant_id.as_str())).collect::<Vec<_>>())
        .bind(orders.iter().map(|o| o.details.map(total_quantity)).collect::<Vec<_>>())
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
        Change::Confirmed => "dispatch",
        Change::Cancelled => "call_off",
    }
}

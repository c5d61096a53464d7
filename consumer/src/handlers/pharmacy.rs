//! The pharmacy's side of the orders: what to prepare, and a task for each thing that happened.

use serde_json::Value;
use sqlx::PgConnection;

use super::{
    Handler,
    orders::{latest, open_tasks},
};
use crate::{
    decide::Fault,
    event::{Change, Details, OrderEvent},
};

/// Writes `pharmacy_orders` and `pharmacy_tasks`.
pub(crate) struct Pharmacy;

/// Status and details each have a version of their own, and neither is overwritten by an older one.
const UPSERT_ORDERS: &str = "
    INSERT INTO pharmacy_orders AS mine
        (order_id, status, version, occurred_on, details_version, customer_id, currency, total_amount, items)
    SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::timestamptz[], $5::bigint[], $6::text[],
                         $7::text[], $8::numeric[], $9::jsonb[])
    ON CONFLICT (order_id) DO UPDATE SET
        status = CASE WHEN excluded.version > mine.version THEN excluded.status ELSE mine.status END,
        occurred_on = CASE WHEN excluded.version > mine.version THEN excluded.occurred_on ELSE mine.occurred_on END,
        version = greatest(excluded.version, mine.version),
        customer_id = CASE WHEN excluded.details_version > mine.details_version THEN excluded.customer_id ELSE mine.customer_id END,
        currency = CASE WHEN excluded.details_version > mine.details_version THEN excluded.currency ELSE mine.currency END,
        total_amount = CASE WHEN excluded.details_version > mine.details_version THEN excluded.total_amount ELSE mine.total_amount END,
        items = CASE WHEN excluded.details_version > mine.details_version THEN excluded.items ELSE mine.items END,
        details_version = greatest(excluded.details_version, mine.details_version),
        updated_at = now()
    WHERE excluded.version > mine.version OR excluded.details_version > mine.details_version";

/// The inbox already lets an event through only once; the primary key says so again, for a pruned inbox.
const INSERT_TASKS: &str = "
    INSERT INTO pharmacy_tasks (event_id, order_id, version, kind)
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::text[])
    ON CONFLICT (event_id) DO NOTHING";

impl Handler for Pharmacy {
    type Event = OrderEvent;

    async fn apply(&self, transaction: &mut PgConnection, events: &[&OrderEvent]) -> Result<(), Fault> {
        write_orders(transaction, events).await?;
        Ok(open_tasks(transaction, INSERT_TASKS, events, task).await?)
    }
}

async fn write_orders(transaction: &mut PgConnection, events: &[&OrderEvent]) -> sqlx::Result<()> {
    let orders = latest(events);
    let items = |d: &Details| serde_json::to_value(&d.items);
    let items: Vec<Option<Value>> = orders
        .iter()
        .map(|o| o.details.map(items).transpose())
        .collect::<Result<_, _>>()
        .map_err(|e| sqlx::Error::Encode(e.into()))?;
    sqlx::query(UPSERT_ORDERS)
        .bind(orders.iter().map(|o| o.event.order_id.as_str()).collect::<Vec<_>>())
        .bind(orders.iter().map(|o| o.event.change.status().as_str()).collect::<Vec<_>>())
        .bind(orders.iter().map(|o| o.event.version).collect::<Vec<_>>())
        .bind(orders.iter().map(|o| o.event.occurred_on).collect::<Vec<_>>())
        .bind(orders.iter().map(|o| o.details_version).collect::<Vec<_>>())
        .bind(orders.iter().map(|o| o.details.map(|d| d.customer_id.as_str())).collect::<Vec<_>>())
        .bind(orders.iter().map(|o| o.details.map(|d| d.currency.as_str())).collect::<Vec<_>>())
        .bind(orders.iter().map(|o| o.details.map(|d| d.total_amount)).collect::<Vec<_>>())
        .bind(items)
        .execute(transaction)
        .await?;
    Ok(())
}

/// What the pharmacy does about a change.
fn task(change: &Change) -> &'static str {
    match change {
        Change::Created(_) => "check_stock",
        Change::Updated { .. } => "check_changes",
        Change::Confirmed => "prepare",
        Change::Cancelled => "return_to_stock",
    }
}

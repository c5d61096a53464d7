//! The pharmacy's side of the orders: what to prepare, and a task for each thing that happened.

use sqlx::{PgConnection, types::Json};

use super::orders::{column, latest, open_tasks};
use crate::{
    decide::Fault,
    event::{Change, OrderEvent},
    handler::Handler,
};

/// Writes `pharmacy_orders` and `pharmacy_tasks`.
pub(crate) struct Pharmacy;

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

/// What the pharmacy does about a change.
fn task(change: &Change) -> &'static str {
    match change {
        Change::Created(_) => "check_stock",
        Change::Updated { .. } => "check_changes",
        Change::Confirmed { .. } => "prepare",
        Change::Cancelled { .. } => "return_to_stock",
    }
}

//! The read model: each order as one document, which the consumer answers by HTTP.

mod http;

use axum::Router;
use sqlx::{PgConnection, PgPool, types::Json};

use super::orders::{column, latest};
use crate::{decide::Fault, event::OrderEvent, handler::Handler};

/// Writes `order_views`.
pub(crate) struct OrderView;

/// An event that tells no details leaves those that are there. One that tells them tells the notes, too, by having none.
const UPSERT: &str = "
    INSERT INTO order_views AS mine
        (order_id, status, version, created_at, updated_at, customer_id, restaurant_id, currency, total_amount, items,
         notes, payment_id, cancellation_reason)
    SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::timestamptz[], $5::timestamptz[], $6::text[],
                         $7::text[], $8::text[], $9::numeric[], $10::jsonb[], $11::text[], $12::text[], $13::text[])
    ON CONFLICT (order_id) DO UPDATE SET
        status = excluded.status, version = excluded.version, updated_at = excluded.updated_at,
        customer_id = coalesce(excluded.customer_id, mine.customer_id),
        restaurant_id = coalesce(excluded.restaurant_id, mine.restaurant_id),
        currency = coalesce(excluded.currency, mine.currency),
        total_amount = coalesce(excluded.total_amount, mine.total_amount),
        items = coalesce(excluded.items, mine.items),
        notes = CASE WHEN excluded.items IS NULL THEN mine.notes ELSE excluded.notes END,
        payment_id = coalesce(excluded.payment_id, mine.payment_id),
        cancellation_reason = coalesce(excluded.cancellation_reason, mine.cancellation_reason)";

impl Handler for OrderView {
    type Event = OrderEvent;

    const PROJECTION: &'static [&'static str] = &["order_views"];

    async fn apply(&self, transaction: &mut PgConnection, events: &[&OrderEvent]) -> Result<(), Fault> {
        let orders = latest(events);
        sqlx::query(UPSERT)
            .bind(column(&orders, |o| o.event.order_id.as_str()))
            .bind(column(&orders, |o| o.event.change.status().as_str()))
            .bind(column(&orders, |o| o.event.version))
            .bind(column(&orders, |o| o.first.occurred_on))
            .bind(column(&orders, |o| o.event.occurred_on))
            .bind(column(&orders, |o| o.details.map(|d| d.customer_id.as_str())))
            .bind(column(&orders, |o| o.details.map(|d| d.restaurant_id.as_str())))
            .bind(column(&orders, |o| o.details.map(|d| d.currency.as_str())))
            .bind(column(&orders, |o| o.details.map(|d| d.total_amount)))
            .bind(column(&orders, |o| o.details.map(|d| Json(&d.items))))
            .bind(column(&orders, |o| o.details.and_then(|d| d.notes.as_deref())))
            .bind(column(&orders, |o| o.payment_id))
            .bind(column(&orders, |o| o.reason))
            .execute(transaction)
            .await?;
        Ok(())
    }

    fn router(&self, pool: PgPool) -> Router {
        http::router(pool)
    }
}

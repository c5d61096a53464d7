//! What the handlers of order events do alike.

use sqlx::PgConnection;

use crate::event::{Change, Details, OrderEvent};

/// Opens a task for each event by `insert`, whose parameters are arrays: event ids, order ids, versions, kinds.
pub(super) async fn open_tasks(
    transaction: &mut PgConnection,
    insert: &'static str,
    events: &[&OrderEvent],
    kind: fn(&Change) -> &'static str,
) -> sqlx::Result<()> {
    sqlx::query(insert)
        .bind(events.iter().map(|e| e.id).collect::<Vec<_>>())
        .bind(events.iter().map(|e| e.order_id.as_str()).collect::<Vec<_>>())
        .bind(events.iter().map(|e| e.version).collect::<Vec<_>>())
        .bind(events.iter().map(|e| kind(&e.change)).collect::<Vec<_>>())
        .execute(transaction)
        .await
        .map(drop)
}

/// What a batch says about one order, all its events taken together: one row to write instead of many.
#[derive(Debug, PartialEq)]
pub(super) struct Latest<'e> {
    /// The oldest event.
    pub(super) first: &'e OrderEvent,
    /// The newest event.
    pub(super) event: &'e OrderEvent,
    /// The newest details any of them told.
    pub(super) details: Option<&'e Details>,
    /// How it was paid, if one of them told.
    pub(super) payment_id: Option<&'e str>,
    /// Why it was called off, if one of them told.
    pub(super) reason: Option<&'e str>,
}

/// One [`Latest`] for each order, in the order of their ids: two batches that meet on the same rows then lock
/// them in the same order and do not deadlock.
pub(super) fn latest<'e>(events: &[&'e OrderEvent]) -> Vec<Latest<'e>> {
    let mut sorted = events.to_vec();
    sorted.sort_by(|a, b| (&a.order_id, a.version).cmp(&(&b.order_id, b.version)));
    let mut orders: Vec<Latest<'e>> = Vec::with_capacity(sorted.len());
    for event in sorted {
        if orders.last().is_none_or(|o| o.event.order_id != event.order_id) {
            orders.push(Latest { first: event, event, details: None, payment_id: None, reason: None });
        }
        if let Some(order) = orders.last_mut() {
            order.event = event;
            order.details = event.change.details().or(order.details);
            match &event.change {
                Change::Confirmed { payment_id } => order.payment_id = Some(payment_id),
                Change::Cancelled { reason } => order.reason = Some(reason),
                Change::Created(_) | Change::Updated { .. } => {}
            }
        }
    }
    orders
}

/// One value of each order: what a statement's array takes.
pub(super) fn column<'e, T>(orders: &[Latest<'e>], value: impl Fn(&Latest<'e>) -> T) -> Vec<T> {
    orders.iter().map(value).collect()
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use uuid::Uuid;

    use super::*;
    use crate::event::Status;

    fn event(order: &str, version: i64, change: Change) -> OrderEvent {
        let id = Uuid::new_v4();
        OrderEvent { id, order_id: order.into(), version, occurred_on: DateTime::UNIX_EPOCH, change }
    }

    fn details(customer: &str) -> Details {
        Details {
            customer_id: customer.into(),
            restaurant_id: "r".into(),
            currency: "EUR".into(),
            total_amount: 1.into(),
            items: vec![],
            notes: None,
        }
    }

    #[test]
    fn an_orders_events_fold_into_its_newest_status_and_newest_details() {
        let events = [
            event("b", 1, Change::Created(details("b1"))),
            event("a", 3, Change::Confirmed { payment_id: "p".into() }),
            event("a", 1, Change::Created(details("a1"))),
            event("a", 2, Change::Updated { status: Status::Created, details: details("a2") }),
            event("c", 7, Change::Cancelled { reason: "late".into() }),
        ];
        let folded = latest(&events.iter().collect::<Vec<_>>());
        let said: Vec<_> = folded
            .iter()
            .map(|o| {
                let customer = o.details.map(|d| d.customer_id.as_str());
                let told = (customer, o.payment_id, o.reason);
                (o.event.order_id.as_str(), o.first.version, o.event.version, told)
            })
            .collect();
        assert_eq!(
            said,
            [
                ("a", 1, 3, (Some("a2"), Some("p"), None)),
                ("b", 1, 1, (Some("b1"), None, None)),
                ("c", 7, 7, (None, None, Some("late"))),
            ]
        );
    }
}

//! What is done with an event: one handler to a file. A handler writes its rows inside the transaction that the
//! inbox row is in, and nothing else; it sees each event once, a batch at a time, a key's events in order.

pub(crate) mod fulfillment;
pub(crate) mod pharmacy;

use std::{pin::Pin, str::FromStr, sync::Arc};

use service::Failure;
use sqlx::PgConnection;

use crate::event::{Change, Details, Event};

/// What a handler gives back: a future, because it speaks to the database.
pub(crate) type Applying<'a> = Pin<Box<dyn Future<Output = sqlx::Result<()>> + Send + 'a>>;

/// Applies events to its own tables.
pub(crate) trait Handler: Send + Sync {
    /// Applies events that this group has not applied before, never empty, within the caller's transaction.
    /// An error rolls all of it back; which errors are retried is not the handler's affair.
    fn apply<'a>(&'a self, transaction: &'a mut PgConnection, events: &'a [&'a Event]) -> Applying<'a>;
}

/// The handlers there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Name {
    Pharmacy,
    Fulfillment,
}

impl Name {
    /// As `--handler` spells it; also the default group.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Pharmacy => "pharmacy",
            Self::Fulfillment => "fulfillment",
        }
    }

    /// The handler of this name.
    pub(crate) fn handler(self) -> Arc<dyn Handler> {
        match self {
            Self::Pharmacy => Arc::new(pharmacy::Pharmacy),
            Self::Fulfillment => Arc::new(fulfillment::Fulfillment),
        }
    }
}

impl FromStr for Name {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        [Self::Pharmacy, Self::Fulfillment].into_iter().find(|n| n.as_str() == text).ok_or_else(|| {
            let found = if text.is_empty() { "is not set".into() } else { format!("is {text:?}") };
            Failure::configuration(format!("consumer.handler {found}"))
                .hint("choose one: --handler pharmacy or --handler fulfillment")
        })
    }
}

/// Opens a task for each event by `insert`, whose parameters are arrays: event ids, order ids, versions, kinds.
async fn open_tasks(
    transaction: &mut PgConnection,
    insert: &'static str,
    events: &[&Event],
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
struct Latest<'e> {
    /// The newest event.
    event: &'e Event,
    /// The newest details any of them told, and that event's version (0 without).
    details: Option<&'e Details>,
    details_version: i64,
}

/// One [`Latest`] for each order, in the order of their ids: two batches that meet on the same rows then lock
/// them in the same order and do not deadlock.
fn latest<'e>(events: &[&'e Event]) -> Vec<Latest<'e>> {
    let mut sorted = events.to_vec();
    sorted.sort_by(|a, b| (&a.order_id, a.version).cmp(&(&b.order_id, b.version)));
    let mut orders: Vec<Latest<'e>> = Vec::with_capacity(sorted.len());
    for event in sorted {
        if orders.last().is_none_or(|o| o.event.order_id != event.order_id) {
            orders.push(Latest { event, details: None, details_version: 0 });
        }
        if let Some(order) = orders.last_mut() {
            order.event = event;
            if let Some(details) = event.change.details() {
                (order.details, order.details_version) = (Some(details), event.version);
            }
        }
    }
    orders
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use uuid::Uuid;

    use super::*;
    use crate::event::Status;

    fn event(order: &str, version: i64, change: Change) -> Event {
        let id = Uuid::new_v4();
        Event { id, order_id: order.into(), version, occurred_on: DateTime::UNIX_EPOCH, change }
    }

    fn details(customer: &str) -> Details {
        Details {
            customer_id: customer.into(),
            restaurant_id: "r".into(),
            currency: "EUR".into(),
            total_amount: 1.into(),
            items: vec![],
        }
    }

    #[test]
    fn an_orders_events_fold_into_its_newest_status_and_newest_details() {
        let events = [
            event("b", 1, Change::Created(details("b1"))),
            event("a", 3, Change::Confirmed),
            event("a", 1, Change::Created(details("a1"))),
            event("a", 2, Change::Updated { status: Status::Created, details: details("a2") }),
            event("c", 7, Change::Cancelled),
        ];
        let folded = latest(&events.iter().collect::<Vec<_>>());
        let said: Vec<_> = folded
            .iter()
            .map(|o| {
                let customer = o.details.map(|d| d.customer_id.as_str());
                (o.event.order_id.as_str(), o.event.version, customer, o.details_version)
            })
            .collect();
        assert_eq!(said, [("a", 3, Some("a2"), 2), ("b", 1, Some("b1"), 1), ("c", 7, None, 0)]);
    }
}

//! An order: its lines, its total, its state.

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    Amount, Currency, CustomerId, Event, EventBody, ItemName, MenuItemId, Notes, OrderId, PaymentId, Reason,
    RestaurantId,
};

/// The most lines of an order.
pub const MAX_ITEMS: usize = 200;

/// The most events an order can have: what keeps its history readable.
pub const MAX_VERSION: i32 = 1_000;

/// The most of one item.
pub const MAX_QUANTITY: i32 = 10_000;

/// One line of an order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Item {
    /// What was ordered.
    pub menu_item_id: MenuItemId,
    /// What it is called.
    pub name: ItemName,
    /// Of one.
    pub price: Amount,
    /// How many, from 1.
    pub quantity: i32,
}

/// The sum of price times quantity. Exact: the limits on both and on the number of lines keep it far below
/// what a decimal holds.
pub(crate) fn total(items: &[Item], currency: &Currency) -> Amount {
    let sum: Decimal = items.iter().map(|item| item.price.value() * Decimal::from(item.quantity)).sum();
    Amount::of(sum, currency.decimals())
}

/// What a client orders, parsed: nothing in it can be refused any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewOrder {
    /// The client's own id for it, if it has one.
    pub order_id: Option<OrderId>,
    /// Who orders.
    pub customer_id: CustomerId,
    /// Who prepares it.
    pub restaurant_id: RestaurantId,
    /// Of every price and the total.
    pub currency: Currency,
    /// 1 to [`MAX_ITEMS`] lines.
    pub items: Vec<Item>,
    /// What else should be known.
    pub notes: Option<Notes>,
}

/// What may be done with an order next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Placed; items may still change.
    Created,
    /// Paid for.
    Confirmed,
    /// Being made.
    Preparing,
    /// Waits to be fetched.
    Ready,
    /// Done.
    Delivered,
    /// Called off.
    Cancelled,
}

impl Status {
    /// All of them, in the order of an order's life.
    pub const ALL: [(Self, &'static str); 6] = [
        (Self::Created, "created"),
        (Self::Confirmed, "confirmed"),
        (Self::Preparing, "preparing"),
        (Self::Ready, "ready"),
        (Self::Delivered, "delivered"),
        (Self::Cancelled, "cancelled"),
    ];

    /// As the database and the API write it.
    pub fn as_str(self) -> &'static str {
        Self::ALL[self as usize].1
    }

    /// Where an order may go from here.
    pub fn next(self) -> &'static [Self] {
        match self {
            Self::Created => &[Self::Confirmed, Self::Cancelled],
            Self::Confirmed => &[Self::Preparing, Self::Cancelled],
            Self::Preparing => &[Self::Ready],
            Self::Ready => &[Self::Delivered],
            Self::Delivered | Self::Cancelled => &[],
        }
    }

    /// The status that is written so.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, name)| *name == text).map(|(status, _)| *status)
    }
}

/// The current state of an order, as the API answers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Order {
    /// Which one.
    pub order_id: OrderId,
    /// What may be done with it next.
    pub status: Status,
    /// The version of its last event, from 1.
    pub version: i32,
    /// Who ordered.
    pub customer_id: CustomerId,
    /// Who prepares it.
    pub restaurant_id: RestaurantId,
    /// Of every price and the total.
    pub currency: Currency,
    /// The exact sum over the lines.
    pub total_amount: Amount,
    /// In the order the client gave them.
    pub items: Vec<Item>,
    /// What else should be known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub notes: Option<Notes>,
    /// How it was paid, once it is confirmed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payment_id: Option<PaymentId>,
    /// Why it was called off, if it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cancellation_reason: Option<Reason>,
    /// When it was placed.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
}

impl Order {
    /// The state after the first event of an order; nothing if the event is another.
    pub fn begin(first: &Event) -> Option<Self> {
        let EventBody::OrderCreated(details) = &first.body else { return None };
        let details = details.clone();
        Some(Self {
            order_id: first.aggregate_id.clone(),
            status: Status::Created,
            version: first.version,
            customer_id: details.customer_id,
            restaurant_id: details.restaurant_id,
            currency: details.currency,
            total_amount: details.total_amount,
            items: details.items,
            notes: details.notes,
            payment_id: None,
            cancellation_reason: None,
            created_at: first.occurred_on,
            updated_at: first.occurred_on,
        })
    }

    /// Goes on to the state after the next event.
    pub fn apply(&mut self, event: &Event) {
        self.version = event.version;
        self.updated_at = event.occurred_on;
        match &event.body {
            EventBody::OrderCreated(_) => {}
            EventBody::OrderUpdated { status, details } => {
                let details = details.clone();
                self.status = *status;
                self.customer_id = details.customer_id;
                self.restaurant_id = details.restaurant_id;
                self.currency = details.currency;
                self.total_amount = details.total_amount;
                self.items = details.items;
                self.notes = details.notes;
            }
            EventBody::OrderConfirmed { payment_id } => {
                self.status = Status::Confirmed;
                self.payment_id = Some(payment_id.clone());
            }
            EventBody::OrderCancelled { reason } => {
                self.status = Status::Cancelled;
                self.cancellation_reason = Some(reason.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::{MAX_PRICE, parse_decimal};

    #[test]
    fn every_status_is_read_as_it_is_written() {
        for (status, name) in Status::ALL {
            assert_eq!(Status::parse(status.as_str()), Some(status));
            assert_eq!(serde_json::to_value(status).unwrap(), name);
        }
        assert_eq!(Status::parse("Created"), None);
    }

    fn item(price: &str, quantity: i32, currency: &Currency) -> Item {
        Item {
            menu_item_id: MenuItemId::parse("m").unwrap(),
            name: ItemName::parse("n").unwrap(),
            price: Amount::price(parse_decimal(price).unwrap(), Some(currency)).unwrap(),
            quantity,
        }
    }

    #[test]
    fn the_largest_order_has_a_total() {
        let currency = Currency::parse("CLF").unwrap();
        let items = vec![item(&MAX_PRICE.to_string(), MAX_QUANTITY, &currency); MAX_ITEMS];
        assert_eq!(total(&items, &currency).to_string(), "2000000000000000.0000");
    }

    #[test]
    fn what_floats_get_wrong_is_right() {
        let currency = Currency::default();
        let items = [item("0.1", 1, &currency), item("0.2", 1, &currency), item("1.15", 3, &currency)];
        assert_eq!(total(&items, &currency).to_string(), "3.75");
    }

    proptest! {
        /// The naive model counts in cents, as integers.
        #[test]
        fn the_total_is_the_exact_sum(
            lines in prop::collection::vec((0_i64..=100_000_000_000, 1..=MAX_QUANTITY), 1..=MAX_ITEMS)
        ) {
            let currency = Currency::default();
            let items: Vec<_> =
                lines.iter().map(|(cents, n)| item(&Decimal::new(*cents, 2).to_string(), *n, &currency)).collect();
            let cents: i128 = lines.iter().map(|(cents, n)| i128::from(*cents) * i128::from(*n)).sum();
            prop_assert_eq!(
                total(&items, &currency).to_string(),
                format!("{}.{:02}", cents / 100, cents % 100)
            );
        }
    }
}

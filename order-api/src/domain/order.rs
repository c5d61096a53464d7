//! An order: its lines, its total, its state.

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde::Serialize;

use super::{Amount, Currency, CustomerId, ItemName, MenuItemId, OrderId, RestaurantId};

/// The most lines of an order.
pub const MAX_ITEMS: usize = 200;

/// The most of one item.
pub const MAX_QUANTITY: i32 = 10_000;

/// One line of an order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Item {
    /// What was ordered.
    pub menu_item_id: MenuItemId,
    /// What it is called.
    pub name: ItemName,
    /// Of one.
    pub price: Amount,
    /// 1 to [`MAX_QUANTITY`].
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
    /// Who orders.
    pub customer_id: CustomerId,
    /// Who prepares it.
    pub restaurant_id: RestaurantId,
    /// Of every price and the total.
    pub currency: Currency,
    /// 1 to [`MAX_ITEMS`] lines.
    pub items: Vec<Item>,
}

/// What may be done with an order next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
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
    const ALL: [(Self, &'static str); 6] = [
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

    /// The status that is written so.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, name)| *name == text).map(|(status, _)| *status)
    }
}

/// The current state of an order, as the API answers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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
    /// When it was placed.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
}

impl Order {
    /// Places an order: its first state, of which [`super::Event::created`] tells.
    pub fn place(new: NewOrder, order_id: OrderId, now: DateTime<Utc>) -> Self {
        Self {
            order_id,
            status: Status::Created,
            version: 1,
            customer_id: new.customer_id,
            restaurant_id: new.restaurant_id,
            total_amount: total(&new.items, &new.currency),
            currency: new.currency,
            items: new.items,
            created_at: now,
            updated_at: now,
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

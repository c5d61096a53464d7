//! What the consumers' tables must hold, of the events in the topics: the orders as they are, and the tasks. Pure.
//!
//! Every table has rows of text, by a key; so does what the database is asked for, and one is laid beside the other.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

/// A row: its columns in the table's order, as text.
pub(super) type Row = Vec<Option<String>>;

/// A table of the consumers' database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Table {
    OrderViews,
    PharmacyOrders,
    FulfillmentOrders,
    PharmacyTasks,
    FulfillmentTasks,
}

/// What the events come to.
#[derive(Debug, Default)]
pub(super) struct Fold {
    orders: BTreeMap<String, Order>,
    tasks: BTreeMap<Uuid, Task>,
}

#[derive(Debug)]
struct Order {
    status: String,
    version: i64,
    created: DateTime<Utc>,
    updated: DateTime<Utc>,
    details: Option<Details>,
    payment_id: Option<String>,
    reason: Option<String>,
}

#[derive(Debug)]
struct Task {
    order: String,
    version: i64,
    what: What,
}

#[derive(Debug, Clone, Copy, Deserialize)]
enum What {
    #[serde(rename = "OrderCreated")]
    Created,
    #[serde(rename = "OrderUpdated")]
    Updated,
    #[serde(rename = "OrderConfirmed")]
    Confirmed,
    #[serde(rename = "OrderCancelled")]
    Cancelled,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Event {
    #[serde(rename = "eventId")]
    id: Uuid,
    aggregate_id: String,
    occurred_on: DateTime<Utc>,
    version: i64,
    #[serde(rename = "eventType")]
    what: What,
    status: Option<String>,
    payment_id: Option<String>,
    reason: Option<String>,
    #[serde(flatten)]
    details: Option<Details>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Details {
    customer_id: String,
    restaurant_id: String,
    currency: String,
    total_amount: String,
    items: Vec<Item>,
    notes: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Item {
    menu_item_id: String,
    name: String,
    price: String,
    quantity: u32,
}

impl Fold {
    /// Takes an order's next event, whose id came for the first time.
    ///
    /// # Errors
    /// It is none.
    pub(super) fn apply(&mut self, value: &[u8]) -> Result<(), String> {
        let event: Event = serde_json::from_slice(value).map_err(|error| format!("not an event: {error}"))?;
        let task = Task { order: event.aggregate_id.clone(), version: event.version, what: event.what };
        self.tasks.insert(event.id, task);
        let order = self.orders.entry(event.aggregate_id).or_insert_with(|| Order {
            status: String::new(),
            version: 0,
            created: event.occurred_on,
            updated: event.occurred_on,
            details: None,
            payment_id: None,
            reason: None,
        });
        order.version = event.version;
        order.updated = event.occurred_on;
        order.status = match event.what {
            What::Created => "created".to_owned(),
            What::Updated => event.status.ok_or("an OrderUpdated without a status")?,
            What::Confirmed => "confirmed".to_owned(),
            What::Cancelled => "cancelled".to_owned(),
        };
        match event.what {
            What::Created | What::Updated => {
                order.details = Some(event.details.ok_or("details are missing")?);
            }
            What::Confirmed => order.payment_id = event.payment_id,
            What::Cancelled => order.reason = event.reason,
        }
        Ok(())
    }

    /// A table's rows by their keys, sorted by these as bytes.
    pub(super) fn rows(&self, table: Table) -> Box<dyn Iterator<Item = (String, Row)> + '_> {
        match table {
            Table::PharmacyTasks | Table::FulfillmentTasks => {
                let tasks = self.tasks.iter();
                Box::new(tasks.map(move |(id, task)| (id.to_string(), task.row(table))))
            }
            _ => Box::new(self.orders.iter().map(move |(id, order)| (id.clone(), order.row(table)))),
        }
    }

    /// A number that grows with each event that a table takes in: a table that has it is not behind.
    pub(super) fn progress(&self, table: Table) -> i64 {
        match table {
            Table::PharmacyTasks | Table::FulfillmentTasks => {
                i64::try_from(self.tasks.len()).unwrap_or(i64::MAX)
            }
            _ => self.orders.values().map(|order| order.version).sum(),
        }
    }
}

impl Table {
    pub(super) const ALL: [Self; 5] = [
        Self::OrderViews,
        Self::PharmacyOrders,
        Self::FulfillmentOrders,
        Self::PharmacyTasks,
        Self::FulfillmentTasks,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::OrderViews => "order_views",
            Self::PharmacyOrders => "pharmacy_orders",
            Self::FulfillmentOrders => "fulfillment_orders",
            Self::PharmacyTasks => "pharmacy_tasks",
            Self::FulfillmentTasks => "fulfillment_tasks",
        }
    }

    /// What rows are sorted by.
    pub(super) fn key(self) -> &'static str {
        match self {
            Self::PharmacyTasks | Self::FulfillmentTasks => "event_id",
            _ => "order_id",
        }
    }

    pub(super) fn columns(self) -> &'static [&'static str] {
        match self {
            Self::OrderViews => &[
                "status",
                "version",
                "created_at",
                "updated_at",
                "customer_id",
                "restaurant_id",
                "currency",
                "total_amount",
                "items",
                "notes",
                "payment_id",
                "cancellation_reason",
            ],
            Self::PharmacyOrders => {
                &["status", "version", "occurred_on", "customer_id", "currency", "total_amount", "items"]
            }
            Self::FulfillmentOrders => {
                &["status", "version", "occurred_on", "customer_id", "restaurant_id", "total_quantity"]
            }
            Self::PharmacyTasks | Self::FulfillmentTasks => &["order_id", "version", "kind"],
        }
    }

    /// What [`Fold::progress`] is in the database.
    pub(super) fn progress(self) -> &'static str {
        match self {
            Self::PharmacyTasks | Self::FulfillmentTasks => "count(*)",
            _ => "coalesce(sum(version), 0)::int8",
        }
    }
}

impl Order {
    fn row(&self, table: Table) -> Row {
        let detail = |of: fn(&Details) -> String| self.details.as_ref().map(of);
        let customer = detail(|d| d.customer_id.clone());
        let restaurant = detail(|d| d.restaurant_id.clone());
        let currency = detail(|d| d.currency.clone());
        let total = detail(|d| d.total_amount.clone());
        let items = detail(|d| d.items.iter().map(Item::json).collect::<Value>().to_string());
        let mut row = vec![Some(self.status.clone()), Some(self.version.to_string())];
        let updated = Some(microseconds(self.updated));
        row.extend(match table {
            Table::OrderViews => vec![
                Some(microseconds(self.created)),
                updated,
                customer,
                restaurant,
                currency,
                total,
                items,
                self.details.as_ref().and_then(|d| d.notes.clone()),
                self.payment_id.clone(),
                self.reason.clone(),
            ],
            Table::PharmacyOrders => vec![updated, customer, currency, total, items],
            _ => {
                let quantity =
                    detail(|d| d.items.iter().map(|i| u64::from(i.quantity)).sum::<u64>().to_string());
                vec![updated, customer, restaurant, quantity]
            }
        });
        row
    }
}

impl Task {
    fn row(&self, table: Table) -> Row {
        let kind = match (table, self.what) {
            (Table::FulfillmentTasks, What::Created) => "plan",
            (Table::FulfillmentTasks, What::Updated) => "replan",
            (Table::FulfillmentTasks, What::Confirmed) => "dispatch",
            (Table::FulfillmentTasks, What::Cancelled) => "call_off",
            (_, What::Created) => "check_stock",
            (_, What::Updated) => "check_changes",
            (_, What::Confirmed) => "prepare",
            (_, What::Cancelled) => "return_to_stock",
        };
        vec![Some(self.order.clone()), Some(self.version.to_string()), Some(kind.to_owned())]
    }
}

impl Item {
    fn json(&self) -> Value {
        json!({"menuItemId": self.menu_item_id, "name": self.name, "price": self.price, "quantity": self.quantity})
    }
}

/// Since 1970, as the database is asked for times.
fn microseconds(time: DateTime<Utc>) -> String {
    time.timestamp_micros().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(name: &str) -> Vec<u8> {
        let path = format!("{}/../contracts/events/{name}.example.json", env!("CARGO_MANIFEST_DIR"));
        std::fs::read(path).unwrap()
    }

    fn row(fold: &Fold, table: Table) -> Vec<(String, String)> {
        let rows: Vec<_> = fold.rows(table).collect();
        let text = |row: Row| row.into_iter().map(|v| v.unwrap_or("-".into())).collect::<Vec<_>>().join(" ");
        rows.into_iter().map(|(key, row)| (key, text(row))).collect()
    }

    #[test]
    fn the_golden_examples_come_to_one_order_and_four_tasks() {
        let mut fold = Fold::default();
        for name in ["OrderCreated", "OrderUpdated", "OrderConfirmed"] {
            fold.apply(&example(name)).unwrap();
        }
        let id = "01936d2e-7bff-7c31-b0aa-5d6e7f809101";
        let items = r#"[{"menuItemId":"paracetamol-500","name":"Paracetamol 500 mg","price":"6.25","quantity":2},{"menuItemId":"vitamin-c","name":"Vitamin C, 20 tablets","price":"3.99","quantity":1}]"#;
        let view = |rest: &str| {
            let first = "1795262400123456";
            format!("{first} {rest} customer-1 restaurant-1 EUR 16.49 {items} Ring twice payment-1")
        };
        assert_eq!(
            row(&fold, Table::OrderViews),
            [(id.to_owned(), format!("confirmed 3 {} -", view("1795262410123456")))]
        );
        fold.apply(&example("OrderCancelled")).unwrap();
        assert_eq!(
            row(&fold, Table::OrderViews)[0].1,
            format!("cancelled 4 {} The customer changed their mind", view("1795262415123456"))
        );
        let pharmacy = format!("cancelled 4 1795262415123456 customer-1 EUR 16.49 {items}");
        assert_eq!(row(&fold, Table::PharmacyOrders)[0].1, pharmacy);
        let fulfillment = "cancelled 4 1795262415123456 customer-1 restaurant-1 3";
        assert_eq!(row(&fold, Table::FulfillmentOrders)[0].1, fulfillment);
        let kinds = |table| {
            row(&fold, table)
                .into_iter()
                .map(|(_, row)| row.replace(id, "").trim().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            kinds(Table::PharmacyTasks),
            ["1 check_stock", "2 check_changes", "3 prepare", "4 return_to_stock"]
        );
        assert_eq!(kinds(Table::FulfillmentTasks), ["1 plan", "2 replan", "3 dispatch", "4 call_off"]);
        for table in Table::ALL {
            assert_eq!(fold.progress(table), 4);
            assert!(fold.rows(table).all(|(_, row)| row.len() == table.columns().len()));
        }
    }

    #[test]
    fn what_is_no_event_is_told() {
        let mut fold = Fold::default();
        assert!(fold.apply(b"{}").unwrap_err().contains("not an event"));
        assert!(fold.apply(b"").is_err());
    }
}

//! What happened to an order, as consumers are told. `contracts/events/` says what each event must hold.

use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::{Amount, Currency, CustomerId, Item, Order, OrderId, RestaurantId};

/// Which event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum EventType {
    /// An order was placed.
    OrderCreated,
}

impl EventType {
    /// As it is written everywhere.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::OrderCreated => "OrderCreated",
        }
    }
}

/// An event: the envelope every one has, and what it says.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// Unique to the event; also the outbox row's id.
    pub event_id: Uuid,
    /// Which order.
    pub aggregate_id: OrderId,
    /// When, in UTC.
    pub occurred_on: DateTime<Utc>,
    /// Counts the order's events from 1.
    pub version: i32,
    /// Which event.
    pub event_type: EventType,
    #[serde(flatten)]
    body: Body,
}

#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
enum Body {
    #[serde(rename_all = "camelCase")]
    Created {
        customer_id: CustomerId,
        restaurant_id: RestaurantId,
        currency: Currency,
        total_amount: Amount,
        items: Vec<Item>,
    },
}

impl Event {
    /// Tells that the order was placed.
    pub fn created(order: &Order, event_id: Uuid) -> Self {
        Self {
            event_id,
            aggregate_id: order.order_id.clone(),
            occurred_on: order.created_at,
            version: order.version,
            event_type: EventType::OrderCreated,
            body: Body::Created {
                customer_id: order.customer_id.clone(),
                restaurant_id: order.restaurant_id.clone(),
                currency: order.currency.clone(),
                total_amount: order.total_amount,
                items: order.items.clone(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;

    use super::*;
    use crate::domain::{ItemName, MenuItemId, NewOrder, parse_decimal};

    const EVENTS: [&str; 4] = ["OrderCreated", "OrderUpdated", "OrderConfirmed", "OrderCancelled"];

    fn contract(name: &str) -> Value {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../contracts/events").join(name);
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap()
    }

    fn validator(event: &str) -> jsonschema::Validator {
        jsonschema::options()
            .should_validate_formats(true)
            .build(&contract(&format!("{event}.schema.json")))
            .unwrap()
    }

    fn problems(event: &str, value: &Value) -> Vec<String> {
        validator(event).iter_errors(value).map(|e| format!("{}: {e}", e.instance_path())).collect()
    }

    #[test]
    fn every_example_is_what_its_schema_says() {
        for event in EVENTS {
            let example = contract(&format!("{event}.example.json"));
            assert_eq!(problems(event, &example), Vec::<String>::new(), "{event}");
            assert_eq!(example["eventType"], event);
        }
    }

    #[test]
    fn the_schemas_refuse_what_breaks_a_consumer() {
        for event in EVENTS {
            let example = contract(&format!("{event}.example.json"));
            let schema = contract(&format!("{event}.schema.json"));
            for field in schema["required"].as_array().unwrap() {
                let mut broken = example.clone();
                broken.as_object_mut().unwrap().remove(field.as_str().unwrap()).unwrap();
                assert!(!problems(event, &broken).is_empty(), "{event} without {field}");
            }
            for (field, wrong) in [("eventId", "x"), ("occurredOn", "yesterday"), ("aggregateId", "a b")] {
                let mut broken = example.clone();
                broken[field] = wrong.into();
                assert!(!problems(event, &broken).is_empty(), "{event} with {field} = {wrong}");
            }
        }
        let mut floats = contract("OrderCreated.example.json");
        floats["totalAmount"] = serde_json::json!(12.5);
        assert!(!problems("OrderCreated", &floats).is_empty());
    }

    /// Our own event for the order of the golden example is the golden example, to the last field.
    #[test]
    fn order_created_is_the_golden_example() {
        let example = contract("OrderCreated.example.json");
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let line = &example["items"][0];
        let new = NewOrder {
            customer_id: CustomerId::parse(text(&example["customerId"])).unwrap(),
            restaurant_id: RestaurantId::parse(text(&example["restaurantId"])).unwrap(),
            currency: Currency::default(),
            items: vec![Item {
                menu_item_id: MenuItemId::parse(text(&line["menuItemId"])).unwrap(),
                name: ItemName::parse(text(&line["name"])).unwrap(),
                price: Amount::price(parse_decimal("6.25").unwrap(), Some(&Currency::default())).unwrap(),
                quantity: 2,
            }],
        };
        let now = text(&example["occurredOn"]).parse().unwrap();
        let order = Order::place(new, OrderId::parse(text(&example["aggregateId"])).unwrap(), now);
        let event = Event::created(&order, text(&example["eventId"]).parse().unwrap());
        assert_eq!(serde_json::to_value(&event).unwrap(), example);
        assert_eq!(event.event_type.as_str(), "OrderCreated");
    }
}

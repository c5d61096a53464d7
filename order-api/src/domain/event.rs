//! What happened to an order, as consumers are told. `contracts/events/` says what each event must hold.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    Amount, Currency, CustomerId, Item, NewOrder, Notes, Order, OrderId, PaymentId, Reason, RestaurantId,
    Status, total,
};

/// An event: the envelope every one has, and what it says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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
    /// What happened; its name is `eventType`.
    #[serde(flatten)]
    pub body: EventBody,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "eventType")]
pub enum EventBody {
    /// It was placed.
    OrderCreated(Details),
    /// Its items, its notes or its status changed; told is all of it as it is now.
    OrderUpdated {
        /// Where it stands now.
        status: Status,
        /// What is ordered now.
        #[serde(flatten)]
        details: Details,
    },
    /// It was paid for.
    #[serde(rename_all = "camelCase")]
    OrderConfirmed {
        /// How.
        payment_id: PaymentId,
    },
    /// It was called off.
    OrderCancelled {
        /// Why.
        reason: Reason,
    },
}

/// What is ordered, by whom and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Details {
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
}

impl EventBody {
    /// The type's name, as it is written everywhere.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::OrderCreated(_) => "OrderCreated",
            Self::OrderUpdated { .. } => "OrderUpdated",
            Self::OrderConfirmed { .. } => "OrderConfirmed",
            Self::OrderCancelled { .. } => "OrderCancelled",
        }
    }
}

impl Details {
    /// Those of an order as it is.
    pub fn of(order: &Order) -> Self {
        Self {
            customer_id: order.customer_id.clone(),
            restaurant_id: order.restaurant_id.clone(),
            currency: order.currency.clone(),
            total_amount: order.total_amount,
            items: order.items.clone(),
            notes: order.notes.clone(),
        }
    }
}

impl Event {
    /// The first event of an order: it is placed.
    pub fn created(new: NewOrder, event_id: Uuid, now: DateTime<Utc>) -> Self {
        let details = Details {
            total_amount: total(&new.items, &new.currency),
            customer_id: new.customer_id,
            restaurant_id: new.restaurant_id,
            currency: new.currency,
            items: new.items,
            notes: new.notes,
        };
        Self {
            event_id,
            aggregate_id: new.order_id.unwrap_or_else(OrderId::generate),
            occurred_on: now,
            version: 1,
            body: EventBody::OrderCreated(details),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;

    use super::*;

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

    /// What is read from a golden example is written as that example again, to the last field.
    #[test]
    fn our_events_are_the_golden_examples() {
        for name in EVENTS {
            let example = contract(&format!("{name}.example.json"));
            let event: Event = serde_json::from_value(example.clone()).unwrap();
            assert_eq!(serde_json::to_value(&event).unwrap(), example);
            assert_eq!(event.body.type_name(), name);
        }
    }
}

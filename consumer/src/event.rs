//! Record → event: parse, don't validate. What leaves here is applied without another check; what cannot is a
//! [`Poison`] that says which field and why. Total: any bytes whatever give one or the other.
//!
//! The contract is `contracts/events/`. Unknown fields are ignored, so that producers may add some; a decimal is
//! read from a JSON string or number, exactly, never through a float.

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::{
    decide::{Poison, Reason},
    fields::{Field, amount, bad_value, excerpt, id, integer, object, present, text, time, uuid, wrong_type},
    record::{Event, Record},
};

/// The newest `schemaVersion` we understand. A body without one is of version 1.
const SCHEMA_VERSION: i64 = 1;

/// Something that happened to an order.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct OrderEvent {
    /// Unique to the event: what the inbox remembers.
    pub(crate) id: Uuid,
    pub(crate) order_id: String,
    /// Counts the order's events, from 1.
    pub(crate) version: i64,
    pub(crate) occurred_on: DateTime<Utc>,
    pub(crate) change: Change,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Change {
    Created(Details),
    Updated { status: Status, details: Details },
    Confirmed { payment_id: String },
    Cancelled { reason: String },
}

/// What was ordered, by whom and where.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Details {
    pub(crate) customer_id: String,
    pub(crate) restaurant_id: String,
    /// ISO 4217.
    pub(crate) currency: String,
    pub(crate) total_amount: Decimal,
    /// Never empty.
    pub(crate) items: Vec<Item>,
    /// For people.
    pub(crate) notes: Option<String>,
}

/// One line of an order.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Item {
    pub(crate) menu_item_id: String,
    pub(crate) name: String,
    /// Of one.
    pub(crate) price: Decimal,
    /// From 1.
    pub(crate) quantity: u32,
}

/// Where an order stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Created,
    Confirmed,
    Preparing,
    Ready,
    Delivered,
    Cancelled,
}

impl Status {
    /// All of them, in the order of an order's life.
    pub(crate) const ALL: [Self; 6] =
        [Self::Created, Self::Confirmed, Self::Preparing, Self::Ready, Self::Delivered, Self::Cancelled];

    /// As the events and the tables spell it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Confirmed => "confirmed",
            Self::Preparing => "preparing",
            Self::Ready => "ready",
            Self::Delivered => "delivered",
            Self::Cancelled => "cancelled",
        }
    }

    /// The status that is spelt so.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == text)
    }
}

impl Change {
    /// As `eventType` spells it.
    pub(crate) fn type_name(&self) -> &'static str {
        match self {
            Self::Created(_) => "OrderCreated",
            Self::Updated { .. } => "OrderUpdated",
            Self::Confirmed { .. } => "OrderConfirmed",
            Self::Cancelled { .. } => "OrderCancelled",
        }
    }

    /// Where the order stands after it.
    pub(crate) fn status(&self) -> Status {
        match self {
            Self::Created(_) => Status::Created,
            Self::Updated { status, .. } => *status,
            Self::Confirmed { .. } => Status::Confirmed,
            Self::Cancelled { .. } => Status::Cancelled,
        }
    }

    /// What it says was ordered, if it says.
    pub(crate) fn details(&self) -> Option<&Details> {
        match self {
            Self::Created(details) | Self::Updated { details, .. } => Some(details),
            Self::Confirmed { .. } | Self::Cancelled { .. } => None,
        }
    }
}

/// The body with every value still as its JSON text: which one is wrong, and how, is found field by field.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    #[serde(borrow)]
    schema_version: Option<&'a RawValue>,
    event_id: Option<&'a RawValue>,
    aggregate_id: Option<&'a RawValue>,
    occurred_on: Option<&'a RawValue>,
    version: Option<&'a RawValue>,
    event_type: Option<&'a RawValue>,
    status: Option<&'a RawValue>,
    customer_id: Option<&'a RawValue>,
    restaurant_id: Option<&'a RawValue>,
    currency: Option<&'a RawValue>,
    total_amount: Option<&'a RawValue>,
    items: Option<&'a RawValue>,
    notes: Option<&'a RawValue>,
    payment_id: Option<&'a RawValue>,
    reason: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ItemBody<'a> {
    #[serde(borrow)]
    menu_item_id: Option<&'a RawValue>,
    name: Option<&'a RawValue>,
    price: Option<&'a RawValue>,
    quantity: Option<&'a RawValue>,
}

impl Event for OrderEvent {
    const VERSIONED: bool = true;

    fn parse(record: &Record<'_>) -> Result<Self, Poison> {
        parse(record.key, record.value)
    }

    fn id(&self) -> Uuid {
        self.id
    }

    fn type_name(&self) -> &'static str {
        self.change.type_name()
    }

    fn version(&self) -> Option<(&str, i64)> {
        Some((&self.order_id, self.version))
    }
}

/// The event in a record's key and value.
fn parse(key: Option<&[u8]>, value: Option<&[u8]>) -> Result<OrderEvent, Poison> {
    let key = key.ok_or_else(|| Poison::new(Reason::NoKey, "the record has no key"))?;
    let value = value.ok_or_else(|| Poison::new(Reason::NoValue, "the record's value is NULL"))?;
    let body: Body<'_> = object("the value", value)?;
    // Before anything else is looked at: a newer version may have renamed it.
    if let Some(raw) = body.schema_version {
        let version = integer(Field("schemaVersion", Some(raw)))?;
        if version > SCHEMA_VERSION {
            return Err(Poison::new(
                Reason::UnsupportedSchema,
                format!(
                    "schemaVersion {version} is newer than {SCHEMA_VERSION}, the newest this consumer knows"
                ),
            ));
        }
    }
    let kind = text(Field("eventType", body.event_type))?;
    let change = change(&kind, &body)?;
    let version = integer(Field("version", body.version))?;
    if version < 1 {
        return Err(bad_value("version", "must be 1 or more"));
    }
    let event = OrderEvent {
        id: uuid(Field("eventId", body.event_id))?,
        order_id: id(Field("aggregateId", body.aggregate_id))?,
        version,
        occurred_on: time(Field("occurredOn", body.occurred_on))?,
        change,
    };
    if key != event.order_id.as_bytes() {
        return Err(Poison::new(
            Reason::KeyMismatch,
            format!("the key is {:?}, aggregateId is {}", excerpt(key), event.order_id),
        ));
    }
    Ok(event)
}

fn change(kind: &str, body: &Body<'_>) -> Result<Change, Poison> {
    match kind {
        "OrderCreated" => Ok(Change::Created(details(body)?)),
        "OrderUpdated" => {
            Ok(Change::Updated { status: status(Field("status", body.status))?, details: details(body)? })
        }
        "OrderConfirmed" => Ok(Change::Confirmed { payment_id: id(Field("paymentId", body.payment_id))? }),
        "OrderCancelled" => Ok(Change::Cancelled { reason: text(Field("reason", body.reason))? }),
        other => {
            Err(Poison::new(Reason::UnknownType, format!("eventType is {:?}", excerpt(other.as_bytes()))))
        }
    }
}

fn details(body: &Body<'_>) -> Result<Details, Poison> {
    let currency = text(Field("currency", body.currency))?;
    if currency.len() != 3 || !currency.bytes().all(|b| b.is_ascii_uppercase()) {
        return Err(bad_value("currency", "must be three capital letters (ISO 4217)"));
    }
    let raw_items = present(Field("items", body.items))?;
    let raw_items: Vec<&RawValue> =
        serde_json::from_str(raw_items.get()).map_err(|_| wrong_type("items", "an array", raw_items))?;
    if raw_items.is_empty() {
        return Err(bad_value("items", "must not be empty"));
    }
    Ok(Details {
        customer_id: id(Field("customerId", body.customer_id))?,
        restaurant_id: id(Field("restaurantId", body.restaurant_id))?,
        currency,
        total_amount: amount(Field("totalAmount", body.total_amount))?,
        items: raw_items.into_iter().map(item).collect::<Result<_, _>>()?,
        notes: body.notes.map(|raw| text(Field("notes", Some(raw)))).transpose()?,
    })
}

fn item(raw: &RawValue) -> Result<Item, Poison> {
    let body: ItemBody<'_> = object("an item of items", raw.get().as_bytes())?;
    let quantity = integer(Field("quantity", body.quantity))?;
    let quantity = u32::try_from(quantity)
        .ok()
        .filter(|q| *q > 0)
        .ok_or_else(|| bad_value("quantity", "must be from 1 to 4294967295"))?;
    Ok(Item {
        menu_item_id: id(Field("menuItemId", body.menu_item_id))?,
        name: text(Field("name", body.name))?,
        price: amount(Field("price", body.price))?,
        quantity,
    })
}

fn status(field: Field<'_>) -> Result<Status, Poison> {
    let text = text(field)?;
    Status::parse(&text)
        .ok_or_else(|| bad_value(field.0, &format!("is {:?}, no status we know", excerpt(text.as_bytes()))))
}

#[cfg(test)]
#[path = "event_tests.rs"]
mod tests;

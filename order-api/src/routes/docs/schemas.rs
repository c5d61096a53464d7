//! What bodies look like. The limits are the constants by which the parsers decide.

use rust_decimal::prelude::ToPrimitive;
use serde_json::{Value, json};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, Schema},
};

use crate::domain::{
    Amount, Currency, CustomerId, Headers, ItemName, KafkaName, MAX_ACK_TIMEOUT_SECONDS, MAX_GROUPS,
    MAX_HEADER_CHARS, MAX_HEADER_NAME_BYTES, MAX_HEADERS, MAX_ID_BYTES, MAX_ITEMS, MAX_KAFKA_NAME_BYTES,
    MAX_MESSAGE_KEY_CHARS, MAX_NAME_CHARS, MAX_NOTES_CHARS, MAX_PRICE, MAX_QUANTITY, MAX_REASON_CHARS,
    MAX_VERSION, MenuItemId, MessageKey, NewMessage, NewOrder, Notes, OrderId, Payload, PaymentId, Reason,
    RestaurantId, Status, Update,
};
use crate::routes::{
    instances,
    query::{DEFAULT_LIMIT, MAX_LIMIT},
};

/// A decimal in a string. An exponent is taken too, but who would write one.
const DECIMAL: &str = r"^(0|[1-9][0-9]{0,15})(\.[0-9]{1,4})?$";

/// An amount as we write it.
const AMOUNT: &str = r"^(0|[1-9][0-9]*)(\.[0-9]+)?$";

/// Control characters, as the inside of a class.
const CONTROLS: &str = r"\x00-\x1f\x7f-\x9f";

/// Control characters but line breaks and tabs.
const CONTROLS_IN_A_LINE: &str = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f";

macro_rules! schemas {
    ($($type:ty, $name:literal => $schema:expr;)+) => {$(
        impl PartialSchema for $type {
            fn schema() -> RefOr<Schema> {
                serde_json::from_value($schema).unwrap_or_default()
            }
        }

        impl ToSchema for $type {
            fn name() -> std::borrow::Cow<'static, str> {
                $name.into()
            }
        }
    )+};
}

schemas! {
    OrderId, "OrderId" => id("Which order.");
    CustomerId, "CustomerId" => id("Who orders.");
    RestaurantId, "RestaurantId" => id("Who prepares the order.");
    MenuItemId, "MenuItemId" => id("What is ordered.");
    PaymentId, "PaymentId" => id("How it was paid, by the payment system's own id.");
    ItemName, "ItemName" => text("What an item is called, for people.", MAX_NAME_CHARS, CONTROLS);
    Notes, "Notes" => text("What the customer wants known.", MAX_NOTES_CHARS, CONTROLS_IN_A_LINE);
    Reason, "Reason" => text("Why an order was called off.", MAX_REASON_CHARS, CONTROLS_IN_A_LINE);
    Currency, "Currency" => json!({
        "type": "string", "minLength": 3, "maxLength": 3, "pattern": "^[A-Z]+$", "description": "ISO 4217.",
    });
    Amount, "Amount" => json!({
        "type": "string", "pattern": AMOUNT,
        "description": "An exact decimal with the currency's number of decimals.",
    });
    Limit, "Limit" => json!({"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT});
    Version, "Version" => json!({"type": "integer", "minimum": 1, "maximum": MAX_VERSION});
    NewOrder, "NewOrder" => object(&["customerId", "restaurantId", "items"], json!({
        "orderId": optional(of("OrderId"), "Given by the client; a new one if it is absent."),
        "customerId": of("CustomerId"),
        "restaurantId": of("RestaurantId"),
        "currency": optional(of("Currency"), "EUR if it is absent."),
        "totalAmount": optional(decimal(None), "If it is given, it must be the sum of price times quantity."),
        "items": items(),
        "notes": optional(of("Notes"), "What the customer wants known."),
    }));
    Update, "OrderUpdate" => {
        let mut update = object(&[], json!({
            "items": items(),
            "notes": optional(of("Notes"), "Null takes them away."),
        }));
        update["minProperties"] = 1.into();
        update
    };
    StatusChange, "StatusChange" => object(&["status"], json!({
        "status": {"type": "string", "enum": settable()},
    }));
    Confirmation, "Confirmation" => object(&["paymentId"], json!({"paymentId": of("PaymentId")}));
    InstanceName, "InstanceName" => name("What an instance is called.", "._-");
    Beat, "Heartbeat" => object(&["service", "version", "started", "state"], json!({
        "service": name("Of which service it is.", "._-"),
        "version": name("Of which version.", ".+~_-"),
        "started": {"type": "string", "format": "date-time", "description": "By its own clock."},
        "state": name("How it is, in one word.", "._-"),
    }));
    KafkaName, "KafkaName" => json!({
        "type": "string", "minLength": 1, "maxLength": MAX_KAFKA_NAME_BYTES, "pattern": "^[A-Za-z0-9._-]+$",
        "description": "What a consumer group is called.",
    });
    MessageKey, "MessageKey" => text(
        "The record's key: messages with the same one keep their order.", MAX_MESSAGE_KEY_CHARS, CONTROLS,
    );
    Payload, "Payload" => json!({
        "type": ["string", "number", "boolean", "array", "object"],
        "description": "Any JSON but null: without U+0000 and repeated names, nested at most 100 deep, with numbers that a \
                        float of 64 bits can come near.",
    });
    Headers, "Headers" => json!({
        "type": "object", "maxProperties": MAX_HEADERS,
        "propertyNames": {"type": "string", "minLength": 1, "maxLength": MAX_HEADER_NAME_BYTES, "pattern": "^[A-Za-z0-9._-]+$"},
        "additionalProperties": {"type": "string", "maxLength": MAX_HEADER_CHARS, "pattern": format!("^[^{CONTROLS}]*$")},
        "description": "The record's, besides those of the order system, whose names are reserved.",
    });
    NewMessage, "NewMessage" => object(&["topic", "payload"], json!({
        "topic": topic(),
        "key": optional(of("MessageKey"), "The message's id if it is absent."),
        "payload": of("Payload"),
        "headers": optional(of("Headers"), "None if it is absent."),
        "requireAck": optional(
            json!({
                "type": "array", "minItems": 1, "maxItems": MAX_GROUPS, "uniqueItems": true, "items": of("KafkaName"),
            }),
            "The consumer groups that have to acknowledge it; none if it is absent.",
        ),
        "ackTimeout": optional(
            json!({"type": "integer", "minimum": 1, "maximum": MAX_ACK_TIMEOUT_SECONDS}),
            "How long its first attempt waits for acknowledgements, in seconds; each later one waits twice as long.",
        ),
    }));
    ShortMessage, "ShortMessage" => object(&["topic", "message", "consumerGroup"], json!({
        "topic": topic(), "message": of("Payload"), "consumerGroup": of("KafkaName"),
    }));
    Nothing, "Nothing" => object(&[], json!({}));
    Cancellation, "Cancellation" => object(&["reason"], json!({"reason": of("Reason")}));
}

/// The body of a heartbeat.
pub(in crate::routes) struct Beat;

/// What an instance is called.
pub(in crate::routes) struct InstanceName;

/// How many elements of a list are wanted.
pub(in crate::routes) struct Limit;

/// A version of an order.
pub(in crate::routes) struct Version;

/// The body of `PUT /api/orders/{id}/status`.
pub(in crate::routes) struct StatusChange;

/// The body of `POST /api/orders/{id}/confirm`.
pub(in crate::routes) struct Confirmation;

/// The body of `POST /api/orders/{id}/cancel`.
pub(in crate::routes) struct Cancellation;

/// The body of `POST /api/messages/send`.
pub(in crate::routes) struct ShortMessage;

/// The body of a request that says everything by its path.
pub(in crate::routes) struct Nothing;

fn topic() -> Value {
    json!({"type": "string", "description": "One of those that this service's configuration allows (messages.topics)."})
}

fn id(about: &str) -> Value {
    json!({
        "type": "string", "minLength": 1, "maxLength": MAX_ID_BYTES, "pattern": "^[A-Za-z0-9_-]+$",
        "description": about,
    })
}

/// Letters, digits and these characters.
fn name(about: &str, also: &str) -> Value {
    json!({
        "type": "string", "minLength": 1, "maxLength": instances::MAX_CHARS,
        "pattern": format!("^[A-Za-z0-9{also}]+$"), "description": about,
    })
}

/// Text for people: not blank, and without these control characters.
fn text(about: &str, most_chars: usize, controls: &str) -> Value {
    json!({
        "type": "string", "minLength": 1, "maxLength": most_chars, "description": about,
        "pattern": format!(r"^[^{controls}]*[^\s{controls}][^{controls}]*$"),
    })
}

/// The statuses that have no route of their own.
fn settable() -> Vec<&'static str> {
    let others = Status::ALL.iter().filter(|(s, _)| !matches!(s, Status::Confirmed | Status::Cancelled));
    others.map(|(_, name)| *name).collect()
}

fn of(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn object(required: &[&str], properties: Value) -> Value {
    let mut object = json!({"type": "object", "additionalProperties": false});
    object["properties"] = properties;
    object["required"] = required.into();
    object
}

/// Null is the same as none.
fn optional(schema: Value, about: &str) -> Value {
    let mut optional = json!({"description": about});
    optional["anyOf"] = vec![schema, json!({"type": "null"})].into();
    optional
}

fn items() -> Value {
    let item = object(
        &["menuItemId", "name", "price", "quantity"],
        json!({
            "menuItemId": of("MenuItemId"),
            "name": of("ItemName"),
            "price": decimal(MAX_PRICE.to_u64()),
            "quantity": {"type": "integer", "minimum": 1, "maximum": MAX_QUANTITY},
        }),
    );
    json!({"type": "array", "minItems": 1, "maxItems": MAX_ITEMS, "items": item})
}

/// A number, or a string that holds one. How many decimals it may have depends on the currency, which a schema cannot
/// say.
fn decimal(most: Option<u64>) -> Value {
    let mut number = json!({"type": "number"});
    if let Some(most) = most {
        number["minimum"] = 0.into();
        number["maximum"] = most.into();
    }
    json!({
        "anyOf": [number, {"type": "string", "pattern": DECIMAL}],
        "description": "With no more decimals than the currency has. A number is read exactly, not as a float.",
    })
}

/// Whether the process lives.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes an answer of the service crate")]
pub(super) struct Live {
    live: bool,
}

/// Whether it can do its work.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes an answer of the service crate")]
pub(super) struct Readiness {
    ready: bool,
    /// One word, such as `serving` or `draining`.
    state: String,
    /// Why it is not ready.
    detail: Option<String>,
}

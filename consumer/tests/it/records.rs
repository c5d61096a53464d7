//! What tests write to topics.

use serde_json::{Value, json};
use uuid::Uuid;

/// A record to write.
#[derive(Debug, Clone, Default)]
pub(crate) struct Record {
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: Option<Vec<u8>>,
    pub(crate) headers: Vec<(String, Vec<u8>)>,
    pub(crate) partition: Option<i32>,
}

impl Record {
    /// A body under its own order's key, with the headers the relay gives it.
    pub(crate) fn of(body: &Value) -> Self {
        let text = |field: &str| body[field].as_str().unwrap_or_default().as_bytes().to_vec();
        Self {
            key: Some(text("aggregateId")),
            value: Some(body.to_string().into_bytes()),
            headers: vec![("id".into(), text("eventId")), ("type".into(), text("eventType"))],
            partition: None,
        }
    }

    /// The same as `consumer dlq redrive` writes it, which was at this offset of a topic's partition.
    pub(crate) fn redriven(
        &self,
        topic: &str,
        partition: i32,
        offset: i64,
        number: i32,
        action: &str,
    ) -> Self {
        let mut record = Self { partition: None, ..self.clone() };
        if action == "discard" {
            record.value = None;
        }
        record.header("redrive.topic", topic);
        record.header("redrive.partition", &partition.to_string());
        record.header("redrive.offset", &offset.to_string());
        record.header("redrive.number", &number.to_string());
        record.header("redrive.action", action);
        record
    }

    pub(crate) fn header(&mut self, name: &str, value: &str) {
        self.headers.push((name.into(), value.into()));
    }
}

/// A generic message as the order API and the relay write it, the `attempt`th delivery of it.
pub(crate) fn message(id: Uuid, attempt: i32, require_ack: &str, payload: &str) -> Record {
    let mut record =
        Record { key: Some(id.to_string().into_bytes()), value: Some(payload.into()), ..Record::default() };
    record.header("id", &Uuid::now_v7().to_string());
    record.header("message-id", &id.to_string());
    record.header("attempt", &attempt.to_string());
    record.header("lsn", &format!("0/{attempt}"));
    if !require_ack.is_empty() {
        record.header("require-ack", require_ack);
    }
    record
}

/// An `OrderCreated`.
pub(crate) fn created(order: &str) -> Value {
    json!({
        "eventId": Uuid::now_v7(), "aggregateId": order, "occurredOn": "2026-11-21T12:00:00.5Z", "version": 1,
        "eventType": "OrderCreated", "customerId": "c-1", "restaurantId": "r-1", "currency": "EUR",
        "totalAmount": "12.50",
        "items": [{"menuItemId": "m-1", "name": "Tea", "price": "6.25", "quantity": 2}],
    })
}

/// An `OrderConfirmed` of this version.
pub(crate) fn confirmed(order: &str, version: i64) -> Value {
    json!({
        "eventId": Uuid::now_v7(), "aggregateId": order, "occurredOn": "2026-11-21T12:00:10Z",
        "version": version, "eventType": "OrderConfirmed", "paymentId": "p-1",
    })
}

/// An `OrderUpdated` of this version, after which the order costs `total`.
pub(crate) fn updated(order: &str, version: i64, total: &str) -> Value {
    let mut body = created(order);
    body["eventType"] = json!("OrderUpdated");
    body["status"] = json!("created");
    body["version"] = json!(version);
    body["totalAmount"] = json!(total);
    body
}

/// Bytes that do not get shorter when they are compressed.
pub(crate) fn incompressible(count: usize) -> Vec<u8> {
    let mut state = 1_u64;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_be_bytes()[0]
        })
        .collect()
}

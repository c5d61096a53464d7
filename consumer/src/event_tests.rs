use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const EXAMPLES: [(&str, &str); 4] = [
    (
        include_str!("../../contracts/events/OrderCreated.example.json"),
        include_str!("../../contracts/events/OrderCreated.schema.json"),
    ),
    (
        include_str!("../../contracts/events/OrderUpdated.example.json"),
        include_str!("../../contracts/events/OrderUpdated.schema.json"),
    ),
    (
        include_str!("../../contracts/events/OrderConfirmed.example.json"),
        include_str!("../../contracts/events/OrderConfirmed.schema.json"),
    ),
    (
        include_str!("../../contracts/events/OrderCancelled.example.json"),
        include_str!("../../contracts/events/OrderCancelled.schema.json"),
    ),
];

fn example(number: usize) -> Value {
    serde_json::from_str(EXAMPLES[number].0).unwrap()
}

fn parse_body(body: &Value) -> Result<OrderEvent, Poison> {
    let key = body["aggregateId"].as_str().unwrap_or("o-1").to_owned();
    parse(Some(key.as_bytes()), Some(body.to_string().as_bytes()))
}

fn reason_of(body: &Value) -> Reason {
    parse_body(body).unwrap_err().reason
}

/// `body` with `change` applied to it.
fn with(mut body: Value, pointer: &str, value: Value) -> Value {
    *body.pointer_mut(pointer).unwrap() = value;
    body
}

#[test]
fn every_golden_example_is_an_event_and_follows_its_schema() {
    let parsed: Vec<OrderEvent> = (0..4).map(|n| parse_body(&example(n)).unwrap()).collect();
    let said: Vec<_> = parsed.iter().map(|e| (e.change.type_name(), e.version, e.change.status())).collect();
    assert_eq!(
        said,
        [
            ("OrderCreated", 1, Status::Created),
            ("OrderUpdated", 2, Status::Created),
            ("OrderConfirmed", 3, Status::Confirmed),
            ("OrderCancelled", 4, Status::Cancelled),
        ]
    );
    for (body, schema) in EXAMPLES {
        let schema: Value = serde_json::from_str(schema).unwrap();
        let body: Value = serde_json::from_str(body).unwrap();
        jsonschema::validate(&schema, &body).unwrap_or_else(|e| panic!("{body}: {e}"));
    }
}

#[test]
fn the_golden_order_is_read_to_the_last_decimal() {
    let created = parse_body(&example(0)).unwrap();
    assert_eq!(created.id.to_string(), "01936d2e-7c01-7a4b-8e55-9f0c1d2e3a41");
    assert_eq!(created.order_id, "01936d2e-7bff-7c31-b0aa-5d6e7f809101");
    assert_eq!(created.occurred_on.to_rfc3339(), "2026-11-21T12:00:00.123456+00:00");
    let details = created.change.details().unwrap();
    assert_eq!(
        (details.customer_id.as_str(), details.restaurant_id.as_str()),
        ("customer-1", "restaurant-1")
    );
    assert_eq!((details.currency.as_str(), details.total_amount.to_string().as_str()), ("EUR", "12.50"));
    assert_eq!(
        details.items,
        [Item {
            menu_item_id: "paracetamol-500".into(),
            name: "Paracetamol 500 mg".into(),
            price: Decimal::new(625, 2),
            quantity: 2
        }]
    );
}

#[test]
fn what_only_some_events_tell_is_kept() {
    let change = |n| parse_body(&example(n)).unwrap().change;
    assert_eq!(change(0).details().unwrap().notes, None);
    assert_eq!(change(1).details().unwrap().notes.as_deref(), Some("Ring twice"));
    assert_eq!(change(2), Change::Confirmed { payment_id: "payment-1".into() });
    assert_eq!(change(3), Change::Cancelled { reason: "The customer changed their mind".into() });
}

/// A field that a schema requires is one we miss; a value the schema refuses is one we refuse.
#[test]
fn what_the_schema_requires_we_require() {
    for (n, (_, schema)) in EXAMPLES.iter().enumerate() {
        let schema: Value = serde_json::from_str(schema).unwrap();
        for field in schema["required"].as_array().unwrap() {
            let field = field.as_str().unwrap();
            let mut body = example(n);
            body.as_object_mut().unwrap().remove(field);
            let poison = parse_body(&body).unwrap_err();
            assert_eq!(poison.reason, Reason::MissingField, "{field}");
            assert!(poison.error.contains(field), "{field}: {}", poison.error);
            assert_eq!(reason_of(&with(example(n), &format!("/{field}"), Value::Null)), Reason::MissingField);
            let wrong = with(example(n), &format!("/{field}"), json!({"no": "object"}));
            assert_eq!(reason_of(&wrong), Reason::WrongType, "{field}");
        }
    }
    for field in ["menuItemId", "name", "price", "quantity"] {
        let wrong = with(example(0), &format!("/items/0/{field}"), json!([]));
        assert_eq!(reason_of(&wrong), Reason::WrongType, "{field}");
    }
}

#[test]
fn each_kind_of_poison_has_its_reason() {
    let key = Some(&b"o-1"[..]);
    let reason = |value: &[u8]| parse(key, Some(value)).unwrap_err().reason;
    assert_eq!(parse(None, Some(b"{}")).unwrap_err().reason, Reason::NoKey);
    assert_eq!(parse(key, None).unwrap_err().reason, Reason::NoValue);
    for not_json in [&b""[..], b"{", b"\xff\xfe", b"{\"eventType\":\"\xff\"}", b"nope", b"{} {}"] {
        assert_eq!(reason(not_json), Reason::NotJson, "{not_json:?}");
    }
    for not_an_object in ["[]", "7", "null", "\"text\"", "[1,2,3,4,5,6,7,8,9,10,11,12,13,14]"] {
        assert_eq!(reason(not_an_object.as_bytes()), Reason::WrongType, "{not_an_object}");
    }
    assert_eq!(reason(b"{\"eventType\":\"OrderEaten\"}"), Reason::UnknownType);
    let mut newer = example(0);
    newer["schemaVersion"] = json!(2);
    assert_eq!(reason_of(&newer), Reason::UnsupportedSchema);
    newer["schemaVersion"] = json!(1);
    assert!(parse_body(&newer).is_ok());
    assert_eq!(reason_of(&with(example(0), "/items/0/name", json!("a\0b"))), Reason::NulCharacter);
    let other_key = parse(key, Some(EXAMPLES[0].0.as_bytes())).unwrap_err();
    assert_eq!(other_key.reason, Reason::KeyMismatch);
}

#[test]
fn values_of_the_right_type_can_still_be_wrong() {
    let refused = [
        (0, "/eventId", json!("not-a-uuid")),
        (0, "/aggregateId", json!("has space")),
        (0, "/customerId", json!("x".repeat(65))),
        (0, "/occurredOn", json!("yesterday")),
        (0, "/version", json!(0)),
        (0, "/version", json!(u64::MAX)),
        (0, "/currency", json!("euro")),
        (0, "/totalAmount", json!("-0.01")),
        (0, "/totalAmount", json!("9".repeat(40))),
        (0, "/totalAmount", json!("0.00000000000000000000000000001")),
        (0, "/totalAmount", json!("twelve")),
        (0, "/items", json!([])),
        (0, "/items/0/quantity", json!(0)),
        (0, "/items/0/quantity", json!(4_294_967_296_u64)),
        (0, "/items/0/quantity", json!(-1)),
        (1, "/status", json!("lost")),
        (1, "/notes", json!("")),
        (2, "/paymentId", json!("has space")),
        (3, "/reason", json!("")),
    ];
    for (n, pointer, value) in refused {
        assert_eq!(
            reason_of(&with(example(n), pointer, value.clone())),
            Reason::BadValue,
            "{pointer} {value}"
        );
    }
    assert_eq!(reason_of(&with(example(0), "/version", json!(1.5))), Reason::WrongType);
    // Numbers that no float holds do not make the whole value "not JSON".
    let huge = EXAMPLES[0].0.replace("\"12.50\"", "1e400");
    assert_eq!(parse(Some(b"o-1"), Some(huge.as_bytes())).unwrap_err().reason, Reason::BadValue);
}

#[test]
fn decimals_come_as_string_or_number_and_stay_exact() {
    for (written, read) in [
        ("\"12.50\"", "12.50"),
        ("12.50", "12.50"),
        ("0.1", "0.1"),
        ("12345678901234567890.12345678", "12345678901234567890.12345678"),
        ("125e-1", "12.5"),
        ("0", "0"),
    ] {
        let body = EXAMPLES[0].0.replace("\"12.50\"", written);
        let key = example(0)["aggregateId"].as_str().unwrap().to_owned();
        let event = parse(Some(key.as_bytes()), Some(body.as_bytes())).unwrap();
        assert_eq!(event.change.details().unwrap().total_amount.to_string(), read, "{written}");
    }
}

#[test]
fn fields_we_do_not_know_are_ignored() {
    let mut body = example(2);
    body["loyaltyPoints"] = json!({"a": [1, 2, 3]});
    assert!(parse_body(&body).is_ok());
}

#[test]
fn a_value_nested_without_end_is_poison_like_any_other() {
    let deep = format!("{{\"eventType\":\"OrderCreated\",\"items\":{}", "[".repeat(200_000));
    assert_eq!(parse(Some(b"o-1"), Some(deep.as_bytes())).unwrap_err().reason, Reason::NotJson);
    let closed = format!("{{\"eventType\":{}{}}}", "[".repeat(200_000), "]".repeat(200_000));
    assert!(parse(Some(b"o-1"), Some(closed.as_bytes())).is_err());
}

#[test]
fn an_error_never_repeats_more_than_a_little_of_the_value() {
    let body = with(example(0), "/version", json!("x".repeat(1_000_000)));
    assert!(parse_body(&body).unwrap_err().error.len() < 300);
}

proptest! {
    #[test]
    fn any_bytes_are_an_event_or_poison(
        key in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40)),
        value in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..400)),
    ) {
        let _ = parse(key.as_deref(), value.as_deref());
    }

    /// Nearly right is where parsers fall over: an example with one stretch replaced by anything.
    #[test]
    fn a_damaged_example_is_an_event_or_poison(
        n in 0_usize..4,
        at in 0.0_f64..1.0,
        length in 0_usize..20,
        noise in proptest::collection::vec(any::<u8>(), 0..20),
    ) {
        let mut value = EXAMPLES[n].0.as_bytes().to_vec();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
        let start = (at * value.len() as f64) as usize;
        let end = (start + length).min(value.len());
        value.splice(start..end, noise);
        if let Ok(event) = parse(Some(b"01936d2e-7bff-7c31-b0aa-5d6e7f809101"), Some(&value)) {
            prop_assert!(event.version >= 1);
            prop_assert_eq!(event.order_id, "01936d2e-7bff-7c31-b0aa-5d6e7f809101");
        }
    }
}

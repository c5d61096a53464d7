//! What clients may ask for, from JSON to what the domain knows.

use rust_decimal::{Decimal, prelude::ToPrimitive};

use super::json::{Errors, Field, Object};
use crate::{
    domain::{
        Amount, Command, Currency, CustomerId, Item, ItemName, MAX_ITEMS, MAX_QUANTITY, MenuItemId, NewOrder,
        Notes, OrderId, PaymentId, Reason, RestaurantId, Status, Update, parse_decimal, total,
    },
    error::Error,
};

/// The body of `POST /api/orders`.
///
/// # Errors
/// Every field that is wrong, by its pointer.
pub(super) fn new_order(body: &str) -> Result<NewOrder, Error> {
    let mut errors = Errors::default();
    let parsed = order(&Field::root(body)?, &mut errors);
    errors.or(parsed)
}

fn order(body: &Field<'_>, errors: &mut Errors) -> Option<NewOrder> {
    let known = &["orderId", "customerId", "restaurantId", "items", "currency", "totalAmount", "notes"];
    let object = body.object(known, errors)?;
    let order_id = object.optional("orderId").map(|f| f.string(errors, OrderId::parse));
    let customer_id = object.required("customerId", errors).and_then(|f| f.string(errors, CustomerId::parse));
    let restaurant_id =
        object.required("restaurantId", errors).and_then(|f| f.string(errors, RestaurantId::parse));
    let currency = match object.optional("currency") {
        Some(field) => field.string(errors, Currency::parse),
        None => Some(Currency::default()),
    };
    let items = object.required("items", errors).and_then(|f| items(&f, currency.as_ref(), errors));
    let claimed = object.optional("totalAmount").and_then(|field| {
        let amount = field.number(true, errors, parse_decimal)?;
        Some((field.pointer, amount))
    });
    let notes = object.optional("notes").map(|f| f.string(errors, Notes::parse));
    let (items, currency) = (items?, currency?);
    if let Some((pointer, claimed)) = claimed {
        let total = total(&items, &currency);
        if claimed != total.value() {
            errors.add(pointer, format!("must be {total}, the sum of price times quantity"));
        }
    }
    Some(NewOrder {
        // Given and wrong is not the same as not given.
        order_id: order_id.map_or(Some(None), |id| id.map(Some))?,
        customer_id: customer_id?,
        restaurant_id: restaurant_id?,
        currency,
        items,
        notes: notes.map_or(Some(None), |notes| notes.map(Some))?,
    })
}

/// The body of `PATCH /api/orders/{id}`, a merge patch (<https://www.rfc-editor.org/rfc/rfc7396>).
///
/// # Errors
/// Every field that is wrong, by its pointer.
pub(super) fn update(body: &str) -> Result<Command, Error> {
    one(body, &["items", "notes"], |object, errors| {
        let items = match object.given("items") {
            // What currency the prices are in, the order says.
            Some(field) => Some(items(&field, None, errors)?),
            None => None,
        };
        let notes = match object.given("notes") {
            Some(field) if field.is_null() => Some(None),
            Some(field) => Some(Some(field.string(errors, Notes::parse)?)),
            None => None,
        };
        if items.is_none() && notes.is_none() {
            errors.add("", "must have items, notes or both");
        }
        Some(Command::Update(Update { items, notes }))
    })
}

/// The body of `PUT /api/orders/{id}/status`.
///
/// # Errors
/// Every field that is wrong, by its pointer.
pub(super) fn status(body: &str) -> Result<Command, Error> {
    one(body, &["status"], |object, errors| {
        let parse = |text: String| {
            let names: Vec<_> = Status::ALL.iter().map(|(_, name)| *name).collect();
            Status::parse(&text).ok_or_else(|| format!("must be one of {}", names.join(", ")))
        };
        object.required("status", errors)?.string(errors, parse).map(Command::SetStatus)
    })
}

/// The body of `POST /api/orders/{id}/confirm`.
///
/// # Errors
/// Every field that is wrong, by its pointer.
pub(super) fn confirm(body: &str) -> Result<Command, Error> {
    one(body, &["paymentId"], |object, errors| {
        object.required("paymentId", errors)?.string(errors, PaymentId::parse).map(Command::Confirm)
    })
}

/// The body of `POST /api/orders/{id}/cancel`.
///
/// # Errors
/// Every field that is wrong, by its pointer.
pub(super) fn cancel(body: &str) -> Result<Command, Error> {
    one(body, &["reason"], |object, errors| {
        object.required("reason", errors)?.string(errors, Reason::parse).map(Command::Cancel)
    })
}

/// A body that is one object with these members.
///
/// # Errors
/// Every field that is wrong, by its pointer.
pub(super) fn one<T>(
    body: &str,
    known: &'static [&'static str],
    parse: impl FnOnce(&Object<'_>, &mut Errors) -> Option<T>,
) -> Result<T, Error> {
    let mut errors = Errors::default();
    let object = Field::root(body)?.object(known, &mut errors);
    let parsed = object.and_then(|object| parse(&object, &mut errors));
    errors.or(parsed)
}

fn items(field: &Field<'_>, currency: Option<&Currency>, errors: &mut Errors) -> Option<Vec<Item>> {
    let elements = field.array(MAX_ITEMS, errors)?;
    // Each is looked at even when an earlier one is wrong, so that all errors are told.
    let parsed: Vec<_> = elements.iter().map(|element| item(element, currency, errors)).collect();
    parsed.into_iter().collect()
}

fn item(field: &Field<'_>, currency: Option<&Currency>, errors: &mut Errors) -> Option<Item> {
    let object = field.object(&["menuItemId", "name", "price", "quantity"], errors)?;
    let menu_item_id =
        object.required("menuItemId", errors).and_then(|f| f.string(errors, MenuItemId::parse));
    let name = object.required("name", errors).and_then(|f| f.string(errors, ItemName::parse));
    let price = object
        .required("price", errors)
        .and_then(|f| f.number(true, errors, |text| Amount::price(parse_decimal(text)?, currency)));
    let quantity = object
        .required("quantity", errors)
        .and_then(|f| f.number(false, errors, |text| whole(text, MAX_QUANTITY)));
    Some(Item { menu_item_id: menu_item_id?, name: name?, price: price?, quantity: quantity? })
}

/// A whole number from 1 on: `2` and, as JSON Schema has it, `2.0`.
pub(super) fn whole(text: &str, most: i32) -> Result<i32, String> {
    let value = parse_decimal(text)?;
    let wanted = || format!("must be a whole number from 1 to {most}");
    if !value.is_integer() || value < Decimal::ONE {
        return Err(wanted());
    }
    value.to_i32().filter(|n| *n <= most).ok_or_else(wanted)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn good() -> Value {
        json!({
            "customerId": "c-1", "restaurantId": "r-1",
            "items": [{"menuItemId": "m-1", "name": "Paracetamol", "price": 6.25, "quantity": 2}],
        })
    }

    /// The pointers that are told for the good order after a change.
    fn wrong(change: impl FnOnce(&mut Value)) -> Vec<String> {
        let mut body = good();
        change(&mut body);
        pointers(&body.to_string())
    }

    fn pointers(body: &str) -> Vec<String> {
        match new_order(body) {
            Ok(_) => Vec::new(),
            Err(Error::Invalid(errors)) => errors.into_iter().map(|e| e.pointer).collect(),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_good_order_is_read() {
        let order = new_order(&good().to_string()).unwrap();
        assert_eq!(order.currency.as_str(), "EUR");
        assert_eq!(order.items[0].price.to_string(), "6.25");
        for (key, value) in [
            ("currency", json!("USD")),
            ("currency", Value::Null),
            ("totalAmount", json!("12.5")),
            ("totalAmount", json!(12.50)),
            ("totalAmount", Value::Null),
        ] {
            assert_eq!(wrong(|b| b[key] = value), Vec::<String>::new(), "{key}");
        }
    }

    #[test]
    fn each_wrong_field_is_named() {
        for (pointer, value) in [
            ("/customerId", json!("")),
            ("/customerId", json!(1)),
            ("/customerId", json!("a b")),
            ("/customerId", json!("a\0")),
            ("/restaurantId", json!("x".repeat(65))),
            ("/restaurantId", Value::Null),
            ("/currency", json!("eur")),
            ("/totalAmount", json!("12.51")),
            ("/totalAmount", json!("a lot")),
            ("/items", json!([])),
            ("/items", json!({})),
            ("/items/0", json!([])),
            ("/items/0/menuItemId", json!("é")),
            ("/items/0/name", json!("")),
            ("/items/0/name", json!("a\u{0}b")),
            ("/items/0/price", json!(-0.01)),
            ("/items/0/price", json!("-1")),
            ("/items/0/price", json!(1.005)),
            ("/items/0/price", json!(true)),
            ("/items/0/price", json!("1,5")),
            ("/items/0/price", json!(1e300)),
            ("/items/0/quantity", json!(0)),
            ("/items/0/quantity", json!(-1)),
            ("/items/0/quantity", json!(1.5)),
            ("/items/0/quantity", json!("1")),
            ("/items/0/quantity", json!(MAX_QUANTITY + 1)),
            ("/items/0/quantity", json!(u64::MAX)),
        ] {
            let found = wrong(|body| {
                let (parent, last) = pointer.rsplit_once('/').unwrap();
                match body.pointer_mut(parent).unwrap() {
                    Value::Array(elements) => elements[last.parse::<usize>().unwrap()] = value.clone(),
                    object => object[last] = value.clone(),
                }
            });
            assert_eq!(found, [pointer], "{value}");
        }
    }

    #[test]
    fn every_wrong_field_is_told_at_once() {
        let body = json!({
            "customerId": 1, "currency": "eur", "extra/~": 1, "totalAmount": [],
            "items": [{"price": -1, "quantity": 0, "name": "x", "menuItemId": "m", "note": ""}, 7],
        });
        let mut found = pointers(&body.to_string());
        found.sort_unstable();
        let expected = [
            "/currency",
            "/customerId",
            "/extra~1~0",
            "/items/0/note",
            "/items/0/price",
            "/items/0/quantity",
            "/items/1",
            "/restaurantId",
            "/totalAmount",
        ];
        assert_eq!(found, expected);
        assert_eq!(pointers("[]"), [""]);
    }

    #[test]
    fn numbers_keep_the_text_they_came_with() {
        let body = |price: &str| good().to_string().replace("6.25", price);
        for (sent, read) in [("0.1", "0.10"), ("1e2", "100.00"), ("\"0.3\"", "0.30"), ("0.30", "0.30")] {
            assert_eq!(new_order(&body(sent)).unwrap().items[0].price.to_string(), read);
        }
        for refused in ["1e400", "0.1000000000000000000000000000000000001", "1e-400", "\"1e400\"", "\"\""] {
            assert_eq!(pointers(&body(refused)), ["/items/0/price"], "{refused}");
        }
    }

    #[test]
    fn repeated_members_half_surrogates_and_floods_are_refused() {
        let text = good().to_string();
        let twice = text.replacen('{', r#"{"currency":"EUR","currency":"USD","#, 1);
        assert_eq!(pointers(&twice), ["/currency"]);
        assert_eq!(pointers(&text.replace("Paracetamol", r"\ud800")), ["/items/0/name"]);
        let flood: Vec<_> = (0..10_000).map(|n| format!("\"f{n}\":0")).collect();
        let found = pointers(&format!("{{{}}}", flood.join(",")));
        assert!(found.len() <= 51, "{}", found.len());
    }

    #[test]
    fn the_number_of_items_is_limited() {
        let with = |n: usize| wrong(|b| b["items"] = vec![b["items"][0].clone(); n].into());
        assert_eq!(with(MAX_ITEMS), Vec::<String>::new());
        assert_eq!(with(MAX_ITEMS + 1), ["/items"]);
        assert_eq!(wrong(|b| b["items"][0]["quantity"] = MAX_QUANTITY.into()), Vec::<String>::new());
    }

    proptest! {
        #[test]
        fn nothing_panics(body in "\\PC*") {
            let _ = new_order(&body);
        }

        #[test]
        fn no_value_in_any_field_panics(
            field in prop::sample::select(vec!["price", "quantity", "name", "menuItemId"]),
            value in "(-?[0-9]{0,40}(\\.[0-9]{0,40})?([eE][-+]?[0-9]{0,20})?|\"\\PC{0,20}\"|\\[\\]|null)",
        ) {
            let text = good().to_string();
            let old = format!("\"{field}\":{}", good()["items"][0][field]);
            prop_assert!(text.contains(&old));
            let _ = new_order(&text.replace(&old, &format!("\"{field}\":{value}")));
        }
    }
}

//! What the API says of itself: the document and the page.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::{
    documented::DOCUMENT,
    stage::{Answer, Service, Stage, order},
};

/// The operations: method, path, description.
fn operations() -> Vec<(String, &'static str, &'static Value)> {
    let paths = DOCUMENT["paths"].as_object().unwrap();
    let all = paths.iter().flat_map(|(path, item)| {
        let methods = item.as_object().unwrap().iter();
        methods.map(|(method, operation)| (method.to_ascii_uppercase(), path.as_str(), operation))
    });
    all.collect()
}

/// What a `$ref` stands for.
fn resolve(mut schema: &'static Value) -> &'static Value {
    while let Some(reference) = schema["$ref"].as_str() {
        schema = DOCUMENT.pointer(&reference[1..]).unwrap_or_else(|| panic!("{reference} leads nowhere"));
    }
    schema
}

/// Sends a body to an order or a message of its own that is new, or makes one.
fn send(service: &Service, method: &str, path: &str, media: &str, body: &Value) -> Answer {
    let path = if path.starts_with("/api/messages/{id}") {
        let message = json!({"topic": "notifications", "message": "x", "consumerGroup": "messages"});
        let headers = [("content-type", "application/json")];
        let sent = service.send("POST", "/api/messages/send", &headers, &message.to_string());
        path.replace("{id}", sent.json()["messageId"].as_str().unwrap())
    } else if path.contains("{id}") {
        let placed = service.post(&order());
        path.replace("{id}", placed.json()["orderId"].as_str().unwrap())
    } else {
        path.to_owned()
    };
    service.send(method, &path, &[("content-type", media)], &body.to_string())
}

#[test]
fn the_document_is_served_and_each_path_has_the_methods_it_tells() {
    let stage = Stage::new();
    let service = stage.service();
    assert_eq!(service.get("/openapi.json").json(), *DOCUMENT);
    assert_eq!(DOCUMENT["openapi"], "3.1.0");
    for path in DOCUMENT["paths"].as_object().unwrap().keys() {
        // Whether `Allow` lists what the document does, is looked at with every answer.
        let answer = service.send("BREW", &path.replace("{id}", "x").replace("{file}", "start.js"), &[], "");
        assert_eq!(answer.status, 405, "{path}");
    }
}

#[test]
fn every_reference_leads_somewhere_and_every_operation_has_a_name_of_its_own() {
    fn references(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Array(elements) => elements.iter().for_each(|e| references(e, found)),
            Value::Object(members) => {
                found.extend(members.get("$ref").and_then(Value::as_str).map(ToOwned::to_owned));
                members.values().for_each(|v| references(v, found));
            }
            _ => {}
        }
    }
    let mut found = BTreeSet::new();
    references(&DOCUMENT, &mut found);
    assert!(found.contains("#/components/schemas/Problem"), "{found:?}");
    for reference in found {
        assert!(DOCUMENT.pointer(&reference[1..]).is_some(), "{reference} leads nowhere");
    }
    let names: Vec<_> =
        operations().iter().map(|(.., operation)| operation["operationId"].to_string()).collect();
    let unique: BTreeSet<_> = names.iter().collect();
    assert_eq!(unique.len(), names.len(), "{names:?}");
    assert!(!DOCUMENT.to_string().contains("[`"), "a description for readers of the code");
}

/// A null would be taken for a value by some readers of the document, and refused by others.
#[test]
fn nothing_is_null_but_in_examples() {
    fn nulls(value: &Value, at: &str, found: &mut Vec<String>) {
        match value {
            Value::Null => found.push(at.to_owned()),
            Value::Array(elements) => elements.iter().for_each(|e| nulls(e, at, found)),
            Value::Object(members) => {
                for (name, value) in members.iter().filter(|(name, _)| !name.starts_with("example")) {
                    nulls(value, &format!("{at}/{name}"), found);
                }
            }
            _ => {}
        }
    }
    let mut found = Vec::new();
    nulls(&DOCUMENT, "", &mut found);
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn every_example_is_answered_as_it_should() {
    let stage = Stage::new();
    let service = stage.service();
    let mut sent = 0;
    for (method, path, operation) in operations() {
        for (media, content) in operation["requestBody"]["content"].as_object().into_iter().flatten() {
            let example = content.get("example").unwrap_or_else(|| panic!("{method} {path} has no example"));
            let answer = if path.ends_with("/status") {
                let placed = service.post(&order()).json();
                let of = format!("/api/orders/{}", placed["orderId"].as_str().unwrap());
                let headers = [("content-type", "application/json")];
                let confirmation = json!({"paymentId": "p"}).to_string();
                assert_eq!(
                    service.send("POST", &format!("{of}/confirm"), &headers, &confirmation).status,
                    200
                );
                service.send(&method, &format!("{of}/status"), &headers, &example.to_string())
            } else {
                send(&service, &method, path, media, example)
            };
            assert!(matches!(answer.status, 200 | 201), "{method} {path}: {answer:?}");
            sent += 1;
        }
    }
    assert_eq!(sent, 10);
}

/// A value at a limit and one beyond it, or what should be refused and nothing to compare with.
struct Bound {
    pointer: String,
    keyword: &'static str,
    within: Option<Value>,
    beyond: Value,
}

/// Every limit that a schema tells, with the value that is at `pointer` in an instance.
fn bounds(schema: &'static Value, pointer: &str, instance: &Value, found: &mut Vec<Bound>) {
    let schema = resolve(schema);
    for branch in schema["anyOf"].as_array().into_iter().flatten() {
        bounds(branch, pointer, instance, found);
    }
    let mut add = |keyword, within: Option<Value>, beyond: Value| {
        found.push(Bound { pointer: pointer.to_owned(), keyword, within, beyond });
    };
    let number = |keyword: &str| schema[keyword].as_i64();
    let text = |length: i64| json!("É".repeat(usize::try_from(length).unwrap()));
    let letters = |length: i64| json!("A".repeat(usize::try_from(length).unwrap()));
    // Where only some characters are allowed, capital letters are among them.
    let text = |length| {
        if schema["pattern"].as_str().is_some_and(|p| p.contains("A-Z")) {
            letters(length)
        } else {
            text(length)
        }
    };
    if let Some(most) = number("maxLength") {
        add("maxLength", Some(text(most)), text(most + 1));
        add("pattern", None, json!("\u{0}"));
    }
    if let Some(least) = number("minLength") {
        add("minLength", Some(text(least)), text(least - 1));
    }
    if let Some(most) = number("maximum") {
        add("maximum", Some(json!(most)), json!(most + 1));
    }
    if let Some(least) = number("minimum") {
        add("minimum", Some(json!(least)), json!(least - 1));
    }
    if schema["enum"].is_array() {
        add("enum", None, json!("another"));
    }
    if let Some(most) = number("maxItems") {
        // All alike, or each with another number at its end where they must not be.
        let unique = schema["uniqueItems"] == true;
        let element = |n: i64| match &instance[0] {
            Value::String(text) if unique => format!("{text}{n}").into(),
            other => other.clone(),
        };
        let repeated = |count: i64| (0..count).map(element).collect::<Value>();
        add("maxItems", Some(repeated(most)), repeated(most + 1));
        add("minItems", Some(repeated(1)), repeated(number("minItems").unwrap() - 1));
        bounds(&schema["items"], &format!("{pointer}/0"), &instance[0], found);
    }
    let Some(properties) = schema["properties"].as_object() else { return };
    for name in schema["required"].as_array().into_iter().flatten() {
        let mut without = instance.clone();
        without.as_object_mut().unwrap().remove(name.as_str().unwrap());
        found.push(Bound { pointer: pointer.into(), keyword: "required", within: None, beyond: without });
    }
    assert_eq!(schema["additionalProperties"], false, "{pointer}");
    let mut with = instance.clone();
    with["another"] = json!(1);
    found.push(Bound {
        pointer: pointer.into(),
        keyword: "additionalProperties",
        within: None,
        beyond: with,
    });
    for (name, property) in properties {
        bounds(property, &format!("{pointer}/{name}"), &instance[name], found);
    }
}

/// The instance with a value at the pointer.
fn with(instance: &Value, pointer: &str, value: &Value) -> Value {
    let mut changed = instance.clone();
    match pointer.rsplit_once('/') {
        None => return value.clone(),
        Some((parent, last)) => match changed.pointer_mut(parent).unwrap() {
            Value::Array(elements) => elements[last.parse::<usize>().unwrap()] = value.clone(),
            object => object[last] = value.clone(),
        },
    }
    changed
}

#[test]
fn each_documented_limit_of_a_body_holds_just_over_and_not_just_under() {
    let stage = Stage::new();
    let service = stage.service();
    let mut seen = BTreeSet::new();
    for (method, path, operation) in operations() {
        let Some(content) = operation["requestBody"]["content"].get("application/json") else { continue };
        let mut instance = content["example"].clone();
        if resolve(&content["schema"])["properties"].get("items").is_some() {
            instance["items"] = json!([order()["items"][0]]);
        }
        let mut found = Vec::new();
        bounds(&content["schema"], "", &instance, &mut found);
        for Bound { pointer, keyword, within, beyond } in found {
            let what = format!("{method} {path} {pointer} {keyword}");
            let send = |value: &Value| {
                send(&service, &method, path, "application/json", &with(&instance, &pointer, value))
            };
            if let Some(within) = within {
                let answer = send(&within);
                assert!(matches!(answer.status, 200 | 201), "{what} {within}: {answer:?}");
            }
            assert!(!send(&beyond).wrong_fields().is_empty(), "{what} {beyond}");
            seen.insert(keyword);
        }
    }
    let expected = [
        "additionalProperties",
        "enum",
        "maxItems",
        "maxLength",
        "maximum",
        "minItems",
        "minLength",
        "minimum",
        "pattern",
        "required",
    ];
    assert_eq!(seen, BTreeSet::from(expected));
}

#[test]
fn each_documented_limit_of_a_query_holds_just_over_and_not_just_under() {
    let stage = Stage::new();
    let service = stage.service();
    let placed = service.post(&order()).json();
    let mut seen = 0;
    for (_, path, operation) in operations().iter().filter(|(method, ..)| method == "GET") {
        let path = path.replace("{id}", placed["orderId"].as_str().unwrap());
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let schema = resolve(&parameter["schema"]);
            let Some((least, most)) = schema["minimum"].as_i64().zip(schema["maximum"].as_i64()) else {
                continue;
            };
            let name = parameter["name"].as_str().unwrap();
            let get = |value: i64| service.get(&format!("{path}?{name}={value}"));
            for within in [least, most] {
                assert_ne!(get(within).status, 400, "{path} {name}={within}");
            }
            for beyond in [least - 1, most + 1] {
                get(beyond).problem(400, "invalid-query");
            }
            seen += 1;
        }
    }
    assert_eq!(seen, 4);
}

#[test]
fn the_page_and_its_parts_come_from_here() {
    let stage = Stage::new();
    let service = stage.service();
    let page = service.get("/docs");
    let policy = page.header("content-security-policy");
    assert!(policy.starts_with("default-src 'self'; "), "{policy}");
    assert!(!policy.contains("http") && !policy.contains('*'), "{policy}");
    let mut parts: Vec<&str> = page.text.split('"').filter(|quoted| quoted.starts_with("docs/")).collect();
    parts.sort_unstable();
    assert_eq!(
        parts,
        ["docs/favicon-32x32.png", "docs/start.js", "docs/swagger-ui-bundle.js", "docs/swagger-ui.css"]
    );
    let start = service.get("/docs/start.js");
    for text in [&page.text, &start.text] {
        assert!(!text.contains("//") || text.contains("// No validator"), "{text}");
        assert!(!text.contains("http"), "{text}");
    }
    assert!(
        start.text.contains("validatorUrl: null") && start.text.contains("\"openapi.json\""),
        "{}",
        start.text
    );
    for part in parts {
        let answer = service.send("HEAD", &format!("/{part}"), &[], "");
        assert_eq!(answer.status, 200, "{part}");
        assert_eq!(answer.header("content-security-policy"), policy, "{part}");
        assert_eq!(answer.header("x-content-type-options"), "nosniff", "{part}");
    }
    service.get("/docs/index.html").problem(404, "route-not-found");
    service.get("/docs/..%2f..%2fetc%2fpasswd").problem(404, "route-not-found");
}

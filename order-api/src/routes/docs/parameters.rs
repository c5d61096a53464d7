//! The parameters that requests of a kind take, beside those that a handler describes itself.

use serde_json::{Map, Value, json};

use crate::routes::command::MAX_KEY_CHARS;

/// An entity tag.
const TAG: &str = r#"(W/)?"[!#-+\--~]*""#;

/// Adds them to an operation, by its method and by what it may refuse.
pub(super) fn add(method: &str, operation: &mut Map<String, Value>, refused: &[String]) {
    let own = operation.get_mut("parameters").and_then(Value::as_array_mut);
    for parameter in own.into_iter().flatten().filter(|parameter| parameter["in"] != "path") {
        // None of ours is, and the macro cannot say so without making null a value of it.
        parameter["required"] = false.into();
    }
    let responses = operation.get_mut("responses").and_then(Value::as_object_mut);
    for (_, response) in responses.into_iter().flatten() {
        // And an answer has every header that is told of it.
        let headers = response.get_mut("headers").and_then(Value::as_object_mut);
        for (_, header) in headers.into_iter().flatten() {
            header["required"] = true.into();
        }
    }
    if !operation.contains_key("requestBody") {
        return;
    }
    let mut parameters = vec![header(
        "traceparent",
        "The trace context (W3C) that consumers find in the headers of the event. Ignored if it is not one.",
        json!({"type": "string"}),
    )];
    if refused.iter().any(|slug| slug == "version-mismatch") {
        let tags = format!(r"^(\*|{TAG}( *, *{TAG})*)$");
        let mut tags = header(
            "If-Match",
            "The ETag of what is meant: if it has changed since, nothing is done.",
            json!({"type": "string", "minLength": 1, "pattern": tags}),
        );
        tags["example"] = "*".into();
        parameters.push(tags);
    }
    if method == "post" {
        // In quotes, as the draft has it, or as it is. Neither has a quote or a backslash in it.
        let (inner, visible, between) = (r"[ !#-\[\]-~]", r"[!#-\[\]-~]", MAX_KEY_CHARS - 2);
        let key =
            format!(r#"^("{inner}{{1,{MAX_KEY_CHARS}}}"|{visible}({inner}{{0,{between}}}{visible})?)$"#);
        parameters.push(header(
            "Idempotency-Key",
            "Chosen by the client, such as a UUID: however often the request is sent with it, it is carried out once, \
             and answered alike.",
            json!({"type": "string", "minLength": 1, "pattern": key}),
        ));
        tell_repetitions(operation);
    }
    let own = operation.entry("parameters").or_insert_with(|| json!([]));
    if let Some(own) = own.as_array_mut() {
        own.extend(parameters);
    }
}

fn header(name: &str, about: &str, schema: Value) -> Value {
    let mut header = json!({"name": name, "in": "header", "required": false, "description": about});
    header["schema"] = schema;
    header
}

fn tell_repetitions(operation: &mut Map<String, Value>) {
    let Some(responses) = operation.get_mut("responses").and_then(Value::as_object_mut) else { return };
    for (_, response) in responses.iter_mut().filter(|(status, _)| status.starts_with('2')) {
        response["headers"]["Idempotency-Replayed"] = json!({
            "description": "The request was carried out before; this is what was answered then.",
            "schema": {"const": "true"},
            "required": false,
        });
    }
}

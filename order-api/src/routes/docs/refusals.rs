//! What each route may refuse, from the errors themselves.
//!
//! A handler names the kinds of problem that are its own by `extensions(("x-refused" = json!(["order-not-found"])))`;
//! what every route refuses, and every route with a body or an id in its path, is added here.

use serde_json::{Map, Value, json};

use crate::error::Error;

/// What any route of the API may answer.
const ALWAYS: [&str; 6] = [
    "database-unavailable",
    "internal-error",
    "overloaded",
    "token-missing",
    "token-invalid",
    "insufficient-scope",
];

/// What any route may answer.
const ANYWHERE: [&str; 1] = ["request-head-too-large"];

/// What a route that takes an id may answer.
const WITH_ID: [&str; 1] = ["invalid-id"];

/// What a route that takes a body may answer.
const WITH_BODY: [&str; 7] = [
    "malformed-json",
    "incomplete-body",
    "request-timeout",
    "body-too-large",
    "unsupported-media-type",
    "unsupported-content-encoding",
    "invalid-request",
];

/// What a route that takes an `Idempotency-Key` may answer.
const WITH_KEY: [&str; 2] = ["invalid-header", "idempotency-key-reused"];

const EXTENSION: &str = "x-refused";

/// A problem as it is answered.
pub(super) struct Example {
    slug: String,
    status: u64,
    body: Value,
    retry: bool,
}

/// One of each kind there is.
pub(super) fn examples() -> Vec<Example> {
    Error::examples().into_iter().map(example).collect()
}

fn example(error: Error) -> Example {
    let problem = error.problem();
    let retry = problem.retry_after().is_some();
    let body = serde_json::to_value(problem).unwrap_or_default();
    let slug = body["type"].as_str().and_then(|kind| kind.rsplit('/').next()).unwrap_or_default().to_owned();
    Example { slug, status: body["status"].as_u64().unwrap_or_default(), body, retry }
}

/// The kinds of problem of an operation: its own, which are taken out of it, and those of all like it.
pub(super) fn of(method: &str, path: &str, operation: &mut Map<String, Value>) -> Vec<String> {
    let own = operation.remove(EXTENSION).unwrap_or_default();
    let mut refused: Vec<String> =
        own.as_array().into_iter().flatten().filter_map(|slug| Some(slug.as_str()?.to_owned())).collect();
    let mut also = |slugs: &[&str]| refused.extend(slugs.iter().map(|slug| (*slug).to_owned()));
    also(&ANYWHERE);
    if !path.starts_with("/api/") {
        return refused;
    }
    also(&ALWAYS);
    if path.contains('{') {
        also(&WITH_ID);
    }
    if operation.contains_key("requestBody") {
        also(&WITH_BODY);
    }
    let parameters = operation.get("parameters").and_then(Value::as_array);
    if parameters.into_iter().flatten().any(|parameter| parameter["in"] == "query") {
        also(&["invalid-query"]);
    }
    if method == "post" {
        also(&WITH_KEY);
    } else if operation.contains_key("requestBody") {
        also(&["invalid-header"]);
    }
    refused
}

/// Adds the responses to an operation.
pub(super) fn add(operation: &mut Map<String, Value>, refused: &[String], examples: &[Example]) {
    let responses = responses(examples, refused);
    if let Some(documented) = operation.get_mut("responses").and_then(Value::as_object_mut) {
        documented.extend(responses);
    }
}

/// One response for each status among the problems.
fn responses(examples: &[Example], refused: &[String]) -> Map<String, Value> {
    let mut responses = Map::new();
    for example in examples.iter().filter(|example| refused.contains(&example.slug)) {
        let response = responses.entry(example.status.to_string()).or_insert_with(|| {
            json!({
                "description": "",
                "content": {"application/problem+json": {
                    "schema": {
                        "allOf": [{"$ref": "#/components/schemas/Problem"}],
                        "properties": {"type": {"enum": []}, "status": {"const": example.status}},
                    },
                    "examples": {},
                }},
            })
        });
        let title = example.body["title"].as_str().unwrap_or_default();
        let description = response["description"].as_str().unwrap_or_default();
        let separator = if description.is_empty() { "" } else { "; " };
        response["description"] = format!("{description}{separator}{title}").into();
        if example.retry {
            response["headers"]["Retry-After"] = json!({
                "description": "When to try again, in seconds.", "schema": {"type": "integer", "minimum": 1},
                "required": true,
            });
        }
        let content = &mut response["content"]["application/problem+json"];
        content["examples"][&example.slug] = json!({"summary": title, "value": example.body});
        if let Some(kinds) = content["schema"]["properties"]["type"]["enum"].as_array_mut() {
            kinds.push(example.body["type"].clone());
        }
    }
    responses
}

/// What every problem looks like.
pub(super) fn schema(examples: &[Example]) -> Value {
    let kinds: Vec<_> = examples.iter().map(|example| &example.body["type"]).collect();
    json!({
        "type": "object",
        "description": "Why a request was refused (RFC 9457).",
        "required": ["type", "title", "status"],
        "additionalProperties": false,
        "properties": {
            "type": {"type": "string", "enum": kinds, "description": "The kind of problem. It is stable."},
            "title": {"type": "string", "description": "The kind in a few words."},
            "status": {"type": "integer", "description": "The HTTP status."},
            "detail": {"type": "string", "description": "What is wrong this time, and what to do."},
            "currentStatus": {"$ref": "#/components/schemas/Status"},
            "currentVersion": {"type": "integer", "description": "The order's, where that is what is wrong."},
            "errors": {
                "type": "array",
                "description": "Each field that is wrong.",
                "items": {
                    "type": "object",
                    "required": ["pointer", "detail"],
                    "additionalProperties": false,
                    "properties": {
                        "pointer": {
                            "type": "string",
                            "description": "A JSON pointer (RFC 6901) into the request's body.",
                        },
                        "detail": {"type": "string", "description": "What is wrong with it."},
                    },
                },
            },
        },
    })
}

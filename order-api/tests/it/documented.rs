//! Every answer that a test gets is held against the `OpenAPI` document: its status, its media type, its headers, its
//! body. So what the document says is what the API does, wherever there is a test of what it does.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{LazyLock, Mutex},
};

use jsonschema::Validator;
use serde_json::{Value, json};

use crate::stage::Answer;

pub(crate) static DOCUMENT: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(&order_api::document()).unwrap());

/// Headers that a client acts upon: an answer has them exactly if the document says so.
const HEADERS: [&str; 4] = ["location", "etag", "retry-after", "idempotency-replayed"];

/// Fails if the document does not say that such a request may be answered so.
pub(crate) fn check(method: &str, target: &str, answer: &Answer) {
    let path = target.split('?').next().unwrap();
    let what = format!("{method} {path}: {answer:?}");
    let Some((route, item)) = route(path) else {
        assert_eq!((answer.status, kind(answer)), (404, "/problems/route-not-found".into()), "{what}");
        return;
    };
    let head = method == "HEAD" && item.get("get").is_some();
    let name = if head { "get" } else { method };
    let Some(operation) = item.get(name.to_ascii_lowercase()) else {
        assert_eq!((answer.status, kind(answer)), (405, "/problems/method-not-allowed".into()), "{what}");
        assert_eq!(split(answer.header("allow")), methods(item), "{what}");
        return;
    };
    let response = &operation["responses"][answer.status.to_string()];
    assert!(response.is_object(), "the document has no such status: {what}");
    for header in HEADERS {
        let documented = documented(response, header);
        let required = documented.is_some_and(|header| header["required"] == true);
        let there = answer.headers.contains_key(header);
        assert!(!there || documented.is_some(), "the document has no header {header}: {what}");
        assert!(there || !required, "there is no header {header}: {what}");
    }
    let content = response["content"].as_object();
    let Some(media) = content.filter(|_| !head) else { return };
    let Some(media) = media.get(answer.header("content-type")) else {
        panic!("the document has no such media type: {what}");
    };
    if answer.header("content-type").ends_with("json") && path != "/openapi.json" {
        let problems =
            problems(&format!("{name} {route} {}", answer.status), &media["schema"], &answer.json());
        assert_eq!(problems, Vec::<String>::new(), "{what}");
    }
}

fn kind(answer: &Answer) -> String {
    answer.json()["type"].as_str().unwrap_or_default().to_owned()
}

/// The path of the document that this one is an instance of; those without parameters come first.
pub(crate) fn route(path: &str) -> Option<(&'static str, &'static Value)> {
    let matches = |route: &str| {
        let (route, path): (Vec<_>, Vec<_>) = (route.split('/').collect(), path.split('/').collect());
        let same =
            |(part, given): (&&str, &&str)| part == given || (part.starts_with('{') && !given.is_empty());
        route.len() == path.len() && route.iter().zip(&path).all(same)
    };
    let routes = DOCUMENT["paths"].as_object().unwrap().iter();
    let found =
        routes.filter(|(route, _)| matches(route)).min_by_key(|(route, _)| route.matches('{').count());
    found.map(|(route, item)| (route.as_str(), item))
}

/// The methods of a path as `Allow` lists them.
fn methods(item: &Value) -> BTreeSet<String> {
    let mut methods: BTreeSet<_> = item.as_object().unwrap().keys().map(|m| m.to_ascii_uppercase()).collect();
    if methods.contains("GET") {
        methods.insert("HEAD".into());
    }
    methods
}

fn split(list: &str) -> BTreeSet<String> {
    list.split(',').map(|part| part.trim().to_owned()).collect()
}

fn documented<'a>(response: &'a Value, header: &str) -> Option<&'a Value> {
    let headers = response["headers"].as_object()?;
    headers.iter().find(|(name, _)| name.eq_ignore_ascii_case(header)).map(|(_, described)| described)
}

/// What a schema of the document has against a value. Compiled once for each `key`.
fn problems(key: &str, schema: &Value, value: &Value) -> Vec<String> {
    static COMPILED: LazyLock<Mutex<HashMap<String, Validator>>> = LazyLock::new(Mutex::default);
    let mut compiled = COMPILED.lock().unwrap();
    let validator = compiled.entry(key.to_owned()).or_insert_with(|| {
        // Clients ignore fields they do not know; we have none that is not documented.
        let whole = json!({
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "allOf": [schema],
            "unevaluatedProperties": false,
            "components": DOCUMENT["components"],
        });
        jsonschema::options().should_validate_formats(true).build(&whole).unwrap()
    });
    validator.iter_errors(value).map(|e| format!("{}: {e}", e.instance_path())).collect()
}

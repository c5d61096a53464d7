//! `/api/instances`: which instances of which service there are, and how each is.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, Request, State, rejection::PathRejection},
    http::StatusCode,
};
use chrono::{DateTime, Datelike, Utc};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    Context,
    command::Posted,
    docs::{Beat, InstanceName},
    json::{Errors, Field},
};
use crate::{
    error::Error,
    store::{Answer, Heartbeat, Instance},
};

/// The longest id and the longest of every other text, in characters.
pub(super) const MAX_CHARS: usize = 64;

/// Every instance of every service.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Instances {
    instances: Vec<Instance>,
}

/// Tell that an instance of a service is there
///
/// To be sent every few seconds, however often: the last one counts.
#[utoipa::path(
    post, path = "/api/instances/{id}/heartbeat", operation_id = "sendHeartbeat", tag = "fleet",
    params(("id" = inline(InstanceName), Path, description = "Which instance")),
    request_body(content = Beat, example = json!({
        "service": "cdc-relay", "version": "0.1.0", "started": "2026-01-31T12:00:00Z", "state": "streaming",
    })),
    responses((status = 200, description = "The instance as it is stored", body = Instance)),
    extensions(("x-refused" = json!(["too-many-instances"]))),
)]
pub(super) async fn heartbeat(
    State(context): State<Arc<Context>>,
    id: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Answer, Error> {
    let Path(id) = id.map_err(|e| Error::BadId(e.body_text()))?;
    let id = name(id).map_err(|what| Error::BadId(format!("An instance's id {what}.")))?;
    let posted = Posted::read(request, &context).await?;
    let heartbeat = read(id, &posted.body)?;
    let answer = |instance: &Instance| Answer::json(StatusCode::OK, instance);
    context.store.heartbeat(&heartbeat, context.fleet.forget_after(), posted.key.as_ref(), answer).await
}

/// Which instances there are
///
/// By service and id. One that has been silent for long is stale, and later forgotten.
#[utoipa::path(
    get, path = "/api/instances", operation_id = "listInstances", tag = "fleet",
    responses((status = 200, description = "All of them", body = Instances)),
)]
pub(super) async fn list(State(context): State<Arc<Context>>) -> Result<Json<Instances>, Error> {
    let fleet = &context.fleet;
    let instances = context.store.instances(fleet.stale_after(), fleet.forget_after()).await?;
    Ok(Json(Instances { instances }))
}

/// The body of a heartbeat.
fn read(id: String, body: &str) -> Result<Heartbeat, Error> {
    let mut errors = Errors::default();
    let parsed = parse(id, &Field::root(body)?, &mut errors);
    errors.or(parsed)
}

fn parse(id: String, body: &Field<'_>, errors: &mut Errors) -> Option<Heartbeat> {
    let object = body.object(&["service", "version", "started", "state"], errors)?;
    let service = object.required("service", errors).and_then(|f| f.string(errors, name));
    let version = object.required("version", errors).and_then(|f| f.string(errors, version));
    let started = object.required("started", errors).and_then(|f| f.string(errors, time));
    let state = object.required("state", errors).and_then(|f| f.string(errors, name));
    Some(Heartbeat { id, service: service?, version: version?, started: started?, state: state? })
}

fn name(text: String) -> Result<String, String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if (1..=MAX_CHARS).contains(&text.len()) && text.chars().all(legal) {
        return Ok(text);
    }
    Err(format!("must be 1 to {MAX_CHARS} characters of A-Z a-z 0-9 . _ -"))
}

fn version(text: String) -> Result<String, String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '+' | '~' | '_' | '-');
    if (1..=MAX_CHARS).contains(&text.len()) && text.chars().all(legal) {
        return Ok(text);
    }
    Err(format!("must be 1 to {MAX_CHARS} characters of A-Z a-z 0-9 . + ~ _ -"))
}

#[expect(clippy::needless_pass_by_value, reason = "the field hands its text over")]
fn time(text: String) -> Result<DateTime<Utc>, String> {
    let time = DateTime::parse_from_rfc3339(&text).map(|time| time.to_utc()).ok();
    // In UTC it may be of a year that has no four digits.
    let time = time.filter(|time| (0..=9999).contains(&time.year()));
    time.ok_or_else(|| "must be a time such as 2026-01-31T12:00:00Z".into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn good() -> Value {
        json!({"service": "cdc-relay", "version": "0.1.0", "started": "2026-01-31T12:00:00.5+01:00", "state": "streaming"})
    }

    fn pointers(body: &Value) -> Vec<String> {
        match read("relay-1".into(), &body.to_string()) {
            Ok(_) => Vec::new(),
            Err(Error::Invalid(errors)) => errors.into_iter().map(|e| e.pointer).collect(),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_heartbeat_is_read_and_each_wrong_field_is_named() {
        let heartbeat = read("relay-1".into(), &good().to_string()).unwrap();
        assert_eq!(heartbeat.started.to_rfc3339(), "2026-01-31T11:00:00.500+00:00");
        for (key, under, over) in [
            ("service", json!("s".repeat(64)), json!("s".repeat(65))),
            ("service", json!("a.B_c-1"), json!("")),
            ("version", json!("v".repeat(64)), json!("v".repeat(65))),
            ("version", json!("1.0+x"), json!("1 0")),
            ("state", json!("s".repeat(64)), json!("s".repeat(65))),
            ("state", json!("waiting_for_kafka"), json!("a b")),
            ("started", json!("0001-01-01T00:00:00Z"), json!("2026-01-31")),
            ("started", json!("9999-12-31T23:59:59Z"), json!(1_769_860_800)),
            ("started", json!("9999-12-31T22:58:59-01:00"), json!("9999-12-31T23:59:59-01:00")),
            ("started", json!("0000-01-01T01:00:00+01:00"), json!("0000-01-01T00:59:59+01:00")),
        ] {
            let with = |value: Value| {
                let mut body = good();
                body[key] = value;
                pointers(&body)
            };
            assert_eq!(with(under), Vec::<String>::new(), "{key}");
            assert_eq!(with(over), [format!("/{key}")]);
            assert_eq!(with(Value::Null), [format!("/{key}")]);
        }
        let mut more = good();
        more["id"] = json!("x");
        assert_eq!(pointers(&more), ["/id"]);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC*") {
            let _ = (name(text.clone()), version(text.clone()), time(text.clone()), read(String::new(), &text));
        }
    }
}

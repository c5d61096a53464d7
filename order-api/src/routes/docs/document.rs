//! The document: what the routes say of themselves, and what all of them have alike.

use axum::{Router, body::Bytes, http::header::CONTENT_TYPE, routing::get};
use serde_json::{Value, json};
use utoipa::{OpenApi, openapi::OpenApi as Described};

use super::{
    page, parameters, refusals,
    schemas::{Live, Readiness},
};
use crate::domain::KafkaName;

/// What is there before any route is added: also the routes that cannot describe themselves.
#[derive(OpenApi)]
#[openapi(
    info(title = "Order API", description = include_str!("about.md")),
    servers((url = "/", description = "Where this document is")),
    paths(live, ready, metrics, document, page::page, page::part),
    components(schemas(KafkaName)),
    tags(
        (name = "orders", description = "Placing and following orders"),
        (name = "fleet", description = "Which instances of which service there are"),
        (name = "messages", description = "Sending messages of any kind, and following them"),
        (name = "operation", description = "Health, metrics and documentation"),
    ),
)]
struct Base;

/// The document without the routes that describe themselves.
pub(in crate::routes) fn base() -> Described {
    Base::openapi()
}

/// The whole document, once every route is described.
pub(in crate::routes) fn text(described: &Described) -> String {
    let mut document = serde_json::to_value(described).unwrap_or_default();
    describe_alike(&mut document);
    document.to_string()
}

/// The routes of the documentation, once every other is described.
pub(in crate::routes) fn serve(described: &Described) -> Router {
    let text: Bytes = text(described).into();
    Router::new()
        .route("/openapi.json", get(async move || ([(CONTENT_TYPE, "application/json")], text.clone())))
        .route("/docs", get(page::page))
        .route("/docs/{file}", get(page::part))
}

/// Adds what routes have alike: headers, and what they refuse.
fn describe_alike(document: &mut Value) {
    let examples = refusals::examples();
    document["components"]["schemas"]["Problem"] = refusals::schema(&examples);
    document["components"]["securitySchemes"]["token"] = json!({
        "type": "http",
        "scheme": "bearer",
        "description": "Where the service asks for tokens: read for GET and HEAD, write for everything else.",
    });
    let paths = document["paths"].as_object_mut().into_iter().flatten();
    for (path, item) in paths {
        for (method, operation) in item.as_object_mut().into_iter().flatten() {
            let Some(operation) = operation.as_object_mut() else { continue };
            let refused = refusals::of(method, path, operation);
            parameters::add(method, operation, &refused);
            if path.starts_with("/api/") {
                operation.insert("security".into(), json!([{}, {"token": []}]));
            }
            refusals::add(operation, &refused, &examples);
        }
    }
}

/// Whether the process answers
#[utoipa::path(get, path = "/health/live", operation_id = "isAlive", tag = "operation", responses(
    (status = 200, description = "It does", body = Live),
))]
#[expect(dead_code, reason = "describes a route of the service crate")]
fn live() {}

/// Whether orders can be taken
#[utoipa::path(get, path = "/health/ready", operation_id = "isReady", tag = "operation", responses(
    (status = 200, description = "They can", body = Readiness),
    (status = 503, description = "They cannot now", body = Readiness),
))]
#[expect(dead_code, reason = "describes a route of the service crate")]
fn ready() {}

/// Metrics for Prometheus
#[utoipa::path(get, path = "/metrics", operation_id = "getMetrics", tag = "operation", responses(
    (status = 200, description = "OpenMetrics text", body = String,
        content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8"),
))]
#[expect(dead_code, reason = "describes a route of the service crate")]
fn metrics() {}

/// This document
#[utoipa::path(get, path = "/openapi.json", operation_id = "getDocument", tag = "operation", responses(
    (status = 200, description = "OpenAPI 3.1", body = Value),
))]
#[expect(dead_code, reason = "its handler has the document, which must know it first")]
fn document() {}

//! What every request passes: the deadline, the catch for panics, the metrics and the access log.

use std::{any::Any, sync::Arc, time::Instant};

use axum::{
    extract::{MatchedPath, Request, State},
    http::Method,
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::Context;
use crate::{
    auth::Client,
    error::{Error, Written},
    metrics::RequestLabels,
};

/// When the request must have been answered; the body's reader looks at it, too.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(pub(super) tokio::time::Instant);

/// Tells the handlers who asks.
pub(super) async fn authenticate(mut request: Request, next: Next) -> Response {
    request.extensions_mut().insert(Client::default());
    next.run(request).await
}

/// Answers 503 when the deadline passes. What is under way is dropped, and its database connection closed.
pub(super) async fn deadline(
    State(context): State<Arc<Context>>,
    mut request: Request,
    next: Next,
) -> Response {
    let at = tokio::time::Instant::now() + context.request_timeout;
    request.extensions_mut().insert(Deadline(at));
    let written = if request.method() == Method::GET { Written::Nothing } else { Written::Unknown };
    tokio::select! {
        // The handler first: a body that is late is told so (408), and both are woken at the same instant.
        biased;
        response = next.run(request) => response,
        () = tokio::time::sleep_until(at) => Error::Unavailable(written).into_response(),
    }
}

/// A panic is a bug: the client gets a 500, the log the message, the process goes on.
#[expect(clippy::needless_pass_by_value, reason = "the layer hands the panic over")]
pub(super) fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response {
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("(no message)");
    tracing::error!(message, "a handler panicked");
    Error::Internal.into_response()
}

/// Counts and times the request, and writes one line about it.
pub(super) async fn measure(State(context): State<Arc<Context>>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let method = method(request.method());
    // The route's pattern, not the path: a label must not have as many values as there are orders.
    let route = request.extensions().get::<MatchedPath>().cloned();
    let response = next.run(request).await;
    let elapsed = started.elapsed();
    let route = route.as_ref().map_or("unmatched", MatchedPath::as_str);
    let status = response.status();
    context.metrics.answered(
        &RequestLabels { method, route: route.into(), status: status.as_u16() },
        elapsed.as_secs_f64(),
    );
    let elapsed_us = elapsed.as_micros();
    if status.is_server_error() {
        tracing::warn!(method, route, status = status.as_u16(), elapsed_us, "answered");
    } else {
        tracing::debug!(method, route, status = status.as_u16(), elapsed_us, "answered");
    }
    response
}

/// A label must not have as many values as clients can think of.
fn method(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}

//! What every request passes: its id, the metrics and the access log, the bounds, the catch for panics, the deadline,
//! and below `/api` who asks.

use std::{any::Any, sync::Arc, time::Instant};

use axum::{
    body::HttpBody as _,
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use prometheus_client::metrics::gauge::Gauge;
use service::http::Peer;
use tokio::sync::SemaphorePermit;
use tracing::{Instrument as _, Level};
use uuid::Uuid;

use super::Context;
use crate::{
    auth::{Client, Scope},
    error::{Error, Written},
    metrics::RequestLabels,
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest `x-request-id` that is taken over, in characters.
const MAX_REQUEST_ID_CHARS: usize = 128;

/// How much of a path goes to the log, in characters.
const MAX_LOGGED_CHARS: usize = 256;

/// Routes that are asked every few seconds, by machines.
const PROBES: [&str; 3] = ["/health/live", "/health/ready", "/metrics"];

/// When the request must have been answered; the body's reader looks at it, too.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(pub(super) tokio::time::Instant);

/// Refuses a request whose line and header fields are too large.
pub(super) async fn bound_head(
    State(context): State<Arc<Context>>,
    request: Request,
    next: Next,
) -> Response {
    let limit = context.header_limit_bytes;
    if head_bytes(&request) > limit {
        return Error::HeadTooLarge(limit).into_response();
    }
    next.run(request).await
}

/// The request's head as it is usually sent: `GET /path HTTP/1.1`, then `name: value` a line, then an empty line.
fn head_bytes(request: &Request) -> usize {
    let target = request.uri().path_and_query().map_or(1, |target| target.as_str().len());
    let fields = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len() + 4);
    request.method().as_str().len() + target + "  HTTP/1.1\r\n\r\n".len() + fields.sum::<usize>()
}

/// What every request to the API passes: who asks, whether we can read what they send, and whether there is a place.
pub(super) async fn admit(State(context): State<Arc<Context>>, mut request: Request, next: Next) -> Response {
    let client = match &context.tokens {
        None => Ok(Client::default()),
        Some(tokens) => tokens.client(request.headers(), request.method()),
    };
    let client = match client {
        Ok(client) => client,
        Err(refused) => return refused.into_response(),
    };
    request.extensions_mut().insert(client.clone());
    let mut response = match Place::take(&context, request.method(), request.headers()) {
        Ok(_place) => next.run(request).await,
        Err(refused) => refused.into_response(),
    };
    // For the access log.
    response.extensions_mut().insert(client);
    response
}

/// The place of a request among those that may be under way at once; free again when it is dropped.
struct Place<'a> {
    _permit: SemaphorePermit<'a>,
    in_flight: &'a Gauge,
}

impl<'a> Place<'a> {
    fn take(context: &'a Context, method: &Method, headers: &HeaderMap) -> Result<Self, Error> {
        let plain = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"identity");
        let with_body = Scope::of(method) == Scope::Write;
        if with_body && !headers.get_all(header::CONTENT_ENCODING).iter().all(plain) {
            return Err(Error::Encoded);
        }
        let Ok(permit) = context.places.try_acquire() else {
            context.metrics.shed.inc();
            return Err(Error::Overloaded);
        };
        let in_flight = &context.metrics.in_flight;
        in_flight.inc();
        Ok(Self { _permit: permit, in_flight })
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.in_flight.dec();
    }
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

/// Names, counts and times the request, and writes one line about it.
pub(super) async fn measure(State(context): State<Arc<Context>>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let method = method(request.method());
    // The route's pattern, not the path: a label must not have as many values as there are orders.
    let route = request.extensions().get::<MatchedPath>().cloned();
    // Without the query, which may hold what is nobody's business.
    let path: String = request.uri().path().chars().take(MAX_LOGGED_CHARS).collect();
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0.to_string());
    let id = RequestId::of(request.headers());
    // What is logged meanwhile has the id, too.
    let span = tracing::info_span!("request", id = id.as_str());
    let mut response = next.run(request).instrument(span).await;
    let elapsed = started.elapsed();
    let route = route.as_ref().map_or("unmatched", MatchedPath::as_str);
    let status = response.status();
    context.metrics.answered(
        &RequestLabels { method, route: route.into(), status: status.as_u16() },
        elapsed.as_secs_f64(),
    );
    let client = response.extensions_mut().remove::<Client>().map(|client| client.0);
    let client = client.as_deref().filter(|name| !name.is_empty());
    // Before it is compressed; unknown where it is made while it is sent.
    let bytes = response.body().size_hint().exact();
    let elapsed_us = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
    macro_rules! line {
        ($level:expr) => {
            tracing::event!(
                target: "access", $level, method, route, path, status = status.as_u16(), elapsed_us,
                request_id = id.as_str(), client, bytes, peer, "answered"
            )
        };
    }
    if PROBES.contains(&route) {
        line!(Level::DEBUG);
    } else if status.is_server_error() {
        line!(Level::WARN);
    } else {
        line!(Level::INFO);
    }
    response.headers_mut().insert(REQUEST_ID, id.0);
    response
}

/// What a request is called: as its client or whoever passed it on says, or a new UUID.
struct RequestId(HeaderValue);

impl RequestId {
    fn of(headers: &HeaderMap) -> Self {
        let mut values = headers.get_all(REQUEST_ID).iter();
        match (values.next(), values.next()) {
            (Some(only), None) if is_request_id(only.as_bytes()) => Self(only.clone()),
            _ => {
                let id = Uuid::now_v7().to_string();
                Self(HeaderValue::from_str(&id).unwrap_or(HeaderValue::from_static("none")))
            }
        }
    }

    fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }
}

fn is_request_id(text: &[u8]) -> bool {
    (1..=MAX_REQUEST_ID_CHARS).contains(&text.len()) && text.iter().all(u8::is_ascii_graphic)
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

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    #[test]
    fn a_head_is_measured_as_it_is_sent() {
        for sent in [
            "GET / HTTP/1.1\r\n\r\n",
            "GET /api/orders?limit=1 HTTP/1.1\r\nhost: x\r\n\r\n",
            "DELETE /a HTTP/1.1\r\nhost: x\r\nx-a: 1\r\nx-a: 22\r\nx-empty: \r\n\r\n",
        ] {
            let mut lines = sent.split("\r\n");
            let mut first = lines.next().unwrap().split(' ');
            let mut request = Request::builder().method(first.next().unwrap()).uri(first.next().unwrap());
            for (name, value) in lines.filter_map(|line| line.split_once(": ")) {
                request = request.header(name, value);
            }
            assert_eq!(head_bytes(&request.body(Body::empty()).unwrap()), sent.len(), "{sent:?}");
        }
    }

    #[test]
    fn an_id_is_visible_ascii_and_not_too_long() {
        for good in ["a", "!", "~", &"x".repeat(128)] {
            assert!(is_request_id(good.as_bytes()), "{good}");
        }
        for bad in ["", " ", "a b", "a\t", "é", "\u{7f}", &"x".repeat(129)] {
            assert!(!is_request_id(bad.as_bytes()), "{bad:?}");
        }
    }
}

//! The HTTP interface: which routes there are, and what every request passes on its way to one.

mod command;
mod json;
mod middleware;
mod orders;
mod query;
mod requests;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    routing::{get, post, put},
};
use prometheus_client::registry::Registry;
use service::Health;
use tower_http::catch_panic::CatchPanicLayer;

use crate::{error::Error, metrics::Metrics, store::Store};

/// What every handler shares.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) store: Store,
    pub(crate) metrics: Metrics,
    /// The largest body, in bytes.
    pub(crate) body_limit_bytes: usize,
    /// A request is answered by then.
    pub(crate) request_timeout: Duration,
}

/// Every route. The layers below are passed from the last to the first: measure, catch, time.
pub(crate) fn router(context: Arc<Context>, health: Health, registry: Arc<Registry>) -> Router {
    Router::new()
        .route("/api/orders", post(orders::create).get(orders::list))
        .route("/api/orders/{id}", get(orders::show).patch(orders::update))
        .route("/api/orders/{id}/events", get(orders::events))
        .route("/api/orders/{id}/status", put(orders::set_status))
        .route("/api/orders/{id}/confirm", post(orders::confirm))
        .route("/api/orders/{id}/cancel", post(orders::cancel))
        .route_layer(axum::middleware::from_fn(middleware::authenticate))
        .with_state(Arc::clone(&context))
        .merge(service::health::router(health, registry))
        .fallback(async || Error::NoRoute)
        .method_not_allowed_fallback(async || Error::WrongMethod)
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&context), middleware::deadline))
        .layer(CatchPanicLayer::custom(middleware::panicked))
        .layer(axum::middleware::from_fn_with_state(context, middleware::measure))
}

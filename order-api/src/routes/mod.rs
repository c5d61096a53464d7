//! The HTTP interface: which routes there are, and what every request passes on its way to one.

mod command;
mod docs;
mod json;
mod middleware;
mod orders;
mod query;
mod requests;

use std::{sync::Arc, time::Duration};

use axum::Router;
use prometheus_client::registry::Registry;
use service::Health;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa_axum::{router::OpenApiRouter, routes};

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
    let (api, described) = api()
        .route_layer(axum::middleware::from_fn(middleware::authenticate))
        .with_state(Arc::clone(&context))
        .split_for_parts();
    api.merge(docs::serve(&described))
        .merge(service::health::router(health, registry))
        .fallback(async || Error::NoRoute)
        .method_not_allowed_fallback(async || Error::WrongMethod)
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&context), middleware::deadline))
        .layer(CatchPanicLayer::custom(middleware::panicked))
        .layer(axum::middleware::from_fn_with_state(context, middleware::measure))
}

/// The `OpenAPI` document, as `/openapi.json` has it.
pub fn document() -> String {
    docs::text(api().get_openapi())
}

/// The routes that describe themselves. What is not declared by `routes!` is not documented.
fn api() -> OpenApiRouter<Arc<Context>> {
    OpenApiRouter::with_openapi(docs::base())
        .routes(routes!(orders::create, orders::list))
        .routes(routes!(orders::show, orders::update))
        .routes(routes!(orders::events))
        .routes(routes!(orders::set_status))
        .routes(routes!(orders::confirm))
        .routes(routes!(orders::cancel))
}

//! The HTTP interface: which routes there are, and what every request passes on its way to one.

mod command;
mod docs;
mod instances;
mod json;
mod messages;
mod middleware;
mod orders;
mod query;
mod requests;

use std::{sync::Arc, time::Duration};

use axum::Router;
use prometheus_client::registry::Registry;
use service::Health;
use tokio::sync::Semaphore;
use tower_http::{
    CompressionLevel,
    catch_panic::CatchPanicLayer,
    compression::{CompressionLayer, predicate::SizeAbove},
};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    auth::Tokens,
    config::{FleetConfig, MessagesConfig},
    error::Error,
    metrics::Metrics,
    store::Store,
};

/// What every handler shares.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) store: Store,
    pub(crate) metrics: Metrics,
    pub(crate) fleet: FleetConfig,
    /// What opens the API; nothing where nobody is asked for a token.
    pub(crate) tokens: Option<Arc<Tokens>>,
    /// One for each request that may be under way.
    pub(crate) places: Semaphore,
    /// The largest request line with all header fields, in bytes.
    pub(crate) header_limit_bytes: usize,
    /// The largest body, in bytes.
    pub(crate) body_limit_bytes: usize,
    /// A request is answered by then.
    pub(crate) request_timeout: Duration,
    /// Which messages are taken.
    pub(crate) messages: MessagesConfig,
}

/// Smaller answers would hardly become smaller.
const COMPRESSED_FROM_BYTES: u16 = 1024;

/// Every route. The layers below are passed from the last to the first: compress, measure, bound the head, catch, time,
/// and below `/api` admit.
pub(crate) fn router(context: Arc<Context>, health: Health, registry: Arc<Registry>) -> Router {
    let compression = CompressionLayer::new()
        .quality(CompressionLevel::Fastest)
        .compress_when(SizeAbove::new(COMPRESSED_FROM_BYTES));
    let (api, described) = api()
        .route_layer(axum::middleware::from_fn_with_state(Arc::clone(&context), middleware::admit))
        .with_state(Arc::clone(&context))
        .split_for_parts();
    api.merge(docs::serve(&described))
        .merge(service::health::router(health, registry))
        .fallback(async || Error::NoRoute)
        .method_not_allowed_fallback(async || Error::WrongMethod)
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&context), middleware::deadline))
        .layer(CatchPanicLayer::custom(middleware::panicked))
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&context), middleware::bound_head))
        .layer(axum::middleware::from_fn_with_state(context, middleware::measure))
        .layer(compression)
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
        .routes(routes!(instances::list))
        .routes(routes!(instances::heartbeat))
        .routes(routes!(messages::send, messages::list))
        .routes(routes!(messages::send_short))
        .routes(routes!(messages::show))
        .routes(routes!(messages::redeliver))
}

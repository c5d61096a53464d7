//! `/api/orders`.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{HeaderMap, StatusCode, header::LOCATION},
    response::IntoResponse,
};
use chrono::{SubsecRound, Utc};
use uuid::Uuid;

use super::{Context, json, requests};
use crate::{
    domain::{Event, Order, OrderId, Traceparent},
    error::Error,
};

/// `POST /api/orders`: 201 with the order and its place, after the commit.
pub(super) async fn create(
    State(context): State<Arc<Context>>,
    request: Request,
) -> Result<impl IntoResponse, Error> {
    let traceparent = traceparent(request.headers());
    let body = json::read(request, context.body_limit_bytes, context.request_timeout).await?;
    let new = requests::new_order(&body)?;
    // Postgres keeps microseconds: what is answered now is what is read later.
    let now = Utc::now().trunc_subsecs(6);
    let order = Order::place(new, OrderId::generate(), now);
    let event = Event::created(&order, Uuid::now_v7());
    context.store.create(&order, &event, traceparent.as_ref()).await?;
    context.metrics.orders_created.inc();
    let location = format!("/api/orders/{}", order.order_id);
    Ok((StatusCode::CREATED, [(LOCATION, location)], Json(order)))
}

/// `GET /api/orders/{id}`: 200 with the order's current state.
pub(super) async fn show(
    State(context): State<Arc<Context>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Order>, Error> {
    let Path(id) = id.map_err(|e| Error::BadId(e.body_text()))?;
    let id = OrderId::parse(id).map_err(|what| Error::BadId(format!("An order id {what}.")))?;
    let order = context.store.find(&id).await?;
    order.map(Json).ok_or_else(|| Error::NoOrder(id.to_string()))
}

/// The request's trace context, if there is exactly one and it is valid.
fn traceparent(headers: &HeaderMap) -> Option<Traceparent> {
    let mut values = headers.get_all("traceparent").iter();
    let only = values.next()?;
    if values.next().is_some() {
        return None;
    }
    Traceparent::parse(only.to_str().ok()?)
}

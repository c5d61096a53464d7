//! `/api/orders`.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use service::problem::FieldError;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    Context,
    command::{Posted, etag, now},
    docs::{Cancellation, Confirmation, Limit, StatusChange, Version},
    query::{self, Query},
    requests,
};
use crate::{
    domain::{Command, CustomerId, Event, NewOrder, Order, OrderId, Refusal, Status, Update},
    error::Error,
    store::{Answer, Decision},
};

/// A page of orders.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Orders {
    orders: Vec<Order>,
    /// Where the next page begins; null: there is none.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// A page of what happened to an order.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Events {
    events: Vec<Event>,
    /// Where the next page begins; null: there is none.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// Place an order
#[utoipa::path(
    post, path = "/api/orders", operation_id = "createOrder", tag = "orders",
    request_body(content = NewOrder, example = json!({
        "customerId": "customer-1",
        "restaurantId": "restaurant-1",
        "items": [{"menuItemId": "paracetamol-500", "name": "Paracetamol 500 mg", "price": "6.25", "quantity": 2}],
        "notes": "Ring twice",
    })),
    responses((status = 201, description = "It is placed, for good", body = Order, headers(
        ("Location" = String, description = "Where the order is"),
        ("ETag" = String, description = "Its version, for If-Match"),
    ))),
    extensions(("x-refused" = json!(["order-exists"]))),
)]
pub(super) async fn create(State(context): State<Arc<Context>>, request: Request) -> Result<Answer, Error> {
    let posted = Posted::read(request, &context).await?;
    let new = requests::new_order(&posted.body)?;
    let event = Event::created(new, Uuid::now_v7(), now());
    let order = Order::begin(&event).ok_or(Error::Internal)?;
    let answer = Answer {
        location: Some(format!("/api/orders/{}", order.order_id)),
        ..answer(StatusCode::CREATED, &order)?
    };
    let traceparent = posted.traceparent.as_ref();
    let answer = context.store.create(&order, &event, traceparent, posted.key.as_ref(), &answer).await?;
    if !answer.repeated {
        context.metrics.orders_created.inc();
    }
    Ok(answer)
}

/// Change what is ordered
///
/// A merge patch (RFC 7396). Items change only while the order is `created`, notes until it is final.
#[utoipa::path(
    patch, path = "/api/orders/{id}", operation_id = "updateOrder", tag = "orders",
    params(("id" = OrderId, Path, description = "Which order")),
    request_body(content(
        (Update = "application/json", example = json!({"notes": "Ring once"})),
        (Update = "application/merge-patch+json", example = json!({"notes": null})),
    )),
    responses((status = 200, description = "As it is now", body = Order, headers(
        ("ETag" = String, description = "Its version, for If-Match"),
    ))),
    extensions(("x-refused" = json!(["order-not-found", "order-state", "version-mismatch"]))),
)]
pub(super) async fn update(
    State(context): State<Arc<Context>>,
    id: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Answer, Error> {
    carry_out(&context, id, request, requests::update).await
}

/// Move an order on
///
/// From `confirmed` to `preparing`, `ready` and `delivered`. It is confirmed and cancelled by routes of their own.
#[utoipa::path(
    put, path = "/api/orders/{id}/status", operation_id = "setOrderStatus", tag = "orders",
    params(("id" = OrderId, Path, description = "Which order")),
    request_body(content = StatusChange, example = json!({"status": "preparing"})),
    responses((status = 200, description = "As it is now", body = Order, headers(
        ("ETag" = String, description = "Its version, for If-Match"),
    ))),
    extensions(("x-refused" = json!(["order-not-found", "order-state", "version-mismatch"]))),
)]
pub(super) async fn set_status(
    State(context): State<Arc<Context>>,
    id: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Answer, Error> {
    carry_out(&context, id, request, requests::status).await
}

/// Confirm an order: it is paid for
#[utoipa::path(
    post, path = "/api/orders/{id}/confirm", operation_id = "confirmOrder", tag = "orders",
    params(("id" = OrderId, Path, description = "Which order")),
    request_body(content = Confirmation, example = json!({"paymentId": "payment-1"})),
    responses((status = 200, description = "As it is now", body = Order, headers(
        ("ETag" = String, description = "Its version, for If-Match"),
    ))),
    extensions(("x-refused" = json!(["order-not-found", "order-state", "version-mismatch"]))),
)]
pub(super) async fn confirm(
    State(context): State<Arc<Context>>,
    id: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Answer, Error> {
    carry_out(&context, id, request, requests::confirm).await
}

/// Cancel an order
#[utoipa::path(
    post, path = "/api/orders/{id}/cancel", operation_id = "cancelOrder", tag = "orders",
    params(("id" = OrderId, Path, description = "Which order")),
    request_body(content = Cancellation, example = json!({"reason": "The customer changed their mind"})),
    responses((status = 200, description = "As it is now", body = Order, headers(
        ("ETag" = String, description = "Its version, for If-Match"),
    ))),
    extensions(("x-refused" = json!(["order-not-found", "order-state", "version-mismatch"]))),
)]
pub(super) async fn cancel(
    State(context): State<Arc<Context>>,
    id: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Answer, Error> {
    carry_out(&context, id, request, requests::cancel).await
}

async fn carry_out(
    context: &Context,
    id: Result<Path<String>, PathRejection>,
    request: Request,
    parse: fn(&str) -> Result<Command, Error>,
) -> Result<Answer, Error> {
    let id = order_id(id)?;
    let posted = Posted::read(request, context).await?;
    let command = parse(&posted.body)?;
    let event_id = Uuid::now_v7();
    let decide = |order: &Order| {
        posted.precondition.check(order)?;
        let event = order.decide(&command, event_id, now()).map_err(|refusal| refused(refusal, order))?;
        let Some(event) = event else { return answer(StatusCode::OK, order).map(Decision::Keep) };
        let mut after = order.clone();
        after.apply(&event);
        let answer = answer(StatusCode::OK, &after)?;
        Ok(Decision::Write(Box::new(event), Box::new(after), answer))
    };
    context.store.change(&id, event_id, posted.traceparent.as_ref(), posted.key.as_ref(), decide).await
}

/// List orders, the newest first
#[utoipa::path(
    get, path = "/api/orders", operation_id = "listOrders", tag = "orders",
    params(
        ("customer_id" = inline(CustomerId), Query, description = "Of this customer"),
        ("status" = Vec<Status>, Query, description = "At one of these"),
        ("created_from" = DateTime<Utc>, Query, description = "Placed then or later"),
        ("created_to" = DateTime<Utc>, Query, description = "Placed before"),
        ("limit" = inline(Limit), Query, description = "How many at most"),
        ("cursor" = String, Query, description = "The nextCursor of the page before"),
    ),
    responses((status = 200, description = "A page of them", body = Orders)),
)]
pub(super) async fn list(
    State(context): State<Arc<Context>>,
    query: Query,
) -> Result<impl IntoResponse, Error> {
    let (filter, limit) = query.orders()?;
    let orders = context.store.list(&filter, limit + 1).await?;
    let (orders, next_cursor) = query::page(orders, limit, |order| query::after_order(&filter, order));
    Ok(Json(Orders { orders, next_cursor }))
}

/// Look at an order, as it is or as it was
#[utoipa::path(
    get, path = "/api/orders/{id}", operation_id = "getOrder", tag = "orders",
    params(
        ("id" = OrderId, Path, description = "Which order"),
        ("at_version" = inline(Version), Query, description = "As it was at that version"),
        ("If-None-Match" = String, Header, description = "The ETag of what the client has"),
    ),
    responses(
        (status = 200, description = "The order", body = Order, headers(
            ("ETag" = String, description = "Its version, for If-Match"),
        )),
        (status = 304, description = "The client has it", headers(("ETag" = String, description = "Its version"))),
    ),
    extensions(("x-refused" = json!(["order-not-found", "version-not-found"]))),
)]
pub(super) async fn show(
    State(context): State<Arc<Context>>,
    id: Result<Path<String>, PathRejection>,
    query: Query,
    headers: HeaderMap,
) -> Result<Response, Error> {
    let id = order_id(id)?;
    let version = query.version()?;
    let order = match version {
        Some(version) => context.store.at_version(&id, version).await?,
        None => context.store.find(&id).await?,
    };
    let order = order.ok_or_else(|| Error::NoOrder(id.to_string()))?;
    if version.is_some_and(|version| version != order.version) {
        return Err(Error::NoVersion(order.version));
    }
    let known = headers.get(header::IF_NONE_MATCH).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let tag = etag(&order);
    if known == "*" || known.split(',').any(|known| known.trim().trim_start_matches("W/") == tag) {
        return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, tag)]).into_response());
    }
    Ok(answer(StatusCode::OK, &order)?.into_response())
}

/// What happened to an order, from its beginning
#[utoipa::path(
    get, path = "/api/orders/{id}/events", operation_id = "listOrderEvents", tag = "orders",
    params(
        ("id" = OrderId, Path, description = "Which order"),
        ("limit" = inline(Limit), Query, description = "How many at most"),
        ("cursor" = String, Query, description = "The nextCursor of the page before"),
    ),
    responses((status = 200, description = "A page of its events", body = Events)),
    extensions(("x-refused" = json!(["order-not-found"]))),
)]
pub(super) async fn events(
    State(context): State<Arc<Context>>,
    id: Result<Path<String>, PathRejection>,
    query: Query,
) -> Result<impl IntoResponse, Error> {
    let id = order_id(id)?;
    let (after, limit) = query.events()?;
    let events = context.store.events(&id, after, limit + 1).await?;
    if events.is_empty() && context.store.find(&id).await?.is_none() {
        return Err(Error::NoOrder(id.to_string()));
    }
    let (events, next_cursor) = query::page(events, limit, |event| query::after_version(event.version));
    Ok(Json(Events { events, next_cursor }))
}

fn answer(status: StatusCode, order: &Order) -> Result<Answer, Error> {
    Ok(Answer { etag: Some(etag(order)), ..Answer::json(status, order)? })
}

fn order_id(id: Result<Path<String>, PathRejection>) -> Result<OrderId, Error> {
    let Path(id) = id.map_err(|e| Error::BadId(e.body_text()))?;
    OrderId::parse(id).map_err(|what| Error::BadId(format!("An order id {what}.")))
}

fn refused(refusal: Refusal, order: &Order) -> Error {
    match refusal {
        Refusal::State(why) => Error::State(why, order.status, order.version),
        Refusal::Fields(fields) => Error::Invalid(
            fields.into_iter().map(|(pointer, detail)| FieldError { pointer, detail }).collect(),
        ),
    }
}

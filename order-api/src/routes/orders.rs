//! `/api/orders`.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use chrono::{DateTime, SubsecRound, Utc};
use serde::Serialize;
use service::problem::FieldError;
use uuid::Uuid;

use super::{
    Context,
    command::{Posted, etag},
    query::{self, Query},
    requests,
};
use crate::{
    domain::{Command, Event, Order, OrderId, Refusal},
    error::Error,
    store::{Answer, Decision},
};

/// A page of orders.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Orders {
    orders: Vec<Order>,
    /// Where the next page begins; null: there is none.
    next_cursor: Option<String>,
}

/// A page of what happened to an order.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Events {
    events: Vec<Event>,
    /// Where the next page begins; null: there is none.
    next_cursor: Option<String>,
}

/// `POST /api/orders`: 201 with the order and its place, after the commit.
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

/// `PATCH /api/orders/{id}`: 200 with the order as it is then.
pub(super) async fn update(
    State(context): State<Arc<Context>>,
    id: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Answer, Error> {
    carry_out(&context, id, request, requests::update).await
}

/// `PUT /api/orders/{id}/status`: 200 with the order as it is then.
pub(super) async fn set_status(
    State(context): State<Arc<Context>>,
    id: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Answer, Error> {
    carry_out(&context, id, request, requests::status).await
}

/// `POST /api/orders/{id}/confirm`: 200 with the order as it is then.
pub(super) async fn confirm(
    State(context): State<Arc<Context>>,
    id: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Answer, Error> {
    carry_out(&context, id, request, requests::confirm).await
}

/// `POST /api/orders/{id}/cancel`: 200 with the order as it is then.
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

/// `GET /api/orders`: 200 with a page of orders, the newest first.
pub(super) async fn list(
    State(context): State<Arc<Context>>,
    query: Query,
) -> Result<impl IntoResponse, Error> {
    let (filter, limit) = query.orders()?;
    let mut orders = context.store.list(&filter, limit + 1).await?;
    let more = i64::try_from(orders.len()).is_ok_and(|count| count > limit);
    if more {
        orders.pop();
    }
    let last = orders.last().filter(|_| more);
    let next_cursor = last.map(|order| query::after_order(&filter, order));
    Ok(Json(Orders { orders, next_cursor }))
}

/// `GET /api/orders/{id}`: 200 with the order's current state, or as it was at a version; 304 if the client has it.
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

/// `GET /api/orders/{id}/events`: 200 with a page of what happened to the order, from its beginning.
pub(super) async fn events(
    State(context): State<Arc<Context>>,
    id: Result<Path<String>, PathRejection>,
    query: Query,
) -> Result<impl IntoResponse, Error> {
    let id = order_id(id)?;
    let (after, limit) = query.events()?;
    let mut events = context.store.events(&id, after, limit + 1).await?;
    if events.is_empty() && context.store.find(&id).await?.is_none() {
        return Err(Error::NoOrder(id.to_string()));
    }
    let more = i64::try_from(events.len()).is_ok_and(|count| count > limit);
    if more {
        events.pop();
    }
    let last = events.last().filter(|_| more);
    let next_cursor = last.map(|event| query::after_version(event.version));
    Ok(Json(Events { events, next_cursor }))
}

/// Postgres keeps microseconds: what is answered now is what is read later.
fn now() -> DateTime<Utc> {
    Utc::now().trunc_subsecs(6)
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

//! `/api/messages`.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, Request, State, rejection::PathRejection},
    http::StatusCode,
    response::IntoResponse,
};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::{Uuid, fmt::Hyphenated};

use super::{
    Context,
    command::{Posted, now},
    docs::{Limit, Nothing, ShortMessage},
    json::{Errors, Field, Object},
    query::{self, Query},
    requests::{one, whole},
};
use crate::{
    domain::{
        Headers, KafkaName, MAX_ACK_TIMEOUT_SECONDS, MAX_GROUPS, MAX_HEADERS, MAX_PAYLOAD_BYTES, Message,
        MessageKey, MessageState, NewMessage, Payload,
    },
    error::Error,
    store::Answer,
};

/// A page of messages.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Messages {
    messages: Vec<Message>,
    /// Where the next page begins; null: there is none.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// Send a message
///
/// It is put in the outbox, from there into the topic, and followed until each group in `requireAck` has acknowledged it:
/// what is not acknowledged in time is put in the outbox again, a limited number of times.
#[utoipa::path(
    post, path = "/api/messages", operation_id = "sendMessage", tag = "messages",
    request_body(content = NewMessage, example = json!({
        "topic": "notifications", "key": "customer-1", "payload": {"text": "Your order is ready"},
        "headers": {"tenant": "acme"}, "requireAck": ["messages"], "ackTimeout": 30,
    })),
    responses((status = 201, description = "It is committed", body = Message, headers(
        ("Location" = String, description = "Where the message is"),
    ))),
)]
pub(super) async fn send(State(context): State<Arc<Context>>, request: Request) -> Result<Answer, Error> {
    commit(&context, request, whole_form).await
}

/// Send a message, in few words
///
/// One that a single group has to acknowledge.
#[utoipa::path(
    post, path = "/api/messages/send", operation_id = "sendShortMessage", tag = "messages",
    request_body(content = ShortMessage, example = json!({
        "topic": "notifications", "message": {"text": "Your order is ready"}, "consumerGroup": "messages",
    })),
    responses((status = 201, description = "It is committed", body = Message, headers(
        ("Location" = String, description = "Where the message is"),
    ))),
)]
pub(super) async fn send_short(
    State(context): State<Arc<Context>>,
    request: Request,
) -> Result<Answer, Error> {
    commit(&context, request, short_form).await
}

async fn commit(
    context: &Context,
    request: Request,
    parse: fn(&str, &Context) -> Result<NewMessage, Error>,
) -> Result<Answer, Error> {
    let posted = Posted::read(request, context).await?;
    let message = Message::begin(parse(&posted.body, context)?, Uuid::now_v7(), now());
    let location = Some(format!("/api/messages/{}", message.message_id));
    let answer = Answer { location, ..Answer::json(StatusCode::CREATED, &message)? };
    let traceparent = posted.traceparent.as_ref();
    let answer = context.store.send(&message, traceparent, posted.key.as_ref(), &answer).await?;
    if !answer.repeated {
        context.metrics.messages_sent.inc();
    }
    Ok(answer)
}

/// Look at a message, and how far it has come
#[utoipa::path(
    get, path = "/api/messages/{id}", operation_id = "getMessage", tag = "messages",
    params(("id" = Uuid, Path, description = "Which message")),
    responses((status = 200, description = "The message", body = Message)),
    extensions(("x-refused" = json!(["message-not-found"]))),
)]
pub(super) async fn show(
    State(context): State<Arc<Context>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Answer, Error> {
    let id = message_id(id)?;
    let message = context.store.message(id).await?.ok_or_else(|| Error::NoMessage(id.to_string()))?;
    Answer::json(StatusCode::OK, &message)
}

/// List messages, the newest first, without what they say
#[utoipa::path(
    get, path = "/api/messages", operation_id = "listMessages", tag = "messages",
    params(
        ("state" = Vec<MessageState>, Query, description = "In one of these"),
        ("limit" = inline(Limit), Query, description = "How many at most"),
        ("cursor" = String, Query, description = "The nextCursor of the page before"),
    ),
    responses((status = 200, description = "A page of them", body = Messages)),
)]
pub(super) async fn list(
    State(context): State<Arc<Context>>,
    query: Query,
) -> Result<impl IntoResponse, Error> {
    let (filter, limit) = query.messages()?;
    let messages = context.store.messages(&filter, limit + 1).await?;
    let (messages, next_cursor) =
        query::page(messages, limit, |message| query::after_message(&filter, message));
    Ok(Json(Messages { messages, next_cursor }))
}

/// Deliver a message again, now
///
/// Whatever its time is, and also after it was given up. There may be no body.
#[utoipa::path(
    post, path = "/api/messages/{id}/redeliver", operation_id = "redeliverMessage", tag = "messages",
    params(("id" = Uuid, Path, description = "Which message")),
    request_body(content = Option<Nothing>, example = json!({})),
    responses((status = 200, description = "It is in the outbox once more", body = Message)),
    extensions(("x-refused" = json!(["message-not-found", "message-settled"]))),
)]
pub(super) async fn redeliver(
    State(context): State<Arc<Context>>,
    id: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Answer, Error> {
    let id = message_id(id)?;
    let posted = Posted::read_optional(request, &context).await?;
    if !posted.body.is_empty() && !Field::root(&posted.body)?.is_null() {
        one(&posted.body, &[], |_, _| Some(()))?;
    }
    let answer = |message: &Message| Answer::json(StatusCode::OK, message);
    let answer = context.store.redeliver(id, posted.key.as_ref(), answer).await?;
    if !answer.repeated {
        context.metrics.messages_redelivered.inc();
    }
    Ok(answer)
}

fn message_id(id: Result<Path<String>, PathRejection>) -> Result<Uuid, Error> {
    let Path(id) = id.map_err(|e| Error::BadId(e.body_text()))?;
    let parsed: Result<Hyphenated, _> = id.parse();
    parsed.map(Hyphenated::into_uuid).map_err(|_| {
        Error::BadId("A message id must be a UUID such as 01936d2e-7bff-7c31-b0aa-5d6e7f809101.".into())
    })
}

/// The body of `POST /api/messages`.
fn whole_form(body: &str, context: &Context) -> Result<NewMessage, Error> {
    let known = &["topic", "key", "payload", "headers", "requireAck", "ackTimeout"];
    one(body, known, |object, errors| {
        let topic = topic(object, context, errors);
        let key = object.optional("key").map(|f| f.string(errors, MessageKey::parse));
        let payload = payload("payload", object, context, errors);
        let headers = object.optional("headers").map(|f| headers(&f, errors));
        let groups = object.optional("requireAck").map(|f| groups(&f, errors));
        let seconds = object
            .optional("ackTimeout")
            .map(|f| f.number(false, errors, |text| whole(text, MAX_ACK_TIMEOUT_SECONDS)));
        Some(NewMessage {
            topic: topic?,
            // Given and wrong is not the same as not given.
            key: key.map_or(Some(None), |key| key.map(Some))?,
            payload: payload?,
            headers: headers.unwrap_or_else(|| Some(Headers::default()))?,
            require_ack: groups.unwrap_or_else(|| Some(Vec::new()))?,
            ack_timeout_seconds: seconds.unwrap_or(Some(context.messages.ack_timeout_seconds))?,
        })
    })
}

/// The body of `POST /api/messages/send`.
fn short_form(body: &str, context: &Context) -> Result<NewMessage, Error> {
    one(body, &["topic", "message", "consumerGroup"], |object, errors| {
        let topic = topic(object, context, errors);
        let payload = payload("message", object, context, errors);
        let group = object.required("consumerGroup", errors).and_then(|f| f.string(errors, KafkaName::parse));
        Some(NewMessage {
            topic: topic?,
            key: None,
            payload: payload?,
            headers: Headers::default(),
            require_ack: vec![group?],
            ack_timeout_seconds: context.messages.ack_timeout_seconds,
        })
    })
}

fn topic(object: &Object<'_>, context: &Context, errors: &mut Errors) -> Option<String> {
    let allowed = &context.messages.topics;
    object.required("topic", errors)?.string(errors, |text| {
        if allowed.contains(&text) {
            return Ok(text);
        }
        Err(if allowed.is_empty() {
            "is not allowed, as no topic is: whoever runs this service lists in messages.topics \
             (ORDER_API_MESSAGES__TOPICS) those that messages may go to"
                .into()
        } else {
            format!(
                "must be one of {}, which messages.topics of this service's configuration allows",
                allowed.join(", ")
            )
        })
    })
}

fn payload(name: &str, object: &Object<'_>, context: &Context, errors: &mut Errors) -> Option<Payload> {
    let field = object.required(name, errors)?;
    let payload = Payload::parse(field.raw, context.body_limit_bytes.min(MAX_PAYLOAD_BYTES));
    payload.map_err(|what| errors.add(field.pointer, what)).ok()
}

fn headers(field: &Field<'_>, errors: &mut Errors) -> Option<Headers> {
    let object = field.any_object(errors)?;
    let count = object.all().len();
    if count > MAX_HEADERS {
        errors.add(&field.pointer, format!("must have at most {MAX_HEADERS} headers, but has {count}"));
        return None;
    }
    let mut headers = Headers::default();
    for (name, value) in object.all() {
        value.string(errors, |text| headers.add(name, text));
    }
    Some(headers)
}

fn groups(field: &Field<'_>, errors: &mut Errors) -> Option<Vec<KafkaName>> {
    let mut groups = Vec::new();
    for element in field.array(MAX_GROUPS, errors)? {
        let Some(group) = element.string(errors, KafkaName::parse) else { continue };
        if groups.contains(&group) {
            errors.add(&element.pointer, "is there already");
        } else {
            groups.push(group);
        }
    }
    Some(groups)
}

//! `POST /dlq/redrive`: asks the pipeline for a redrive, and waits for what comes of it.

use std::{collections::BTreeSet, sync::Arc};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State, rejection::BytesRejection},
    http::{HeaderMap, StatusCode, header},
    routing::post,
};
use relay_core::{
    parking::Key,
    redrive::{Options, Place, Plan},
    route::is_legal_topic,
};
use serde::{Deserialize, Serialize};
use service::{Problem, problem::FieldError};

use super::desk::{Desk, NotNow, Order};

pub(crate) const PATH: &str = "/dlq/redrive";
/// The most letters that one request may name.
pub(crate) const LETTERS_LIMIT: usize = 10_000;
const BODY_LIMIT_BYTES: usize = 1 << 20;
/// When it makes sense to ask a relay again that is busy or without a session.
const RETRY_AFTER_SECONDS: u32 = 5;

/// The body of a request.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[allow(clippy::struct_excessive_bools, reason = "each is a choice of its own")]
pub(crate) struct Request {
    /// Whose letters they are, `SYSTEM/SLOT`; None: the relay's that is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) source: Option<String>,
    /// Each as `PARTITION/OFFSET`.
    pub(crate) letters: Vec<String>,
    /// The topic to publish to, instead of each letter's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) topic: Option<String>,
    #[serde(default)]
    pub(crate) again: bool,
    #[serde(default)]
    pub(crate) as_is: bool,
    /// Give the letters up instead of publishing them.
    #[serde(default)]
    pub(crate) discard: bool,
    /// Free every parked aggregate that has no open letter, named or not.
    #[serde(default)]
    pub(crate) all: bool,
}

/// What came of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Report {
    pub(crate) letters: Vec<Line>,
    /// Aggregates that were parked.
    pub(crate) freed: Vec<Aggregate>,
    /// Aggregates of these letters that stay parked, because some of their letters are open.
    pub(crate) still_parked: Vec<Aggregate>,
}

/// What came of one letter.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Line {
    pub(crate) letter: String,
    /// For a program: `redriven`, `discarded`, `already-done`, `not-found`, `cut`, `not-whole`, `no-topic`, `behind`,
    /// `refused`, `not-tried`.
    pub(crate) outcome: String,
    /// For a person.
    pub(crate) detail: String,
    /// Whether the letter is open no more.
    pub(crate) done: bool,
}

/// An aggregate that is, or was, parked.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Aggregate {
    #[serde(rename = "aggregateType")]
    pub(crate) kind: String,
    #[serde(rename = "aggregateId")]
    pub(crate) id: String,
    pub(crate) open_letters: usize,
}

/// Why there is no report.
#[derive(Debug, Clone)]
pub(crate) struct Failed {
    pub(crate) why: String,
    /// Letters that were done before.
    pub(crate) done: usize,
}

impl Report {
    pub(crate) fn new(plan: &Plan, freed: &[Key]) -> Self {
        let aggregate = |key: &Key, open_letters| Aggregate {
            kind: key.aggregate_type.clone(),
            id: key.aggregate_id.clone(),
            open_letters,
        };
        let line = |(place, outcome): (&Place, &relay_core::redrive::Outcome)| Line {
            letter: place.to_string(),
            outcome: outcome.name().into(),
            detail: outcome.to_string(),
            done: outcome.is_done(),
        };
        Self {
            letters: plan.outcomes().iter().map(line).collect(),
            freed: freed.iter().map(|key| aggregate(key, 0)).collect(),
            still_parked: plan.still_parked().map(|(key, open)| aggregate(key, open)).collect(),
        }
    }
}

/// The route, without any check of who asks.
pub(crate) fn router(desk: Arc<Desk>) -> Router {
    Router::new().route(PATH, post(redrive)).layer(DefaultBodyLimit::max(BODY_LIMIT_BYTES)).with_state(desk)
}

async fn redrive(
    State(desk): State<Arc<Desk>>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Report>, Problem> {
    let order = parse(&headers, body)?;
    let answer = desk.leave(order).map_err(|e| match e {
        NotNow::Closed => unavailable(
            "this relay holds no slot at the moment (GET /health/ready says why): ask the one that streams",
        ),
        NotNow::Busy => Problem::new(StatusCode::CONFLICT, "redrive-under-way", "A redrive is under way")
            .detail("one at a time: ask again when it is over")
            .retry_after_seconds(RETRY_AFTER_SECONDS),
        NotNow::NotOurs(ours) => {
            let title = "The letters are another relay's";
            let detail = format!("this relay's have dlq.source {ours}: ask the one that wrote them");
            Problem::new(StatusCode::CONFLICT, "foreign-letters", title).detail(detail)
        }
    })?;
    match answer.await {
        Ok(Ok(report)) => Ok(Json(report)),
        Ok(Err(Failed { why, done })) => Err(unavailable(&format!(
            "the redrive ended before its end: {why}. {done} letters were done before; ask again for the others"
        ))),
        Err(_) => Err(unavailable(
            "the relay's session ended before the redrive did (its log says why): what is done is marked, ask again for the others",
        )),
    }
}

fn unavailable(detail: &str) -> Problem {
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, "redrive-unavailable", "The relay cannot redrive now")
        .detail(detail)
        .retry_after_seconds(RETRY_AFTER_SECONDS)
}

fn parse(headers: &HeaderMap, body: Result<Bytes, BytesRejection>) -> Result<Order, Problem> {
    // A page in a browser cannot send this type to another origin without asking first.
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    if kind.split(';').next().map(str::trim) != Some("application/json") {
        let title = "The body is not application/json";
        return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", title));
    }
    let body = body.map_err(|e| {
        Problem::new(e.status(), "bad-body", "The body cannot be read")
            .detail(format!("{e}; at most {BODY_LIMIT_BYTES} bytes"))
    })?;
    let request: Request = serde_json::from_slice(&body).map_err(|e| {
        Problem::new(StatusCode::BAD_REQUEST, "bad-body", "The body is not a redrive").detail(e.to_string())
    })?;
    check(request)
}

fn check(request: Request) -> Result<Order, Problem> {
    let Request { source, letters, topic, again, as_is, discard, all } = request;
    let mut errors = Vec::new();
    if letters.len() > LETTERS_LIMIT {
        let detail = format!("names {} letters; at most {LETTERS_LIMIT}", letters.len());
        errors.push(FieldError { pointer: "/letters".into(), detail });
    }
    let mut places = BTreeSet::new();
    for (i, letter) in letters.iter().enumerate().take(LETTERS_LIMIT) {
        match letter.parse::<Place>() {
            Ok(place) => drop(places.insert(place)),
            Err(e) => errors.push(FieldError { pointer: format!("/letters/{i}"), detail: e.to_string() }),
        }
    }
    if let Some(topic) = topic.as_ref().filter(|topic| !is_legal_topic(topic)) {
        let detail = format!("{topic:?} is not a legal name of a Kafka topic");
        errors.push(FieldError { pointer: "/topic".into(), detail });
    }
    if !errors.is_empty() {
        let title = "The redrive cannot be carried out";
        return Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "bad-redrive", title).errors(errors));
    }
    let options = Options { again, as_is, discard, all, has_topic: topic.is_some() };
    Ok(Order { source: source.unwrap_or_default(), letters: places, topic, options })
}

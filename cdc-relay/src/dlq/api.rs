//! `POST /dlq/redrive`: asks the pipeline for a redrive, and waits for what comes of it.

use std::{collections::BTreeSet, sync::Arc};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State, rejection::BytesRejection},
    http::{HeaderMap, StatusCode},
    routing::post,
};
use relay_core::{
    parking::Key,
    redrive::{Options, Outcome, Place, Plan},
    route::is_legal_topic,
};
use serde::{Deserialize, Serialize};
use service::{Problem, problem::FieldError};

use crate::{
    desk::{self, BODY_LIMIT_BYTES, Failed, NotNow, RETRY_AFTER_SECONDS, read_order},
    wait::Waker,
};

pub(crate) const PATH: &str = "/dlq/redrive";
/// The most letters that one request may name.
pub(crate) const LETTERS_LIMIT: usize = 10_000;

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
    /// For a person: why; empty where it is done.
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

/// What is asked for.
#[derive(Debug)]
pub(crate) struct Order {
    /// Whose letters, `SYSTEM/SLOT`.
    pub(crate) source: String,
    pub(crate) letters: BTreeSet<Place>,
    /// Instead of each letter's own.
    pub(crate) topic: Option<String>,
    pub(crate) options: Options,
}

/// Where a redrive is asked for.
pub(crate) type Desk = desk::Desk<Order, Report>;
/// A redrive that was asked for. Done are letters.
pub(crate) type Job = desk::Job<Order, Report>;
/// What comes of it.
pub(crate) type Answer = Result<Report, Failed>;

impl Report {
    pub(crate) fn new(plan: &Plan, freed: &[Key]) -> Self {
        let aggregate = |key: &Key, open_letters| Aggregate {
            kind: key.aggregate_type.clone(),
            id: key.aggregate_id.clone(),
            open_letters,
        };
        let line = |(place, outcome): (&Place, &Outcome)| Line {
            letter: place.to_string(),
            outcome: outcome.name().into(),
            // That it is done says the outcome.
            detail: if matches!(outcome, Outcome::Done(_)) { String::new() } else { outcome.to_string() },
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
pub(crate) fn router(desk: Arc<Desk>, waker: Waker) -> Router {
    Router::new()
        .route(PATH, post(redrive))
        .layer(DefaultBodyLimit::max(BODY_LIMIT_BYTES))
        .with_state((desk, waker))
}

async fn redrive(
    State((desk, waker)): State<(Arc<Desk>, Waker)>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Report>, Problem> {
    let order = check(read_order(&headers, body, "redrive")?)?;
    let for_relay = |source: &str| {
        if !order.source.is_empty() && order.source != source {
            return Err(NotNow::NotOurs(source.to_owned()));
        }
        Ok(Order { source: source.to_owned(), ..order })
    };
    let answer = desk.leave(for_relay).map_err(|e| match e {
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
    waker.wake();
    match answer.await {
        Ok(Ok(report)) => Ok(Json(report)),
        Ok(Err(Failed { why, done, .. })) => Err(unavailable(&format!(
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

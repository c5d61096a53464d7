//! `POST /replay`: asks the pipeline for a replay, and waits for what comes of it. Whoever hangs up ends it. `GET /replay`
//! tells how far it is.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State, rejection::BytesRejection},
    http::{HeaderMap, StatusCode},
    routing::post,
};
use serde::{Deserialize, Serialize};
use service::Problem;

use super::selection::{Request, Selection};
use crate::{
    config::Settings,
    desk::{self, BODY_LIMIT_BYTES, Desk, Failed, NotNow, RETRY_AFTER_SECONDS, read_order},
    error::Kind,
    owned_record::OwnedRecord,
    wait::Waker,
};

pub(crate) const PATH: &str = "/replay";
/// The most records and ids that are named in a report; more are only counted.
pub(crate) const NAMED_LIMIT: usize = 1000;

/// A replay that was asked for. Done are records.
pub(crate) type Job = desk::Job<Selection, Report>;
/// What comes of it.
pub(crate) type Answer = Result<Report, Failed>;

/// Where a replay is asked for, and how far it is.
#[derive(Debug, Default)]
pub(crate) struct Replays {
    pub(crate) desk: Desk<Selection, Report>,
    /// Of the one that is under way, or was last: records that Kafka has.
    pub(crate) published: AtomicU64,
}

/// What came of a replay.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Report {
    pub(crate) found: u64,
    pub(crate) published: u64,
    /// How many were not, and which: the first [`NAMED_LIMIT`].
    pub(crate) refused: u64,
    pub(crate) refusals: Vec<Refusal>,
    /// How many of the ids are in no outbox, and which, likewise.
    pub(crate) missing: u64,
    pub(crate) missing_ids: Vec<String>,
}

/// A record that was found and not published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Refusal {
    pub(crate) id: String,
    pub(crate) topic: String,
    pub(crate) why: String,
}

/// How far it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct HowFar {
    pub(crate) under_way: bool,
    pub(crate) published: u64,
}

impl Report {
    pub(crate) fn refuse(&mut self, record: &OwnedRecord, why: String) {
        self.refused += 1;
        if self.refusals.len() < NAMED_LIMIT {
            let (id, topic) = (record.row_id.clone(), record.topic.clone());
            self.refusals.push(Refusal { id, topic, why });
        }
    }

    pub(crate) fn no_row(&mut self, id: String) {
        self.missing += 1;
        if self.missing_ids.len() < NAMED_LIMIT {
            self.missing_ids.push(id);
        }
    }
}

/// The routes, without any check of who asks.
pub(crate) fn router(replays: Arc<Replays>, settings: Arc<Settings>, waker: Waker) -> Router {
    Router::new()
        .route(PATH, post(replay).get(how_far))
        .layer(DefaultBodyLimit::max(BODY_LIMIT_BYTES))
        .with_state((replays, settings, waker))
}

type Shared = (Arc<Replays>, Arc<Settings>, Waker);

async fn how_far(State((replays, ..)): State<Shared>) -> Json<HowFar> {
    let published = replays.published.load(Ordering::Relaxed);
    Json(HowFar { under_way: replays.desk.is_busy(), published })
}

async fn replay(
    State((replays, settings, waker)): State<Shared>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Report>, Problem> {
    let request: Request = read_order(&headers, body, "replay")?;
    let selection = request.check(&settings).map_err(|errors| {
        let title = "The replay cannot be carried out";
        Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "bad-replay", title).errors(errors)
    })?;
    let answer = replays.desk.leave(|_| Ok(selection)).map_err(|e| match e {
        NotNow::Busy => Problem::new(StatusCode::CONFLICT, "replay-under-way", "A replay is under way")
            .detail("one at a time: ask again when it is over")
            .retry_after_seconds(RETRY_AFTER_SECONDS),
        NotNow::Closed | NotNow::NotOurs(_) => unavailable(
            "this relay holds no slot at the moment (GET /health/ready says why): ask the one that streams",
        ),
    })?;
    waker.wake();
    match answer.await {
        Ok(Ok(report)) => Ok(Json(report)),
        Ok(Err(Failed { why, kind: Some(kind @ (Kind::Misconfigured | Kind::Refused)), .. })) => {
            let (status, slug) = match kind {
                Kind::Refused => (StatusCode::FORBIDDEN, "replay-refused"),
                _ => (StatusCode::UNPROCESSABLE_ENTITY, "bad-replay"),
            };
            Err(Problem::new(status, slug, "The replay cannot be carried out").detail(why))
        }
        Ok(Err(Failed { why, done, .. })) => Err(unavailable(&format!(
            "the replay ended before its end: {why}. At least {done} records were published before; asked for again, it begins \
             again"
        ))),
        Err(_) => Err(unavailable(
            "the relay's session ended before the replay began (its log says why): ask again",
        )),
    }
}

fn unavailable(detail: &str) -> Problem {
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, "replay-unavailable", "The relay cannot replay now")
        .detail(detail)
        .retry_after_seconds(RETRY_AFTER_SECONDS)
}

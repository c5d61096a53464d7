//! Where the admin API leaves what is asked for the pipeline: one order at a time, and only while there is a session.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    body::Bytes,
    extract::rejection::BytesRejection,
    http::{HeaderMap, StatusCode, header},
};
use relay_core::Relay;
use serde::de::DeserializeOwned;
use service::Problem;
use tokio::sync::oneshot;

use crate::{error::Kind, kafka::Producer, shared::Shared};

/// The most of a request's body that is read, in bytes.
pub(crate) const BODY_LIMIT_BYTES: usize = 1 << 20;
/// When it makes sense to ask a relay again that is busy or without a session.
pub(crate) const RETRY_AFTER_SECONDS: u32 = 5;

/// Reads what is asked for from a request's body.
///
/// # Errors
/// It is no JSON of that form; what it is told to be, for a person: `what`.
pub(crate) fn read_order<T: DeserializeOwned>(
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
    what: &str,
) -> Result<T, Problem> {
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
    serde_json::from_slice(&body).map_err(|e| {
        Problem::new(StatusCode::BAD_REQUEST, "bad-body", &format!("The body is not a {what}"))
            .detail(e.to_string())
    })
}

/// What the pipeline carries an order out with.
pub(crate) struct Hands<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) relay: &'a mut Relay,
    pub(crate) producer: &'a mut Producer,
    pub(crate) now: Duration,
    /// Whether to come to an end soon.
    pub(crate) hurry: bool,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Nothing to do until something else happens.
    Waits,
    Moved,
    Over,
}

/// Why there is no report.
#[derive(Debug, Clone)]
pub(crate) struct Failed {
    pub(crate) why: String,
    /// How much was done before, at least.
    pub(crate) done: u64,
    /// What kind of error it was, where it was not the session's.
    pub(crate) kind: Option<Kind>,
}

/// An order `O`, and who waits for what comes of it.
#[derive(Debug)]
pub(crate) struct Job<O, R> {
    pub(crate) order: O,
    pub(crate) reply: oneshot::Sender<Result<R, Failed>>,
}

/// Why an order is not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NotNow {
    /// There is no session.
    Closed,
    /// Another is under way.
    Busy,
    /// It is for another relay; whose it would have to be, `SYSTEM/SLOT`.
    NotOurs(String),
}

#[derive(Debug)]
enum State<O, R> {
    Closed,
    /// To orders for this relay, `SYSTEM/SLOT`.
    Open(String),
    Waiting(Job<O, R>),
    UnderWay,
}

/// Shared by the pipeline and the admin API.
#[derive(Debug)]
pub(crate) struct Desk<O, R>(Mutex<State<O, R>>);

impl<O, R> Default for Desk<O, R> {
    fn default() -> Self {
        Self(Mutex::new(State::Closed))
    }
}

impl<O, R> Desk<O, R> {
    fn state(&self) -> MutexGuard<'_, State<O, R>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Orders for this relay, `SYSTEM/SLOT`, are taken from now on, and none is under way.
    pub(crate) fn open(&self, source: String) {
        *self.state() = State::Open(source);
    }

    /// Orders are not taken any more; one that waits is dropped, which its owner hears.
    pub(crate) fn close(&self) {
        *self.state() = State::Closed;
    }

    /// Leaves the order that `order` makes for the relay of that source.
    pub(crate) fn leave(
        &self,
        order: impl FnOnce(&str) -> Result<O, NotNow>,
    ) -> Result<oneshot::Receiver<Result<R, Failed>>, NotNow> {
        let mut state = self.state();
        match &*state {
            State::Closed => Err(NotNow::Closed),
            State::Waiting(_) | State::UnderWay => Err(NotNow::Busy),
            State::Open(source) => {
                let (reply, answer) = oneshot::channel();
                *state = State::Waiting(Job { order: order(source)?, reply });
                Ok(answer)
            }
        }
    }

    /// Whether an order waits or is under way.
    pub(crate) fn is_busy(&self) -> bool {
        matches!(*self.state(), State::Waiting(_) | State::UnderWay)
    }

    /// The order that waits; it is under way until the desk is [opened](Self::open) again.
    pub(crate) fn take(&self) -> Option<Job<O, R>> {
        let mut state = self.state();
        if !matches!(*state, State::Waiting(_)) {
            return None;
        }
        match std::mem::replace(&mut *state, State::UnderWay) {
            State::Waiting(job) => Some(job),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_order_at_a_time_and_none_without_a_session() {
        let desk: Desk<String, ()> = Desk::default();
        let leave = || desk.leave(|source| Ok(source.to_owned()));
        assert_eq!(leave().err(), Some(NotNow::Closed));
        desk.open("1/a".into());
        let mut first = leave().unwrap();
        assert_eq!(leave().err(), Some(NotNow::Busy));
        let job = desk.take().unwrap();
        assert_eq!(job.order, "1/a");
        assert!(desk.take().is_none());
        assert_eq!(leave().err(), Some(NotNow::Busy));
        drop(job);
        assert!(matches!(first.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
        desk.open("1/a".into());
        let foreign = |source: &str| Err(NotNow::NotOurs(source.to_owned()));
        assert_eq!(desk.leave(foreign).err(), Some(NotNow::NotOurs("1/a".into())));
        let mut second = leave().unwrap();
        desk.close();
        assert!(matches!(second.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
    }
}

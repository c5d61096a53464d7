//! Liveness, readiness and metrics over HTTP.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::{Json, Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};
use chrono::{SecondsFormat, Utc};
use prometheus_client::registry::Registry;
use serde::Serialize;

use crate::metrics;

/// Whether the service can do its work, and in which state it is. Cloning shares it.
#[derive(Debug, Clone)]
pub struct Health(Arc<Mutex<Readiness>>);

#[derive(Debug, Clone, Serialize)]
struct Readiness {
    ready: bool,
    /// One word for a table: `starting`, `streaming`, `standby`, `serving`, `draining`, …
    state: String,
    /// Why it is not ready, or what else a reader should know; empty when there is nothing to say.
    #[serde(skip_serializing_if = "String::is_empty")]
    detail: String,
    /// What went wrong last, also once it is over.
    #[serde(rename = "lastError", skip_serializing_if = "Option::is_none")]
    last_error: Option<LastError>,
}

#[derive(Debug, Clone, Serialize)]
struct LastError {
    /// RFC 3339.
    at: String,
    message: String,
}

impl Default for Health {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Readiness {
            ready: false,
            state: "starting".into(),
            detail: String::new(),
            last_error: None,
        })))
    }
}

impl Health {
    /// The service does its work.
    pub fn ready(&self, state: &str) {
        self.set(true, state, String::new());
    }

    /// The service does its work, and what else a reader should know.
    pub fn ready_with(&self, state: &str, detail: impl Into<String>) {
        self.set(true, state, detail.into());
    }

    /// The service runs but cannot do its work, and why.
    pub fn not_ready(&self, state: &str, detail: impl Into<String>) {
        self.set(false, state, detail.into());
    }

    /// Something went wrong just now; it is told until something else does.
    pub fn failed(&self, message: impl Into<String>) {
        let at = Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true);
        self.lock().last_error = Some(LastError { at, message: message.into() });
    }

    fn set(&self, ready: bool, state: &str, detail: String) {
        let mut now = self.lock();
        (now.ready, now.state, now.detail) = (ready, state.into(), detail);
    }

    fn lock(&self) -> MutexGuard<'_, Readiness> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the service can do its work.
    pub fn is_ready(&self) -> bool {
        self.get().ready
    }

    /// The word for the state.
    pub fn state(&self) -> String {
        self.get().state
    }

    fn get(&self) -> Readiness {
        self.lock().clone()
    }
}

/// `GET /health/live` (200 while the process answers), `GET /health/ready` (200 or 503, with the state) and
/// `GET /metrics` (`OpenMetrics` text).
pub fn router(health: Health, registry: Arc<Registry>) -> Router {
    Router::new()
        .route("/health/live", get(|| async { Json(serde_json::json!({"live": true})) }))
        .route("/health/ready", get(ready).with_state(health))
        .route("/metrics", get(render).with_state(registry))
}

async fn ready(State(health): State<Health>) -> impl IntoResponse {
    let now = health.get();
    let status = if now.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(now))
}

async fn render(State(registry): State<Arc<Registry>>) -> impl IntoResponse {
    ([(axum::http::header::CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics::render(&registry))
}

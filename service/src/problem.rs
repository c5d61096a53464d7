//! Errors over HTTP as RFC 9457 `application/problem+json`.

use std::collections::BTreeMap;

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;

/// An answer that is not what was asked for: what is wrong, where, and what to do.
#[derive(Debug, Clone, Serialize)]
pub struct Problem {
    /// A stable identifier of the kind of problem, the same for every occurrence.
    #[serde(rename = "type")]
    pub kind: Box<str>,
    /// The kind in a few words.
    pub title: Box<str>,
    /// The HTTP status, repeated as the RFC asks.
    pub status: u16,
    /// What is wrong this time, and what to do.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// Each field that is wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
    /// What else a program may want to know of this kind (RFC 9457, section 3.2).
    #[serde(flatten)]
    pub extensions: BTreeMap<&'static str, serde_json::Value>,
    #[serde(skip)]
    retry_after_seconds: Option<u32>,
}

/// One field that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FieldError {
    /// A JSON pointer (RFC 6901) into the request body, such as `/items/0/price`.
    pub pointer: String,
    /// What is wrong with it.
    pub detail: String,
}

impl Problem {
    /// A problem of the kind `slug` (`/problems/<slug>` is its type).
    pub fn new(status: StatusCode, slug: &str, title: &str) -> Self {
        Self {
            kind: format!("/problems/{slug}").into(),
            title: title.into(),
            status: status.as_u16(),
            detail: String::new(),
            errors: Vec::new(),
            extensions: BTreeMap::new(),
            retry_after_seconds: None,
        }
    }

    /// What is wrong this time.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = detail.into();
        self
    }

    /// The fields that are wrong.
    #[must_use]
    pub fn errors(mut self, errors: Vec<FieldError>) -> Self {
        self.errors = errors;
        self
    }

    /// Something else that a program may want to know; the name is none of the members above.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<serde_json::Value>) -> Self {
        self.extensions.insert(name, value.into());
        self
    }

    /// When trying again makes sense, in seconds: the `Retry-After` header.
    #[must_use]
    pub fn retry_after_seconds(mut self, seconds: u32) -> Self {
        self.retry_after_seconds = Some(seconds);
        self
    }

    /// The `Retry-After` header, in seconds.
    pub fn retry_after(&self) -> Option<u32> {
        self.retry_after_seconds
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = self.retry_after_seconds {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

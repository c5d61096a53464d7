//! What a request that changes something brings along besides its body, and how it is answered.

use axum::{
    extract::Request,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use chrono::{DateTime, SubsecRound, Utc};
use sha2::{Digest, Sha256};

use super::{Context, json};
use crate::{
    auth::Client,
    domain::{Order, Traceparent},
    error::Error,
    store::{Answer, Key},
};

/// The longest `Idempotency-Key`, in characters.
pub(super) const MAX_KEY_CHARS: usize = 255;

/// Tells that the answer is that of an earlier request with the same key.
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// A request, its body read and known to be JSON.
pub(super) struct Posted {
    pub(super) body: String,
    /// There on a POST whose client wants it done once.
    pub(super) key: Option<Key>,
    pub(super) precondition: Precondition,
    pub(super) traceparent: Option<Traceparent>,
}

impl Posted {
    /// Reads all of it, within the limits.
    ///
    /// # Errors
    /// What is wrong with the body or a header.
    pub(super) async fn read(request: Request, context: &Context) -> Result<Self, Error> {
        Self::read_by(request, async |request| json::read(request, context).await).await
    }

    /// The same of a request that may have no body.
    ///
    /// # Errors
    /// What is wrong with the body or a header.
    pub(super) async fn read_optional(request: Request, context: &Context) -> Result<Self, Error> {
        Self::read_by(request, async |request| json::read_optional(request, context).await).await
    }

    async fn read_by(
        request: Request,
        read: impl AsyncFnOnce(Request) -> Result<String, Error>,
    ) -> Result<Self, Error> {
        let headers = request.headers();
        let precondition = Precondition::of(headers)?;
        let traceparent = traceparent(headers);
        let wanted = if request.method() == axum::http::Method::POST { key(headers)? } else { None };
        let target = format!("{} {}", request.method(), request.uri().path());
        let client = request.extensions().get::<Client>().cloned().unwrap_or_default();
        let body = read(request).await?;
        let key = wanted.map(|name| {
            let fingerprint =
                Sha256::new().chain_update(&target).chain_update([0]).chain_update(&body).finalize();
            Key { client: client.0, name, fingerprint: fingerprint.into() }
        });
        Ok(Self { body, key, precondition, traceparent })
    }
}

/// The `Idempotency-Key`: a string of the structured headers, in quotes, as the draft has it
/// (<https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/>), or without them, as most clients
/// send it.
fn key(headers: &HeaderMap) -> Result<Option<String>, Error> {
    let wrong = Error::BadHeader(
        "Idempotency-Key must be one header of 1 to 255 visible ASCII characters, such as a UUID.",
    );
    let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let text = value.to_str().unwrap_or_default().trim();
    let inner = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(text);
    let fits = (1..=MAX_KEY_CHARS).contains(&inner.len())
        && inner.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
    if !fits || inner.contains(['"', '\\']) || values.next().is_some() {
        return Err(wrong);
    }
    Ok(Some(inner.to_owned()))
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

/// Which versions of an order the client means to change: `If-Match`
/// (<https://www.rfc-editor.org/rfc/rfc9110#name-if-match>).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Precondition {
    /// Whichever it is at.
    None,
    /// One of these entity tags, of which a weak one never matches.
    Tags(Vec<String>),
}

impl Precondition {
    fn of(headers: &HeaderMap) -> Result<Self, Error> {
        let mut tags = Vec::new();
        for value in headers.get_all(header::IF_MATCH) {
            let text = value.to_str().unwrap_or_default().trim();
            if text == "*" {
                return Ok(Self::None);
            }
            for tag in text.split(',').map(str::trim) {
                let opaque = tag.strip_prefix("W/").unwrap_or(tag);
                if opaque.len() < 2 || !opaque.starts_with('"') || !opaque.ends_with('"') {
                    return Err(Error::BadHeader(
                        "If-Match must be * or entity tags in double quotes, such as \"3\".",
                    ));
                }
                tags.push(tag.to_owned());
            }
        }
        Ok(if tags.is_empty() { Self::None } else { Self::Tags(tags) })
    }

    /// Lets an order at that version through.
    ///
    /// # Errors
    /// 412.
    pub(super) fn check(&self, order: &Order) -> Result<(), Error> {
        match self {
            Self::Tags(tags) if !tags.contains(&etag(order)) => Err(Error::Precondition(order.version)),
            _ => Ok(()),
        }
    }
}

/// Postgres keeps microseconds: what is answered now is what is read later.
pub(super) fn now() -> DateTime<Utc> {
    Utc::now().trunc_subsecs(6)
}

/// An order's entity tag: its version.
pub(super) fn etag(order: &Order) -> String {
    format!("\"{}\"", order.version)
}

impl Answer {
    /// An answer with this body.
    ///
    /// # Errors
    /// A bug of ours.
    pub(super) fn json(status: StatusCode, body: &impl serde::Serialize) -> Result<Self, Error> {
        let body = serde_json::to_string(body).map_err(|error| {
            tracing::error!(%error, "an answer cannot be written");
            Error::Internal
        })?;
        Ok(Self { status: status.as_u16(), location: None, etag: None, body, repeated: false })
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, self.body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        for (name, value) in [(header::LOCATION, self.location), (header::ETAG, self.etag)] {
            if let Some(value) = value.and_then(|v| HeaderValue::try_from(v).ok()) {
                headers.insert(name, value);
            }
        }
        if self.repeated {
            headers.insert(REPLAYED, HeaderValue::from_static("true"));
        }
        response
    }
}

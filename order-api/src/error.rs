//! Every way a request can fail, and the problem+json it is answered with.

use std::time::Duration;

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use service::{Problem, problem::FieldError};

use crate::domain::Status;

/// Why a request is not answered with what it asked for.
#[derive(Debug)]
pub(crate) enum Error {
    /// The body is not JSON, or not text; the detail says where.
    Malformed(String),
    /// The body is JSON, but these fields are wrong.
    Invalid(Vec<FieldError>),
    /// The body is beyond the limit, in bytes.
    TooLarge(usize),
    /// The body is not declared as JSON.
    NotJson,
    /// The body did not come in time.
    BodyTimeout(Duration),
    /// The connection ended before the body did.
    BodyLost,
    /// The path holds something that cannot be an id.
    BadId(String),
    /// The query string is wrong: what, in words.
    BadQuery(String),
    /// The `Idempotency-Key` or the `If-Match` cannot be one: what is wrong, in words.
    BadHeader(&'static str),
    /// No such order.
    NoOrder(String),
    /// The order has not come to that version: it is at this one.
    NoVersion(i32),
    /// There is an order of that id.
    OrderExists(String),
    /// The order's state does not allow it: why, and the state.
    State(String, Status, i32),
    /// No such message.
    NoMessage(String),
    /// The message is not put in the outbox again: why.
    MessageSettled(&'static str),
    /// The order is at another version than `If-Match` asks for: at this one.
    Precondition(i32),
    /// The `Idempotency-Key` was used for another request.
    KeyReused,
    /// There are as many instances as there may be.
    FleetFull(u32),
    /// The request's line and header fields are beyond the limit, in bytes.
    HeadTooLarge(usize),
    /// The body is compressed.
    Encoded,
    /// As many requests are under way as there may be.
    Overloaded,
    /// A token is asked for, and there is none.
    TokenMissing,
    /// The token is none of ours.
    TokenWrong,
    /// The token does not allow this.
    ScopeMissing(&'static str),
    /// No such route.
    NoRoute,
    /// The route has other methods.
    WrongMethod,
    /// The database does not serve us.
    Unavailable(Written),
    /// A bug of ours; the log has it.
    Internal,
}

/// What is known about the work of a request that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Written {
    /// The transaction did not commit.
    Nothing,
    /// The answer to the commit was lost: it may have.
    Unknown,
}

/// How long a client should wait before it tries again, in seconds.
const RETRY_AFTER_SECONDS: u32 = 1;

impl Error {
    /// The status, the problem's stable name and its title.
    fn kind(&self) -> (StatusCode, &'static str, &'static str) {
        use StatusCode as S;
        match self {
            Self::Malformed(_) => (S::BAD_REQUEST, "malformed-json", "The body is not valid JSON"),
            Self::Invalid(_) => (S::UNPROCESSABLE_ENTITY, "invalid-request", "The request is not valid"),
            Self::TooLarge(_) => (S::PAYLOAD_TOO_LARGE, "body-too-large", "The body is too large"),
            Self::NotJson => {
                (S::UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", "The body is not declared as JSON")
            }
            Self::FleetFull(_) => (S::CONFLICT, "too-many-instances", "There are too many instances"),
            Self::HeadTooLarge(_) => (
                S::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "request-head-too-large",
                "The request's line and headers are too large",
            ),
            Self::Encoded => {
                (S::UNSUPPORTED_MEDIA_TYPE, "unsupported-content-encoding", "The body is compressed")
            }
            Self::Overloaded => (S::SERVICE_UNAVAILABLE, "overloaded", "Too many requests are under way"),
            Self::TokenMissing => (S::UNAUTHORIZED, "token-missing", "A token is asked for"),
            Self::TokenWrong => (S::UNAUTHORIZED, "token-invalid", "The token is not valid"),
            Self::ScopeMissing(_) => (S::FORBIDDEN, "insufficient-scope", "The token does not allow this"),
            Self::BodyTimeout(_) => (S::REQUEST_TIMEOUT, "request-timeout", "The body did not come in time"),
            Self::BodyLost => (S::BAD_REQUEST, "incomplete-body", "The body did not come whole"),
            Self::BadId(_) => (S::BAD_REQUEST, "invalid-id", "The path holds no such id"),
            Self::BadQuery(_) => (S::BAD_REQUEST, "invalid-query", "The query string is not valid"),
            Self::BadHeader(_) => (S::BAD_REQUEST, "invalid-header", "A header is not valid"),
            Self::NoOrder(_) => (S::NOT_FOUND, "order-not-found", "No such order"),
            Self::NoVersion(_) => (S::NOT_FOUND, "version-not-found", "No such version of the order"),
            Self::OrderExists(_) => (S::CONFLICT, "order-exists", "There is such an order already"),
            Self::State(..) => (S::CONFLICT, "order-state", "The order's state does not allow this"),
            Self::NoMessage(_) => (S::NOT_FOUND, "message-not-found", "No such message"),
            Self::MessageSettled(_) => {
                (S::CONFLICT, "message-settled", "The message is not to be delivered again")
            }
            Self::Precondition(_) => {
                (S::PRECONDITION_FAILED, "version-mismatch", "The order is at another version")
            }
            Self::KeyReused => (
                S::UNPROCESSABLE_ENTITY,
                "idempotency-key-reused",
                "The Idempotency-Key was used for another request",
            ),
            Self::NoRoute => (S::NOT_FOUND, "route-not-found", "No such route"),
            Self::WrongMethod => {
                (S::METHOD_NOT_ALLOWED, "method-not-allowed", "The route has no such method")
            }
            Self::Unavailable(_) => {
                (S::SERVICE_UNAVAILABLE, "database-unavailable", "The orders database is not available")
            }
            Self::Internal => (S::INTERNAL_SERVER_ERROR, "internal-error", "The service failed"),
        }
    }

    /// One of each kind, for the documentation.
    pub(crate) fn examples() -> Vec<Self> {
        let id = || "01936d2e-7bff-7c31-b0aa-5d6e7f809101".to_owned();
        let price = FieldError { pointer: "/items/0/price".into(), detail: "must not be negative".into() };
        vec![
            Self::Malformed("Expected value at line 2 column 17.".into()),
            Self::Invalid(vec![price]),
            Self::TooLarge(262_144),
            Self::NotJson,
            Self::BodyTimeout(Duration::from_secs(10)),
            Self::BodyLost,
            Self::BadId("An order id must be 1 to 64 characters of A-Z a-z 0-9 _ -.".into()),
            Self::BadQuery("The parameter limit must be a whole number from 1 to 100.".into()),
            Self::BadHeader("If-Match must be * or entity tags in double quotes, such as \"3\"."),
            Self::NoOrder(id()),
            Self::NoVersion(3),
            Self::OrderExists(id()),
            Self::State("It is delivered, which is final.".into(), Status::Delivered, 5),
            Self::NoMessage(id()),
            Self::MessageSettled("Every consumer group it waits for has acknowledged it."),
            Self::Precondition(3),
            Self::KeyReused,
            Self::FleetFull(1000),
            Self::HeadTooLarge(16_384),
            Self::Encoded,
            Self::Overloaded,
            Self::TokenMissing,
            Self::TokenWrong,
            Self::ScopeMissing("write"),
            Self::NoRoute,
            Self::WrongMethod,
            Self::Unavailable(Written::Nothing),
            Self::Internal,
        ]
    }

    /// As it is answered.
    pub(crate) fn problem(self) -> Problem {
        let (status, slug, title) = self.kind();
        let problem = Problem::new(status, slug, title);
        match self {
            Self::Malformed(detail) | Self::BadId(detail) | Self::BadQuery(detail) => problem.detail(detail),
            Self::BadHeader(detail) | Self::MessageSettled(detail) => problem.detail(detail),
            Self::Invalid(errors) => problem.detail("Correct the fields listed in errors.").errors(errors),
            Self::TooLarge(limit) => problem.detail(format!("A body may have at most {limit} bytes.")),
            Self::NotJson => problem.detail("Send Content-Type: application/json."),
            Self::FleetFull(most) => problem.detail(format!(
                "There are {most} already. One that is silent is forgotten after fleet.forget_after_hours."
            )),
            Self::HeadTooLarge(limit) => {
                problem.detail(format!("The request's line and headers may have at most {limit} bytes together."))
            }
            Self::Encoded => problem.detail("Send the body as it is, without Content-Encoding."),
            Self::Overloaded => problem
                .detail("Nothing was done. Try again later.")
                .retry_after_seconds(RETRY_AFTER_SECONDS),
            Self::TokenMissing | Self::TokenWrong => {
                problem.detail("Send `Authorization: Bearer TOKEN` with a token that the operator gave you.")
            }
            Self::ScopeMissing(scope) => {
                problem.detail(format!("It needs the scope {scope}, which the token does not have."))
            }
            Self::BodyTimeout(limit) => {
                problem.detail(format!("A request has {} ms. Nothing was written.", limit.as_millis()))
            }
            Self::BodyLost => problem.detail("The connection failed before its end."),
            Self::NoOrder(id) => problem.detail(format!("There is no order {id}.")),
            Self::NoMessage(id) => problem.detail(format!("There is no message {id}.")),
            Self::NoVersion(last) => {
                problem.detail(format!("The order is at version {last}.")).with("currentVersion", last)
            }
            Self::OrderExists(id) => {
                problem.detail(format!("There is an order {id}. Leave orderId out, or send another."))
            }
            Self::State(detail, status, version) => problem
                .detail(detail)
                .with("currentStatus", status.as_str())
                .with("currentVersion", version),
            Self::Precondition(version) => problem
                .detail(format!(
                    "It is at version {version}, its ETag is \"{version}\". Read it again before you change it."
                ))
                .with("currentVersion", version),
            Self::KeyReused => problem.detail(
                "A key stands for one request: its method, path and body. Send a new key with a new request.",
            ),
            Self::NoRoute => problem.detail("GET /openapi.json lists those there are, and /docs shows them."),
            Self::WrongMethod => problem.detail("The Allow header lists those it has."),
            Self::Unavailable(written) => problem
                .detail(match written {
                    Written::Nothing => "Nothing was written. Try again later.",
                    Written::Unknown => {
                        "The answer of the database was lost: the request may or may not have taken effect. \
                         Look before you try again, or it may take effect twice."
                    }
                })
                .retry_after_seconds(RETRY_AFTER_SECONDS),
            Self::Internal => problem.detail("This is a bug; the service's log tells more."),
        }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        // <https://www.rfc-editor.org/rfc/rfc6750#section-3>
        let header = match &self {
            Self::TokenMissing => Some((header::WWW_AUTHENTICATE, "Bearer realm=\"order-api\"")),
            Self::TokenWrong => {
                Some((header::WWW_AUTHENTICATE, "Bearer realm=\"order-api\", error=\"invalid_token\""))
            }
            Self::ScopeMissing("read") => Some((
                header::WWW_AUTHENTICATE,
                "Bearer realm=\"order-api\", error=\"insufficient_scope\", scope=\"read\"",
            )),
            Self::ScopeMissing(_) => Some((
                header::WWW_AUTHENTICATE,
                "Bearer realm=\"order-api\", error=\"insufficient_scope\", scope=\"write\"",
            )),
            Self::Encoded => Some((header::ACCEPT_ENCODING, "identity")),
            _ => None,
        };
        let mut response = self.problem().into_response();
        if let Some((name, value)) = header {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        response
    }
}

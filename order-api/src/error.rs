//! Every way a request can fail, and the problem+json it is answered with.

use std::time::Duration;

use axum::{
    http::StatusCode,
    response::{IntoResponse, Response},
};
use service::{Problem, problem::FieldError};

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
    /// No such order.
    NoOrder(String),
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
    fn problem(self) -> Problem {
        match self {
            Self::Malformed(detail) => {
                Problem::new(StatusCode::BAD_REQUEST, "malformed-json", "The body is not valid JSON")
                    .detail(detail)
            }
            Self::Invalid(errors) => {
                Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid-request", "The request is not valid")
                    .detail("Correct the fields listed in errors.")
                    .errors(errors)
            }
            Self::TooLarge(limit) => {
                Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "body-too-large", "The body is too large")
                    .detail(format!("A body may have at most {limit} bytes."))
            }
            Self::NotJson => Problem::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "unsupported-media-type",
                "The body is not declared as JSON",
            )
            .detail("Send Content-Type: application/json."),
            Self::BodyTimeout(limit) => {
                Problem::new(StatusCode::REQUEST_TIMEOUT, "request-timeout", "The body did not come in time")
                    .detail(format!("A request has {} ms. Nothing was written.", limit.as_millis()))
            }
            Self::BodyLost => {
                Problem::new(StatusCode::BAD_REQUEST, "incomplete-body", "The body did not come whole")
                    .detail("The connection failed before its end.")
            }
            Self::BadId(detail) => {
                Problem::new(StatusCode::BAD_REQUEST, "invalid-id", "The path holds no order id")
                    .detail(detail)
            }
            Self::NoOrder(id) => Problem::new(StatusCode::NOT_FOUND, "order-not-found", "No such order")
                .detail(format!("There is no order {id}.")),
            Self::NoRoute => Problem::new(StatusCode::NOT_FOUND, "route-not-found", "No such route")
                .detail("Try POST /api/orders or GET /api/orders/{id}."),
            Self::WrongMethod => Problem::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "method-not-allowed",
                "The route has no such method",
            )
            .detail("The Allow header lists those it has."),
            Self::Unavailable(written) => Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "database-unavailable",
                "The orders database is not available",
            )
            .detail(match written {
                Written::Nothing => "Nothing was written. Try again later.",
                Written::Unknown => {
                    "The answer of the database was lost: the request may or may not have taken effect. \
                     Look before you try again, or it may take effect twice."
                }
            })
            .retry_after_seconds(RETRY_AFTER_SECONDS),
            Self::Internal => {
                Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal-error", "The service failed")
                    .detail("This is a bug; the service's log tells more.")
            }
        }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        self.problem().into_response()
    }
}

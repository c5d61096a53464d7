//! The interactive page: Swagger UI, out of this binary. The policy it comes with lets a browser fetch nothing from
//! anywhere else.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Path, rejection::PathRejection},
    http::header::{
        CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS,
    },
    response::{AppendHeaders, IntoResponse, Response},
};
use utoipa_swagger_ui::Config;

use crate::error::Error;

/// The stylesheet's pictures are `data:` urls, and Swagger UI's elements have styles of their own.
const POLICY: &str = "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// What of Swagger UI the page uses. It is kept compressed, and every browser takes it so.
const PARTS: [&str; 3] = ["favicon-32x32.png", "swagger-ui.css", "swagger-ui-bundle.js"];

/// This API, to try out
#[utoipa::path(get, path = "/docs", operation_id = "getPage", tag = "operation", responses(
    (status = OK, description = "A page for people", body = String, content_type = "text/html; charset=utf-8"),
))]
pub(super) async fn page() -> Response {
    answer("text/html; charset=utf-8", None, include_str!("page.html"))
}

/// A part of that page
#[utoipa::path(get, path = "/docs/{file}", operation_id = "getPagePart", tag = "operation",
    params(("file" = String, Path, description = "Its name, as the page has it", example = "start.js")),
    responses(
        (status = OK, description = "Its content", content(
            (String = "text/javascript; charset=utf-8"), (String = "text/javascript"), (String = "text/css"),
            (String = "image/png"),
        )),
    ),
    extensions(("x-refused" = json!(["route-not-found"]))),
)]
pub(super) async fn part(file: Result<Path<String>, PathRejection>) -> Result<Response, Error> {
    let Path(file) = file.map_err(|_| Error::NoRoute)?;
    if file == "start.js" {
        return Ok(answer("text/javascript; charset=utf-8", None, include_str!("start.js")));
    }
    if !PARTS.contains(&file.as_str()) {
        return Err(Error::NoRoute);
    }
    let part = utoipa_swagger_ui::serve(&file, Arc::new(Config::default())).ok().flatten();
    let part = part.ok_or(Error::Internal)?;
    Ok(answer(&part.content_type, part.gzpipped.then_some("gzip"), part.bytes.into_owned()))
}

fn answer(content_type: &str, encoding: Option<&'static str>, content: impl Into<Body>) -> Response {
    let headers = [
        (CONTENT_TYPE, content_type),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (CACHE_CONTROL, "no-cache"),
    ];
    let encoding = encoding.map(|encoding| [(CONTENT_ENCODING, encoding)]);
    (AppendHeaders(headers), encoding.map(AppendHeaders), content.into()).into_response()
}

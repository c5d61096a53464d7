//! Queries of the read model: `GET /api/orders/{id}` and `GET /api/orders?customer_id=…`. Names, limits and problems are
//! those of the order API, so that a client may ask either.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{
        Path, Query, State,
        rejection::{PathRejection, QueryRejection},
    },
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde::Serialize;
use serde_json::Value;
use service::Problem;
use sqlx::{FromRow, PgPool, Postgres, postgres::PgArguments, query::QueryAs};
use tokio::{
    sync::Semaphore,
    time::{Duration, Instant, timeout_at},
};

use crate::{event::Status, fields::is_id};

/// The most orders of a page.
const LIMIT_MAX: i64 = 100;
/// How many orders a page has if the client does not say.
const LIMIT_DEFAULT: i64 = 20;
/// How long the database may take for an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a client should wait before it tries again.
const RETRY_AFTER_SECONDS: u32 = 1;

const FIND: &str = "SELECT * FROM order_views WHERE order_id = $1";

/// The bounds of a row comparison are never NULL, so the index gives the page's place, too.
const LIST: &str = "
    SELECT * FROM order_views
    WHERE customer_id = $1 AND (cardinality($2::text[]) = 0 OR status = ANY ($2))
      AND (created_at, order_id) < (coalesce($3, 'infinity'::timestamptz), coalesce($4, ''))
    ORDER BY created_at DESC, order_id DESC LIMIT $5";

/// An order, as the API answers it; what no event has told is absent.
#[derive(Debug, FromRow, Serialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    order_id: String,
    status: String,
    version: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    customer_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    restaurant_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    currency: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_amount: Option<Decimal>,
    #[serde(skip_serializing_if = "Option::is_none")]
    items: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    notes: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payment_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cancellation_reason: Option<String>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
}

/// A page of orders.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Documents {
    orders: Vec<Document>,
    /// Where the next page begins; null: there is none.
    next_cursor: Option<String>,
}

/// The routes.
pub(super) fn router(pool: PgPool) -> Router {
    // Applying events must not wait for readers, however many there are.
    let places = Semaphore::new((pool.options().get_max_connections() / 2).max(1) as usize);
    Router::new()
        .route("/api/orders", get(list))
        .route("/api/orders/{id}", get(show))
        .method_not_allowed_fallback(async || {
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", "The route has no such method")
                .detail("The Allow header lists those it has.")
        })
        .with_state(Arc::new(Reader { pool, places }))
}

/// Reads documents, with a bound on how many ask at once and for how long.
struct Reader {
    pool: PgPool,
    /// One for each connection that readers may have.
    places: Semaphore,
}

impl Reader {
    async fn read(
        &self,
        query: QueryAs<'_, Postgres, Document, PgArguments>,
    ) -> Result<Vec<Document>, Problem> {
        let deadline = Instant::now() + READ_TIMEOUT;
        let taking = async { (self.places.acquire().await, self.pool.acquire().await) };
        let (_place, connection) = timeout_at(deadline, taking).await.map_err(|_| unavailable())?;
        let mut connection = connection.map_err(|e| failed(&e))?;
        if let Ok(rows) = timeout_at(deadline, query.fetch_all(&mut *connection)).await {
            return rows.map_err(|e| failed(&e));
        }
        // Somewhere in the middle of the protocol: such a connection cannot go back to the others.
        connection.close_on_drop();
        Err(unavailable())
    }
}

async fn show(
    State(reader): State<Arc<Reader>>,
    id: Result<Path<String>, PathRejection>,
    pairs: Result<Query<Pairs>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Path(id) = id.map_err(|e| bad_id(e.body_text()))?;
    if !is_id(&id) {
        return Err(bad_id("An order id must be 1 to 64 characters of A-Z a-z 0-9 _ -."));
    }
    let Query(pairs) = pairs.map_err(|e| bad_query(e.body_text()))?;
    known(&pairs, &[], &[]).map_err(bad_query)?;
    let Some(document) = reader.read(sqlx::query_as(FIND).bind(&id)).await?.pop() else {
        return Err(Problem::new(StatusCode::NOT_FOUND, "order-not-found", "No such order")
            .detail(format!("There is no order {id}, or its first event has not been applied yet.")));
    };
    let etag = format!("\"{}\"", document.version);
    let asked = headers.get(header::IF_NONE_MATCH).and_then(|v| v.to_str().ok()).unwrap_or_default();
    if asked == "*" || asked.split(',').any(|tag| tag.trim().trim_start_matches("W/") == etag) {
        return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, etag)]).into_response());
    }
    Ok(([(header::ETAG, etag)], Json(document)).into_response())
}

async fn list(
    State(reader): State<Arc<Reader>>,
    pairs: Result<Query<Pairs>, QueryRejection>,
) -> Result<Json<Documents>, Problem> {
    let Query(pairs) = pairs.map_err(|e| bad_query(e.body_text()))?;
    let page = Page::parse(&pairs).map_err(bad_query)?;
    let (created_at, order_id) = page.after.clone().unzip();
    let query = sqlx::query_as(LIST)
        .bind(&page.customer_id)
        .bind(page.statuses.iter().map(|s| s.as_str()).collect::<Vec<_>>())
        .bind(created_at)
        .bind(order_id)
        .bind(page.limit + 1);
    let mut orders = reader.read(query).await?;
    let limit = usize::try_from(page.limit).unwrap_or_default();
    let more = orders.len() > limit;
    orders.truncate(limit);
    let next_cursor = orders.last().filter(|_| more).map(|last| page.cursor(last.created_at, &last.order_id));
    Ok(Json(Documents { orders, next_cursor }))
}

/// A query string.
type Pairs = Vec<(String, String)>;

/// Which orders are asked for.
#[derive(Debug, PartialEq)]
struct Page {
    customer_id: String,
    /// Any of these; empty: of any.
    statuses: Vec<Status>,
    /// Those that come after this one in the list, which goes from the newest back.
    after: Option<(DateTime<Utc>, String)>,
    limit: i64,
}

impl Page {
    /// Reads a query string, or says what is wrong with it.
    fn parse(pairs: &Pairs) -> Result<Self, String> {
        known(pairs, &["customer_id", "status", "limit", "cursor"], &["status"])?;
        let one = |name: &str| pairs.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
        let customer_id = one("customer_id").ok_or("The parameter customer_id is missing.")?;
        if !is_id(customer_id) {
            return Err("The parameter customer_id must be 1 to 64 characters of A-Z a-z 0-9 _ -.".into());
        }
        let statuses = pairs.iter().filter(|(name, _)| name == "status").map(|(_, text)| {
            Status::parse(text).ok_or("The parameter status must be a status of orders, such as created.")
        });
        let limit = one("limit").map(|text| {
            let limit = text.parse().ok().filter(|limit| (1..=LIMIT_MAX).contains(limit));
            limit.ok_or_else(|| format!("The parameter limit must be a whole number from 1 to {LIMIT_MAX}."))
        });
        let mut page = Self {
            customer_id: customer_id.to_owned(),
            statuses: statuses.collect::<Result<_, _>>()?,
            after: None,
            limit: limit.transpose()?.unwrap_or(LIMIT_DEFAULT),
        };
        if let Some(cursor) = one("cursor") {
            let wrong = "The parameter cursor must be the nextCursor of a page with the same parameters.";
            page.after = Some(page.place(cursor).ok_or(wrong)?);
        }
        Ok(page)
    }

    /// The cursor behind an order: what it is a page of, and where. To clients it is opaque.
    fn cursor(&self, created_at: DateTime<Utc>, order_id: &str) -> String {
        let micros = created_at.timestamp_micros();
        URL_SAFE_NO_PAD.encode(format!("{} {micros} {order_id}", self.filter()))
    }

    /// The place that a cursor of the same filter stands for.
    fn place(&self, cursor: &str) -> Option<(DateTime<Utc>, String)> {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(cursor).ok()?).ok()?;
        let place = text.strip_prefix(&self.filter())?.strip_prefix(' ')?;
        let (micros, order_id) = place.split_once(' ')?;
        // Postgres keeps fewer years than chrono does.
        let micros = micros.parse().ok().filter(|micros| *micros >= 0)?;
        let created_at = DateTime::from_timestamp_micros(micros)?;
        is_id(order_id).then(|| (created_at, order_id.to_owned()))
    }

    /// Ids and statuses hold neither commas nor spaces.
    fn filter(&self) -> String {
        let statuses: Vec<&str> = self.statuses.iter().map(|s| s.as_str()).collect();
        format!("{} {}", self.customer_id, statuses.join(","))
    }
}

/// Refuses parameters that there are not, and those that are given again.
fn known(pairs: &Pairs, names: &[&str], repeatable: &[&str]) -> Result<(), String> {
    for (index, (name, _)) in pairs.iter().enumerate() {
        if !names.contains(&name.as_str()) {
            let name: String = name.chars().take(100).collect();
            let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            return Err(format!("The parameter {name} is unknown; known are {known}."));
        }
        let again = pairs[..index].iter().any(|(earlier, _)| earlier == name);
        if again && !repeatable.contains(&name.as_str()) {
            return Err(format!("The parameter {name} is given more than once."));
        }
    }
    Ok(())
}

fn bad_id(detail: impl Into<String>) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, "invalid-id", "The path holds no such id").detail(detail)
}

fn bad_query(detail: impl Into<String>) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, "invalid-query", "The query string is not valid").detail(detail)
}

fn failed(error: &sqlx::Error) -> Problem {
    // The health tells of a database that is away, and clients may ask often.
    tracing::debug!(%error, "cannot read orders");
    unavailable()
}

fn unavailable() -> Problem {
    let title = "The database of the read model is not available";
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, "database-unavailable", title)
        .detail("Try again later.")
        .retry_after_seconds(RETRY_AFTER_SECONDS)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Page, String> {
        Page::parse(&pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect())
    }

    #[test]
    fn a_wrong_parameter_is_named() {
        for (pairs, told) in [
            (&[][..], "customer_id is missing"),
            (&[("customer_id", "a b")], "customer_id must"),
            (&[("customer_id", "c"), ("customer_id", "c")], "customer_id is given more than once"),
            (&[("customer_id", "c"), ("status", "eaten")], "status must"),
            (&[("customer_id", "c"), ("limit", "0")], "from 1 to 100"),
            (&[("customer_id", "c"), ("limit", "101")], "from 1 to 100"),
            (&[("customer_id", "c"), ("cursor", "AAAA")], "cursor must"),
            (&[("customer_id", "c"), ("customerId", "c")], "customerId is unknown"),
        ] {
            let error = parse(pairs).unwrap_err();
            assert!(error.contains(told), "{pairs:?}: {error}");
        }
        let page = parse(&[("customer_id", "c"), ("status", "created"), ("status", "ready")]).unwrap();
        assert_eq!((page.statuses, page.limit), (vec![Status::Created, Status::Ready], LIMIT_DEFAULT));
    }

    #[test]
    fn a_cursor_leads_back_to_its_place_and_serves_no_other_filter() {
        let page = parse(&[("customer_id", "c"), ("status", "created")]).unwrap();
        let at = DateTime::from_timestamp_micros(1_795_262_400_123_456).unwrap();
        let cursor = page.cursor(at, "o-1");
        let same = parse(&[("customer_id", "c"), ("status", "created"), ("cursor", &cursor)]).unwrap();
        assert_eq!(same.after, Some((at, "o-1".into())));
        for other in
            [&[("customer_id", "c"), ("cursor", &cursor)][..], &[("customer_id", "d"), ("cursor", &cursor)]]
        {
            parse(other).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn any_cursor_is_a_place_or_refused(text in "\\PC*", micros in any::<i64>()) {
            for text in [text.clone(), format!("c  {micros} o"), format!("c  {micros} {text}")] {
                for cursor in [URL_SAFE_NO_PAD.encode(&text), text] {
                    let _ = parse(&[("customer_id", "c"), ("cursor", &cursor)]);
                }
            }
        }
    }
}

//! Answers to requests with an `Idempotency-Key`: written in the statement that does the work, so there is never one
//! without the other, and read when such a statement finds that it has been done before.

use std::time::Duration;

use sqlx::{
    Postgres,
    postgres::{PgArguments, PgConnection},
    query::Query,
};

use super::Store;
use crate::error::Error;

const FIND: &str = "
SELECT fingerprint, status, location, etag, body FROM public.idempotency_keys WHERE client = $1 AND key = $2";

const FORGET: &str = "
DELETE FROM public.idempotency_keys WHERE (client, key) IN (
    SELECT client, key FROM public.idempotency_keys
    WHERE created_at < now() - make_interval(secs => $1)
    ORDER BY created_at LIMIT 1000)";

/// Alone, where the work is more than one statement.
pub(super) const REMEMBER: &str = "
INSERT INTO public.idempotency_keys (client, key, fingerprint, status, location, etag, body)
SELECT $1::text, $2::text, $3::bytea, $4::smallint, $5::text, $6::text, $7::text WHERE $2 IS NOT NULL";

pub(super) const STATEMENTS: [&str; 3] = [FIND, FORGET, REMEMBER];

/// A request that is to have its effect once, however often it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Key {
    /// Whose key it is: two clients may choose the same one.
    pub(crate) client: String,
    /// The client's.
    pub(crate) name: String,
    /// SHA-256 of what is asked for, so that another request under the same key is noticed.
    pub(crate) fingerprint: [u8; 32],
}

/// What a client is answered when all went well, in the form in which it can be answered again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    /// 200 to 299.
    pub(crate) status: u16,
    pub(crate) location: Option<String>,
    pub(crate) etag: Option<String>,
    /// JSON.
    pub(crate) body: String,
    /// Whether it was given before.
    pub(crate) repeated: bool,
}

/// What is known of a key.
#[derive(Debug)]
enum Known {
    /// Nothing.
    No,
    /// It was answered so.
    Yes(Answer),
    /// It was used for another request.
    Otherwise,
}

type Statement<'q> = Query<'q, Postgres, PgArguments>;

/// Starts a statement whose first seven parameters are the key and the answer; without a key the statement remembers
/// nothing.
pub(super) fn remembering<'q>(sql: &'static str, key: Option<&'q Key>, answer: &'q Answer) -> Statement<'q> {
    let status = i16::try_from(answer.status).unwrap_or_default();
    // Without a key nothing of the answer is sent.
    let told = |text: &'q str| key.map(|_| text);
    sqlx::query(sql)
        .bind(key.map(|k| k.client.as_str()))
        .bind(key.map(|k| k.name.as_str()))
        .bind(key.map(|k| k.fingerprint.as_slice()))
        .bind(status)
        .bind(answer.location.as_deref().and_then(told))
        .bind(answer.etag.as_deref().and_then(told))
        .bind(told(&answer.body))
}

/// Looks for the answer to a request.
async fn find(connection: &mut PgConnection, wanted: &Key) -> Result<Known, sqlx::Error> {
    type Row = (Vec<u8>, i16, Option<String>, Option<String>, String);
    let row: Option<Row> =
        sqlx::query_as(FIND).bind(&wanted.client).bind(&wanted.name).fetch_optional(connection).await?;
    Ok(match row {
        None => Known::No,
        Some((fingerprint, ..)) if fingerprint != wanted.fingerprint => Known::Otherwise,
        Some((_, status, location, etag, body)) => {
            let status = u16::try_from(status).unwrap_or_default();
            Known::Yes(Answer { status, location, etag, body, repeated: true })
        }
    })
}

/// The answer that was given for the key, if there is one.
pub(super) async fn known(
    connection: &mut PgConnection,
    key: Option<&Key>,
) -> Result<Option<Result<Answer, Error>>, sqlx::Error> {
    let Some(key) = key else { return Ok(None) };
    Ok(match find(connection, key).await? {
        Known::No => None,
        Known::Yes(answer) => Some(Ok(answer)),
        Known::Otherwise => Some(Err(Error::KeyReused)),
    })
}

impl Answer {
    /// None that anybody gets: of work that was not asked for.
    pub(crate) fn none() -> Self {
        Self { status: 204, location: None, etag: None, body: String::new(), repeated: false }
    }
}

impl Store {
    /// Forgets some of the answers that are older than that; gives back how many.
    ///
    /// # Errors
    /// What went wrong, for the log.
    pub(crate) async fn forget_keys(&self, older_than: Duration) -> Result<u64, String> {
        self.chore(sqlx::query(FORGET).bind(older_than.as_secs_f64())).await
    }
}

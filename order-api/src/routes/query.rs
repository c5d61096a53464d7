//! Query strings and cursors. A cursor is where a page ended and what it was a page of; to clients it is opaque.

use std::fmt::Write as _;

use axum::{
    extract::{FromRequestParts, Query as Pairs},
    http::request::Parts,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::{
    domain::{CustomerId, MAX_VERSION, Message, MessageState, Order, OrderId, Status},
    error::Error,
    store::{Filter, MessageFilter},
};

/// The most elements of a page.
pub(crate) const MAX_LIMIT: i64 = 100;

/// How many elements a page has if the client does not say.
pub(crate) const DEFAULT_LIMIT: i64 = 20;

/// A query string, not looked at yet.
#[derive(Debug)]
pub(super) struct Query(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Query {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let pairs = Pairs::<Vec<(String, String)>>::from_request_parts(parts, state).await;
        pairs.map(|Pairs(pairs)| Self(pairs)).map_err(|e| Error::BadQuery(e.body_text()))
    }
}

impl Query {
    /// Of `GET /api/orders`: which orders, and how many at most.
    ///
    /// # Errors
    /// Which parameter is wrong.
    pub(super) fn orders(&self) -> Result<(Filter, i64), Error> {
        self.known(&["customer_id", "status", "created_from", "created_to", "limit", "cursor"], &["status"])?;
        let statuses = self.0.iter().filter(|(name, _)| name == "status").map(|(_, text)| {
            Status::parse(text).ok_or_else(|| bad("status", "must be a status of orders, such as created"))
        });
        let mut filter = Filter {
            customer_id: self.parse("customer_id", |text| CustomerId::parse(text))?,
            statuses: statuses.collect::<Result<_, _>>()?,
            created_from: self.parse("created_from", instant)?,
            created_to: self.parse("created_to", instant)?,
            after: None,
        };
        if let Some(cursor) = self.one("cursor") {
            filter.after = Some(order_after(&filter, cursor).ok_or_else(wrong_cursor)?);
        }
        Ok((filter, self.limit()?))
    }

    /// Of `GET /api/messages`: which messages, and how many at most.
    ///
    /// # Errors
    /// Which parameter is wrong.
    pub(super) fn messages(&self) -> Result<(MessageFilter, i64), Error> {
        self.known(&["state", "limit", "cursor"], &["state"])?;
        let states = self.0.iter().filter(|(name, _)| name == "state").map(|(_, text)| {
            MessageState::parse(text)
                .ok_or_else(|| bad("state", "must be a state of messages, such as undelivered"))
        });
        let mut filter = MessageFilter { states: states.collect::<Result<_, _>>()?, after: None };
        if let Some(cursor) = self.one("cursor") {
            filter.after = Some(message_after(&filter, cursor).ok_or_else(wrong_cursor)?);
        }
        Ok((filter, self.limit()?))
    }

    /// Of `GET /api/orders/{id}/events`: after which version, and how many at most.
    ///
    /// # Errors
    /// Which parameter is wrong.
    pub(super) fn events(&self) -> Result<(i32, i64), Error> {
        self.known(&["limit", "cursor"], &[])?;
        let after = self.one("cursor").map(|cursor| version_after(cursor).ok_or_else(wrong_cursor));
        Ok((after.transpose()?.unwrap_or(0), self.limit()?))
    }

    /// Of `GET /api/orders/{id}`: the version that is asked for.
    ///
    /// # Errors
    /// Which parameter is wrong.
    pub(super) fn version(&self) -> Result<Option<i32>, Error> {
        self.known(&["at_version"], &[])?;
        self.parse("at_version", |text| {
            let version = text.parse().ok().filter(|version| (1..=MAX_VERSION).contains(version));
            version.ok_or_else(|| format!("must be a whole number from 1 to {MAX_VERSION}"))
        })
    }

    fn limit(&self) -> Result<i64, Error> {
        let limit = self.parse("limit", |text| {
            let limit = text.parse().ok().filter(|limit| (1..=MAX_LIMIT).contains(limit));
            limit.ok_or_else(|| format!("must be a whole number from 1 to {MAX_LIMIT}"))
        })?;
        Ok(limit.unwrap_or(DEFAULT_LIMIT))
    }

    /// Refuses parameters that there are not, and those that are given again.
    fn known(&self, names: &[&str], repeatable: &[&str]) -> Result<(), Error> {
        for (index, (name, _)) in self.0.iter().enumerate() {
            if !names.contains(&name.as_str()) {
                let name: String = name.chars().take(100).collect();
                return Err(bad(&name, &format!("is unknown; known are {}", names.join(", "))));
            }
            let again = self.0[..index].iter().any(|(earlier, _)| earlier == name);
            if again && !repeatable.contains(&name.as_str()) {
                return Err(bad(name, "is given more than once"));
            }
        }
        Ok(())
    }

    fn one(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    fn parse<T>(
        &self,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, Error> {
        self.one(name).map(parse).transpose().map_err(|what| bad(name, &what))
    }
}

fn bad(name: &str, what: &str) -> Error {
    Error::BadQuery(format!("The parameter {name} {what}."))
}

fn wrong_cursor() -> Error {
    bad("cursor", "must be the nextCursor of a page with the same parameters")
}

fn instant(text: &str) -> Result<DateTime<Utc>, String> {
    DateTime::parse_from_rfc3339(text).map(|time| time.to_utc()).map_err(|_| {
        "must be a time as RFC 3339 has it, such as 2026-11-21T12:00:00Z (a + has to be sent as %2B)".into()
    })
}

/// The first `limit` of the elements and, if there are more, the cursor behind the last of them.
pub(super) fn page<T>(
    mut elements: Vec<T>,
    limit: i64,
    cursor: impl FnOnce(&T) -> String,
) -> (Vec<T>, Option<String>) {
    let limit = usize::try_from(limit).unwrap_or_default();
    let more = elements.len() > limit;
    elements.truncate(limit);
    let next_cursor = elements.last().filter(|_| more).map(cursor);
    (elements, next_cursor)
}

/// The cursor behind an order in the list.
pub(super) fn after_order(filter: &Filter, order: &Order) -> String {
    let micros = order.created_at.timestamp_micros();
    URL_SAFE_NO_PAD.encode(format!("{} {micros} {}", mark(filter), order.order_id))
}

fn order_after(filter: &Filter, cursor: &str) -> Option<(DateTime<Utc>, OrderId)> {
    let text = String::from_utf8(URL_SAFE_NO_PAD.decode(cursor).ok()?).ok()?;
    let mut parts = text.split(' ');
    let (of, micros, id) = (parts.next()?, parts.next()?, parts.next()?);
    let time = DateTime::from_timestamp_micros(micros.parse().ok()?)?;
    // Postgres keeps fewer years than chrono does.
    let kept = time.timestamp_micros() >= 0 && parts.next().is_none() && of == mark(filter);
    kept.then_some((time, OrderId::parse(id).ok()?))
}

fn mark(filter: &Filter) -> String {
    let Filter { customer_id, statuses, created_from, created_to, after: _ } = filter;
    mark_of(&format!("{customer_id:?} {statuses:?} {created_from:?} {created_to:?}"))
}

/// Tells filters apart, so that a cursor is not used with others than its own.
fn mark_of(filter: &str) -> String {
    Sha256::digest(filter).iter().take(4).fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// The cursor behind a message in the list.
pub(super) fn after_message(filter: &MessageFilter, message: &Message) -> String {
    let mark = mark_of(&format!("{:?}", filter.states));
    URL_SAFE_NO_PAD.encode(format!("{mark} {}", message.message_id))
}

fn message_after(filter: &MessageFilter, cursor: &str) -> Option<Uuid> {
    let text = String::from_utf8(URL_SAFE_NO_PAD.decode(cursor).ok()?).ok()?;
    let (mark, id) = text.split_once(' ')?;
    (mark == mark_of(&format!("{:?}", filter.states))).then(|| id.parse().ok())?
}

/// The cursor behind an event of an order.
pub(super) fn after_version(version: i32) -> String {
    URL_SAFE_NO_PAD.encode(format!("version {version}"))
}

fn version_after(cursor: &str) -> Option<i32> {
    let text = String::from_utf8(URL_SAFE_NO_PAD.decode(cursor).ok()?).ok()?;
    text.strip_prefix("version ")?.parse().ok().filter(|version| (1..=MAX_VERSION).contains(version))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_cursor_is_read_or_refused(text in "\\PC*", version in any::<i32>(), micros in any::<i64>()) {
            let filter = Filter::default();
            for text in [text, format!("version {version}"), format!("{} {micros} o", mark(&filter))] {
                for cursor in [URL_SAFE_NO_PAD.encode(&text), text] {
                    let _ = (order_after(&filter, &cursor), version_after(&cursor));
                }
            }
        }

        #[test]
        fn a_cursor_leads_back_to_its_place(version in 1..=MAX_VERSION) {
            prop_assert_eq!(version_after(&after_version(version)), Some(version));
        }
    }
}

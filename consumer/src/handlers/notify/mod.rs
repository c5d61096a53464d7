//! A webhook for each event: whoever listens at `notify.url` is told of it, signed, at least once.
//!
//! The request is no part of the transaction. It is sent before the commit, so an event that was told and could not be
//! committed is told again; `webhook-id` is the same each time, and by it the receiver knows. It works on every topic
//! that a relay writes, because it knows nothing of what is in a value.

mod webhook;

use std::sync::Arc;

use serde_json::value::RawValue;
use service::Failure;
use sqlx::PgConnection;
use tokio::task::spawn_blocking;
use ureq::http::HeaderValue;
use uuid::Uuid;

use self::webhook::Webhook;
use crate::{
    config::Settings,
    decide::{Fault, Poison, Reason},
    fields::{bad_value, parse_uuid},
    handler::Handler,
    record::{Event, Record},
};

/// A record as it is passed on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Notification {
    id: Uuid,
    /// What it is, in the producer's words.
    kind: Option<HeaderValue>,
    traceparent: Option<HeaderValue>,
    /// JSON, as it came.
    value: Vec<u8>,
}

impl Event for Notification {
    fn parse(record: &Record<'_>) -> Result<Self, Poison> {
        // The relay's `id` is another for each delivery of a generic message, its own id the same.
        let (name, id) = match (record.header("message-id")?, record.header("id")?) {
            (Some(id), _) => ("the header message-id", id),
            (None, Some(id)) => ("the header id", id),
            (None, None) => return Err(Poison::new(Reason::MissingField, "the header id is missing")),
        };
        let value = record.value.ok_or_else(|| Poison::new(Reason::NoValue, "the record's value is NULL"))?;
        serde_json::from_slice::<&RawValue>(value)
            .map_err(|e| Poison::new(Reason::NotJson, format!("the value is not JSON: {e}")))?;
        Ok(Self {
            id: parse_uuid(name, id)?,
            kind: passed_on(record, "type")?,
            traceparent: passed_on(record, "traceparent")?,
            value: value.to_owned(),
        })
    }

    fn id(&self) -> Uuid {
        self.id
    }

    fn type_name(&self) -> &'static str {
        "Notification"
    }
}

fn passed_on(record: &Record<'_>, name: &str) -> Result<Option<HeaderValue>, Poison> {
    let value = record.header(name)?.map(HeaderValue::from_str).transpose();
    value.map_err(|_| bad_value(&format!("the header {name}"), "must be visible ASCII"))
}

/// Writes nothing of its own.
pub(crate) struct Notify {
    webhook: Arc<Webhook>,
}

impl Notify {
    /// # Errors
    /// 64, naming the key of `[notify]`.
    pub(crate) fn new(settings: &Settings) -> Result<Self, Failure> {
        let timeout_ms = u128::from(settings.notify.timeout_ms);
        if timeout_ms >= settings.limits.apply_timeout.as_millis() {
            let why =
                format!("notify.timeout_ms is {timeout_ms}, and the transaction around it would end first");
            return Err(Failure::configuration(why)
                .hint("make it less than consumer.apply_timeout_seconds, or that more"));
        }
        Ok(Self { webhook: Arc::new(Webhook::new(&settings.notify)?) })
    }
}

impl Handler for Notify {
    type Event = Notification;

    /// What was told cannot be taken back.
    const BATCH_MAX: usize = 1;

    async fn apply(&self, _: &mut PgConnection, events: &[&Notification]) -> Result<(), Fault> {
        for event in events {
            let (webhook, event) = (self.webhook.clone(), (*event).clone());
            let told = spawn_blocking(move || webhook.tell(&event)).await;
            told.unwrap_or_else(|e| Err(Fault::Transient(e.to_string())))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "01936d2e-7c01-7a4b-8e55-9f0c1d2e3a41";
    const OTHER: &str = "01936d2e-7c01-7a4b-8e55-9f0c1d2e3a42";

    fn parse(headers: &[(&str, &str)], value: Option<&str>) -> Result<Notification, Poison> {
        let headers = headers.iter().map(|(name, value)| (*name, Some(value.as_bytes()))).collect();
        let record = Record { value: value.map(str::as_bytes), headers: Some(headers), ..Record::default() };
        Notification::parse(&record)
    }

    #[test]
    fn a_value_stays_as_it_came_and_a_messages_own_id_counts() {
        let event = parse(&[("id", ID), ("type", "OrderCreated")], Some(" {\"a\": 1.10}\n")).unwrap();
        assert_eq!((event.id().to_string().as_str(), &event.value[..]), (ID, &b" {\"a\": 1.10}\n"[..]));
        assert_eq!(event.kind.unwrap(), "OrderCreated");
        let message = parse(&[("id", OTHER), ("message-id", ID)], Some("null")).unwrap();
        assert_eq!((message.id().to_string().as_str(), message.kind), (ID, None));
    }

    #[test]
    fn each_kind_of_poison_has_its_reason() {
        for (headers, value, reason) in [
            (&[][..], Some("{}"), Reason::MissingField),
            (&[("id", "7")], Some("{}"), Reason::BadValue),
            (&[("id", ID), ("type", "a\nb")], Some("{}"), Reason::BadValue),
            (&[("id", ID)], None, Reason::NoValue),
            (&[("id", ID)], Some("{"), Reason::NotJson),
        ] {
            assert_eq!(parse(headers, value).unwrap_err().reason, reason, "{headers:?} {value:?}");
        }
    }
}

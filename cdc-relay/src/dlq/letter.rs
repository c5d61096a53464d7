//! A dead letter, and the marker of what became of one, as they are in Kafka.

use chrono::{SecondsFormat, Utc};
use rdkafka::message::{Headers as _, Message};
use relay_core::{
    parking::Key,
    poison::Kind,
    record::{Headers, Identity},
    redrive::{self, Place, State},
    route::is_legal_topic,
};
use serde::Serialize;

use crate::{config::Settings, owned_record::OwnedRecord};

const SOURCE: &str = "dlq.source";
const REDRIVEN: &str = "dlq.redriven";
const DISCARDED: &str = "dlq.discarded";
/// The header of a redriven record: how often it was redriven.
const ATTEMPT: &str = "redriven";

/// A record of the dead-letter topic.
#[derive(Debug)]
pub(crate) enum Found {
    Letter(Box<About>),
    Marker { source: String, of: Place, state: State },
}

/// What is told of a letter beside its key, value and headers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct About {
    #[serde(serialize_with = "as_text")]
    pub(crate) letter: Place,
    pub(crate) source: String,
    pub(crate) reason: String,
    pub(crate) error: String,
    /// Empty where it was a message.
    pub(crate) table: String,
    pub(crate) row_id: String,
    pub(crate) event_type: String,
    pub(crate) aggregate_type: String,
    /// Empty where it cannot be told.
    pub(crate) aggregate_id: String,
    pub(crate) topic: String,
    pub(crate) partition: Option<i32>,
    #[serde(serialize_with = "as_text")]
    pub(crate) lsn: relay_core::Lsn,
    pub(crate) seq: u64,
    pub(crate) at: String,
    /// The row's, in milliseconds since the Unix epoch.
    pub(crate) timestamp_ms: i64,
    /// Only where the value is cut: how long it was, in bytes, and its SHA-256.
    pub(crate) length: Option<usize>,
    pub(crate) sha256: Option<String>,
}

fn as_text<S: serde::Serializer>(value: &impl std::fmt::Display, out: S) -> Result<S::Ok, S::Error> {
    out.collect_str(value)
}

/// Reads a record of the dead-letter topic; None where no relay wrote it.
pub(crate) fn read(message: &impl Message) -> Option<Found> {
    let headers = message.headers()?;
    let ours = (0..headers.count()).rev().find(|i| headers.get(*i).key == SOURCE)?;
    let text = |i: usize| headers.get(i).value.map(|v| String::from_utf8_lossy(v).into_owned());
    let of_ours = |name: &str| {
        let at = (ours..headers.count()).find(|i| headers.get(*i).key == name)?;
        text(at)
    };
    let of_row =
        |name: &str| (0..ours).find(|i| headers.get(*i).key == name).and_then(text).unwrap_or_default();
    let source = of_ours(SOURCE)?;
    for (name, state) in [(REDRIVEN, State::Redriven), (DISCARDED, State::Discarded)] {
        if let Some(of) = of_ours(name) {
            return Some(Found::Marker { source, of: of.parse().ok()?, state });
        }
    }
    let key = message.key().and_then(|key| std::str::from_utf8(key).ok());
    Some(Found::Letter(Box::new(About {
        letter: Place { partition: message.partition(), offset: message.offset() },
        source,
        reason: of_ours("dlq.reason")?,
        error: of_ours("dlq.error").unwrap_or_default(),
        table: of_ours("dlq.table").unwrap_or_default(),
        row_id: of_row("id"),
        event_type: of_row("type"),
        aggregate_type: of_row("aggregatetype"),
        aggregate_id: key.unwrap_or_default().to_owned(),
        topic: of_ours("dlq.topic").unwrap_or_default(),
        partition: of_ours("dlq.partition").and_then(|p| p.parse().ok()),
        lsn: of_ours("dlq.lsn")?.parse().ok()?,
        seq: of_ours("dlq.seq")?.parse().ok()?,
        at: of_ours("dlq.at").unwrap_or_default(),
        timestamp_ms: of_ours("dlq.timestamp")
            .and_then(|ms| ms.parse().ok())
            .or_else(|| message.timestamp().to_millis())
            .unwrap_or_default(),
        length: of_ours("dlq.length").and_then(|n| n.parse().ok()),
        sha256: of_ours("dlq.sha256"),
    })))
}

impl About {
    /// The aggregate, where it can be told.
    pub(crate) fn aggregate(&self) -> Option<Key> {
        let known = !self.aggregate_type.is_empty() && !self.aggregate_id.is_empty();
        known.then(|| Key {
            aggregate_type: self.aggregate_type.clone(),
            aggregate_id: self.aggregate_id.clone(),
        })
    }

    /// What a redrive has to know of it.
    pub(crate) fn for_plan(&self, settings: &Settings) -> redrive::Letter {
        let unread = [Kind::Undecodable, Kind::MissingColumn, Kind::InvalidHeader];
        // A message names its topic itself, and any role may write one, so its topic is not taken at its word.
        let is_listed = || {
            let messages = settings.source.messages.as_ref();
            messages.is_some_and(|messages| messages.topics.contains(&self.topic))
        };
        let is_barred = self.table.is_empty() && self.reason == Kind::Unroutable.name() && !is_listed();
        redrive::Letter {
            identity: Identity { commit_lsn: self.lsn, seq: self.seq },
            row_id: self.row_id.clone(),
            aggregate: self.aggregate(),
            is_cut: self.length.is_some(),
            is_whole: unread.iter().all(|kind| kind.name() != self.reason),
            has_topic: is_legal_topic(&self.topic) && !is_barred,
        }
    }
}

/// The record that a letter was to be, for `topic` where that is given, else for its own.
pub(crate) fn redriven(message: &impl Message, topic: Option<&str>, attempt: u32) -> Option<OwnedRecord> {
    let Some(Found::Letter(about)) = read(message) else { return None };
    let theirs = message.headers()?;
    let end = (0..theirs.count()).rev().find(|i| theirs.get(*i).key == SOURCE)?;
    let mut headers = Headers::default();
    for header in (0..end).map(|i| theirs.get(i)) {
        headers.push(header.key, header.value);
    }
    headers.push_text(ATTEMPT, &attempt.to_string());
    Some(OwnedRecord {
        row_id: about.row_id,
        partition: about.partition.filter(|_| topic.is_none()),
        topic: topic.unwrap_or(&about.topic).to_owned(),
        // A row without an aggregate's id has an empty key in its own topic, and none as a letter.
        key: Some(message.key().unwrap_or_default().to_vec()),
        value: message.payload().map(<[u8]>::to_vec),
        timestamp_ms: about.timestamp_ms,
        identity: Identity { commit_lsn: about.lsn, seq: about.seq },
        headers,
    })
}

/// The marker that a letter is open no more. It goes behind the letter, so that who reads on from the letter finds
/// it.
pub(crate) fn marker(topic: &str, source: &str, of: Place, is_discarded: bool) -> OwnedRecord {
    let mut headers = Headers::default();
    headers.push_text(SOURCE, source);
    headers.push_text(if is_discarded { DISCARDED } else { REDRIVEN }, &of.to_string());
    headers.push_text("dlq.at", &Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true));
    OwnedRecord {
        topic: topic.to_owned(),
        partition: Some(of.partition),
        timestamp_ms: Utc::now().timestamp_millis(),
        headers,
        ..OwnedRecord::default()
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::{
        Timestamp,
        message::{Header, OwnedHeaders, OwnedMessage},
    };

    use super::*;

    fn message(headers: &[(&str, &str)]) -> OwnedMessage {
        let headers = headers
            .iter()
            .fold(OwnedHeaders::new(), |all, (key, value)| all.insert(Header { key, value: Some(*value) }));
        let (key, value, topic) = (Some(b"o-1".to_vec()), Some(b"{}".to_vec()), "dlq".to_owned());
        OwnedMessage::new(value, key, topic, Timestamp::CreateTime(7), 2, 42, Some(headers))
    }

    const OURS: [(&str, &str); 5] = [
        ("dlq.source", "1/slot"),
        ("dlq.reason", "unroutable"),
        ("dlq.topic", "orders"),
        ("dlq.lsn", "0/10"),
        ("dlq.seq", "3"),
    ];

    #[test]
    fn a_row_that_has_headers_like_ours_cannot_pass_for_something_else() {
        let mut forged = vec![
            ("id", "x"),
            ("aggregatetype", "order"),
            ("dlq.source", "9/other"),
            ("dlq.redriven", "0/1"),
            ("dlq.topic", "secrets"),
        ];
        forged.extend(OURS);
        let message = message(&forged);
        let Some(Found::Letter(about)) = read(&message) else { panic!("a letter") };
        assert_eq!((about.source.as_str(), about.topic.as_str()), ("1/slot", "orders"));
        assert_eq!(about.letter, Place { partition: 2, offset: 42 });
        let letter = redriven(&message, None, 2).unwrap();
        let names: Vec<_> = letter.record().headers.iter().map(|(name, _)| name.to_owned()).collect();
        assert_eq!(names, ["id", "aggregatetype", "dlq.source", "dlq.redriven", "dlq.topic", "redriven"]);
        assert_eq!(letter.record().headers.get("redriven"), Some(Some(&b"2"[..])));
    }

    #[test]
    fn what_no_relay_wrote_is_passed_over() {
        assert!(read(&message(&[("dlq.reason", "unroutable")])).is_none());
        assert!(read(&message(&[("dlq.source", "1/slot"), ("dlq.redriven", "x")])).is_none());
        assert!(read(&message(&[("dlq.source", "1/slot"), ("dlq.reason", "x"), ("dlq.lsn", "?")])).is_none());
    }
}

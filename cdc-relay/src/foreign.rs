//! Events that exist only in Kafka: those of transactions that the server never had, because it was restored from a
//! backup, or promoted before it had everything.
//!
//! A record carries its commit LSN, and in a partition the LSNs of first occurrences rise; so those beyond the point up to
//! which the server has the log are at the partitions' ends. Each partition is read backwards until nothing of the kind has
//! come for so many records that no restart of a relay can have repeated that many.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt::Write as _,
    ops::RangeInclusive,
    time::{Duration, Instant},
};

use rdkafka::{
    Message as _,
    message::{BorrowedMessage, Headers as _},
};
use relay_core::{Lsn, outbox::Outbox};
use serde::Serialize;

use crate::{
    config::Settings,
    error::{Error, Kind},
    kafka::{Patience, Tails},
    ledger::Owner,
    position::Beyond,
    replication::{connection::Connection, handshake::Purpose, stream::identify},
};

/// How long a relay that is about to stop looks.
const LOOK_LIMIT: Duration = Duration::from_secs(30);
/// The most events that are kept of those that are found, the earliest.
const EVENTS_LIMIT: usize = 100_000;
/// After so many records in a row that are no such events, none is expected before them.
const QUIET_RECORDS: u64 = 10_000;
/// How far the clocks of Postgres' machine and of the relay's may be apart, and how long after its last checkpoint a relay may
/// still have published.
const CLOCK_SLACK_MS: i64 = 60_000;
/// How many events an error names.
const NAMED: usize = 3;
/// The most of one header or key that is kept, in characters.
const TEXT_CHARS: usize = 256;

/// An event that the server does not have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Event {
    #[serde(serialize_with = "as_text")]
    pub(crate) lsn: Lsn,
    pub(crate) seq: u64,
    pub(crate) id: String,
    #[serde(rename = "eventType")]
    pub(crate) kind: String,
    pub(crate) aggregate_type: String,
    pub(crate) aggregate_id: String,
    pub(crate) topic: String,
    pub(crate) partition: i32,
    pub(crate) offset: i64,
}

fn as_text<S: serde::Serializer>(value: &impl std::fmt::Display, out: S) -> Result<S::Ok, S::Error> {
    out.collect_str(value)
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Foreign {
    /// In commit order, each once, however often it was repeated.
    pub(crate) events: Vec<Event>,
    /// How many more records were found than are kept.
    pub(crate) more: u64,
    /// Topics that were not read, or not far enough, and why.
    pub(crate) unread: BTreeMap<String, String>,
}

impl Foreign {
    /// In a sentence: how many, and the first.
    pub(crate) fn describe(&self) -> String {
        let count = self.events.len() as u64 + self.more;
        let least = if self.more > 0 || !self.unread.is_empty() { "at least " } else { "" };
        let mut text = match count {
            0 => format!(
                "{} was found in Kafka beyond that",
                if least.is_empty() { "no event" } else { "so far no event" }
            ),
            1 => format!("{least}1 event exists only in Kafka: "),
            _ => format!("{least}{count} events exist only in Kafka: "),
        };
        let named: Vec<_> = self.events.iter().take(NAMED).map(Event::describe).collect();
        text.push_str(&named.join(", "));
        if count > NAMED as u64 {
            text.push_str(", …");
        }
        if let Some((topic, why)) = self.unread.first_key_value() {
            // Writing to a String cannot fail.
            let _ = write!(text, "; not everything could be read, such as topic {topic}: {why}");
        }
        text
    }
}

impl Event {
    fn describe(&self) -> String {
        let Self { id, kind, aggregate_type, aggregate_id, topic, partition, offset, lsn, .. } = self;
        format!("{id} ({kind} of {aggregate_type}/{aggregate_id}, {topic}/{partition}/{offset}, LSN {lsn})")
    }
}

/// Adds to an error that says so which events exist only in Kafka.
pub(crate) fn explain(settings: &Settings, error: Error, stops: &dyn Fn() -> bool) -> Error {
    let Some(beyond) = error.beyond else { return error };
    let since = Instant::now();
    let patience = || {
        if stops() || since.elapsed() >= LOOK_LIMIT {
            return Err(Error::new(Kind::GaveUp, "there was no time to read it"));
        }
        Ok(())
    };
    let look = || -> Result<Foreign, Error> {
        let mut connection = Connection::connect(&settings.postgres, Purpose::Sql, settings.connect_timeout)?;
        let beside = connection.beside(&settings.postgres, Purpose::Replication, settings.connect_timeout);
        let owner = Owner { system: identify(&mut beside?)?.identifier, slot: settings.slot.clone() };
        find(settings, &owner, &mut connection, beyond, &patience)
    };
    let found = match look() {
        Ok(found) => found.describe(),
        Err(e) => format!("which events, could not be found out: {e}"),
    };
    Error { message: format!("{}; {found}", error.message), ..error }
}

/// Looks for records from `beyond` on, in every topic that the configuration can route to. Where other relays publish to
/// such a topic, theirs of the same minutes may be among them: a record does not say whose it is.
///
/// # Errors
/// Postgres or Kafka cannot be asked at all.
pub(crate) fn find(
    settings: &Settings,
    owner: &Owner,
    connection: &mut Connection,
    beyond: Beyond,
    patience: Patience<'_>,
) -> Result<Foreign, Error> {
    let rows_name_topics = rows_name_topics(settings, connection)?;
    let tails = Tails::open(&settings.kafka)?;
    let committed_ms = commit_times(settings, connection, beyond)?;
    let mut search =
        Search { beyond: beyond.lsn, committed_ms, owner: owner.key(), found: BTreeMap::new(), more: 0 };
    let mut unread = BTreeMap::new();
    for (topic, partitions) in tails.topics(patience)? {
        if !may_publish_to(settings, rows_name_topics, &topic) {
            continue;
        }
        for partition in partitions {
            if let Err(e) = search.partition(&tails, &topic, partition, patience) {
                unread.entry(topic.clone()).or_insert(e.message);
            }
        }
    }
    Ok(Foreign { events: search.found.into_values().collect(), more: search.more, unread })
}

/// When such transactions can have been committed, in milliseconds since the Unix epoch: after the last one that the server
/// has, where it still knows, and before the last checkpoint or soon after.
fn commit_times(
    settings: &Settings,
    connection: &mut Connection,
    beyond: Beyond,
) -> Result<RangeInclusive<i64>, Error> {
    if settings.source.outboxes.iter().any(Outbox::has_timestamp_column) {
        // A record's timestamp need not be the commit's.
        return Ok(i64::MIN..=i64::MAX);
    }
    let sql = "SELECT (extract(epoch FROM pg_last_xact_replay_timestamp()) * 1000)::int8";
    let rows = connection.simple_query(sql)?;
    let last: Option<i64> = rows.into_iter().flatten().flatten().next().and_then(|ms| ms.parse().ok());
    let from = last.map_or(i64::MIN, |last| last.saturating_sub(CLOCK_SLACK_MS));
    Ok(from..=beyond.until_ms.map_or(i64::MAX, |until| until.saturating_add(CLOCK_SLACK_MS)))
}

/// Whether rows can name their own topic, as there is a column for it.
fn rows_name_topics(settings: &Settings, connection: &mut Connection) -> Result<bool, Error> {
    let sql = "SELECT 1 FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
               WHERE n.nspname = $1 AND c.relname = $2 AND a.attname = $3 AND a.attnum > 0 AND NOT a.attisdropped";
    for outbox in &settings.source.outboxes {
        let (schema, table) = outbox.name();
        if !connection.query(sql, &[schema, table, outbox.topic_column()])?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn may_publish_to(settings: &Settings, rows_name_topics: bool, topic: &str) -> bool {
    if topic.starts_with("__")
        || [&settings.kafka.checkpoint_topic, &settings.parked_keys_topic].iter().any(|own| *own == topic)
    {
        return false;
    }
    let source = &settings.source;
    rows_name_topics
        || topic == settings.dead_letter_topic
        || source.topic_by_type.values().any(|to| to == topic)
        || source.outboxes.iter().any(|outbox| outbox.may_go_to(topic))
        || source.messages.as_ref().is_some_and(|m| m.outbox.may_go_to(topic) || m.topics.contains(topic))
}

struct Search {
    beyond: Lsn,
    committed_ms: RangeInclusive<i64>,
    /// Dead letters name theirs.
    owner: String,
    /// By commit LSN, ordinal and id: the last tells two relays' apart.
    found: BTreeMap<(Lsn, u64, String), Event>,
    more: u64,
}

impl Search {
    fn partition(
        &mut self,
        tails: &Tails,
        topic: &str,
        partition: i32,
        patience: Patience<'_>,
    ) -> Result<(), Error> {
        let mut tail = tails.tail(topic, partition, patience)?;
        let mut quiet = 0;
        loop {
            let (mut records, mut events) = (0, 0_u64);
            let is_window = tail.window(|message| {
                records += 1;
                if let Some(event) = self.read(topic, message) {
                    events += 1;
                    self.keep(event);
                }
            })?;
            quiet = if events > 0 { 0 } else { quiet + records };
            if !is_window || quiet >= QUIET_RECORDS {
                return Ok(());
            }
        }
    }

    /// The record as an event that the server does not have; None where it is something else.
    fn read(&self, topic: &str, message: &BorrowedMessage<'_>) -> Option<Event> {
        let committed = message.timestamp().to_millis();
        if committed.is_some_and(|ms| !self.committed_ms.contains(&ms)) {
            return None;
        }
        let headers = message.headers()?;
        // A row's own headers come after the relay's, and a dead letter's after both.
        let header = |name: &str| {
            let found = headers.iter().find(|header| header.key == name)?.value?;
            Some(short(found))
        };
        let (lsn, seq) = match header("dlq.source") {
            Some(source) if source == self.owner => (header("dlq.lsn")?, header("dlq.seq")?),
            Some(_) => return None,
            None => (header("lsn")?, header("seq")?),
        };
        let lsn: Lsn = lsn.parse().ok().filter(|lsn| *lsn >= self.beyond)?;
        Some(Event {
            lsn,
            seq: seq.parse().ok()?,
            id: header("id").unwrap_or_default(),
            kind: header("type").unwrap_or_default(),
            aggregate_type: header("aggregatetype").unwrap_or_default(),
            aggregate_id: message.key().map(short).unwrap_or_default(),
            topic: topic.to_owned(),
            partition: message.partition(),
            offset: message.offset(),
        })
    }

    fn keep(&mut self, event: Event) {
        match self.found.entry((event.lsn, event.seq, event.id.clone())) {
            // A repetition, or what it repeats.
            Entry::Occupied(mut known) => {
                let place = |e: &Event| (e.topic.clone(), e.partition, e.offset);
                if place(&event) < place(known.get()) {
                    known.insert(event);
                }
            }
            Entry::Vacant(free) => drop(free.insert(event)),
        }
        if self.found.len() > EVENTS_LIMIT {
            self.found.pop_last();
            self.more += 1;
        }
    }
}

fn short(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().take(TEXT_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(lsn: u64, offset: i64) -> Event {
        let text = |s: &str| s.to_owned();
        Event {
            lsn: Lsn(lsn),
            seq: 0,
            id: format!("e{lsn}"),
            kind: text("T"),
            aggregate_type: text("order"),
            aggregate_id: text("7"),
            topic: text("orders"),
            partition: 2,
            offset,
        }
    }

    #[test]
    fn an_event_that_was_repeated_is_told_once_and_the_earliest_are_kept() {
        let mut search = Search {
            beyond: Lsn(1),
            committed_ms: 0..=9,
            owner: String::new(),
            found: BTreeMap::new(),
            more: 0,
        };
        // Windows come backwards.
        for found in [event(6, 9), event(5, 8), event(6, 7), event(5, 6)] {
            search.keep(found);
        }
        let places: Vec<_> = search.found.values().map(|e| (e.lsn.0, e.offset)).collect();
        assert_eq!((places, search.more), (vec![(5, 6), (6, 7)], 0));
    }

    #[test]
    fn the_sentence_counts_names_the_first_and_hides_nothing() {
        let mut found = Foreign { events: (1..=4).map(|n| event(n, 0)).collect(), ..Foreign::default() };
        let said = found.describe();
        assert!(
            said.starts_with("4 events exist only in Kafka: e1 (T of order/7, orders/2/0, LSN 0/1), e2"),
            "{said}"
        );
        assert!(said.ends_with("LSN 0/3), …"), "{said}");
        found.unread.insert("orders".into(), "no time".into());
        assert!(found.describe().starts_with("at least 4 ") && found.describe().ends_with("orders: no time"));
        assert_eq!(Foreign::default().describe(), "no event was found in Kafka beyond that");
    }

    #[test]
    fn topics_are_those_that_rows_can_go_to() {
        let config = "[route]\ntopic = 'shop.${aggregatetype}'\n[route.by_type]\nA = 'as'\n[messages]\nprefix = 'm'\ntopics = ['ms']";
        let settings = toml::from_str::<crate::config::Config>(config).unwrap().check().unwrap();
        for yes in ["shop.order", "as", "ms", "cdc-relay-dlq"] {
            assert!(may_publish_to(&settings, false, yes), "{yes}");
        }
        for no in ["other", "__consumer_offsets", "cdc-relay-checkpoints", "cdc-relay-parked-keys"] {
            assert!(!may_publish_to(&settings, false, no), "{no}");
        }
        assert!(may_publish_to(&settings, true, "other"), "rows name their own");
        assert!(!may_publish_to(&settings, true, "__consumer_offsets"));
    }
}

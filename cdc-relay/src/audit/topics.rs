//! The topics as an audit reads them: each from its beginning to its end, committed records only.

use std::{
    borrow::Cow,
    cell::Cell,
    time::{Duration, Instant},
};

use rdkafka::{
    Message as _,
    message::{BorrowedMessage, Headers as _},
};
use relay_core::{Lsn, outbox::Outbox};
use serde::Serialize;

use super::{
    Finding,
    remains::Remains,
    tally::{Seen, Tally, Verdict},
};
use crate::{
    config::Settings,
    dlq::letter::{self, Found},
    error::{Error, Kind},
    kafka::{History, is_compacted},
};

/// How long Kafka may have nothing to say once it has answered: as long as somebody's transaction may be open.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);

/// What was found in one topic.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Topic {
    pub(crate) name: String,
    pub(crate) exists: bool,
    pub(crate) records: u64,
    /// Of no row that is in the outbox: deleted since, or never of this relay.
    pub(crate) other_records: u64,
    pub(crate) duplicates: u64,
    pub(crate) out_of_order: u64,
    /// Without the headers lsn and seq, so that their order cannot be told.
    pub(crate) unordered: u64,
    /// With the header `replayed` or `redriven`: somebody asked for them.
    pub(crate) replayed: u64,
    /// Partitions whose beginning is deleted, as `PARTITION from OFFSET`.
    pub(crate) deleted_before: Vec<String>,
    /// None where Kafka does not tell us.
    pub(crate) compacted: Option<bool>,
}

impl Topic {
    /// Whether records of it can be gone that were there.
    pub(crate) fn is_cut(&self) -> bool {
        !self.deleted_before.is_empty() || self.compacted == Some(true)
    }
}

/// Kafka, and when it said something last.
pub(super) struct Reader<'a> {
    settings: &'a Settings,
    heard: Cell<Instant>,
    limit: Cell<Duration>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(settings: &'a Settings) -> Self {
        let limit = Cell::new(settings.connect_timeout);
        Self { settings, heard: Cell::new(Instant::now()), limit }
    }

    fn patience(&self) -> Result<(), Error> {
        let limit = self.limit.get();
        if self.heard.get().elapsed() < limit {
            return Ok(());
        }
        let brokers = &self.settings.kafka.brokers;
        let what = format!("Kafka at {brokers} has not answered in {} s", limit.as_secs());
        Err(Error::new(Kind::DeliveryFailed, what)
            .hint("check kafka.brokers and kafka.properties, and whether Kafka runs"))
    }

    /// None where there is no such topic.
    fn open(&self, topic: &str) -> Result<Option<History>, Error> {
        self.heard.set(Instant::now());
        let history = History::open(&self.settings.kafka, topic, &|| self.patience())?;
        self.heard.set(Instant::now());
        self.limit.set(SILENCE_LIMIT);
        Ok(history)
    }

    /// Compares a topic with what the tally expects, and tells what there is of it. `find` takes what is found.
    pub(super) fn compare(
        &self,
        name: &str,
        tally: &mut Tally,
        mut find: impl FnMut(Finding),
    ) -> Result<(Topic, Option<Remains>), Error> {
        let mut topic = Topic { name: name.to_owned(), ..Topic::default() };
        let Some(mut history) = self.open(name)? else { return Ok((topic, None)) };
        topic.exists = true;
        // A record has its row's own time where there is one, and that is not the one of its commit.
        let outboxes = &self.settings.source.outboxes;
        let has_commit_time = !outboxes.iter().any(Outbox::has_timestamp_column);
        let mut remains = Remains::new(Box::new(history.partition_of()), has_commit_time);
        history.read_on(&|| self.patience(), |message| {
            self.heard.set(Instant::now());
            topic.take(message, tally, &mut remains, &mut find);
            Ok(())
        })?;
        // Now, so that what was deleted while we read is known as well.
        let beginnings = history.beginnings(&|| self.patience())?;
        topic.compacted = is_compacted(&self.settings.kafka, name);
        remains.end(&beginnings, topic.compacted == Some(true));
        topic.deleted_before = beginnings
            .into_iter()
            .filter(|(_, offset)| *offset > 0)
            .map(|(partition, offset)| format!("{partition} from {offset}"))
            .collect();
        Ok((topic, Some(remains)))
    }

    /// Tells the tally of the dead letters of our slot.
    pub(super) fn read_letters(&self, tally: &mut Tally) -> Result<(), Error> {
        let slot = format!("/{}", self.settings.slot);
        let history = match self.open(&self.settings.dead_letter_topic) {
            // Without a policy that needs it, it need not be ours to read.
            Err(e) if e.kind == Kind::Refused && !self.settings.may_dead_letter() => return Ok(()),
            opened => opened?,
        };
        let Some(mut history) = history else { return Ok(()) };
        history.read_on(&|| self.patience(), |message| {
            self.heard.set(Instant::now());
            if let Some(Found::Letter(about)) = letter::read(message)
                && about.source.ends_with(&slot)
            {
                tally.see_letter(&about.topic, about.row_id.as_bytes());
            }
            Ok(())
        })
    }
}

impl Topic {
    fn take(
        &mut self,
        message: &BorrowedMessage<'_>,
        tally: &mut Tally,
        remains: &mut Remains,
        find: &mut impl FnMut(Finding),
    ) {
        self.records += 1;
        // A row's own headers come after the relay's.
        let header = |name: &str| message.headers()?.iter().find(|header| header.key == name);
        let text = |name: &str| std::str::from_utf8(header(name)?.value?).ok();
        let Some(id) = header("id").and_then(|header| header.value) else {
            self.other_records += 1;
            return;
        };
        let place = || Some((text("lsn")?.parse::<Lsn>().ok()?.0, text("seq")?.parse().ok()?));
        let place = place();
        let mut seen = Seen {
            topic: &self.name,
            id,
            partition: message.partition(),
            place,
            is_deliberate: header("replayed").is_some() || header("redriven").is_some(),
        };
        if !seen.is_deliberate {
            let at_ms = place.and_then(|_| message.timestamp().to_millis());
            remains.take(message.key(), (message.partition(), message.offset()), at_ms);
        }
        let mut verdict = tally.see(&seen);
        let plain = if verdict == Verdict::Other { plain(id) } else { None };
        if let Some(plain) = &plain {
            seen.id = plain.as_bytes();
            verdict = tally.see(&seen);
        }
        let at = |place: Option<(u64, u64)>| match place {
            Some((lsn, seq)) => format!("LSN {}, change {seq}", Lsn(lsn)),
            None => "no LSN".to_owned(),
        };
        let (kind, detail) = match verdict {
            Verdict::First => return,
            Verdict::Other => return self.other_records += 1,
            Verdict::Unplaced => return self.unordered += 1,
            Verdict::Deliberate => return self.replayed += 1,
            Verdict::Again => {
                self.duplicates += 1;
                ("duplicate", at(place))
            }
            Verdict::Late(lsn, seq) => {
                self.out_of_order += 1;
                ("out-of-order", format!("{}, behind {}", at(place), at(Some((lsn, seq)))))
            }
        };
        find(Finding {
            kind,
            table: String::new(),
            id: String::from_utf8_lossy(seen.id).into_owned(),
            key: String::from_utf8_lossy(message.key().unwrap_or_default()).into_owned(),
            topic: self.name.clone(),
            partition: Some(message.partition()),
            offset: Some(message.offset()),
            detail,
        });
    }
}

/// Text that is written as JSON, as Debezium Server writes headers: alone, or as the payload beside its schema.
fn plain(value: &[u8]) -> Option<Cow<'_, str>> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Json<'a> {
        Text(#[serde(borrow)] Cow<'a, str>),
        Object {
            #[serde(borrow)]
            payload: Cow<'a, str>,
        },
    }
    if !matches!(value.first(), Some(b'"' | b'{')) {
        return None;
    }
    match serde_json::from_slice(value).ok()? {
        Json::Text(text) | Json::Object { payload: text } => Some(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_debezium_wrote_as_json_is_known() {
        assert_eq!(plain(br#""a-1""#).as_deref(), Some("a-1"));
        assert_eq!(plain(br#"{"schema":{"type":"string"},"payload":"a-1"}"#).as_deref(), Some("a-1"));
        assert_eq!(plain(b"a-1"), None);
        assert_eq!(plain(b"{a-1}"), None);
    }
}

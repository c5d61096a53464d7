//! A record that is not of the stream: what a redrive or a replay publishes.

use rdkafka::message::Message;
use relay_core::record::{Headers, Identity, Record};

/// A [`Record`] of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct OwnedRecord {
    /// For an operator; empty where it cannot be told.
    pub(crate) row_id: String,
    pub(crate) topic: String,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: Option<Vec<u8>>,
    pub(crate) partition: Option<i32>,
    /// In milliseconds since the Unix epoch; 0 is the time at which it is sent.
    pub(crate) timestamp_ms: i64,
    pub(crate) identity: Identity,
    pub(crate) headers: Headers,
}

impl OwnedRecord {
    /// A copy of a row's record, with the headers that `keep` lets through.
    pub(crate) fn of_row(record: &Record<'_>, keep: impl Fn(&str) -> bool) -> Self {
        let mut headers = Headers::default();
        for (name, value) in record.headers.iter().filter(|(name, _)| keep(name)) {
            headers.push(name, value);
        }
        Self {
            row_id: record.row_id.to_owned(),
            topic: record.topic.to_owned(),
            key: record.key.map(<[u8]>::to_vec),
            value: record.value.map(<[u8]>::to_vec),
            partition: record.partition,
            timestamp_ms: record.timestamp_ms,
            identity: record.identity,
            headers,
        }
    }

    /// The same record as one of Kafka's, in the same partition.
    pub(crate) fn of_message(message: &impl Message) -> Self {
        let mut headers = Headers::default();
        for header in message.headers().into_iter().flat_map(rdkafka::message::Headers::iter) {
            headers.push(header.key, header.value);
        }
        let row_id = headers.get("id").flatten().map(|id| String::from_utf8_lossy(id).into_owned());
        Self {
            row_id: row_id.unwrap_or_default(),
            topic: message.topic().to_owned(),
            key: message.key().map(<[u8]>::to_vec),
            value: message.payload().map(<[u8]>::to_vec),
            partition: Some(message.partition()),
            timestamp_ms: message.timestamp().to_millis().unwrap_or_default(),
            identity: Identity::default(),
            headers,
        }
    }

    /// As the producer takes it.
    pub(crate) fn record(&self) -> Record<'_> {
        Record {
            identity: self.identity,
            table: "",
            row_id: &self.row_id,
            aggregate_type: "",
            aggregate_id: "",
            topic: &self.topic,
            key: self.key.as_deref(),
            value: self.value.as_deref(),
            partition: self.partition,
            timestamp_ms: self.timestamp_ms,
            headers: &self.headers,
        }
    }
}

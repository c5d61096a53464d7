//! A record as it reaches us: from its topic, redriven, or out of those that were parked behind a dead letter.
//!
//! A redriven record is on `<group>-redrive` as it was, and says by these headers which one it is:
//!
//! | header | value |
//! |---|---|
//! | `redrive.topic`, `redrive.partition`, `redrive.offset` | where it was |
//! | `redrive.number` | which redrive of it this is, from 1 |
//! | `redrive.action` | `apply`, or `discard`: it shall not be applied any more, and has no value |

use rdkafka::{
    Message,
    message::{BorrowedHeaders, BorrowedMessage, Header as KafkaHeader, OwnedHeaders, Timestamp},
};

use crate::record::Record;

/// Where a record was first: what it is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Place<'a> {
    pub(crate) topic: &'a str,
    pub(crate) partition: i32,
    pub(crate) offset: i64,
}

/// The topic that redriven records of a group come by.
pub(crate) fn redrive_topic(group: &str) -> String {
    format!("{group}-redrive")
}

/// A record and how it came.
pub(crate) enum Delivery<'m> {
    Polled(BorrowedMessage<'m>),
    Redriven { message: BorrowedMessage<'m>, redrive: Redrive },
    Parked(Parked),
}

/// What the headers of a redriven record say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Redrive {
    topic: String,
    partition: i32,
    offset: i64,
    number: i32,
    discard: bool,
}

/// A parked record, as stored.
#[derive(Debug, Clone)]
pub(crate) struct Parked {
    pub(crate) topic: String,
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) key: Vec<u8>,
    pub(crate) value: Option<Vec<u8>>,
    pub(crate) headers: Option<Vec<(String, Option<Vec<u8>>)>>,
    pub(crate) written_ms: Option<i64>,
}

impl Redrive {
    fn read(record: &Record<'_>) -> Option<Self> {
        let header = |name| record.header(name).ok().flatten();
        let discard = match header("redrive.action")? {
            "apply" => false,
            "discard" => true,
            _ => return None,
        };
        Some(Self {
            topic: header("redrive.topic")?.to_owned(),
            partition: header("redrive.partition")?.parse().ok()?,
            offset: header("redrive.offset")?.parse().ok()?,
            number: header("redrive.number")?.parse().ok()?,
            discard,
        })
    }
}

impl<'m> Delivery<'m> {
    /// A record of the redrive topic; nothing for one that says not which record it is.
    pub(crate) fn redriven(message: BorrowedMessage<'m>) -> Option<Self> {
        let redrive = Redrive::read(&Record::of(&message))?;
        Some(Self::Redriven { message, redrive })
    }

    pub(crate) fn place(&self) -> Place<'_> {
        match self {
            Self::Polled(m) => Place { topic: m.topic(), partition: m.partition(), offset: m.offset() },
            Self::Redriven { redrive: r, .. } => {
                Place { topic: &r.topic, partition: r.partition, offset: r.offset }
            }
            Self::Parked(p) => Place { topic: &p.topic, partition: p.partition, offset: p.offset },
        }
    }

    /// Which redrive this is; 0 for none.
    pub(crate) fn redrive(&self) -> i32 {
        match self {
            Self::Redriven { redrive, .. } => redrive.number,
            Self::Polled(_) | Self::Parked(_) => 0,
        }
    }

    pub(crate) fn is_parked(&self) -> bool {
        matches!(self, Self::Parked(_))
    }

    /// Whether it came by its own topic, so that what comes after it has not been seen yet.
    pub(crate) fn is_from_its_topic(&self) -> bool {
        matches!(self, Self::Polled(_))
    }

    /// Whether it shall not be applied any more.
    pub(crate) fn is_discarded(&self) -> bool {
        matches!(self, Self::Redriven { redrive, .. } if redrive.discard)
    }

    pub(crate) fn key(&self) -> Option<&[u8]> {
        match self {
            Self::Polled(message) | Self::Redriven { message, .. } => message.key(),
            Self::Parked(parked) => Some(&parked.key),
        }
    }

    pub(crate) fn value(&self) -> Option<&[u8]> {
        match self {
            Self::Polled(message) | Self::Redriven { message, .. } => message.payload(),
            Self::Parked(parked) => parked.value.as_deref(),
        }
    }

    /// When it was written, in milliseconds of Unix time.
    pub(crate) fn written_ms(&self) -> Option<i64> {
        match self {
            Self::Polled(message) | Self::Redriven { message, .. } => written_ms(message),
            Self::Parked(parked) => parked.written_ms,
        }
    }

    /// What a handler sees of it: as it was at first, however it came.
    pub(crate) fn record(&self) -> Record<'_> {
        match self {
            Self::Polled(message) => Record::of(message),
            Self::Redriven { message, redrive } => {
                let mut record = Record::of(message);
                record.topic = &redrive.topic;
                if let Some(headers) = &mut record.headers {
                    headers.retain(|(name, _)| !ours(name));
                }
                record
            }
            Self::Parked(parked) => Record {
                topic: &parked.topic,
                key: Some(&parked.key),
                value: parked.value.as_deref(),
                headers: parked.headers.as_ref().map(|headers| {
                    headers.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect()
                }),
            },
        }
    }

    /// Its own headers, for a copy of it.
    pub(crate) fn headers(&self) -> OwnedHeaders {
        match self {
            // Copied as bytes: a header's name need not be UTF-8.
            Self::Polled(message) => {
                message.headers().map_or_else(OwnedHeaders::new, BorrowedHeaders::detach)
            }
            Self::Redriven { .. } | Self::Parked(_) => {
                let headers = self.record().headers.unwrap_or_default();
                headers.iter().fold(OwnedHeaders::new(), |all, (key, value)| {
                    all.insert(KafkaHeader { key, value: *value })
                })
            }
        }
    }
}

/// A header that is about a record's dead letter and not the record's own.
fn ours(name: &str) -> bool {
    name.starts_with("redrive.") || name.starts_with("dlq.")
}

/// When a record was written, in milliseconds of Unix time.
pub(crate) fn written_ms(message: &BorrowedMessage<'_>) -> Option<i64> {
    match message.timestamp() {
        Timestamp::CreateTime(ms) | Timestamp::LogAppendTime(ms) => Some(ms),
        Timestamp::NotAvailable => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(headers: &[(&'static str, &'static str)]) -> Record<'static> {
        let headers = headers.iter().map(|(name, value)| (*name, Some(value.as_bytes()))).collect();
        Record { headers: Some(headers), ..Record::default() }
    }

    #[test]
    fn a_redriven_record_says_which_one_it_is() {
        let all = [
            ("redrive.topic", "order-events"),
            ("redrive.partition", "3"),
            ("redrive.offset", "17"),
            ("redrive.number", "2"),
            ("redrive.action", "discard"),
        ];
        let read = Redrive::read(&record(&all)).unwrap();
        let wanted =
            Redrive { topic: "order-events".into(), partition: 3, offset: 17, number: 2, discard: true };
        assert_eq!(read, wanted);
        for missing in 0..all.len() {
            let mut some = all.to_vec();
            some.remove(missing);
            assert_eq!(Redrive::read(&record(&some)), None);
        }
        for (index, wrong) in [(1, "x"), (2, ""), (3, "1.5"), (4, "obey")] {
            let mut some = all;
            some[index].1 = wrong;
            assert_eq!(Redrive::read(&record(&some)), None, "{wrong}");
        }
    }

    #[test]
    fn a_handler_never_sees_what_is_ours() {
        let parked = Delivery::Parked(Parked {
            topic: "t".into(),
            partition: 1,
            offset: 2,
            key: b"k".to_vec(),
            value: None,
            headers: Some(vec![("a".into(), Some(b"1".to_vec())), ("b".into(), None)]),
            written_ms: Some(7),
        });
        let record = parked.record();
        assert_eq!((record.topic, record.key, record.value), ("t", Some(&b"k"[..]), None));
        assert_eq!(record.headers().unwrap(), [("a", Some(&b"1"[..])), ("b", None)]);
        assert!(ours("redrive.number") && ours("dlq.reason") && !ours("id"));
    }
}

//! What a handler sees of Kafka: a record, borrowed, and the event that is read out of it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use rdkafka::{
    Message,
    message::{BorrowedMessage, Headers as _},
};
use uuid::Uuid;

use crate::decide::{Poison, Reason};

/// What a record tells, parsed: whatever leaves [`Event::parse`] is applied without another check of its form.
pub trait Event: Sized + Send + Sync + 'static {
    /// Whether [`Self::version`] tells something.
    const VERSIONED: bool = false;

    /// Reads a record. Total: any record whatever gives an event or the reason why it never will.
    fn parse(record: &Record<'_>) -> Result<Self, Poison>;

    /// What the inbox remembers: the same for each repetition, another for each other event.
    fn id(&self) -> Uuid;

    /// What it is, for the metrics: one of a few words.
    fn type_name(&self) -> &'static str;

    /// The aggregate that it belongs to, and which of the aggregate's events it is, counted from 1. Turns the version
    /// guard on: an older event is ignored, a gap noticed.
    fn version(&self) -> Option<(&str, i64)> {
        None
    }
}

/// One header. A name may stand more than once.
pub type Header<'a> = (&'a str, Option<&'a [u8]>);

/// A Kafka record.
#[derive(Debug, Clone, Default)]
pub struct Record<'a> {
    pub topic: &'a str,
    pub key: Option<&'a [u8]>,
    pub value: Option<&'a [u8]>,
    /// In order; None if the name of one is not UTF-8.
    pub headers: Option<Vec<Header<'a>>>,
}

impl<'a> Record<'a> {
    pub(crate) fn of(message: &'a BorrowedMessage<'_>) -> Self {
        // The library panics at a name that is not UTF-8, and offers no other way to the others.
        let headers =
            || message.headers().map_or_else(Vec::new, |h| h.iter().map(|h| (h.key, h.value)).collect());
        Self {
            topic: message.topic(),
            key: message.key(),
            value: message.payload(),
            headers: catch_unwind(AssertUnwindSafe(headers)).ok(),
        }
    }

    /// All headers, in order.
    pub fn headers(&self) -> Result<&[Header<'a>], Poison> {
        self.headers
            .as_deref()
            .ok_or_else(|| Poison::new(Reason::BadValue, "the name of a header is not UTF-8"))
    }

    /// A header's text, if it is there; the last one where a name stands twice.
    pub fn header(&self, name: &str) -> Result<Option<&'a str>, Poison> {
        let found = self.headers()?.iter().rev().find(|(key, _)| *key == name).and_then(|(_, value)| *value);
        found.map(|value| text(name, value)).transpose()
    }
}

/// A header's value as a text that Postgres can hold.
pub(crate) fn text<'a>(name: &str, value: &'a [u8]) -> Result<&'a str, Poison> {
    let text = std::str::from_utf8(value)
        .map_err(|_| Poison::new(Reason::BadValue, format!("the header {name} is not UTF-8")))?;
    if text.contains('\0') {
        let why = format!("the header {name} holds U+0000, which Postgres cannot store");
        return Err(Poison::new(Reason::NulCharacter, why));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_header_that_stands_twice_the_last_counts_and_one_without_a_value_is_absent() {
        let headers: Vec<Header<'_>> =
            vec![("a", Some(b"1")), ("b", Some(b"\xff")), ("a", Some(b"2")), ("c", None)];
        let record = Record { headers: Some(headers), ..Record::default() };
        assert_eq!(record.header("a").unwrap(), Some("2"));
        assert_eq!(record.header("c").unwrap(), None);
        assert_eq!(record.header("d").unwrap(), None);
        assert_eq!(record.header("b").unwrap_err().reason, Reason::BadValue);
        assert_eq!(text("n", b"a\0b").unwrap_err().reason, Reason::NulCharacter);
    }

    #[test]
    fn headers_that_cannot_be_read_are_poison_only_to_who_asks_for_them() {
        let record = Record { key: Some(b"k"), headers: None, ..Record::default() };
        assert_eq!(record.header("a").unwrap_err().reason, Reason::BadValue);
        assert_eq!(record.key, Some(&b"k"[..]));
    }
}

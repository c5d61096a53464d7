//! Redriven records: what an operator sends to a group's own topic, so that it deals with dead letters once more.
//!
//! A record has its original's key, timestamp and headers (but those that begin with `dlq.` or `redrive.`), its
//! original's value if it is to be applied and none if not, and these:
//!
//! | header | value |
//! |---|---|
//! | `redrive.topic`, `redrive.partition`, `redrive.offset` | where the record was at first: which letter this is |
//! | `redrive.number` | how often the letter has been redriven, this time included |
//! | `redrive.action` | `apply`, or `discard`: settle the letter without applying it |

use rdkafka::message::{Header, OwnedHeaders};

/// Where the record was at first: topic, partition (decimal), offset (decimal).
pub(crate) const PLACE: [&str; 3] = ["redrive.topic", "redrive.partition", "redrive.offset"];
/// How often the letter has been redriven (decimal).
pub(crate) const NUMBER: &str = "redrive.number";
/// See [`Action`].
pub(crate) const ACTION: &str = "redrive.action";

/// What the group is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Try it again.
    Apply,
    /// Settle the letter, and let go what waits behind it.
    Discard,
}

impl Action {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Apply => "apply",
            Self::Discard => "discard",
        }
    }
}

/// The topic that only this group reads.
pub(crate) fn topic_of(group: &str) -> String {
    format!("{group}-redrive")
}

/// A header's name and value.
pub(crate) type OwnedHeader = (String, Option<Vec<u8>>);

/// The headers of a redriven record.
pub(crate) fn headers(
    original: &[OwnedHeader],
    place: (&str, i32, i64),
    number: i32,
    action: Action,
) -> OwnedHeaders {
    let ours = |name: &str| ["dlq.", "redrive."].iter().any(|prefix| name.starts_with(prefix));
    let kept = original.iter().filter(|(name, _)| !ours(name));
    let headers = kept.fold(OwnedHeaders::new(), |headers, (key, value)| {
        headers.insert(Header { key, value: value.as_ref() })
    });
    let (topic, partition, offset) = place;
    let place = [topic, &partition.to_string(), &offset.to_string()];
    let number = number.to_string();
    let added = PLACE.into_iter().zip(place).chain([(NUMBER, number.as_str()), (ACTION, action.as_str())]);
    added.fold(headers, |headers, (key, value)| headers.insert(Header { key, value: Some(value) }))
}

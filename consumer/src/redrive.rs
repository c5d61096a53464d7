//! What an operator sends to a group's own topic, as `delivery.rs` reads it.

use rdkafka::message::{Header, OwnedHeaders};

/// What the group is to do: `redrive.action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Try it again.
    Apply,
    /// Settle the letter, and let go what waits behind it.
    Discard,
}

/// A header's name and value.
pub(crate) type OwnedHeader = (String, Option<Vec<u8>>);

/// The headers of a redriven record: the original's, but for those of an earlier failure, and which letter it is.
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
    let action = match action {
        Action::Apply => "apply",
        Action::Discard => "discard",
    };
    let (topic, partition, offset) = place;
    let added = [
        ("redrive.topic", topic.to_owned()),
        ("redrive.partition", partition.to_string()),
        ("redrive.offset", offset.to_string()),
        ("redrive.number", number.to_string()),
        ("redrive.action", action.to_owned()),
    ];
    added.iter().fold(headers, |headers, (key, value)| headers.insert(Header { key, value: Some(value) }))
}

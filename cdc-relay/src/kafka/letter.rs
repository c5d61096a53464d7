//! The last of a dead letter: when it was written, and what of its value the dead-letter topic takes.

use chrono::{SecondsFormat, Utc};
use relay_core::{
    Outgoing,
    poison::Poison,
    record::{Headers, Record},
};
use ring::digest;

use super::{Offer, size::batch_bytes};
use crate::error::{Error, Kind};

/// Assumed where we may not ask for the topic's limit: Kafka's default of `max.message.bytes`.
const DEFAULT_LIMIT_BYTES: usize = 1_048_588;
/// What the headers that tell of a cut take at most, in bytes.
const CUT_HEADERS_BYTES: usize = 256;

/// Adds `dlq.at`, which is the letter's own timestamp, too: the row's could be why its topic refused it, and goes to
/// `dlq.timestamp`, in milliseconds since the Unix epoch. Cuts a value that is too large and says so (`dlq.length`, the bytes it had, and `dlq.sha256`
/// of all of them), and sends it.
pub(super) fn enqueue(
    outgoing: &Outgoing<'_>,
    limit_bytes: Option<usize>,
    send: impl FnOnce(&Record<'_>) -> Result<Offer, Error>,
) -> Result<Offer, Error> {
    let mut headers: Headers = outgoing.record.headers.clone();
    let now = Utc::now();
    headers.push_text("dlq.at", &now.to_rfc3339_opts(SecondsFormat::Millis, true));
    headers.push_text("dlq.timestamp", &outgoing.record.timestamp_ms.to_string());
    let whole = Record { headers: &headers, timestamp_ms: now.timestamp_millis(), ..outgoing.record };
    let limit = limit_bytes.unwrap_or(DEFAULT_LIMIT_BYTES);
    let excess = batch_bytes(&whole).saturating_sub(limit);
    let sent = match whole.value {
        Some(value) if excess > 0 => {
            let kept = value.len().saturating_sub(excess + CUT_HEADERS_BYTES);
            let mut headers = headers.clone();
            headers.push_text("dlq.length", &value.len().to_string());
            headers.push_text("dlq.sha256", &sha256(value));
            send(&Record { headers: &headers, value: value.get(..kept), ..whole })
        }
        _ => send(&whole),
    };
    match sent? {
        Offer::Refused(poison) => Err(refused(&whole, &poison)),
        other => Ok(other),
    }
}

/// There is nothing behind the dead-letter topic.
pub(super) fn refused(letter: &Record<'_>, poison: &Poison) -> Error {
    let what = format!("{} cannot be dead-lettered: {poison}", letter.describe());
    Error::new(Kind::Halted, what)
        .hint("`cdc-relay init` creates poison.dead_letter_topic; mend it, then start again")
}

fn sha256(bytes: &[u8]) -> String {
    digest::digest(&digest::SHA256, bytes).as_ref().iter().fold(String::new(), |mut out, byte| {
        use std::fmt::Write as _;
        // Writing to a String cannot fail.
        let _ = write!(out, "{byte:02x}");
        out
    })
}

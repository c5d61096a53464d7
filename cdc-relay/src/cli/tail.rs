//! `cdc-relay tail`

use std::{
    fmt::Write as _,
    io::{self, Write as _},
};

use relay_core::source::Drafted;
use serde_json::{Map, Value, json};
use service::{
    Failure,
    table::{cut, printable},
};

use super::bytes::hex;
use crate::{
    config::Settings,
    error::{Error, Kind},
    tail,
};

/// The most of a key, a header or a value that a line shows, in characters.
const TEXT_CHARS: usize = 80;

#[derive(Debug, clap::Args)]
pub(super) struct Tail {
    /// End after so many rows [default: go on until Ctrl-C]
    #[arg(long, value_name = "N")]
    rows: Option<u64>,
    /// A JSON object a line
    #[arg(long)]
    json: bool,
}

/// Prints each row as the record that it would be.
pub(super) fn tail(settings: &Settings, tail: &Tail) -> Result<(), Failure> {
    let mut left = tail.rows.unwrap_or(u64::MAX);
    if left == 0 {
        return Ok(());
    }
    let stream = tail::Tail::open(settings).map_err(Error::into_failure)?;
    // Whoever waits for it knows now that nothing is missed from here on.
    eprintln!("following publication {} from here on; Ctrl-C ends it", settings.publication);
    let mut is_closed = false;
    let followed = stream.follow(|drafted| {
        let line = if tail.json { as_json(drafted) } else { as_text(drafted) };
        let mut out = io::stdout().lock();
        match writeln!(out, "{line}").and_then(|()| out.flush()) {
            Ok(()) => left -= 1,
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => is_closed = true,
            Err(e) => return Err(Error::new(Kind::GaveUp, format!("cannot print: {e}"))),
        }
        Ok(left > 0 && !is_closed)
    });
    followed.map_err(Error::into_failure)
}

fn as_json(Drafted { record, poison }: &Drafted<'_>) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let headers =
        record.headers.iter().map(|(name, value)| json!({ "name": name, "value": value.map(text) }));
    let mut object = Map::new();
    let mut put = |name: &str, value: Value| drop(object.insert(name.to_owned(), value));
    put("lsn", json!(record.identity.commit_lsn.to_string()));
    put("seq", json!(record.identity.seq));
    put("table", json!(Some(record.table).filter(|table| !table.is_empty())));
    put("topic", json!(record.topic));
    put("partition", json!(record.partition));
    put("key", json!(record.key.map(text)));
    put("value_bytes", json!(record.value.map(<[u8]>::len)));
    match record.value.map(|value| std::str::from_utf8(value).map_err(|_| hex(value))) {
        Some(Err(hex)) => put("value_hex", json!(hex)),
        text => put("value", json!(text.and_then(Result::ok))),
    }
    put("timestamp_ms", json!(record.timestamp_ms));
    put("headers", headers.collect());
    put("poison", json!(poison.as_ref().map(ToString::to_string)));
    Value::Object(object).to_string()
}

/// In one line: where it goes, its key, how large its value is, its headers, and the beginning of its value.
fn as_text(Drafted { record, poison }: &Drafted<'_>) -> String {
    let text = |bytes: &[u8]| cut(&printable(&String::from_utf8_lossy(bytes)), TEXT_CHARS);
    let partition = record.partition.map(|partition| format!("/{partition}")).unwrap_or_default();
    let key = record.key.map(text).unwrap_or_default();
    let value = record.value.map_or_else(|| "tombstone".to_owned(), |value| format!("{} bytes", value.len()));
    let mut line = format!("{}{partition}  {key}  {value} ", printable(record.topic));
    for (name, value) in record.headers.iter() {
        let value = value.map_or_else(|| "(null)".into(), text);
        // Writing to a String cannot fail.
        let _ = write!(line, " {}={value}", printable(name));
    }
    if let Some(value) = record.value {
        let _ = write!(line, "  {}", beginning(value));
    }
    if let Some(poison) = poison {
        let _ = write!(line, "  CANNOT BE PUBLISHED: {}", printable(&poison.to_string()));
    }
    line
}

/// As much of a value as a line shows.
fn beginning(value: &[u8]) -> String {
    // A character has 4 bytes at most.
    let shown = &value[..value.len().min(4 * (TEXT_CHARS + 1))];
    let text = match std::str::from_utf8(value) {
        Ok(_) => String::from_utf8_lossy(shown).into_owned(),
        Err(_) => format!("0x{}", hex(shown)),
    };
    cut(&printable(&text), TEXT_CHARS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_shown_as_text_or_else_in_hexadecimal_and_no_more_of_it_than_fits() {
        assert_eq!(beginning(b"{\"n\": 1}"), "{\"n\": 1}");
        assert_eq!(beginning(&[0, 0xff]), "0x00ff");
        assert_eq!(beginning("\u{e9}\n".as_bytes()).lines().count(), 1);
        let long = beginning("\u{e9}".repeat(1_000_000).as_bytes());
        assert_eq!(long, cut(&"\u{e9}".repeat(TEXT_CHARS + 1), TEXT_CHARS));
        assert_eq!(beginning(&[0xff; 1000]).chars().count(), TEXT_CHARS);
    }
}

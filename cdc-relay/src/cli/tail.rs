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

use crate::{
    config::Settings,
    error::{Error, Kind},
    tail,
};

/// The most of a key or a header that a line shows, in characters.
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
    put("timestamp_ms", json!(record.timestamp_ms));
    put("headers", headers.collect());
    put("poison", json!(poison.as_ref().map(ToString::to_string)));
    Value::Object(object).to_string()
}

/// In one line: where it goes, its key, how large its value is, and its headers.
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
    if let Some(poison) = poison {
        let _ = write!(line, "  CANNOT BE PUBLISHED: {}", printable(&poison.to_string()));
    }
    line
}

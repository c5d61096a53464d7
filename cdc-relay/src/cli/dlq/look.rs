//! `list` and `show`.

use std::fmt::Write as _;

use rdkafka::{
    Message as _,
    message::{Headers as _, OwnedMessage},
};
use relay_core::redrive::Place;
use serde_json::json;
use service::{
    Failure, exit,
    table::{self, cut, or_dash, printable},
};

use super::Filter;
use crate::{
    cli::bytes::{hex, text_or_hex},
    config::Settings,
    dlq::archive::{Archive, Entry},
    error::Error,
};

/// How much of an error a table has room for, in characters.
const ERROR_CHARS: usize = 80;

#[derive(Debug, clap::Args)]
pub(crate) struct List {
    #[command(flatten)]
    filter: Filter,
    /// The newest so many
    #[arg(long, value_name = "N", default_value_t = 1000)]
    limit: usize,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Show {
    /// PARTITION/OFFSET, as `list` tells it
    letter: Place,
    /// A JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn list(settings: &Settings, list: &List) -> Result<(), Failure> {
    let mut entries = list.filter.entries(settings, &[])?;
    let hidden = entries.len().saturating_sub(list.limit);
    entries.drain(..hidden);
    if list.json {
        for entry in &entries {
            service::say!("{}", json!(entry));
        }
        return Ok(());
    }
    let row = |Entry { about, state, .. }: &Entry| {
        [
            about.letter.to_string(),
            or_dash(&about.at),
            or_dash(&about.reason),
            format!("{}/{}", or_dash(&about.aggregate_type), or_dash(&about.aggregate_id)),
            or_dash(&about.row_id),
            or_dash(&about.topic),
            state.name().to_owned(),
            cut(&printable(&about.error), ERROR_CHARS),
        ]
    };
    let rows: Vec<_> = entries.iter().map(row).collect();
    if rows.is_empty() {
        service::say!("there are no such letters");
        return Ok(());
    }
    table::print(["LETTER", "AT", "REASON", "AGGREGATE", "ROW ID", "TOPIC", "STATE", "ERROR"], &rows);
    if hidden > 0 {
        eprintln!("{hidden} older letters are not shown: --limit N shows more");
    }
    Ok(())
}

pub(super) fn show(settings: &Settings, show: &Show) -> Result<(), Failure> {
    let open = || Archive::open(settings).map_err(Error::into_failure);
    let entries = open()?.entries(|about| about.letter == show.letter).map_err(Error::into_failure)?;
    let message = open()?.fetch(show.letter).map_err(Error::into_failure)?;
    let (Some(entry), Some(message)) = (entries.into_values().next(), message) else {
        let what = format!("there is no dead letter at {} of {}", show.letter, settings.dead_letter_topic);
        return Err(Failure::new(exit::Kind::BadConfiguration, what)
            .hint("`cdc-relay dlq list --state any` tells which there are"));
    };
    if show.json {
        service::say!("{}", as_json(&entry, &message));
    } else {
        service::say!("{}", as_text(&entry, &message).trim_end());
    }
    Ok(())
}

fn as_json(entry: &Entry, message: &OwnedMessage) -> serde_json::Value {
    let mut object = json!(entry);
    let key = |name: &str, bytes: &[u8]| match std::str::from_utf8(bytes) {
        Ok(text) => (name.to_owned(), json!(text)),
        Err(_) => (format!("{name}Hex"), json!(hex(bytes))),
    };
    let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
    let headers: Vec<_> = headers
        .map(|header| {
            let (name, value) =
                header.value.map_or_else(|| ("value".into(), json!(null)), |v| key("value", v));
            json!({ "name": header.key, name: value })
        })
        .collect();
    if let Some(object) = object.as_object_mut() {
        object.insert("headers".into(), json!(headers));
        object.extend(message.key().map(|bytes| key("key", bytes)));
        object.extend(message.payload().map(|bytes| key("value", bytes)));
    }
    object
}

fn as_text(entry: &Entry, message: &OwnedMessage) -> String {
    let about = &entry.about;
    let mut out = String::new();
    // Writing to a String cannot fail.
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(out, "{name:<10} {}", or_dash(value));
    };
    line("letter", &about.letter.to_string());
    let times = if entry.redriven > 1 { format!(" {} times", entry.redriven) } else { String::new() };
    line("state", &format!("{}{times}", entry.state.name()));
    line("at", &about.at);
    line("source", &about.source);
    line("reason", &about.reason);
    line("error", &about.error);
    line("row", &format!("{} of {}", or_dash(&about.row_id), or_dash(&about.table)));
    line("aggregate", &format!("{}/{}", or_dash(&about.aggregate_type), or_dash(&about.aggregate_id)));
    line("type", &about.event_type);
    line("commit LSN", &format!("{}, change {}", about.lsn, about.seq));
    let partition = about.partition.map(|p| format!(", partition {p}")).unwrap_or_default();
    line("topic", &format!("{}{partition}", or_dash(&about.topic)));
    line("key", &message.key().map(text_or_hex).unwrap_or_default());
    for header in message.headers().into_iter().flat_map(|headers| headers.iter()) {
        let value = header.value.map_or_else(|| "(null)".into(), text_or_hex);
        line("header", &format!("{}: {value}", header.key));
    }
    line("value", &value_of(entry));
    if let Some(value) = message.payload() {
        match std::str::from_utf8(value) {
            // Lines and tabs of a text are its own.
            Ok(text) => text.split_inclusive(['\n', '\t']).for_each(|part| {
                let (body, end) = part.split_at(part.trim_end_matches(['\n', '\t']).len());
                out.push_str(&printable(body));
                out.push_str(end);
            }),
            Err(_) => out.push_str(&hex(value)),
        }
        out.push('\n');
    }
    out
}

/// How much of the value there is.
fn value_of(entry: &Entry) -> String {
    match (entry.value_bytes, entry.about.length) {
        (None, _) => "none: a tombstone".into(),
        (Some(bytes), None) => format!("{bytes} bytes"),
        (Some(bytes), Some(length)) => format!(
            "the first {bytes} of {length} bytes: it is cut. SHA-256 of all of it: {}",
            entry.about.sha256.as_deref().unwrap_or("unknown")
        ),
    }
}

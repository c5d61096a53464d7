//! `list` and `show`.

use std::{fmt::Write as _, io::Write as _};

use chrono::{DateTime, SecondsFormat, Utc};
use rdkafka::Message;
use serde_json::{Value, json};
use service::{
    Failure,
    exit::Kind,
    table::{self, age, cut, or_dash, printable},
};
use tokio::task::block_in_place;

use super::{
    Filter,
    copy::{self, Copy},
};
use crate::{
    cluster::Cluster,
    config::Settings,
    ledger::{Chosen, Ledger, Letter, Parked, Place},
};

/// How much of a key or a word a table has room for, in characters.
const CELL_CHARS: usize = 40;
/// How much of a value is shown, in bytes; `--raw` writes all of it.
const VALUE_BYTES_MAX: usize = 64 << 10;
/// How many of the records that wait behind a letter are named.
const PARKED_SHOWN: i64 = 20;

#[derive(Debug, clap::Args)]
pub(crate) struct List {
    #[command(flatten)]
    filter: Filter,
    /// Those that were applied or discarded, too
    #[arg(long)]
    all_states: bool,
    /// The oldest so many
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Show {
    /// TOPIC/PARTITION/OFFSET, as `list` tells it
    letter: Place,
    /// A JSON object
    #[arg(long)]
    json: bool,
    /// Nothing but the value's bytes
    #[arg(long, conflicts_with = "json")]
    raw: bool,
}

pub(super) async fn list(ledger: &mut Ledger, list: &List) -> Result<(), Failure> {
    let chosen = Chosen { settled: list.all_states, ..list.filter.chosen() };
    let letters = ledger.oldest(&chosen, list.limit.into()).await?;
    let keys: Vec<Vec<u8>> = letters.iter().filter(|l| blocks(l)).filter_map(|l| l.key.clone()).collect();
    let parked = ledger.parked_by_key(&keys).await?;
    let behind = |letter: &Letter| match &letter.key {
        Some(key) if blocks(letter) => parked.get(key).copied().unwrap_or_default(),
        _ => 0,
    };
    if list.json {
        for letter in &letters {
            service::say!("{}", as_json(letter, behind(letter)));
        }
        return Ok(());
    }
    let now = Utc::now();
    let rows = letters.iter().map(|letter| {
        let key = letter.key.as_deref().map(text_or_hex).unwrap_or_default();
        [
            letter.place.to_string(),
            letter.reason.clone(),
            cut(&or_dash(letter.event_type.as_deref().unwrap_or_default()), CELL_CHARS),
            cut(&or_dash(&key), CELL_CHARS),
            letter.attempts.to_string(),
            letter.redrives.to_string(),
            age((now - letter.dead_at).num_seconds()),
            behind(letter).to_string(),
            letter.state().to_owned(),
        ]
    });
    let rows: Vec<_> = rows.collect();
    let heads = ["LETTER", "REASON", "TYPE", "KEY", "ATTEMPTS", "REDRIVES", "SINCE", "PARKED", "STATE"];
    table::print(heads, &rows);
    let reasons = ledger.by_reason(&chosen).await?;
    service::say!("{}", summary(&reasons, parked.values().sum()));
    let hidden = reasons.iter().map(|(_, count)| count).sum::<i64>() - i64::from(list.limit);
    if hidden > 0 {
        eprintln!("{hidden} newer letters are not shown: --limit N shows more");
    }
    Ok(())
}

/// Whether records of its key wait for it.
fn blocks(letter: &Letter) -> bool {
    letter.blocks_key && letter.settled_at.is_none()
}

/// `3 letters: 2 not_json, 1 missing_field; 4 records parked behind them`.
pub(crate) fn summary(reasons: &[(String, i64)], parked: i64) -> String {
    let all: i64 = reasons.iter().map(|(_, count)| count).sum();
    let each: Vec<String> = reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    let each = if each.is_empty() { String::new() } else { format!(": {}", each.join(", ")) };
    let letters = if all == 1 { "letter" } else { "letters" };
    let records = if parked == 1 { "record" } else { "records" };
    format!("{all} {letters}{each}; {parked} {records} parked behind them")
}

fn as_json(letter: &Letter, parked: i64) -> Value {
    let mut object = json!({
        "letter": letter.place.to_string(),
        "topic": letter.place.topic,
        "partition": letter.place.partition,
        "offset": letter.place.offset,
        "state": letter.state(),
        "reason": letter.reason,
        "error": letter.error,
        "type": letter.event_type,
        "writtenAt": letter.written_at,
        "attempts": letter.attempts,
        "redrives": letter.redrives,
        "redrivenAt": letter.redriven_at,
        "deadAt": letter.dead_at,
        "settledAt": letter.settled_at,
        "dlqPartition": letter.dlq_partition,
        "dlqOffset": letter.dlq_offset,
        "blocksKey": letter.blocks_key,
        "parked": parked,
    });
    if let Some(object) = object.as_object_mut() {
        object.extend(letter.key.as_deref().map(|bytes| text("key", bytes)));
    }
    object
}

pub(super) async fn show(settings: &Settings, ledger: &mut Ledger, show: &Show) -> Result<(), Failure> {
    let chosen = Chosen { places: vec![show.letter.clone()], settled: true, ..Chosen::default() };
    let Some(letter) = ledger.oldest(&chosen, 1).await?.into_iter().next() else {
        let why = format!("{} has no dead letter {}", settings.kafka.group, show.letter);
        return Err(Failure::new(Kind::BadConfiguration, why)
            .hint("`consumer dlq list --all-states` tells which there are"));
    };
    let (mut parked, mut parked_first) = (0, Vec::new());
    if let Some(key) = letter.key.clone().filter(|_| blocks(&letter)) {
        parked = ledger.parked_by_key(std::slice::from_ref(&key)).await?.into_values().sum();
        parked_first = ledger.parked_behind(&key, PARKED_SHOWN).await?;
    }
    let found = block_in_place(|| {
        let mut cluster = Cluster::new(&settings.kafka)?;
        copy::find(&mut cluster, &settings.kafka.group, &letter)
    })?;
    if show.raw {
        return write_value(&letter, found.as_ref());
    }
    if show.json {
        service::say!("{}", whole_as_json(&letter, parked, &parked_first, found.as_ref()));
    } else {
        service::say!("{}", whole_as_text(&letter, parked, &parked_first, found.as_ref()).trim_end());
    }
    Ok(())
}

fn write_value(letter: &Letter, found: Option<&Copy>) -> Result<(), Failure> {
    let Some(value) = found.filter(|copy| !copy.lacks_value).and_then(|copy| copy.record.payload()) else {
        let why = format!("there is no value of {}: {}", letter.place, whereabouts(found));
        return Err(Failure::new(Kind::Halted, why));
    };
    let written = std::io::stdout().write_all(value);
    written.map_err(|e| Failure::new(Kind::GaveUp, format!("cannot write the value: {e}")))
}

/// Where the record is.
fn whereabouts(found: Option<&Copy>) -> String {
    match found {
        None => "gone from the dead-letter topic and from its own, for its time there was over".into(),
        Some(copy) if copy.lacks_value => {
            format!("{}, without its value, which was too large; it is gone from its own topic", copy.place)
        }
        Some(copy) => copy.place.to_string(),
    }
}

fn whole_as_json(letter: &Letter, parked: i64, first: &[Parked], found: Option<&Copy>) -> Value {
    let mut object = as_json(letter, parked);
    let headers = found.iter().filter_map(|copy| copy.headers.as_ref()).flatten();
    let headers = headers.map(|(name, value)| {
        let (field, value) = value.as_deref().map_or(("value".into(), Value::Null), |v| text("value", v));
        json!({ "name": name, field: value })
    });
    let headers: Vec<Value> = headers.collect();
    let parked = first.iter().map(|p| json!({ "record": p.place.to_string(), "parkedAt": p.parked_at }));
    let parked: Vec<Value> = parked.collect();
    if let Some(object) = object.as_object_mut() {
        object.insert("foundAt".into(), json!(found.map(|copy| copy.place.to_string())));
        object.insert("parkedRecords".into(), json!(parked));
        object.insert("headers".into(), json!(headers));
        object.extend(found.and_then(|copy| copy.record.payload()).map(|bytes| text("value", bytes)));
    }
    object
}

fn whole_as_text(letter: &Letter, parked: i64, first: &[Parked], found: Option<&Copy>) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(out, "{name:<10} {}", or_dash(value));
    };
    let time = |at: DateTime<Utc>| at.to_rfc3339_opts(SecondsFormat::Millis, true);
    line("letter", &letter.place.to_string());
    line("state", letter.state());
    line("at", &time(letter.dead_at));
    line("reason", &letter.reason);
    line("error", &letter.error);
    line("attempts", &letter.attempts.to_string());
    let last = letter.redriven_at.map(|at| format!(", the last time {}", time(at))).unwrap_or_default();
    line("redrives", &format!("{}{last}", letter.redrives));
    line("settled", &letter.settled_at.map(time).unwrap_or_default());
    line("type", letter.event_type.as_deref().unwrap_or_default());
    line("written", &letter.written_at.map(time).unwrap_or_default());
    line("key", &letter.key.as_deref().map(text_or_hex).unwrap_or_default());
    line("blocks key", if blocks(letter) { "yes" } else { "no" });
    for one in first {
        line("parked", &format!("{} since {}", one.place, time(one.parked_at)));
    }
    let more = parked - PARKED_SHOWN;
    if more > 0 {
        line("parked", &format!("and {more} more"));
    }
    line("record", &whereabouts(found));
    let Some(copy) = found else { return out };
    match &copy.headers {
        None => line("header", "the name of one is not UTF-8: they cannot be shown"),
        Some(headers) => headers.iter().for_each(|(name, value)| {
            let value = value.as_deref().map_or_else(|| "(null)".into(), text_or_hex);
            line("header", &format!("{name}: {value}"));
        }),
    }
    let value = copy.record.payload();
    let told = match value {
        _ if copy.lacks_value => "not here".into(),
        None => "none: a tombstone".into(),
        Some(value) if value.len() > VALUE_BYTES_MAX => {
            format!("the first {VALUE_BYTES_MAX} of {} bytes; --raw writes all of them", value.len())
        }
        Some(value) => format!("{} bytes", value.len()),
    };
    line("value", &told);
    out.push_str(&value.map(shown).unwrap_or_default());
    out
}

/// A value for a terminal: JSON with indents, other text as it is, the rest in hexadecimal.
fn shown(value: &[u8]) -> String {
    let pretty = || {
        // As text all through, so that no number loses a digit.
        (value.len() <= VALUE_BYTES_MAX)
            .then(|| serde_json::from_slice::<&serde_json::value::RawValue>(value).ok())?
    };
    let value = &value[..value.len().min(VALUE_BYTES_MAX)];
    let mut out = String::new();
    match (pretty(), std::str::from_utf8(value)) {
        (Some(json), _) => out.push_str(&indented(json.get())),
        (None, Ok(text)) => out.push_str(text),
        (None, Err(e)) if e.error_len().is_none() && value.len() == VALUE_BYTES_MAX => {
            out.push_str(&String::from_utf8_lossy(&value[..e.valid_up_to()]));
        }
        (None, Err(_)) => out.push_str(&hex(value)),
    }
    let mut safe = String::with_capacity(out.len() + 1);
    // Lines and tabs of a text are its own.
    out.split_inclusive(['\n', '\t']).for_each(|part| {
        let (body, end) = part.split_at(part.trim_end_matches(['\n', '\t']).len());
        safe.push_str(&printable(body));
        safe.push_str(end);
    });
    safe.push('\n');
    safe
}

/// Valid JSON with each member on a line of its own; its tokens stay as they are, so that no number loses a digit.
fn indented(json: &str) -> String {
    let mut out = String::with_capacity(2 * json.len());
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    let line = |out: &mut String, depth: usize| {
        out.push('\n');
        out.push_str(&"  ".repeat(depth));
    };
    for c in json.chars() {
        if in_string {
            in_string = escaped || c != '"';
            escaped = !escaped && c == '\\';
            out.push(c);
            continue;
        }
        match c {
            '{' | '[' => {
                depth += 1;
                out.push(c);
                line(&mut out, depth);
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                let inside = out.trim_end().len();
                out.truncate(inside);
                if !out.ends_with(['{', '[']) {
                    line(&mut out, depth);
                }
                out.push(c);
            }
            ',' => {
                out.push(c);
                line(&mut out, depth);
            }
            ':' => out.push_str(": "),
            c if c.is_ascii_whitespace() => {}
            c => {
                in_string = c == '"';
                out.push(c);
            }
        }
    }
    out
}

/// A member called `name`, or `nameHex` where the bytes are no text.
fn text(name: &str, bytes: &[u8]) -> (String, Value) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (name.to_owned(), json!(text)),
        Err(_) => (format!("{name}Hex"), json!(hex(bytes))),
    }
}

fn text_or_hex(bytes: &[u8]) -> String {
    std::str::from_utf8(bytes).map_or_else(|_| format!("0x{}", hex(bytes)), ToOwned::to_owned)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_indented_and_keeps_its_digits() {
        let json = r#"{"a":[1.10,{}],"b{":"x\"]\\", "c": [ ]}"#;
        let expected = "{\n  \"a\": [\n    1.10,\n    {}\n  ],\n  \"b{\": \"x\\\"]\\\\\",\n  \"c\": []\n}\n";
        assert_eq!(shown(json.as_bytes()), expected);
    }

    #[test]
    fn what_is_not_json_is_shown_as_text_and_what_is_no_text_as_hexadecimal() {
        assert_eq!(shown(b"a\x1b[2J\n{"), "a\\u{1b}[2J\n{\n");
        assert_eq!(shown(b"\xff\x00"), "ff00\n");
        let long = format!("{}é and more", "x".repeat(VALUE_BYTES_MAX - 1));
        assert_eq!(shown(long.as_bytes()).len(), VALUE_BYTES_MAX);
    }

    #[test]
    fn a_summary_counts_by_reason() {
        assert_eq!(summary(&[], 0), "0 letters; 0 records parked behind them");
        let two = summary(&[("not_json".into(), 2), ("no_key".into(), 1)], 1);
        assert_eq!(two, "3 letters: 2 not_json, 1 no_key; 1 record parked behind them");
    }
}

//! The text of `test_decoding` → transactions of outbox rows
//! (<https://github.com/postgres/postgres/blob/master/contrib/test_decoding/test_decoding.c>).

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::{
    content::{Content, Headers, own_headers},
    lsn::Lsn,
    murmur2,
};

const INSERT: &str = "table public.outbox: INSERT: ";
/// Of the outbox without a table. Its length in bytes and ` content:` come before what it says.
const MESSAGE: &str = "message: transactional: 1 prefix: outbox, sz: ";

/// A committed row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) id: Uuid,
    pub(super) topic: String,
    /// What the partition follows from.
    pub(super) murmur2: u32,
    pub(super) content: Content,
}

/// A committed transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Transaction {
    /// The commit's record is here or later.
    pub(super) after: Lsn,
    /// And it ends here.
    pub(super) end: Lsn,
    /// In the order of their insertion. Empty where only other tables were written.
    pub(super) rows: Vec<Row>,
}

/// Puts transactions together, of lines that begin with a BEGIN.
#[derive(Debug)]
pub(super) struct Decoder {
    last_end: Lsn,
    open: Option<(Lsn, Vec<Row>)>,
}

impl Decoder {
    /// Of lines behind a transaction that ended at `last_end`.
    pub(super) fn new(last_end: Lsn) -> Self {
        Self { last_end, open: None }
    }

    /// Takes a line; a COMMIT gives the transaction. What else is in no transaction is a message of others.
    ///
    /// # Errors
    /// A row that cannot be read, or a line out of place.
    pub(super) fn line(&mut self, lsn: Lsn, data: &str) -> Result<Option<Transaction>, String> {
        if data.starts_with("BEGIN") {
            self.open = Some((self.last_end, Vec::new()));
            return Ok(None);
        }
        let Some((after, rows)) = &mut self.open else {
            let lost = ["COMMIT", INSERT, MESSAGE].iter().any(|ours| data.starts_with(ours));
            return if lost { Err(format!("a line at {lsn} is in no transaction")) } else { Ok(None) };
        };
        if data.starts_with("COMMIT") {
            let (after, rows) = (*after, std::mem::take(rows));
            self.open = None;
            self.last_end = lsn;
            return Ok(Some(Transaction { after, end: lsn, rows }));
        }
        *after = lsn.max(*after);
        let row = match (data.strip_prefix(INSERT), data.strip_prefix(MESSAGE)) {
            (Some(columns), _) => row(columns),
            (_, Some(message)) => message_row(message),
            (None, None) => return Ok(None),
        };
        rows.push(row.map_err(|error| format!("the row at {lsn}: {error}"))?);
        Ok(None)
    }
}

/// What a row says, in the names of its columns. What is JSON is verbatim.
#[derive(Deserialize)]
struct Fields<'a> {
    id: String,
    aggregatetype: String,
    aggregateid: String,
    r#type: String,
    #[serde(borrow)]
    payload: Option<&'a RawValue>,
    #[serde(borrow)]
    headers: Option<&'a RawValue>,
    traceparent: Option<String>,
    topic: Option<String>,
}

impl Fields<'_> {
    /// The row, and the record it asks for.
    fn row(&self) -> Result<Row, String> {
        let (id, key) = (self.id.as_str(), self.aggregateid.as_bytes());
        let named = [
            ("id", Some(id)),
            ("type", Some(self.r#type.as_str())),
            ("aggregatetype", Some(self.aggregatetype.as_str())),
            ("traceparent", self.traceparent.as_deref()),
        ];
        let text = |(name, value): (&str, Option<&str>)| Some((name.to_owned(), Some(value?.into())));
        let mut headers: Headers = named.into_iter().filter_map(text).collect();
        headers.extend(self.headers.map(|json| own_headers(json.get())).transpose()?.unwrap_or_default());
        Ok(Row {
            id: id.parse().map_err(|_| format!("{id:?} is not a UUID"))?,
            topic: self.topic.clone().unwrap_or_else(|| format!("{}-events", self.aggregatetype)),
            murmur2: murmur2::positive(key),
            content: Content::of(Some(key), self.payload.map(|json| json.get().as_bytes()), headers),
        })
    }
}

/// The row that an insertion tells of.
fn row(text: &str) -> Result<Row, String> {
    let columns = columns(text)?;
    let column = |name: &str| columns.get(name).and_then(Option::as_deref);
    let wanted = |name: &str| column(name).map(str::to_owned).ok_or_else(|| format!("there is no {name}"));
    let json = |name: &str| {
        let raw = column(name).map(serde_json::from_str::<&RawValue>).transpose();
        raw.map_err(|error| format!("{name}: {error}"))
    };
    let fields = Fields {
        id: wanted("id")?,
        aggregatetype: wanted("aggregatetype")?,
        aggregateid: wanted("aggregateid")?,
        r#type: wanted("type")?,
        payload: json("payload")?,
        headers: json("headers")?,
        traceparent: column("traceparent").map(str::to_owned),
        topic: column("topic").map(str::to_owned),
    };
    fields.row()
}

/// The same of a message, which has the columns as members.
fn message_row(text: &str) -> Result<Row, String> {
    let (_, content) = text.split_once(" content:").ok_or("it has no content")?;
    let fields: Fields<'_> = serde_json::from_str(content).map_err(|error| error.to_string())?;
    fields.row()
}

/// `name[type]:value name[type]:value …`
fn columns(text: &str) -> Result<HashMap<&str, Option<String>>, String> {
    let mut columns = HashMap::new();
    let mut rest = text;
    while !rest.is_empty() {
        let parts = rest.split_once('[').and_then(|(name, rest)| {
            let (_, rest) = rest.split_once("]:")?;
            Some((name, rest))
        });
        let (name, tail) = parts.ok_or("a column is not name[type]:value")?;
        let (value, tail) = value(tail).ok_or_else(|| format!("the value of {name} does not end"))?;
        columns.insert(name, value);
        rest = tail.strip_prefix(' ').unwrap_or(tail);
    }
    Ok(columns)
}

/// A literal: `null`, a bare word, or text in quotes in which a quote is doubled. And what follows it.
fn value(text: &str) -> Option<(Option<String>, &str)> {
    let Some(mut rest) = text.strip_prefix('\'') else {
        let end = text.find(' ').unwrap_or(text.len());
        let (word, rest) = text.split_at(end);
        return Some(((word != "null").then(|| word.to_owned()), rest));
    };
    let mut value = String::new();
    loop {
        let (part, tail) = rest.split_once('\'')?;
        value.push_str(part);
        match tail.strip_prefix('\'') {
            Some(tail) => {
                value.push('\'');
                rest = tail;
            }
            None => return Some((Some(value), tail)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "01936d2e-7c01-7a4b-8e55-9f0c1d2e3a41";

    fn insertion(key: &str, payload: &str) -> String {
        format!(
            "{INSERT}id[uuid]:'{ID}' aggregatetype[text]:'chaos' aggregateid[text]:'{key}' type[text]:'T' \
             payload[jsonb]:{payload} headers[jsonb]:'{{\"a\": 1}}' traceparent[text]:null \
             created_at[timestamp with time zone]:'2026-11-22 02:40:06.1+00' topic[text]:null"
        )
    }

    fn message(key: &str, payload: &str) -> String {
        let content = format!(
            "{{\"id\":\"{ID}\",\"aggregatetype\":\"chaos\",\"aggregateid\":\"{key}\",\"type\":\"T\",\"payload\":{payload},\
             \"headers\":{{\"a\": 1}},\"traceparent\":null}}"
        );
        format!("{MESSAGE}{} content:{content}", content.len())
    }

    #[test]
    fn a_transaction_is_its_rows_between_two_places() {
        let mut decoder = Decoder::new(Lsn(5));
        assert_eq!(decoder.line(Lsn(10), "BEGIN 7"), Ok(None));
        assert_eq!(decoder.line(Lsn(10), &insertion("it''s", "'{\"b\": \"''\"}'")), Ok(None));
        assert_eq!(decoder.line(Lsn(20), "table public.orders: INSERT: order_id[text]:'x'"), Ok(None));
        let transaction = decoder.line(Lsn(30), "COMMIT 7").unwrap().unwrap();
        let headers = [("id", ID), ("type", "T"), ("aggregatetype", "chaos"), ("a", "1")]
            .map(|(name, value)| (name.to_owned(), Some(value.as_bytes().to_vec())));
        let row = Row {
            id: ID.parse().unwrap(),
            topic: "chaos-events".into(),
            murmur2: murmur2::positive(b"it's"),
            content: Content::of(Some(b"it's"), Some(b"{\"b\": \"'\"}"), headers.to_vec()),
        };
        assert_eq!(transaction, Transaction { after: Lsn(20), end: Lsn(30), rows: vec![row] });
        // Of one that wrote nothing since, the log before it is that of the last.
        decoder.line(Lsn(28), "BEGIN 8").unwrap();
        let next = decoder.line(Lsn(40), "COMMIT 8").unwrap().unwrap();
        assert_eq!(next, Transaction { after: Lsn(30), end: Lsn(40), rows: vec![] });
        let of_others = "message: transactional: 0 prefix: chaos, sz: 1 content:x";
        assert_eq!(decoder.line(Lsn(41), of_others), Ok(None));
        decoder.line(Lsn(42), "COMMIT 8").unwrap_err();
        decoder.line(Lsn(42), &insertion("k", "null")).unwrap_err();
        decoder.line(Lsn(42), &message("k", "null")).unwrap_err();
    }

    #[test]
    fn a_message_of_the_outbox_is_a_row() {
        let mut decoder = Decoder::new(Lsn(0));
        decoder.line(Lsn(1), "BEGIN 7").unwrap();
        decoder.line(Lsn(1), &insertion("it''s", "'{\"b\": \" content:\"}'")).unwrap();
        decoder.line(Lsn(2), "message: transactional: 1 prefix: chaos, sz: 3 content:not").unwrap();
        decoder.line(Lsn(3), &message("it's", "{\"b\": \" content:\"}")).unwrap();
        decoder.line(Lsn(4), &message("it's", "null")).unwrap();
        decoder.line(Lsn(5), &format!("{MESSAGE}3 content:not")).unwrap_err();
        let rows = decoder.line(Lsn(6), "COMMIT 7").unwrap().unwrap().rows;
        assert_eq!((rows.len(), &rows[0]), (3, &rows[1]));
        assert_eq!(rows[0].content.differences(&rows[2].content), ["the value"]);
    }

    #[test]
    fn a_tombstone_has_no_value() {
        let mut decoder = Decoder::new(Lsn(0));
        decoder.line(Lsn(1), "BEGIN 7").unwrap();
        decoder.line(Lsn(1), &insertion("k", "null")).unwrap();
        decoder.line(Lsn(1), &insertion("k", "'null'")).unwrap();
        let rows = decoder.line(Lsn(2), "COMMIT 7").unwrap().unwrap().rows;
        assert_eq!(rows[0].content.differences(&rows[1].content), ["the value"]);
    }

    proptest! {
        #[test]
        fn text_is_read_as_it_was(values in prop::collection::vec(prop::option::of("\\PC*"), 1..6)) {
            let quoted = |v: &String| format!("'{}'", v.replace('\'', "''"));
            let text: Vec<String> = (0..).zip(&values)
                .map(|(n, v)| format!("c{n}[text]:{}", v.as_ref().map_or("null".to_owned(), quoted)))
                .collect();
            let text = text.join(" ");
            let read = columns(&text).unwrap();
            for (n, value) in (0..).zip(&values) {
                prop_assert_eq!(&read[format!("c{n}").as_str()], value);
            }
        }

        #[test]
        fn any_line_is_read_or_refused(text in "\\PC*") {
            let _ = columns(&text);
        }
    }
}

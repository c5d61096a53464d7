//! An inserted row of an outbox table becomes an [`OutboxRow`], or a typed [`Poison`].

use std::str;

use crate::{
    outbox::{Field, Outbox, REQUIRED, Slots},
    pgoutput::{Relation, Row, Value},
    poison::Poison,
    timestamp,
};

/// Postgres' type oids that matter
/// (<https://github.com/postgres/postgres/blob/master/src/include/catalog/pg_type.dat>). The text output of `bytea`
/// is hexadecimal (`bytea_output = hex`, which the session asks for) and has to be undone.
const BYTEA_OID: u32 = 17;
const JSON_OID: u32 = 114;
const JSONB_OID: u32 = 3802;

/// What a payload is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum PayloadKind {
    Json,
    #[default]
    Text,
    Bytes,
}

/// Where an outbox's columns are in its rows, until the next relation message says otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shape {
    /// The slot of each column that is used.
    slots: Vec<Option<usize>>,
    payload_kind: PayloadKind,
    /// A required column that the table does not have.
    missing: Option<String>,
}

/// A row of an outbox, borrowed from the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct OutboxRow<'a> {
    pub(crate) id: &'a str,
    pub(crate) aggregate_type: &'a str,
    pub(crate) aggregate_id: &'a str,
    pub(crate) event_type: &'a str,
    /// None is SQL NULL: a tombstone.
    pub(crate) payload: Option<&'a [u8]>,
    pub(crate) payload_kind: PayloadKind,
    /// A JSON object.
    pub(crate) headers: Option<&'a str>,
    pub(crate) traceparent: Option<&'a str>,
    pub(crate) partition: Option<i32>,
    pub(crate) topic: Option<&'a str>,
    /// Since the Unix epoch. None: the commit's.
    pub(crate) timestamp_ms: Option<i64>,
}

/// Why a row is poison: the first reason that was found.
#[derive(Debug, Default)]
pub(crate) struct Findings(pub(crate) Option<Poison>);

impl Findings {
    pub(crate) fn add(&mut self, poison: Poison) {
        self.0.get_or_insert(poison);
    }
}

impl Shape {
    /// Finds the outbox's columns in the relation as it is now.
    pub(crate) fn new(outbox: &Outbox, relation: Relation<'_>) -> Self {
        let mut shape = Self { slots: Vec::new(), payload_kind: PayloadKind::Text, missing: None };
        for column in relation.columns() {
            let slot = outbox.slot(column.name);
            if slot == Some(Field::Payload as usize) {
                shape.payload_kind = match column.type_oid {
                    BYTEA_OID => PayloadKind::Bytes,
                    JSON_OID | JSONB_OID => PayloadKind::Json,
                    _ => PayloadKind::Text,
                };
            }
            shape.slots.push(slot);
        }
        let has = |name: &str| outbox.slot(name).is_some_and(|slot| shape.slots.contains(&Some(slot)));
        shape.missing = outbox.required_columns().find(|name| !has(name)).map(str::to_owned);
        shape
    }

    /// Reads a row: what can be read of it, and why it cannot be a record where that is so. `slots` is empty
    /// before; `payload` is where a bytea payload is decoded to, and keeps its capacity from row to row.
    pub(crate) fn read<'a>(
        &self,
        outbox: &Outbox,
        row: Row<'a>,
        slots: &mut Slots<'a>,
        payload: &'a mut Vec<u8>,
    ) -> (OutboxRow<'a>, Findings) {
        let mut findings = Findings(self.missing.clone().map(Poison::MissingColumn));
        if row.len() != self.slots.len() {
            findings.add(Poison::WrongNumberOfValues);
            return (OutboxRow::default(), findings);
        }
        for (slot, value) in self.slots.iter().zip(row.values()) {
            let Some(slot) = *slot else { continue };
            let mut bad = |why| findings.add(Poison::BadColumn(outbox.slot_name(slot).to_owned(), why));
            slots[slot] = match value {
                Value::Null => None,
                Value::Text(bytes) => Some(bytes),
                Value::Unchanged => {
                    bad("was not sent");
                    None
                }
                Value::Binary(_) => {
                    bad("came in binary, which was not asked for");
                    None
                }
            };
        }
        let mut out = interpret(outbox, slots, &mut findings);
        out.payload_kind = self.payload_kind;
        if let Some(hex) = out.payload.filter(|_| self.payload_kind == PayloadKind::Bytes) {
            if decode_bytea(hex, payload) {
                out.payload = Some(payload);
            } else {
                let name = outbox.slot_name(Field::Payload as usize).to_owned();
                findings.add(Poison::BadColumn(name, "is not bytea in hexadecimal form"));
            }
        }
        (out, findings)
    }
}

/// What the values mean: the same for rows and for messages.
pub(crate) fn interpret<'a>(outbox: &Outbox, slots: &Slots<'a>, findings: &mut Findings) -> OutboxRow<'a> {
    let name = |field: Field| outbox.slot_name(field as usize).to_owned();
    let mut text = |field: Field| match slots[field as usize].map(str::from_utf8) {
        None if (field as usize) < REQUIRED => {
            findings.add(Poison::NullColumn(name(field)));
            None
        }
        None => None,
        Some(Ok(text)) => Some(text),
        Some(Err(_)) => {
            findings.add(Poison::BadColumn(name(field), "is not UTF-8"));
            None
        }
    };
    let mut out = OutboxRow {
        id: text(Field::Id).unwrap_or_default(),
        aggregate_type: text(Field::AggregateType).unwrap_or_default(),
        aggregate_id: text(Field::AggregateId).unwrap_or_default(),
        event_type: text(Field::EventType).unwrap_or_default(),
        payload: slots[Field::Payload as usize],
        payload_kind: PayloadKind::Text,
        headers: text(Field::Headers),
        traceparent: text(Field::Traceparent),
        partition: None,
        topic: text(Field::Topic),
        timestamp_ms: None,
    };
    let (partition, time) = (text(Field::Partition), text(Field::Timestamp));
    if let Some(text) = partition {
        out.partition = text.parse().ok().filter(|partition| *partition >= 0);
        if out.partition.is_none() {
            findings.add(Poison::BadColumn(name(Field::Partition), "is not a partition (0 to 2147483647)"));
        }
    }
    if let Some(text) = time {
        out.timestamp_ms = timestamp::parse_ms(text);
        if out.timestamp_ms.is_none() {
            let why = "is not a time after 1970: a timestamp, or milliseconds since then";
            findings.add(Poison::BadColumn(name(Field::Timestamp), why));
        }
    }
    out
}

/// Whether it was bytea's hexadecimal form.
fn decode_bytea(text: &[u8], out: &mut Vec<u8>) -> bool {
    let Some(digits) = text.strip_prefix(b"\\x").filter(|d| d.len() % 2 == 0) else { return false };
    out.clear();
    out.reserve(digits.len() / 2);
    for pair in digits.chunks_exact(2) {
        let (high, low) = (HEX[usize::from(pair[0])], HEX[usize::from(pair[1])]);
        if high > 15 || low > 15 {
            return false;
        }
        out.push(high << 4 | low);
    }
    true
}

/// The value of each hexadecimal digit, 255 for what is none.
const HEX: [u8; 256] = {
    let mut table = [255; 256];
    let mut digit = 0_u8;
    while digit < 10 {
        table[b'0' as usize + digit as usize] = digit;
        digit += 1;
    }
    let mut letter = 0_u8;
    while letter < 6 {
        table[b'a' as usize + letter as usize] = 10 + letter;
        table[b'A' as usize + letter as usize] = 10 + letter;
        letter += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        outbox::{FIELDS, OutboxTable, SLOTS},
        pgoutput::{Message, decode, tests::encode},
        route::TopicTemplate,
    };

    const DEBEZIUM: [(&str, u32); 5] =
        [("id", 2950), ("aggregatetype", 1043), ("aggregateid", 1043), ("type", 1043), ("payload", 3802)];

    fn read_of(
        outbox: &Outbox,
        columns: &[(&str, u32)],
        values: &[Option<&[u8]>],
        check: impl FnOnce(Result<OutboxRow<'_>, Poison>, &Slots<'_>),
    ) {
        let (relation, insert) =
            (encode::relation(1, "public", "outbox", columns), encode::insert(1, values));
        let Ok(Message::Relation(relation)) = decode(&relation) else { panic!("not a relation") };
        let Ok(Message::Insert { row, .. }) = decode(&insert) else { panic!("not an insert") };
        let (mut scratch, mut slots) = (Vec::new(), [None; SLOTS]);
        let (row, findings) = Shape::new(outbox, relation).read(outbox, row, &mut slots, &mut scratch);
        check(findings.0.map_or(Ok(row), Err), &slots);
    }

    fn read(
        columns: &[(&str, u32)],
        values: &[Option<&[u8]>],
        check: impl FnOnce(Result<OutboxRow<'_>, Poison>),
    ) {
        let outbox = Outbox::new(OutboxTable::default()).unwrap();
        read_of(&outbox, columns, values, |row, _| check(row));
    }

    #[test]
    fn debeziums_default_table_is_read_and_other_columns_are_passed_over() {
        let columns = [("extra", 25), DEBEZIUM[0], DEBEZIUM[1], DEBEZIUM[2], DEBEZIUM[3], DEBEZIUM[4]];
        let values: [Option<&[u8]>; 6] =
            [Some(b"x"), Some(b"id-1"), Some(b"order"), Some(b"o1"), Some(b"OrderCreated"), Some(b"{}")];
        read(&columns, &values, |row| {
            let expected = OutboxRow {
                id: "id-1",
                aggregate_type: "order",
                aggregate_id: "o1",
                event_type: "OrderCreated",
                payload: Some(b"{}"),
                payload_kind: PayloadKind::Json,
                ..OutboxRow::default()
            };
            assert_eq!(row, Ok(expected));
        });
    }

    #[test]
    fn what_cannot_be_a_record_says_why() {
        let good: [Option<&[u8]>; 5] = [Some(b"i"), Some(b"order"), Some(b"o"), Some(b"T"), None];
        read(&DEBEZIUM, &good, |row| assert_eq!(row.map(|r| r.payload), Ok(None)));
        for (i, (name, _)) in DEBEZIUM[..4].iter().enumerate() {
            let mut values = good;
            values[i] = None;
            read(&DEBEZIUM, &values, |row| assert_eq!(row, Err(Poison::NullColumn((*name).into()))));
            values[i] = Some(b"\xFF");
            let not_text = Poison::BadColumn((*name).into(), "is not UTF-8");
            read(&DEBEZIUM, &values, |row| assert_eq!(row, Err(not_text)));
        }
        read(&DEBEZIUM[..4], &good[..4], |row| assert_eq!(row, Err(Poison::MissingColumn("payload".into()))));
        read(&DEBEZIUM, &good[..4], |row| assert_eq!(row, Err(Poison::WrongNumberOfValues)));
        let mut columns = DEBEZIUM.to_vec();
        columns.push(("partition", 23));
        for (text, expected) in [("3", Some(Some(3))), ("-1", None), ("x", None), ("2147483648", None)] {
            let values: Vec<_> = good.iter().copied().chain([Some(text.as_bytes())]).collect();
            read(&columns, &values, |row| assert_eq!(row.ok().map(|r| r.partition), expected));
        }
    }

    #[test]
    fn names_are_the_configured_ones_and_further_columns_have_their_slots() {
        let mut table =
            OutboxTable { topic: TopicTemplate::parse("${tenant}").unwrap(), ..OutboxTable::default() };
        table.columns[Field::EventType as usize] = "kind".into();
        table.columns[Field::Timestamp as usize] = "at".into();
        let outbox = Outbox::new(table).unwrap();
        let mut columns = DEBEZIUM.to_vec();
        columns[3].0 = "kind";
        columns.extend([("at", 1184), ("tenant", 25)]);
        let values = |at: Option<&'static str>, kind: Option<&'static str>| {
            [Some("i"), Some("order"), Some("o"), kind, None, at, Some("t1")].map(|v| v.map(str::as_bytes))
        };
        read_of(&outbox, &columns, &values(Some("2026-01-01 00:00:00+00"), Some("T")), |row, slots| {
            let row = row.unwrap();
            assert_eq!((row.event_type, row.timestamp_ms), ("T", Some(1_767_225_600_000)));
            assert_eq!(slots[FIELDS], Some(&b"t1"[..]));
        });
        read_of(&outbox, &columns, &values(None, Some("T")), |row, _| {
            assert_eq!(row.unwrap().timestamp_ms, None);
        });
        read_of(&outbox, &columns, &values(None, None), |row, _| {
            assert_eq!(row, Err(Poison::NullColumn("kind".into())));
        });
        read_of(&outbox, &columns, &values(Some("infinity"), Some("T")), |row, _| {
            assert!(matches!(row, Err(Poison::BadColumn(name, _)) if name == "at"));
        });
        read_of(&outbox, &columns[..6], &values(None, Some("T"))[..6], |row, _| {
            assert_eq!(row, Err(Poison::MissingColumn("tenant".into())));
        });
    }

    proptest! {
        #[test]
        fn bytea_is_undone(bytes: Vec<u8>) {
            let mut text = b"\\x".to_vec();
            for b in &bytes {
                text.extend(format!("{b:02x}").bytes());
            }
            let mut columns = DEBEZIUM;
            columns[4].1 = BYTEA_OID;
            let values: [Option<&[u8]>; 5] = [Some(b"i"), Some(b"a"), Some(b"b"), Some(b"c"), Some(&text)];
            read(&columns, &values, |row| assert_eq!(row.map(|r| r.payload), Ok(Some(&bytes[..]))));
        }

        #[test]
        fn bytea_decoding_is_total(text: Vec<u8>) {
            decode_bytea(&text, &mut Vec::new());
        }
    }
}

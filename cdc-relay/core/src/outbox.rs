//! An inserted row of the outbox table becomes an [`OutboxRow`], or a typed [`Poison`].

use std::str;

use crate::{
    pgoutput::{Relation, Row, Value},
    poison::Poison,
};

/// Postgres' type oid of `bytea`, whose text output is hexadecimal (`bytea_output = hex`, which the session asks
/// for) and has to be undone.
const BYTEA_OID: u32 = 17;

/// Which table is the outbox and what its columns are called. The defaults are Debezium's
/// (<https://debezium.io/documentation/reference/stable/transformations/outbox-event-router.html>).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboxTable {
    pub schema: String,
    pub name: String,
    /// In the order of [`Field`].
    pub columns: [String; FIELDS],
}

/// What a column is to the relay. The first five must be there; the rest are used where the table has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    Id,
    AggregateType,
    AggregateId,
    EventType,
    Payload,
    Headers,
    Traceparent,
    Partition,
    Topic,
}

/// How many kinds of [`Field`] there are.
pub const FIELDS: usize = 9;
const REQUIRED: usize = 5;

impl Field {
    const ALL: [Self; FIELDS] = [
        Self::Id,
        Self::AggregateType,
        Self::AggregateId,
        Self::EventType,
        Self::Payload,
        Self::Headers,
        Self::Traceparent,
        Self::Partition,
        Self::Topic,
    ];
}

impl Default for OutboxTable {
    fn default() -> Self {
        let names = [
            "id",
            "aggregatetype",
            "aggregateid",
            "type",
            "payload",
            "headers",
            "traceparent",
            "partition",
            "topic",
        ];
        Self { schema: "public".into(), name: "outbox".into(), columns: names.map(Into::into) }
    }
}

impl OutboxTable {
    /// Whether the relation is this table.
    pub fn is(&self, relation: Relation<'_>) -> bool {
        relation.schema == self.schema && relation.name == self.name
    }

    /// Finds the columns in the relation as it is now.
    pub fn shape(&self, relation: Relation<'_>) -> Shape {
        let mut shape = Shape { roles: Vec::new(), payload_is_bytea: false, missing: None };
        for column in relation.columns() {
            let role = Field::ALL.into_iter().find(|f| self.columns[*f as usize] == column.name);
            shape.payload_is_bytea |= role == Some(Field::Payload) && column.type_oid == BYTEA_OID;
            shape.roles.push(role);
        }
        let missing = Field::ALL[..REQUIRED].iter().find(|f| !shape.roles.contains(&Some(**f)));
        shape.missing = missing.map(|f| self.columns[*f as usize].clone());
        shape
    }
}

/// Where the outbox's columns are in its rows, until the next relation message says otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    roles: Vec<Option<Field>>,
    payload_is_bytea: bool,
    /// A required column that the table does not have.
    missing: Option<String>,
}

/// A row of the outbox, borrowed from the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OutboxRow<'a> {
    pub id: &'a str,
    pub aggregate_type: &'a str,
    pub aggregate_id: &'a str,
    pub event_type: &'a str,
    /// None is SQL NULL: a tombstone.
    pub payload: Option<&'a [u8]>,
    /// A JSON object.
    pub headers: Option<&'a str>,
    pub traceparent: Option<&'a str>,
    pub partition: Option<i32>,
    pub topic: Option<&'a str>,
}

impl Shape {
    /// Reads a row: what can be read of it, and why it cannot be a record where that is so. `payload` is where a
    /// bytea payload is decoded to; it keeps its capacity from row to row.
    pub fn read<'a>(&self, row: Row<'a>, payload: &'a mut Vec<u8>) -> (OutboxRow<'a>, Option<Poison>) {
        let mut poison = self.missing.clone().map(Poison::MissingColumn);
        if row.len() != self.roles.len() {
            return (OutboxRow::default(), poison.or(Some(Poison::WrongNumberOfValues)));
        }
        let mut found = |why: Poison| {
            poison.get_or_insert(why);
        };
        let mut values: [Option<&'a [u8]>; FIELDS] = [None; FIELDS];
        for (role, value) in self.roles.iter().zip(row.values()) {
            let Some(field) = *role else { continue };
            values[field as usize] = match value {
                Value::Null => None,
                Value::Text(bytes) => Some(bytes),
                Value::Unchanged => {
                    found(Poison::BadColumn(field, "was not sent"));
                    None
                }
                Value::Binary(_) => {
                    found(Poison::BadColumn(field, "came in binary, which was not asked for"));
                    None
                }
            };
        }
        let mut text = |field: Field| match values[field as usize].map(str::from_utf8) {
            None if (field as usize) < REQUIRED => {
                found(Poison::NullColumn(field));
                None
            }
            None => None,
            Some(Ok(text)) => Some(text),
            Some(Err(_)) => {
                found(Poison::BadColumn(field, "is not UTF-8"));
                None
            }
        };
        let mut out = OutboxRow {
            id: text(Field::Id).unwrap_or_default(),
            aggregate_type: text(Field::AggregateType).unwrap_or_default(),
            aggregate_id: text(Field::AggregateId).unwrap_or_default(),
            event_type: text(Field::EventType).unwrap_or_default(),
            headers: text(Field::Headers),
            traceparent: text(Field::Traceparent),
            partition: None,
            topic: text(Field::Topic),
            payload: values[Field::Payload as usize],
        };
        match text(Field::Partition).map(str::parse::<i32>) {
            None => {}
            Some(Ok(partition)) if partition >= 0 => out.partition = Some(partition),
            Some(_) => {
                found(Poison::BadColumn(Field::Partition, "is not a partition (0 to 2147483647)"));
            }
        }
        if let Some(hex) = out.payload.filter(|_| self.payload_is_bytea) {
            match decode_bytea(hex, payload) {
                Ok(()) => out.payload = Some(payload),
                Err(why) => found(why),
            }
        }
        (out, poison)
    }
}

fn decode_bytea(text: &[u8], out: &mut Vec<u8>) -> Result<(), Poison> {
    let bad = || Poison::BadColumn(Field::Payload, "is not bytea in hexadecimal form");
    let digits = text.strip_prefix(b"\\x").filter(|d| d.len() % 2 == 0).ok_or_else(bad)?;
    out.clear();
    out.reserve(digits.len() / 2);
    for pair in digits.chunks_exact(2) {
        let (high, low) = (HEX[usize::from(pair[0])], HEX[usize::from(pair[1])]);
        if high > 15 || low > 15 {
            return Err(bad());
        }
        out.push(high << 4 | low);
    }
    Ok(())
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
    use crate::pgoutput::{Message, decode, tests::encode};

    const DEBEZIUM: [(&str, u32); 5] =
        [("id", 2950), ("aggregatetype", 1043), ("aggregateid", 1043), ("type", 1043), ("payload", 3802)];

    fn read(
        columns: &[(&str, u32)],
        values: &[Option<&[u8]>],
        check: impl FnOnce(Result<OutboxRow<'_>, Poison>),
    ) {
        let (relation, insert) =
            (encode::relation(1, "public", "outbox", columns), encode::insert(1, values));
        let Ok(Message::Relation(relation)) = decode(&relation) else { panic!("not a relation") };
        let Ok(Message::Insert { row, .. }) = decode(&insert) else { panic!("not an insert") };
        let table = OutboxTable::default();
        assert!(table.is(relation));
        let mut scratch = Vec::new();
        let (row, poison) = table.shape(relation).read(row, &mut scratch);
        check(poison.map_or(Ok(row), Err));
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
                ..OutboxRow::default()
            };
            assert_eq!(row, Ok(expected));
        });
    }

    #[test]
    fn what_cannot_be_a_record_says_why() {
        let good: [Option<&[u8]>; 5] = [Some(b"i"), Some(b"order"), Some(b"o"), Some(b"T"), None];
        read(&DEBEZIUM, &good, |row| assert_eq!(row.map(|r| r.payload), Ok(None)));
        for (i, field) in Field::ALL[..4].iter().enumerate() {
            let mut values = good;
            values[i] = None;
            read(&DEBEZIUM, &values, |row| assert_eq!(row, Err(Poison::NullColumn(*field))));
            values[i] = Some(b"\xFF");
            read(&DEBEZIUM, &values, |row| assert_eq!(row, Err(Poison::BadColumn(*field, "is not UTF-8"))));
        }
        read(&DEBEZIUM[..4], &good[..4], |row| assert_eq!(row, Err(Poison::MissingColumn("payload".into()))));
        read(&DEBEZIUM, &good[..4], |row| assert_eq!(row, Err(Poison::WrongNumberOfValues)));
        let mut columns = DEBEZIUM.to_vec();
        columns.push(("partition", 23));
        for (text, expected) in [("3", Some(Some(3))), ("-1", None), ("x", None)] {
            let values: Vec<_> = good.iter().copied().chain([Some(text.as_bytes())]).collect();
            read(&columns, &values, |row| assert_eq!(row.ok().map(|r| r.partition), expected));
        }
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
            let _ = decode_bytea(&text, &mut Vec::new());
        }
    }
}

//! Every message of protocol version 1, with anything in it, comes back as it was sent.

use proptest::prelude::*;

use super::*;

/// What Postgres may send.
#[derive(Debug, Clone)]
enum Sent {
    Begin { commit_lsn: u64, at_us: i64, xid: u32 },
    Commit { commit_lsn: u64, end_lsn: u64, at_us: i64 },
    Origin { lsn: u64, name: String },
    Relation { oid: u32, schema: String, name: String, identity: u8, columns: Vec<SentColumn> },
    Type { oid: u32, schema: String, name: String },
    Insert { oid: u32, row: Vec<Cell> },
    Update { oid: u32, old: Option<(u8, Vec<Cell>)>, new: Vec<Cell> },
    Delete { oid: u32, kind: u8, old: Vec<Cell> },
    Truncate { flags: u8, oids: Vec<u32> },
    LogicalMessage { transactional: bool, lsn: u64, prefix: String, content: Vec<u8> },
}

#[derive(Debug, Clone)]
struct SentColumn {
    is_key: bool,
    name: String,
    type_oid: u32,
    modifier: i32,
}

#[derive(Debug, Clone, PartialEq)]
enum Cell {
    Null,
    Unchanged,
    Text(Vec<u8>),
    Binary(Vec<u8>),
}

fn name() -> impl Strategy<Value = String> {
    "[^\\x00]{0,12}"
}

fn row() -> impl Strategy<Value = Vec<Cell>> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..30);
    let cell = prop_oneof![
        Just(Cell::Null),
        Just(Cell::Unchanged),
        bytes().prop_map(Cell::Text),
        bytes().prop_map(Cell::Binary)
    ];
    prop::collection::vec(cell, 0..8)
}

fn columns() -> impl Strategy<Value = Vec<SentColumn>> {
    let column = (any::<bool>(), name(), any::<u32>(), any::<i32>())
        .prop_map(|(is_key, name, type_oid, modifier)| SentColumn { is_key, name, type_oid, modifier });
    prop::collection::vec(column, 0..8)
}

fn kind() -> impl Strategy<Value = u8> {
    prop::sample::select(b"KO".to_vec())
}

fn sent() -> impl Strategy<Value = Sent> {
    let identity = prop::sample::select(b"dnfi".to_vec());
    let content = prop::collection::vec(any::<u8>(), 0..60);
    prop_oneof![
        any::<(u64, i64, u32)>().prop_map(|(commit_lsn, at_us, xid)| Sent::Begin { commit_lsn, at_us, xid }),
        any::<(u64, u64, i64)>().prop_map(|(commit_lsn, end_lsn, at_us)| Sent::Commit {
            commit_lsn,
            end_lsn,
            at_us
        }),
        (any::<u64>(), name()).prop_map(|(lsn, name)| Sent::Origin { lsn, name }),
        (any::<u32>(), name(), name(), identity, columns()).prop_map(
            |(oid, schema, name, identity, columns)| Sent::Relation { oid, schema, name, identity, columns }
        ),
        (any::<u32>(), name(), name()).prop_map(|(oid, schema, name)| Sent::Type { oid, schema, name }),
        (any::<u32>(), row()).prop_map(|(oid, row)| Sent::Insert { oid, row }),
        (any::<u32>(), prop::option::of((kind(), row())), row()).prop_map(|(oid, old, new)| Sent::Update {
            oid,
            old,
            new
        }),
        (any::<u32>(), kind(), row()).prop_map(|(oid, kind, old)| Sent::Delete { oid, kind, old }),
        (0..4_u8, prop::collection::vec(any::<u32>(), 0..5))
            .prop_map(|(flags, oids)| Sent::Truncate { flags, oids }),
        (any::<bool>(), any::<u64>(), name(), content).prop_map(|(transactional, lsn, prefix, content)| {
            Sent::LogicalMessage { transactional, lsn, prefix, content }
        }),
    ]
}

fn put_sized(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend(u32::try_from(bytes.len()).unwrap().to_be_bytes());
    out.extend(bytes);
}

fn put_row(out: &mut Vec<u8>, row: &[Cell]) {
    out.extend(u16::try_from(row.len()).unwrap().to_be_bytes());
    for cell in row {
        let (tag, bytes) = match cell {
            Cell::Null => (b'n', None),
            Cell::Unchanged => (b'u', None),
            Cell::Text(bytes) => (b't', Some(bytes)),
            Cell::Binary(bytes) => (b'b', Some(bytes)),
        };
        out.push(tag);
        if let Some(bytes) = bytes {
            put_sized(out, bytes);
        }
    }
}

impl Sent {
    /// As `logicalrep_write_*` of Postgres' `proto.c` writes them.
    fn bytes(&self) -> Vec<u8> {
        let text = |text: &str| [text.as_bytes(), b"\0"].concat();
        match self {
            Self::Begin { commit_lsn, at_us, xid } => {
                [b"B", &commit_lsn.to_be_bytes()[..], &at_us.to_be_bytes(), &xid.to_be_bytes()].concat()
            }
            Self::Commit { commit_lsn, end_lsn, at_us } => {
                [b"C\0", &commit_lsn.to_be_bytes()[..], &end_lsn.to_be_bytes(), &at_us.to_be_bytes()].concat()
            }
            Self::Origin { lsn, name } => [b"O", &lsn.to_be_bytes()[..], &text(name)].concat(),
            Self::Relation { oid, schema, name, identity, columns } => {
                let mut out =
                    [b"R", &oid.to_be_bytes()[..], &text(schema), &text(name), &[*identity]].concat();
                out.extend(u16::try_from(columns.len()).unwrap().to_be_bytes());
                for SentColumn { is_key, name, type_oid, modifier } in columns {
                    out.push(u8::from(*is_key));
                    out.extend([&text(name)[..], &type_oid.to_be_bytes(), &modifier.to_be_bytes()].concat());
                }
                out
            }
            Self::Type { oid, schema, name } => {
                [b"Y", &oid.to_be_bytes()[..], &text(schema), &text(name)].concat()
            }
            Self::Insert { oid, row } => {
                let mut out = [b"I", &oid.to_be_bytes()[..], b"N"].concat();
                put_row(&mut out, row);
                out
            }
            Self::Update { oid, old, new } => {
                let mut out = [b"U", &oid.to_be_bytes()[..]].concat();
                if let Some((kind, old)) = old {
                    out.push(*kind);
                    put_row(&mut out, old);
                }
                out.push(b'N');
                put_row(&mut out, new);
                out
            }
            Self::Delete { oid, kind, old } => {
                let mut out = [b"D", &oid.to_be_bytes()[..], &[*kind]].concat();
                put_row(&mut out, old);
                out
            }
            Self::Truncate { flags, oids } => {
                let mut out =
                    [b"T", &u32::try_from(oids.len()).unwrap().to_be_bytes()[..], &[*flags]].concat();
                out.extend(oids.iter().flat_map(|oid| oid.to_be_bytes()));
                out
            }
            Self::LogicalMessage { transactional, lsn, prefix, content } => {
                let head = [b"M", &[u8::from(*transactional)][..], &lsn.to_be_bytes(), &text(prefix)];
                let mut out = head.concat();
                put_sized(&mut out, content);
                out
            }
        }
    }

    /// Whether the message says the same.
    fn is(&self, message: Message<'_>) -> bool {
        match (self, message) {
            (Self::Relation { oid, schema, name, columns, .. }, Message::Relation(relation)) => {
                let got = relation.columns().map(|c| (c.name.to_owned(), c.type_oid));
                (relation.oid, relation.schema, relation.name) == (*oid, schema, name)
                    && got.eq(columns.iter().map(|c| (c.name.clone(), c.type_oid)))
            }
            (Self::Insert { oid, row }, Message::Insert { relation_oid, row: got }) => {
                let cells = got.values().map(|value| match value {
                    Value::Null => Cell::Null,
                    Value::Unchanged => Cell::Unchanged,
                    Value::Text(bytes) => Cell::Text(bytes.to_vec()),
                    Value::Binary(bytes) => Cell::Binary(bytes.to_vec()),
                });
                *oid == relation_oid && got.len() == row.len() && cells.eq(row.iter().cloned())
            }
            (Self::Relation { .. } | Self::Insert { .. }, _) => false,
            (plain, message) => message == plain.expected(),
        }
    }

    /// Those that are compared as they are.
    fn expected(&self) -> Message<'_> {
        match self {
            Self::Begin { commit_lsn, at_us, xid } => {
                Message::Begin { commit_lsn: Lsn(*commit_lsn), committed_at_us: *at_us, xid: *xid }
            }
            Self::Commit { commit_lsn, end_lsn, at_us } => Message::Commit {
                commit_lsn: Lsn(*commit_lsn),
                end_lsn: Lsn(*end_lsn),
                committed_at_us: *at_us,
            },
            Self::Origin { lsn, name } => Message::Origin { lsn: Lsn(*lsn), name },
            Self::Type { oid, schema, name } => Message::Type { oid: *oid, schema, name },
            Self::Update { oid, .. } => Message::Update { relation_oid: *oid },
            Self::Delete { oid, .. } => Message::Delete { relation_oid: *oid },
            Self::Truncate { oids, .. } => {
                Message::Truncate { relations: u32::try_from(oids.len()).unwrap() }
            }
            Self::LogicalMessage { transactional, lsn, prefix, content } => {
                Message::LogicalMessage { transactional: *transactional, lsn: Lsn(*lsn), prefix, content }
            }
            Self::Relation { .. } | Self::Insert { .. } => unreachable!("these are compared by their parts"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn every_message_comes_back_as_it_was(sent in sent()) {
        let bytes = sent.bytes();
        let message = decode(&bytes).map_err(|e| TestCaseError::fail(e.to_string()))?;
        prop_assert!(sent.is(message), "{message:?}");
    }

    /// A message has one length: nothing shorter and nothing longer is taken for it.
    #[test]
    fn a_message_that_was_cut_or_prolonged_is_told(sent in sent(), more: u8) {
        let mut bytes = sent.bytes();
        for cut in 0..bytes.len() {
            prop_assert_eq!(decode(&bytes[..cut]), Err(DecodeError::Truncated));
        }
        bytes.push(more);
        prop_assert_eq!(decode(&bytes), Err(DecodeError::TrailingBytes(1)));
    }
}

/// Stream start, stop, commit and abort; begin prepare, prepare, commit prepared, rollback prepared, stream prepare:
/// of the later versions of the protocol, which we do not ask for.
#[test]
fn messages_of_later_protocol_versions_are_named() {
    for tag in *b"SEcAbPKrp" {
        let bytes = [&[tag][..], &[0; 40]].concat();
        assert_eq!(decode(&bytes), Err(DecodeError::UnknownMessage(tag)));
        assert!(decode(&bytes).unwrap_err().to_string().contains(&format!("{:?}", char::from(tag))));
    }
}

#[test]
fn flags_that_the_protocol_does_not_define_are_named() {
    let refused = |bytes: &[u8], flags| assert_eq!(decode(bytes), Err(DecodeError::UnknownFlags(flags)));
    refused(&[b"C\x01", &[0; 24][..]].concat(), 1);
    refused(&[b"M\x03", &[0; 13][..]].concat(), 3);
    refused(b"T\0\0\0\0\x04", 4);
    refused(b"R\0\0\0\x01s\0t\0d\0\x01\x02c\0\0\0\0\x17\xFF\xFF\xFF\xFF", 2);
    assert_eq!(decode(b"R\0\0\0\x01s\0t\0x\0\0"), Err(DecodeError::UnknownTag(b'x')));
}

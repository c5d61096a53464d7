//! Tests of the decoder, and the encoder that other tests build streams with.

use proptest::prelude::*;

use super::*;

/// Encodes messages as Postgres does.
pub(crate) mod encode {
    fn lsn_pair(tag: u8, a: u64, b: i64, rest: &[u8]) -> Vec<u8> {
        [&[tag][..], &a.to_be_bytes(), &b.to_be_bytes(), rest].concat()
    }

    pub(crate) fn begin(commit_lsn: u64, at_us: i64) -> Vec<u8> {
        lsn_pair(b'B', commit_lsn, at_us, &7_u32.to_be_bytes())
    }

    pub(crate) fn commit(commit_lsn: u64, end_lsn: u64, at_us: i64) -> Vec<u8> {
        [&[b'C', 0][..], &commit_lsn.to_be_bytes(), &end_lsn.to_be_bytes(), &at_us.to_be_bytes()].concat()
    }

    pub(crate) fn relation(oid: u32, schema: &str, name: &str, columns: &[(&str, u32)]) -> Vec<u8> {
        let mut out =
            [&b"R"[..], &oid.to_be_bytes(), schema.as_bytes(), b"\0", name.as_bytes(), b"\0d"].concat();
        out.extend(u16::try_from(columns.len()).unwrap().to_be_bytes());
        for (name, type_oid) in columns {
            out.push(0);
            out.extend(name.as_bytes());
            out.push(0);
            out.extend(type_oid.to_be_bytes());
            out.extend((-1_i32).to_be_bytes());
        }
        out
    }

    pub(crate) fn insert(oid: u32, values: &[Option<&[u8]>]) -> Vec<u8> {
        let mut out = [&b"I"[..], &oid.to_be_bytes(), b"N"].concat();
        out.extend(u16::try_from(values.len()).unwrap().to_be_bytes());
        for value in values {
            match value {
                None => out.push(b'n'),
                Some(bytes) => {
                    out.push(b't');
                    out.extend(u32::try_from(bytes.len()).unwrap().to_be_bytes());
                    out.extend(*bytes);
                }
            }
        }
        out
    }

    pub(crate) fn update(oid: u32) -> Vec<u8> {
        [&b"U"[..], &oid.to_be_bytes(), b"N\0\x02ut\0\0\0\x01x"].concat()
    }

    pub(crate) fn message(transactional: bool, prefix: &str, content: &[u8]) -> Vec<u8> {
        message_at(0, transactional, prefix, content)
    }

    pub(crate) fn message_at(lsn: u64, transactional: bool, prefix: &str, content: &[u8]) -> Vec<u8> {
        let length = u32::try_from(content.len()).unwrap();
        let head = [&[b'M', u8::from(transactional)][..], &lsn.to_be_bytes(), prefix.as_bytes(), b"\0"];
        [&head.concat(), &length.to_be_bytes()[..], content].concat()
    }

    pub(crate) fn delete(oid: u32) -> Vec<u8> {
        [&b"D"[..], &oid.to_be_bytes(), b"K\0\x01t\0\0\0\x01x"].concat()
    }
}

#[test]
fn a_transaction_is_decoded() {
    assert_eq!(
        decode(&encode::begin(5, -1)),
        Ok(Message::Begin { commit_lsn: Lsn(5), committed_at_us: -1, xid: 7 })
    );
    assert_eq!(
        decode(&encode::commit(5, 6, 9)),
        Ok(Message::Commit { commit_lsn: Lsn(5), end_lsn: Lsn(6), committed_at_us: 9 })
    );
    let bytes = encode::relation(1, "public", "outbox", &[("id", 2950), ("payload", 3802)]);
    let Ok(Message::Relation(relation)) = decode(&bytes) else { panic!("not a relation") };
    assert_eq!((relation.oid, relation.schema, relation.name), (1, "public", "outbox"));
    let columns: Vec<_> = relation.columns().map(|c| (c.name, c.type_oid)).collect();
    assert_eq!(columns, [("id", 2950), ("payload", 3802)]);
    let bytes = encode::insert(1, &[Some(b"x"), None, Some(b"")]);
    let Ok(Message::Insert { relation_oid: 1, row }) = decode(&bytes) else { panic!("not an insert") };
    assert_eq!(row.values().collect::<Vec<_>>(), [Value::Text(b"x"), Value::Null, Value::Text(b"")]);
}

#[test]
fn the_other_messages_are_decoded() {
    let update = [&b"U\0\0\0\x01O"[..], b"\0\x01n", b"N", b"\0\x02ub\0\0\0\x01z"].concat();
    assert_eq!(decode(&update), Ok(Message::Update { relation_oid: 1 }));
    assert_eq!(decode(b"U\0\0\0\x01N\0\0"), Ok(Message::Update { relation_oid: 1 }));
    assert_eq!(decode(&encode::delete(3)), Ok(Message::Delete { relation_oid: 3 }));
    assert_eq!(decode(b"T\0\0\0\x02\0\0\0\0\x01\0\0\0\x02"), Ok(Message::Truncate { relations: 2 }));
    assert_eq!(decode(b"O\0\0\0\0\0\0\0\x01eu\0"), Ok(Message::Origin { lsn: Lsn(1), name: "eu" }));
    assert_eq!(decode(b"Y\0\0\0\x09s\0n\0"), Ok(Message::Type { oid: 9, schema: "s", name: "n" }));
    let content = &b"{}"[..];
    assert_eq!(
        decode(b"M\x01\0\0\0\0\0\0\0\x01outbox\0\0\0\0\x02{}"),
        Ok(Message::LogicalMessage { transactional: true, lsn: Lsn(1), prefix: "outbox", content })
    );
}

#[test]
fn what_is_not_of_the_protocol_is_named() {
    assert_eq!(decode(b""), Err(DecodeError::Truncated));
    assert_eq!(decode(b"S\0\0\0\x01\x01"), Err(DecodeError::UnknownMessage(b'S')));
    assert_eq!(decode(b"I\0\0\0\x01X"), Err(DecodeError::UnknownTag(b'X')));
    assert_eq!(decode(b"I\0\0\0\x01N\0\x01t\xFF\xFF\xFF\xFF"), Err(DecodeError::NegativeLength(-1)));
    assert_eq!(decode(b"O\0\0\0\0\0\0\0\x01\xFF\0"), Err(DecodeError::NotUtf8));
    assert_eq!(decode(b"T\xFF\xFF\xFF\xFF\0"), Err(DecodeError::Truncated));
    let mut long = encode::begin(1, 1);
    long.push(0);
    assert_eq!(decode(&long), Err(DecodeError::TrailingBytes(1)));
}

fn any_insert() -> impl Strategy<Value = Vec<Option<Vec<u8>>>> {
    prop::collection::vec(prop::option::of(prop::collection::vec(any::<u8>(), 0..40)), 0..12)
}

proptest! {
    #[test]
    fn decoding_is_total(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode(&bytes);
    }

    #[test]
    fn a_damaged_message_never_panics(values in any_insert(), at: prop::sample::Index, to: u8, cut: prop::sample::Index) {
        let borrowed: Vec<_> = values.iter().map(Option::as_deref).collect();
        let mut bytes = encode::insert(1, &borrowed);
        let at = at.index(bytes.len());
        bytes[at] = to;
        bytes.truncate(cut.index(bytes.len()) + 1);
        if let Ok(Message::Insert { row, .. }) = decode(&bytes) {
            prop_assert_eq!(row.values().count(), row.len());
        }
    }

    #[test]
    fn a_row_comes_back_as_it_was(values in any_insert()) {
        let borrowed: Vec<_> = values.iter().map(Option::as_deref).collect();
        let bytes = encode::insert(9, &borrowed);
        let Ok(Message::Insert { relation_oid: 9, row }) = decode(&bytes) else { panic!("not an insert") };
        let back: Vec<_> = row.values().map(|v| match v { Value::Text(t) => Some(t), _ => None }).collect();
        prop_assert_eq!(back, borrowed);
    }
}

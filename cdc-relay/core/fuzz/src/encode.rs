//! Encodes messages as Postgres does.

use relay_core::pgoutput::{Message, Row, Value};

/// None for those of which the decoder does not keep everything.
pub fn message(message: Message<'_>) -> Option<Vec<u8>> {
    Some(match message {
        Message::Begin { commit_lsn, committed_at_us, xid } => {
            [b"B", &commit_lsn.0.to_be_bytes()[..], &committed_at_us.to_be_bytes(), &xid.to_be_bytes()]
                .concat()
        }
        Message::Commit { commit_lsn, end_lsn, committed_at_us } => [
            b"C\0",
            &commit_lsn.0.to_be_bytes()[..],
            &end_lsn.0.to_be_bytes(),
            &committed_at_us.to_be_bytes(),
        ]
        .concat(),
        Message::Origin { lsn, name } => [b"O", &lsn.0.to_be_bytes()[..], name.as_bytes(), b"\0"].concat(),
        Message::Type { oid, schema, name } => {
            [b"Y", &oid.to_be_bytes()[..], schema.as_bytes(), b"\0", name.as_bytes(), b"\0"].concat()
        }
        Message::Insert { relation_oid, row: values } => {
            [b"I", &relation_oid.to_be_bytes()[..], b"N", &row(values)].concat()
        }
        Message::LogicalMessage { transactional, lsn, prefix, content } => [
            b"M",
            &[u8::from(transactional)][..],
            &lsn.0.to_be_bytes(),
            prefix.as_bytes(),
            b"\0",
            &length(content),
            content,
        ]
        .concat(),
        Message::Relation(_) | Message::Update { .. } | Message::Delete { .. } | Message::Truncate { .. } => {
            return None;
        }
    })
}

fn row(row: Row<'_>) -> Vec<u8> {
    let mut out = u16::try_from(row.len()).expect("counted in 16 bits").to_be_bytes().to_vec();
    for value in row.values() {
        match value {
            Value::Null => out.push(b'n'),
            Value::Unchanged => out.push(b'u'),
            Value::Text(bytes) => out.extend([b"t", &length(bytes)[..], bytes].concat()),
            Value::Binary(bytes) => out.extend([b"b", &length(bytes)[..], bytes].concat()),
        }
    }
    out
}

fn length(bytes: &[u8]) -> [u8; 4] {
    u32::try_from(bytes.len()).expect("its length came in 32 bits").to_be_bytes()
}

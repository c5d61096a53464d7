//! Rows of SQL as messages of `pgoutput`, so that whoever reads them makes of each what it makes of one of the stream
//! (<https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>).

use relay_core::{Lsn, checkpoint::Mark};

/// Makes one message after the other, in the same memory.
#[derive(Debug, Default)]
pub(crate) struct Encoder {
    message: Vec<u8>,
}

impl Encoder {
    /// A transaction begins.
    pub(crate) fn begin(&mut self, mark: Mark) -> &[u8] {
        self.start(b'B');
        self.put(&mark.commit_lsn.0.to_be_bytes());
        self.put(&mark.committed_at_us.to_be_bytes());
        // No transaction's number is used.
        self.put(&[0; 4])
    }

    /// It ends.
    pub(crate) fn commit(&mut self, mark: Mark, end: Lsn) -> &[u8] {
        self.start(b'C');
        // No flags.
        self.put(&[0]);
        self.put(&mark.commit_lsn.0.to_be_bytes());
        self.put(&end.0.to_be_bytes());
        self.put(&mark.committed_at_us.to_be_bytes())
    }

    /// The table, under a number, whose rows follow: its schema and name, and each column's name and type.
    pub(crate) fn relation<'n>(
        &mut self,
        oid: u32,
        (schema, table): (&str, &str),
        columns: impl ExactSizeIterator<Item = (&'n str, u32)>,
    ) -> &[u8] {
        self.start(b'R');
        self.put(&oid.to_be_bytes());
        self.put_text(schema);
        self.put_text(table);
        // The default replica identity.
        self.put(b"d");
        self.put_count(columns.len());
        for (name, type_oid) in columns {
            // No part of the identity.
            self.put(&[0]);
            self.put_text(name);
            self.put(&type_oid.to_be_bytes());
            // No modifiers of the type.
            self.put(&[0; 4]);
        }
        &self.message
    }

    /// A row of that table, its values in text form.
    pub(crate) fn insert<'v>(
        &mut self,
        oid: u32,
        values: impl ExactSizeIterator<Item = Option<&'v [u8]>>,
    ) -> &[u8] {
        self.start(b'I');
        self.put(&oid.to_be_bytes());
        self.put(b"N");
        self.put_count(values.len());
        for value in values {
            let Some(value) = value else {
                self.put(b"n");
                continue;
            };
            self.put(b"t");
            // Postgres has no value of 2 GiB.
            self.put(&u32::try_from(value.len()).unwrap_or(0).to_be_bytes());
            self.put(value);
        }
        &self.message
    }

    fn start(&mut self, tag: u8) {
        self.message.clear();
        // A row that was very large does not keep its room.
        self.message.shrink_to(KEPT_BYTES);
        self.message.push(tag);
    }

    fn put(&mut self, bytes: &[u8]) -> &[u8] {
        self.message.extend_from_slice(bytes);
        &self.message
    }

    fn put_text(&mut self, text: &str) {
        self.put(text.as_bytes());
        self.put(&[0]);
    }

    fn put_count(&mut self, count: usize) {
        // A table has no more than 1600 columns.
        self.put(&u16::try_from(count).unwrap_or(u16::MAX).to_be_bytes());
    }
}

/// What the memory for a message may keep from one to the next.
const KEPT_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use relay_core::pgoutput::{Message, Value, decode};

    use super::*;

    #[test]
    fn what_is_made_is_what_is_read() {
        let mut encoder = Encoder::default();
        let mark = Mark { commit_lsn: Lsn(7), committed_at_us: -5 };
        let begin = Message::Begin { commit_lsn: Lsn(7), committed_at_us: -5, xid: 0 };
        assert_eq!(decode(encoder.begin(mark)), Ok(begin));
        let commit = Message::Commit { commit_lsn: Lsn(7), end_lsn: Lsn(8), committed_at_us: -5 };
        assert_eq!(decode(encoder.commit(mark, Lsn(8))), Ok(commit));
        let columns = [("id", 2950), ("payload", 3802)];
        match decode(encoder.relation(9, ("s", "t"), columns.into_iter())) {
            Ok(Message::Relation(relation)) => {
                assert_eq!((relation.oid, relation.schema, relation.name), (9, "s", "t"));
                let read: Vec<_> = relation.columns().map(|c| (c.name, c.type_oid)).collect();
                assert_eq!(read, columns);
            }
            other => panic!("{other:?}"),
        }
        match decode(encoder.insert(9, [Some(&b"one"[..]), None].into_iter())) {
            Ok(Message::Insert { relation_oid: 9, row }) => {
                assert_eq!(row.values().collect::<Vec<_>>(), [Value::Text(b"one"), Value::Null]);
            }
            other => panic!("{other:?}"),
        }
    }
}

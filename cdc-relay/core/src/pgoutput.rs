//! The messages of the `pgoutput` plug-in, protocol version 1, decoded in place.
//!
//! <https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>. Decoding is total: any
//! bytes give a message or a named error, nothing is allocated, and what is borrowed has been bounds-checked.

use std::{fmt, str};

use crate::Lsn;

/// One message of the stream. Text is borrowed from the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message<'a> {
    /// A transaction begins.
    Begin {
        /// The LSN of its commit record: what `Commit::commit_lsn` will say.
        commit_lsn: Lsn,
        /// When it was committed, in microseconds since 2000-01-01 UTC.
        committed_at_us: i64,
        xid: u32,
    },
    /// The transaction that began last is complete.
    Commit {
        commit_lsn: Lsn,
        /// Where the next transaction may begin: confirming this covers the whole transaction.
        end_lsn: Lsn,
        committed_at_us: i64,
    },
    /// The transaction came from another server.
    Origin { lsn: Lsn, name: &'a str },
    /// The shape of a table; sent before its first change and again whenever it may have changed.
    Relation(Relation<'a>),
    /// The name of a data type that is not built in.
    Type { oid: u32, schema: &'a str, name: &'a str },
    /// A row was inserted.
    Insert { relation_oid: u32, row: Row<'a> },
    /// A row was updated.
    Update { relation_oid: u32 },
    /// A row was deleted.
    Delete { relation_oid: u32 },
    /// Tables were truncated.
    Truncate { relations: u32 },
    /// `pg_logical_emit_message` was called.
    LogicalMessage { transactional: bool, lsn: Lsn, prefix: &'a str, content: &'a [u8] },
}

/// The shape of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Relation<'a> {
    pub oid: u32,
    /// Empty for `pg_catalog`.
    pub schema: &'a str,
    pub name: &'a str,
    count: u16,
    columns: &'a [u8],
}

/// A column of a [`Relation`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column<'a> {
    pub name: &'a str,
    pub type_oid: u32,
}

impl<'a> Relation<'a> {
    /// The columns, in the order in which rows have them.
    pub fn columns(self) -> impl Iterator<Item = Column<'a>> {
        let mut input = Input(self.columns);
        // The bytes were walked once when the message was decoded, so the Ok below is every column.
        (0..self.count).map_while(move |_| input.column().ok())
    }
}

/// A row's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row<'a> {
    count: u16,
    values: &'a [u8],
}

/// A column's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    Null,
    /// A value out of line (TOAST) that did not change and was not sent; never in an insert.
    Unchanged,
    /// The type's text output.
    Text(&'a [u8]),
    /// The type's binary output.
    Binary(&'a [u8]),
}

impl<'a> Row<'a> {
    /// How many values there are.
    pub fn len(self) -> usize {
        usize::from(self.count)
    }

    /// Whether the table has no columns.
    pub fn is_empty(self) -> bool {
        self.count == 0
    }

    /// The values, in the relation's order of columns.
    pub fn values(self) -> impl Iterator<Item = Value<'a>> {
        let mut input = Input(self.values);
        (0..self.count).map_while(move |_| input.value().ok())
    }
}

/// Bytes that are not a message of protocol version 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodeError {
    /// The message ends before its content does.
    Truncated,
    /// Bytes are left after the message's content.
    TrailingBytes(usize),
    /// A message type that protocol version 1 does not have (streaming and two-phase ones among them).
    UnknownMessage(u8),
    /// A tag inside a message that the protocol does not have there.
    UnknownTag(u8),
    /// A field of flags has a bit that the protocol does not define there.
    UnknownFlags(u8),
    /// A length is negative.
    NegativeLength(i32),
    /// A name is not UTF-8.
    NotUtf8,
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated => write!(f, "the message ends before its content does"),
            Self::TrailingBytes(n) => write!(f, "{n} bytes follow the message's content"),
            Self::UnknownMessage(tag) => {
                write!(f, "message type {:?} is not of pgoutput protocol version 1", char::from(*tag))
            }
            Self::UnknownTag(tag) => write!(f, "tag {:?} is not of the protocol", char::from(*tag)),
            Self::UnknownFlags(flags) => write!(f, "flags {flags:#010b} are not of the protocol"),
            Self::NegativeLength(n) => write!(f, "a length of {n}"),
            Self::NotUtf8 => write!(f, "a name is not UTF-8"),
        }
    }
}

impl std::error::Error for DecodeError {}

/// Decodes one message: the payload of one `XLogData`.
pub fn decode(bytes: &[u8]) -> Result<Message<'_>, DecodeError> {
    let mut input = Input(bytes);
    let message = match input.u8()? {
        b'B' => Message::Begin { commit_lsn: input.lsn()?, committed_at_us: input.i64()?, xid: input.u32()? },
        b'C' => {
            input.flags(0)?;
            Message::Commit { commit_lsn: input.lsn()?, end_lsn: input.lsn()?, committed_at_us: input.i64()? }
        }
        b'O' => Message::Origin { lsn: input.lsn()?, name: input.text()? },
        b'R' => Message::Relation(input.relation()?),
        b'Y' => Message::Type { oid: input.u32()?, schema: input.text()?, name: input.text()? },
        b'I' => {
            let relation_oid = input.u32()?;
            input.tag(b"N")?;
            Message::Insert { relation_oid, row: input.row()? }
        }
        b'U' => {
            let relation_oid = input.u32()?;
            if input.tag(b"KON")? != b'N' {
                input.row()?;
                input.tag(b"N")?;
            }
            input.row()?;
            Message::Update { relation_oid }
        }
        b'D' => {
            let relation_oid = input.u32()?;
            input.tag(b"KO")?;
            input.row()?;
            Message::Delete { relation_oid }
        }
        b'T' => {
            let relations = input.u32()?;
            // CASCADE, RESTART IDENTITY.
            input.flags(0b11)?;
            let oids = usize::try_from(relations).ok().and_then(|n| n.checked_mul(4));
            input.take(oids.ok_or(DecodeError::Truncated)?)?;
            Message::Truncate { relations }
        }
        b'M' => {
            let transactional = input.flags(1)? == 1;
            let (lsn, prefix) = (input.lsn()?, input.text()?);
            Message::LogicalMessage { transactional, lsn, prefix, content: input.sized()? }
        }
        other => return Err(DecodeError::UnknownMessage(other)),
    };
    match input.0.len() {
        0 => Ok(message),
        left => Err(DecodeError::TrailingBytes(left)),
    }
}

/// What is left of the message.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], DecodeError> {
        let (head, rest) = self.0.split_at_checked(n).ok_or(DecodeError::Truncated)?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(DecodeError::Truncated)?;
        self.0 = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    fn i64(&mut self) -> Result<i64, DecodeError> {
        self.array().map(i64::from_be_bytes)
    }

    fn lsn(&mut self) -> Result<Lsn, DecodeError> {
        self.array().map(u64::from_be_bytes).map(Lsn)
    }

    fn tag(&mut self, allowed: &[u8]) -> Result<u8, DecodeError> {
        let tag = self.u8()?;
        if allowed.contains(&tag) { Ok(tag) } else { Err(DecodeError::UnknownTag(tag)) }
    }

    /// A byte of flags, none but those in `known` set.
    fn flags(&mut self, known: u8) -> Result<u8, DecodeError> {
        let flags = self.u8()?;
        if flags & !known == 0 { Ok(flags) } else { Err(DecodeError::UnknownFlags(flags)) }
    }

    /// A string that a zero byte ends.
    fn text(&mut self) -> Result<&'a str, DecodeError> {
        let end = self.0.iter().position(|b| *b == 0).ok_or(DecodeError::Truncated)?;
        let text = str::from_utf8(self.take(end)?).map_err(|_| DecodeError::NotUtf8)?;
        self.u8()?;
        Ok(text)
    }

    /// Bytes behind their length.
    fn sized(&mut self) -> Result<&'a [u8], DecodeError> {
        let length = self.array().map(i32::from_be_bytes)?;
        self.take(usize::try_from(length).map_err(|_| DecodeError::NegativeLength(length))?)
    }

    fn relation(&mut self) -> Result<Relation<'a>, DecodeError> {
        let (oid, schema, name) = (self.u32()?, self.text()?, self.text()?);
        self.tag(b"dnfi")?;
        let count = self.u16()?;
        let columns = self.0;
        for _ in 0..count {
            self.column()?;
        }
        Ok(Relation { oid, schema, name, count, columns: &columns[..columns.len() - self.0.len()] })
    }

    fn column(&mut self) -> Result<Column<'a>, DecodeError> {
        // Whether it is part of the replica identity.
        self.flags(1)?;
        let column = Column { name: self.text()?, type_oid: self.u32()? };
        let _type_modifier = self.u32()?;
        Ok(column)
    }

    fn row(&mut self) -> Result<Row<'a>, DecodeError> {
        let count = self.u16()?;
        let values = self.0;
        for _ in 0..count {
            self.value()?;
        }
        Ok(Row { count, values: &values[..values.len() - self.0.len()] })
    }

    fn value(&mut self) -> Result<Value<'a>, DecodeError> {
        Ok(match self.tag(b"nutb")? {
            b'n' => Value::Null,
            b'u' => Value::Unchanged,
            b't' => Value::Text(self.sized()?),
            _ => Value::Binary(self.sized()?),
        })
    }
}

#[cfg(test)]
#[path = "pgoutput_tests.rs"]
pub(crate) mod tests;

#[cfg(test)]
#[path = "pgoutput_round_trip_tests.rs"]
mod round_trip_tests;

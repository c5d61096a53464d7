//! The stream of a slot as rows of the outbox: transactions, the shapes of tables, and the identity of each row.

use std::{
    collections::HashMap,
    fmt::{self, Write as _},
};

use serde_json::value::RawValue;

use crate::{
    Lsn,
    outbox::{OutboxRow, OutboxTable, Shape},
    pgoutput::{self, DecodeError, Message, Row},
    poison::Poison,
    record::{Headers, Identity, Record},
    route::TopicTemplate,
};

/// What the scratch for a decoded payload may keep from row to row, in bytes.
const SCRATCH_KEPT_BYTES: usize = 1 << 20;
/// From the Unix epoch to Postgres' (2000-01-01), in microseconds.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;
/// Names of headers that are the relay's; a row's own header of that name is left out. So is `traceparent` where
/// the column has a value.
const RESERVED_HEADERS: [&str; 5] = ["id", "type", "aggregatetype", "lsn", "seq"];

/// What the outbox is, and what its rows become.
#[derive(Debug, Clone)]
pub struct Options {
    pub table: OutboxTable,
    pub topic: TopicTemplate,
}

/// The stream cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamError {
    /// Bytes that are not pgoutput's.
    Undecodable { at: Identity, error: DecodeError },
    /// Messages in an order that pgoutput does not send.
    OutOfProtocol(&'static str),
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Undecodable { at: Identity { commit_lsn, seq }, error } => write!(
                f,
                "change {seq} of the transaction committed at {commit_lsn} cannot be decoded: {error}"
            ),
            Self::OutOfProtocol(what) => write!(f, "the replication stream is out of protocol: {what}"),
        }
    }
}

impl std::error::Error for StreamError {}

/// What a message of the stream means to the relay.
#[derive(Debug)]
pub enum Step<'a> {
    /// Nothing by itself.
    Nothing,
    /// A change that is not an insert into an outbox: counted in the ordinals, and nothing else.
    PassedOver,
    /// A row of an outbox.
    Row(Drafted<'a>),
    /// The end of a transaction.
    Commit { end_lsn: Lsn },
}

/// The record that a row becomes. Where `poison` says why it cannot be one, what could be read of it: the topic
/// is then empty unless it is known.
#[derive(Debug)]
pub struct Drafted<'a> {
    pub record: Record<'a>,
    pub poison: Option<Poison>,
}

/// The transaction that is being read.
#[derive(Debug)]
struct Open {
    commit_lsn: Lsn,
    committed_at_ms: i64,
    /// The ordinal of the next change.
    next_seq: u64,
}

/// A reader of one stream, from its beginning.
#[derive(Debug)]
pub struct Source {
    options: Options,
    open: Option<Open>,
    /// The shape of each relation seen; None where it is not an outbox.
    relations: HashMap<u32, Option<Shape>>,
    // Scratch that keeps its capacity from row to row.
    commit_lsn: String,
    seq: String,
    topic: String,
    payload: Vec<u8>,
    headers: Headers,
}

impl Source {
    /// A reader that has read nothing.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            open: None,
            relations: HashMap::new(),
            commit_lsn: String::new(),
            seq: String::new(),
            topic: String::new(),
            payload: Vec::new(),
            headers: Headers::default(),
        }
    }

    /// Whether a transaction has been read in part.
    pub fn is_in_transaction(&self) -> bool {
        self.open.is_some()
    }

    /// Takes one message, at `start` in the log.
    pub fn handle<'a>(&'a mut self, start: Lsn, bytes: &'a [u8]) -> Result<Step<'a>, StreamError> {
        let message = pgoutput::decode(bytes)
            .map_err(|error| StreamError::Undecodable { at: self.next_identity(start), error })?;
        match message {
            Message::Begin { commit_lsn, committed_at_us, .. } => self.begin(commit_lsn, committed_at_us)?,
            Message::Commit { commit_lsn, end_lsn, .. } => return self.commit(commit_lsn, end_lsn),
            Message::Relation(relation) => {
                let shape = self.options.table.is(relation).then(|| self.options.table.shape(relation));
                self.relations.insert(relation.oid, shape);
            }
            Message::Insert { relation_oid, row } => {
                self.count_change()?;
                if matches!(self.relations.get(&relation_oid), Some(None)) {
                    return Ok(Step::PassedOver);
                }
                return self.draft(relation_oid, row).map(Step::Row);
            }
            // A non-transactional message can come at any time, so it is outside a transaction's count.
            Message::Origin { .. }
            | Message::Type { .. }
            | Message::LogicalMessage { transactional: false, .. } => {}
            Message::Update { .. }
            | Message::Delete { .. }
            | Message::Truncate { .. }
            | Message::LogicalMessage { .. } => {
                self.count_change()?;
                return Ok(Step::PassedOver);
            }
        }
        Ok(Step::Nothing)
    }

    /// The row that [`handle`](Self::handle) made of these bytes, once more. Nothing may have been handled in
    /// between.
    pub fn repeat<'a>(&'a mut self, bytes: &'a [u8]) -> Result<Drafted<'a>, StreamError> {
        match pgoutput::decode(bytes) {
            Ok(Message::Insert { relation_oid, row }) => self.draft(relation_oid, row),
            _ => Err(StreamError::OutOfProtocol("what is to be repeated is not a row")),
        }
    }

    fn next_identity(&self, start: Lsn) -> Identity {
        let (commit_lsn, seq) = self.open.as_ref().map_or((start, 0), |o| (o.commit_lsn, o.next_seq));
        Identity { commit_lsn, seq }
    }

    fn begin(&mut self, commit_lsn: Lsn, committed_at_us: i64) -> Result<(), StreamError> {
        if self.open.is_some() {
            return Err(StreamError::OutOfProtocol("a transaction begins inside another"));
        }
        let committed_at_ms = committed_at_us.saturating_add(POSTGRES_EPOCH_US) / 1000;
        self.open = Some(Open { commit_lsn, committed_at_ms, next_seq: 0 });
        self.commit_lsn.clear();
        // Writing to a String cannot fail.
        let _ = write!(self.commit_lsn, "{commit_lsn}");
        Ok(())
    }

    fn commit(&mut self, commit_lsn: Lsn, end_lsn: Lsn) -> Result<Step<'_>, StreamError> {
        match self.open.take() {
            Some(open) if open.commit_lsn == commit_lsn => Ok(Step::Commit { end_lsn }),
            Some(_) => {
                Err(StreamError::OutOfProtocol("a commit does not belong to the transaction before it"))
            }
            None => Err(StreamError::OutOfProtocol("a commit without a begin")),
        }
    }

    /// Counts a change of the open transaction, and leaves its ordinal as text.
    fn count_change(&mut self) -> Result<(), StreamError> {
        let outside = StreamError::OutOfProtocol("a change outside a transaction");
        let open = self.open.as_mut().ok_or(outside)?;
        self.seq.clear();
        let _ = write!(self.seq, "{}", open.next_seq);
        open.next_seq += 1;
        Ok(())
    }

    /// The record for a row, which is the last change that was counted.
    fn draft<'a>(&'a mut self, relation_oid: u32, row: Row<'a>) -> Result<Drafted<'a>, StreamError> {
        let Some(Some(shape)) = self.relations.get(&relation_oid) else {
            return Err(StreamError::OutOfProtocol("a row of a relation that was not described"));
        };
        let outside = StreamError::OutOfProtocol("a row outside a transaction");
        let open = self.open.as_ref().ok_or(outside)?;
        if self.payload.capacity() > SCRATCH_KEPT_BYTES {
            self.payload = Vec::new();
        }
        let (outbox_row, mut poison) = shape.read(row, &mut self.payload);
        if !self.options.topic.render(&outbox_row, &mut self.topic) {
            poison = poison.or_else(|| Some(Poison::IllegalTopic(self.topic.clone())));
        }
        let headers = put_headers(&mut self.headers, &outbox_row, &self.commit_lsn, &self.seq);
        let record = Record {
            identity: Identity { commit_lsn: open.commit_lsn, seq: open.next_seq.saturating_sub(1) },
            row_id: outbox_row.id,
            aggregate_type: outbox_row.aggregate_type,
            aggregate_id: outbox_row.aggregate_id,
            topic: &self.topic,
            key: Some(outbox_row.aggregate_id.as_bytes()),
            value: outbox_row.payload,
            partition: outbox_row.partition,
            timestamp_ms: open.committed_at_ms,
            headers: &self.headers,
        };
        Ok(Drafted { record, poison: poison.or(headers.err()) })
    }
}

/// The record's headers, in order: ours, then the row's own.
fn put_headers(out: &mut Headers, row: &OutboxRow<'_>, commit_lsn: &str, seq: &str) -> Result<(), Poison> {
    out.clear();
    out.push_text("id", row.id);
    out.push_text("type", row.event_type);
    out.push_text("aggregatetype", row.aggregate_type);
    out.push_text("lsn", commit_lsn);
    out.push_text("seq", seq);
    if let Some(traceparent) = row.traceparent {
        out.push_text("traceparent", traceparent);
    }
    row.headers.map_or(Ok(()), |json| put_own_headers(out, json, row.traceparent.is_some()))
}

/// The row's own headers: a JSON object. Text goes as it is, null as a header without a value, anything else as
/// its JSON text.
fn put_own_headers(out: &mut Headers, json: &str, has_traceparent: bool) -> Result<(), Poison> {
    let bad = |_| Poison::BadHeaders("is not a JSON object");
    let object: std::collections::BTreeMap<String, &RawValue> = serde_json::from_str(json).map_err(bad)?;
    for (name, raw) in object {
        if RESERVED_HEADERS.contains(&name.as_str()) || (name == "traceparent" && has_traceparent) {
            continue;
        }
        match raw.get() {
            "null" => out.push(&name, None),
            text if text.starts_with('"') => {
                out.push_text(&name, &serde_json::from_str::<String>(text).map_err(bad)?);
            }
            other => out.push_text(&name, other),
        }
    }
    Ok(())
}

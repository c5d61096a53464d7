//! The stream of a slot as rows of the outboxes: transactions, the shapes of tables, and the identity of each row.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
};

use crate::{
    Lsn,
    checkpoint::Mark,
    draft::{Draft, Moment},
    message,
    outbox::{Outbox, OutboxTable, SLOTS, Slots, Updates},
    pgoutput::{self, DecodeError, Message, Relation, Row},
    poison::Poison,
    record::Identity,
    shape::{Findings, Shape},
};
pub use crate::{draft::Drafted, headers::CloudEvents};

/// What the scratch for a decoded payload may keep from row to row, in bytes.
const SCRATCH_KEPT_BYTES: usize = 1 << 20;
/// From the Unix epoch to Postgres' (2000-01-01), in microseconds.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// What the outboxes are, and what their rows become.
#[derive(Debug, Clone)]
pub struct Options {
    pub outboxes: Vec<Outbox>,
    /// Tables, by schema and name, whose rows belong to an outbox and have to come under its name: its partitions.
    pub partitions: HashSet<(String, String)>,
    /// The table-less outbox, where it is used.
    pub messages: Option<Messages>,
    /// Topics of event types, which come before the template. The names are legal.
    pub topic_by_type: BTreeMap<String, String>,
    /// Where each record is to be a CloudEvent, too.
    pub cloud_events: Option<CloudEvents>,
}

/// The table-less outbox.
#[derive(Debug, Clone)]
pub struct Messages {
    /// The prefix of the messages that are rows.
    pub prefix: String,
    pub outbox: Outbox,
    /// Where messages may go, because any role may emit them. Empty: wherever the route says, but to no topic that
    /// a message itself names.
    pub topics: BTreeSet<String>,
}

impl Default for Options {
    /// Debezium's outbox table.
    fn default() -> Self {
        let outboxes = Outbox::new(OutboxTable::default()).into_iter().collect();
        Self {
            outboxes,
            partitions: HashSet::new(),
            messages: None,
            topic_by_type: BTreeMap::new(),
            cloud_events: None,
        }
    }
}

/// The stream cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamError {
    /// Bytes that are not pgoutput's.
    Undecodable { at: Identity, error: DecodeError },
    /// Messages in an order that pgoutput does not send.
    OutOfProtocol(&'static str),
    /// A row of an outbox was updated, and that is to be looked at.
    Updated { at: Identity, table: String },
    /// A row of an outbox came under the name of a partition.
    UnderPartition { at: Identity, partition: String },
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Undecodable { at: Identity { commit_lsn, seq }, error } => write!(
                f,
                "change {seq} of the transaction committed at {commit_lsn} cannot be decoded: {error}"
            ),
            Self::OutOfProtocol(what) => write!(f, "the replication stream is out of protocol: {what}"),
            Self::Updated { at: Identity { commit_lsn, seq }, table } => {
                write!(f, "a row of the outbox {table} was updated (commit LSN {commit_lsn}, change {seq})")
            }
            Self::UnderPartition { at: Identity { commit_lsn, seq }, partition } => write!(
                f,
                "a row came under the name of the partition {partition}, not under its outbox's (commit LSN \
                 {commit_lsn}, change {seq})"
            ),
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
    /// A message under our prefix outside any transaction, which is always poison. It is done with once
    /// everything before `end_lsn` is.
    Lone { drafted: Drafted<'a>, end_lsn: Lsn },
    /// The beginning of a transaction.
    Begin(Mark),
    /// The end of a transaction.
    Commit { end_lsn: Lsn },
}

/// The transaction that is being read.
#[derive(Debug)]
struct Open {
    mark: Mark,
    committed_at_ms: i64,
    /// The ordinal of the next change.
    next_seq: u64,
}

/// A relation of the stream.
#[derive(Debug)]
enum Known {
    /// The outbox of that number.
    Outbox(usize, Shape),
    /// A partition of an outbox: described beside its outbox always, and to be looked at where a row comes.
    Partition(String),
    Other,
}

/// A reader of one stream, from its beginning.
#[derive(Debug)]
pub struct Source {
    options: Options,
    open: Option<Open>,
    relations: HashMap<u32, Known>,
    /// Scratch for what has to be decoded of a row.
    payload: Vec<u8>,
    text: String,
    draft: Draft,
}

impl Source {
    /// A reader that has read nothing.
    pub fn new(options: Options) -> Self {
        Self {
            options,
            open: None,
            relations: HashMap::new(),
            payload: Vec::new(),
            text: String::new(),
            draft: Draft::default(),
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
            Message::Begin { commit_lsn, committed_at_us, .. } => {
                return self.begin(Mark { commit_lsn, committed_at_us });
            }
            Message::Commit { commit_lsn, end_lsn, .. } => return self.commit(commit_lsn, end_lsn),
            Message::Relation(relation) => {
                let known = self.know(relation);
                self.relations.insert(relation.oid, known);
            }
            Message::Insert { relation_oid, row } => {
                self.count_change()?;
                return self.draft_row(relation_oid, row);
            }
            Message::Update { relation_oid } => {
                let at = self.next_identity(start);
                self.count_change()?;
                return self.updated(at, relation_oid);
            }
            Message::Delete { .. } | Message::Truncate { .. } => {
                self.count_change()?;
                return Ok(Step::PassedOver);
            }
            Message::LogicalMessage { transactional: true, prefix, content, .. } => {
                self.count_change()?;
                return self.draft_message(prefix, content, None);
            }
            // It can come at any time between transactions, and is outside their counts.
            Message::LogicalMessage { transactional: false, lsn, prefix, content } => {
                return self.draft_message(prefix, content, Some(lsn));
            }
            Message::Origin { .. } | Message::Type { .. } => {}
        }
        Ok(Step::Nothing)
    }

    /// The row that [`handle`](Self::handle) made of these bytes, once more. Nothing may have been handled in
    /// between.
    pub fn repeat<'a>(&'a mut self, bytes: &'a [u8]) -> Result<Drafted<'a>, StreamError> {
        let step = match pgoutput::decode(bytes) {
            Ok(Message::Insert { relation_oid, row }) => self.draft_row(relation_oid, row)?,
            Ok(Message::LogicalMessage { transactional, lsn, prefix, content }) => {
                self.draft_message(prefix, content, (!transactional).then_some(lsn))?
            }
            _ => Step::Nothing,
        };
        match step {
            Step::Row(drafted) | Step::Lone { drafted, .. } => Ok(drafted),
            _ => Err(StreamError::OutOfProtocol("what is to be repeated is not a row")),
        }
    }

    fn know(&self, relation: Relation<'_>) -> Known {
        let (schema, name) = (relation.schema, relation.name);
        let mut outboxes = self.options.outboxes.iter().enumerate();
        if let Some((number, outbox)) = outboxes.find(|(_, outbox)| outbox.name() == (schema, name)) {
            return Known::Outbox(number, Shape::new(outbox, relation));
        }
        if self.options.partitions.contains(&(schema.to_owned(), name.to_owned())) {
            return Known::Partition(format!("{schema}.{name}"));
        }
        Known::Other
    }

    fn next_identity(&self, start: Lsn) -> Identity {
        self.next_change().unwrap_or(Identity { commit_lsn: start, seq: 0 })
    }

    /// The next change of the transaction that has been read in part, if there is one.
    pub fn next_change(&self) -> Option<Identity> {
        self.open.as_ref().map(|open| Identity { commit_lsn: open.mark.commit_lsn, seq: open.next_seq })
    }

    fn begin(&mut self, mark: Mark) -> Result<Step<'_>, StreamError> {
        if self.open.is_some() {
            return Err(StreamError::OutOfProtocol("a transaction begins inside another"));
        }
        let committed_at_ms = mark.committed_at_us.saturating_add(POSTGRES_EPOCH_US) / 1000;
        self.open = Some(Open { mark, committed_at_ms, next_seq: 0 });
        self.draft.set_commit_lsn(mark.commit_lsn);
        Ok(Step::Begin(mark))
    }

    fn commit(&mut self, commit_lsn: Lsn, end_lsn: Lsn) -> Result<Step<'_>, StreamError> {
        match self.open.take() {
            Some(open) if open.mark.commit_lsn == commit_lsn => Ok(Step::Commit { end_lsn }),
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
        self.draft.set_seq(open.next_seq);
        open.next_seq += 1;
        Ok(())
    }

    fn updated(&self, at: Identity, relation_oid: u32) -> Result<Step<'_>, StreamError> {
        let Some(Known::Outbox(number, _)) = self.relations.get(&relation_oid) else {
            return Ok(Step::PassedOver);
        };
        let outbox = &self.options.outboxes[*number];
        match outbox.updates() {
            Updates::Ignore => Ok(Step::PassedOver),
            Updates::Halt => Err(StreamError::Updated { at, table: outbox.label().to_owned() }),
        }
    }

    /// The identity of the change that was counted last, and when it was committed.
    fn last_change(&self) -> Result<Moment, StreamError> {
        let outside = StreamError::OutOfProtocol("a row outside a transaction");
        let open = self.open.as_ref().ok_or(outside)?;
        let identity = Identity { commit_lsn: open.mark.commit_lsn, seq: open.next_seq.saturating_sub(1) };
        Ok(Moment { identity, committed_at_ms: open.committed_at_ms })
    }

    /// The record for a row, which is the last change that was counted.
    fn draft_row<'a>(&'a mut self, relation_oid: u32, row: Row<'a>) -> Result<Step<'a>, StreamError> {
        let moment = self.last_change()?;
        let (number, shape) = match self.relations.get(&relation_oid) {
            Some(Known::Outbox(number, shape)) => (*number, shape),
            Some(Known::Partition(partition)) => {
                return Err(StreamError::UnderPartition {
                    at: moment.identity,
                    partition: partition.clone(),
                });
            }
            Some(Known::Other) => return Ok(Step::PassedOver),
            None => return Err(StreamError::OutOfProtocol("a row of a relation that was not described")),
        };
        if self.payload.capacity() > SCRATCH_KEPT_BYTES {
            self.payload = Vec::new();
        }
        let outbox = &self.options.outboxes[number];
        let mut slots: Slots<'a> = [None; SLOTS];
        let (row, findings) = shape.read(outbox, row, &mut slots, &mut self.payload);
        let draft = &mut self.draft;
        let rules = (&self.options.topic_by_type, self.options.cloud_events.as_ref());
        Ok(Step::Row(draft.make(rules, outbox, (row, &slots), moment, findings, None)))
    }

    /// The record for a message: the last change that was counted, or one at `lone` outside any transaction.
    fn draft_message<'a>(
        &'a mut self,
        prefix: &str,
        content: &'a [u8],
        lone: Option<Lsn>,
    ) -> Result<Step<'a>, StreamError> {
        let Some(messages) = self.options.messages.as_ref().filter(|messages| messages.prefix == prefix)
        else {
            return Ok(Step::PassedOver);
        };
        let moment = match lone {
            None => self.last_change()?,
            Some(_) if self.open.is_some() => {
                return Err(StreamError::OutOfProtocol("a message without a transaction inside one"));
            }
            Some(lsn) => {
                self.draft.set_commit_lsn(lsn);
                self.draft.set_seq(0);
                Moment { identity: Identity { commit_lsn: lsn, seq: 0 }, committed_at_ms: 0 }
            }
        };
        self.text.clear();
        self.text.shrink_to(SCRATCH_KEPT_BYTES);
        let mut slots: Slots<'a> = [None; SLOTS];
        let (row, mut findings) = message::read(&messages.outbox, content, &mut slots, &mut self.text);
        if lone.is_some() {
            findings = Findings(Some(Poison::BadMessage(
                "is not transactional, so it would be published whether or not its transaction commits",
            )));
        }
        let (outbox, draft) = (&messages.outbox, &mut self.draft);
        let allowed = Some(&messages.topics);
        let rules = (&self.options.topic_by_type, self.options.cloud_events.as_ref());
        let drafted = draft.make(rules, outbox, (row, &slots), moment, findings, allowed);
        Ok(match lone {
            None => Step::Row(drafted),
            // The server leaves a message out that begins before the confirmed LSN.
            Some(lsn) => Step::Lone { drafted, end_lsn: Lsn(lsn.0.saturating_add(1)) },
        })
    }
}

#[cfg(test)]
#[path = "source_tests.rs"]
pub(crate) mod tests;

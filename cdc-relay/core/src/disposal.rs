//! Where a row goes: to its topic, to the dead-letter topic, or nowhere.

use std::{collections::HashMap, fmt};

use crate::{
    Lsn, Outgoing,
    checkpoint::Mark,
    parking::{Key, Marker, PARKED_LIMIT, Parking},
    poison::{Kind, Poison, Policies, Policy},
    progress::{NotInFlight, Progress, Ticket},
    record::{Headers, Identity, Record},
    source::{Drafted, StreamError},
};

/// Why the relay must not go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Halt {
    /// The stream cannot be followed.
    Stream(StreamError),
    /// A row that cannot become a record, and the policy of whose kind is to halt.
    Poison { row: String, poison: Poison },
    /// More aggregates would be parked than the limit allows.
    TooManyParked { limit: usize },
    /// The server has something else where what was published last was: in the place of the transaction `published`, the
    /// last before `checkpoint` is `found`.
    AnotherLog { published: Mark, found: Option<Mark>, checkpoint: Lsn },
    /// A delivery report for a record that is not in flight.
    UnknownTicket(NotInFlight),
}

impl fmt::Display for Halt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stream(error) => error.fmt(f),
            Self::Poison { row, poison } => write!(f, "{row} cannot be published: {poison}"),
            Self::TooManyParked { limit } => write!(f, "{limit} aggregates are parked, which is the limit"),
            Self::AnotherLog { published, found, checkpoint } => {
                write!(
                    f,
                    "the server's log is not the one that was published up to the last checkpoint, {checkpoint}: the last \
                     transaction before it committed at {}, ",
                    published.commit_lsn
                )?;
                match found {
                    Some(found) => {
                        write!(f, "and here the last one is another, committed at {}", found.commit_lsn)
                    }
                    None => write!(f, "and here there is none"),
                }
            }
            Self::UnknownTicket(NotInFlight(ticket)) => {
                write!(f, "Kafka reported the delivery of record {} which is not in flight", ticket.0)
            }
        }
    }
}

impl std::error::Error for Halt {}

impl From<StreamError> for Halt {
    fn from(error: StreamError) -> Self {
        Self::Stream(error)
    }
}

/// A row that did not go the usual way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diversion {
    pub kind: Kind,
    pub policy: Policy,
    /// Which row it was and why, for an operator.
    pub what: String,
}

/// What decides it.
#[derive(Debug)]
pub(crate) struct Disposal {
    pub(crate) policies: Policies,
    pub(crate) dead_letter_topic: String,
    pub(crate) dead_letter_source: String,
    pub(crate) parking: Parking,
    /// Rows that Kafka refused in earlier sessions.
    pub(crate) refused: HashMap<Identity, Poison>,
    /// The row that was refused last in this one. It is not read again, so one is all that has to be known.
    pub(crate) refused_now: Option<(Identity, Poison)>,
    pub(crate) diversions: Vec<Diversion>,
    pub(crate) markers: Vec<Marker>,
    /// Scratch for a dead letter's headers.
    pub(crate) headers: Headers,
}

impl Disposal {
    /// The record to enqueue, or None where the row is left out. It takes its credit unless it already has its
    /// `ticket`; what is unusual is told once, when `tell` says so.
    pub(crate) fn dispose<'a>(
        &'a mut self,
        drafted: Drafted<'a>,
        progress: &mut Progress,
        ticket: Option<Ticket>,
        tell: bool,
    ) -> Result<Option<Outgoing<'a>>, Halt> {
        let Drafted { record, poison } = drafted;
        let is_parked = self.parking.holds(&record);
        let poison = poison
            .or_else(|| self.refusal_of(record.identity).cloned())
            .or_else(|| is_parked.then_some(Poison::BehindParked));
        let Some(poison) = poison else { return Ok(Some(outgoing(record, progress, ticket, false))) };
        let policy = match self.policies.of(poison.kind()) {
            Policy::Halt | Policy::DeadLetter if is_parked => Policy::ParkKey,
            own => own,
        };
        if tell && policy != Policy::Halt {
            let what = format!("{}: {poison}", record.describe());
            self.diversions.push(Diversion { kind: poison.kind(), policy, what });
        }
        match policy {
            Policy::Halt => return Err(Halt::Poison { row: record.describe(), poison }),
            Policy::Skip => {
                return match ticket {
                    Some(ticket) => progress.settle(ticket).map(|()| None).map_err(Halt::UnknownTicket),
                    None => Ok(None),
                };
            }
            // An aggregate that cannot be told cannot be parked either.
            Policy::ParkKey => {
                if let Some(key) = Key::of(&record) {
                    self.park(key, record.identity, progress)?;
                }
            }
            Policy::DeadLetter => {}
        }
        put_headers(&mut self.headers, &self.dead_letter_source, &record, &poison);
        let letter = Record {
            topic: &self.dead_letter_topic,
            key: record.key.filter(|key| !key.is_empty()),
            partition: None,
            headers: &self.headers,
            ..record
        };
        Ok(Some(outgoing(letter, progress, ticket, true)))
    }

    fn refusal_of(&self, row: Identity) -> Option<&Poison> {
        let now = self.refused_now.as_ref().filter(|(refused, _)| *refused == row);
        now.map(|(_, poison)| poison).or_else(|| self.refused.get(&row))
    }

    fn park(&mut self, key: Key, first: Identity, progress: &mut Progress) -> Result<(), Halt> {
        let full = |_| Halt::TooManyParked { limit: PARKED_LIMIT };
        if self.parking.park(key.clone(), first).map_err(full)? {
            // Its credit is taken at once, so that the row's commit waits for the marker too.
            let ticket = progress.begin_record(key.cost_bytes());
            self.markers.push(Marker { ticket, key, parked: Some(first) });
        }
        Ok(())
    }

    /// Frees an aggregate. Whether it was parked.
    pub(crate) fn free(&mut self, key: &Key, progress: &mut Progress) -> bool {
        let was_parked = self.parking.free(key);
        if was_parked {
            let ticket = progress.begin_record(key.cost_bytes());
            self.markers.push(Marker { ticket, key: key.clone(), parked: None });
        }
        was_parked
    }
}

fn outgoing<'a>(
    record: Record<'a>,
    progress: &mut Progress,
    ticket: Option<Ticket>,
    is_dead_letter: bool,
) -> Outgoing<'a> {
    let ticket = ticket.unwrap_or_else(|| progress.begin_record(record.cost_bytes()));
    Outgoing { ticket, record, is_dead_letter }
}

/// The record's own headers, then whose letter it is, why it is here and where it was to go. `dlq.source` is the first
/// of ours: whoever reads the letter knows by it where the record's own end.
fn put_headers(out: &mut Headers, source: &str, record: &Record<'_>, poison: &Poison) {
    out.clone_from(record.headers);
    out.push_text("dlq.source", source);
    out.push_text("dlq.reason", poison.kind().name());
    out.push_text("dlq.error", &poison.to_string());
    if !record.table.is_empty() {
        out.push_text("dlq.table", record.table);
    }
    out.push_text("dlq.topic", record.topic);
    if let Some(partition) = record.partition {
        out.push_text("dlq.partition", &partition.to_string());
    }
    out.push_text("dlq.lsn", &record.identity.commit_lsn.to_string());
    out.push_text("dlq.seq", &record.identity.seq.to_string());
}

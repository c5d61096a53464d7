//! A dead letter as a redrive sees it, and what can come of it.

use std::{fmt, str::FromStr};

use crate::{parking::Key, record::Identity};

/// Where a dead letter is in its topic; `PARTITION/OFFSET` as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    pub partition: i32,
    pub offset: i64,
}

/// Text that is not `PARTITION/OFFSET`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotAPlace(String);

impl fmt::Display for NotAPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not PARTITION/OFFSET, such as 0/42", self.0)
    }
}

impl std::error::Error for NotAPlace {}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.partition, self.offset)
    }
}

impl FromStr for Place {
    type Err = NotAPlace;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (partition, offset) = text.split_once('/')?;
            let place = Self { partition: partition.parse().ok()?, offset: offset.parse().ok()? };
            (place.partition >= 0 && place.offset >= 0).then_some(place)
        };
        parse().ok_or_else(|| NotAPlace(text.to_owned()))
    }
}

/// What became of a letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    #[default]
    Open,
    /// Published.
    Redriven,
    /// Given up on purpose.
    Discarded,
}

impl State {
    /// Its name, in the marker's header and for an operator.
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Redriven => "redriven",
            Self::Discarded => "discarded",
        }
    }
}

/// What a plan has to know of a letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Letter {
    pub identity: Identity,
    /// Empty where it cannot be told.
    pub row_id: String,
    pub aggregate: Option<Key>,
    /// Its value is not all there.
    pub is_cut: bool,
    /// All that its row has could be read.
    pub is_whole: bool,
    /// The topic it was to go to has a legal name.
    pub has_topic: bool,
}

/// How letters are to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(clippy::struct_excessive_bools, reason = "each is a choice of its own")]
pub struct Options {
    /// Those that were redriven before, too.
    pub again: bool,
    /// Those that do not have all of their row, too.
    pub as_is: bool,
    /// Give them up instead of publishing them.
    pub discard: bool,
    /// They all go to a topic that the request names.
    pub has_topic: bool,
    /// Free every parked aggregate that has no open letter, named or not.
    pub all: bool,
}

/// What a redrive did with a letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Done(State),
    /// Redriven or discarded earlier.
    Already(State),
    /// There is no open letter of this relay there.
    NotFound,
    /// Its transaction is not settled: it will be read again.
    Unsettled,
    Cut,
    NotWhole,
    NoTopic,
    /// It is behind a letter of its parked aggregate that was not taken.
    Behind(Place),
    /// Its topic does not take it.
    Refused(String),
    /// The redrive ended before it.
    NotTried(String),
}

impl Outcome {
    /// Its name for a program.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Done(state) => state.name(),
            Self::Already(_) => "already-done",
            Self::NotFound => "not-found",
            Self::Unsettled => "unsettled",
            Self::Cut => "cut",
            Self::NotWhole => "not-whole",
            Self::NoTopic => "no-topic",
            Self::Behind(_) => "behind",
            Self::Refused(_) => "refused",
            Self::NotTried(_) => "not-tried",
        }
    }

    /// Whether the letter is open no more.
    pub fn is_done(&self) -> bool {
        matches!(self, Self::Done(_) | Self::Already(_))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done(state) => f.write_str(state.name()),
            Self::Already(state) => write!(f, "was {} earlier; --again publishes it once more", state.name()),
            Self::NotFound => f.write_str("is not a dead letter of this relay"),
            Self::Unsettled => {
                f.write_str("its transaction is being read again after a restart: ask once more in a moment")
            }
            Self::Cut => f.write_str(
                "its value is cut: take the row from the outbox table by its id and publish it another way, then \
                 `cdc-relay dlq discard` settles the letter",
            ),
            Self::NotWhole => f.write_str(
                "its row could not be read whole: look at it with `cdc-relay dlq show`; --as-is publishes what there is, and \
                 `cdc-relay dlq discard` gives it up",
            ),
            Self::NoTopic => {
                f.write_str("the topic it was to go to has no legal name, or is none for messages: say where with --to-topic NAME")
            }
            Self::Behind(first) => write!(
                f,
                "its aggregate is parked, and letter {first} comes before it and is open: name that one too"
            ),
            Self::Refused(why) => write!(f, "its topic still refuses it: {why}"),
            Self::NotTried(why) => write!(f, "was not tried: {why}"),
        }
    }
}

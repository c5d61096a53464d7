//! What is done with records: one handler to a file. A handler says what it reads out of a record (its [`Event`])
//! and writes its rows inside the transaction that the inbox row is in, and nothing else; it sees each event once, a
//! batch at a time, a key's events in order.

pub(crate) mod acks;
pub(crate) mod fulfillment;
pub(crate) mod messages;
mod orders;
pub(crate) mod pharmacy;

use std::str::FromStr;

use service::Failure;
use sqlx::PgConnection;

use crate::{decide::Fault, record::Event};

/// Applies events to its own tables. One method is required.
pub(crate) trait Handler: Send + Sync + 'static {
    /// What it reads out of a record; the handlers of one topic share theirs.
    type Event: Event;

    /// Who makes its tables, the inbox among them.
    const TABLES: Tables = Tables::Ours;

    /// Applies events that this group has not applied before, never empty, within the caller's transaction.
    ///
    /// # Errors
    /// All of it is rolled back. An error of the database may be passed on as it is: what becomes of it is not the
    /// handler's affair. A [`Fault::Record`] is a verdict on the events; where there are several, they are tried
    /// again in smaller parts until it is one that is refused.
    fn apply(
        &self,
        transaction: &mut PgConnection,
        events: &[&Self::Event],
    ) -> impl Future<Output = Result<(), Fault>> + Send;

    /// Told of events that this group has applied before (in an earlier transaction, or a moment ago in this one),
    /// never empty, within the caller's transaction and after `apply`.
    fn repeated(
        &self,
        transaction: &mut PgConnection,
        events: &[&Self::Event],
    ) -> impl Future<Output = Result<(), Fault>> + Send {
        let _ = (transaction, events);
        async { Ok(()) }
    }
}

/// Who makes a handler's tables.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Tables {
    /// The consumer, by its migrations.
    Ours,
    /// Somebody else, whose database it is; they are looked at when the handler starts.
    Theirs {
        /// Each table with a privilege that the handler needs on it or on a column of it.
        needed: &'static [(&'static str, &'static str)],
        /// The file that makes them.
        made_by: &'static str,
    },
}

/// The handlers there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Name {
    Pharmacy,
    Fulfillment,
    Messages,
    Acks,
}

impl Name {
    const ALL: [Self; 4] = [Self::Pharmacy, Self::Fulfillment, Self::Messages, Self::Acks];

    /// As `--handler` spells it; also the default group.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Pharmacy => "pharmacy",
            Self::Fulfillment => "fulfillment",
            Self::Messages => "messages",
            Self::Acks => "acks",
        }
    }

    /// What it consumes unless told; nothing for a handler that takes any topic.
    pub(crate) fn topic(self) -> Option<&'static str> {
        match self {
            Self::Pharmacy | Self::Fulfillment => Some("order-events"),
            Self::Messages => None,
            Self::Acks => Some("order-acks"),
        }
    }
}

impl FromStr for Name {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        Self::ALL.into_iter().find(|n| n.as_str() == text).ok_or_else(|| {
            let found = if text.is_empty() { "is not set".into() } else { format!("is {text:?}") };
            let choices = Self::ALL.map(|n| format!("--handler {}", n.as_str())).join(", ");
            Failure::configuration(format!("consumer.handler {found}")).hint(format!("choose one: {choices}"))
        })
    }
}

//! What becomes of a record after an attempt: pure, so that the policy can be read and tested in one place.
//!
//! The rule is who is at fault. The record itself: it is dead-lettered, at once, because trying again changes
//! nothing. Anything else (the database is away, a deadlock, Kafka is away, a missing grant): the same work is
//! tried again until it succeeds, because the next record would fare no better and giving up would lose one. In
//! between is what only this event meets and what may pass (a webhook that answers 503): a few attempts, then it is
//! dead-lettered.

use std::{fmt, time::Duration};

/// Why a record was dead-lettered: the header `dlq.reason` and a metric's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The record has no key, so it belongs to no order.
    NoKey,
    /// The record's value is NULL: a tombstone tells nothing.
    NoValue,
    /// The value is not JSON.
    NotJson,
    /// `eventType` is none that we know.
    UnknownType,
    /// A required field is absent or null.
    MissingField,
    /// A field holds another JSON type than it must.
    WrongType,
    /// A field is of the right type and still not usable: a bad id, a negative or oversized number.
    BadValue,
    /// `schemaVersion` is newer than this consumer.
    UnsupportedSchema,
    /// A text holds U+0000, which Postgres cannot store.
    NulCharacter,
    /// The key names another order than the event, so the order's events are not in order.
    KeyMismatch,
    /// The header `message-id` is absent: the record is no message of the order API's.
    NoMessageId,
    /// It acknowledges a message that does not exist.
    UnknownMessage,
    /// The database refused this one event's rows (SQLSTATE 22xxx, 23xxx, …).
    DatabaseRefused,
    /// The handler refuses it, or what the handler asked does (a webhook's 4xx).
    Refused,
    /// It failed as often as it may, each time for a reason that might have passed.
    RetriesExhausted,
    /// The handler panicked.
    HandlerPanicked,
    /// An earlier event of its aggregate is missing.
    VersionGap,
}

impl Reason {
    /// All of them: a metric that is there before its first case can be watched.
    pub(crate) const ALL: [Self; 17] = [
        Self::NoKey,
        Self::NoValue,
        Self::NotJson,
        Self::UnknownType,
        Self::MissingField,
        Self::WrongType,
        Self::BadValue,
        Self::UnsupportedSchema,
        Self::NulCharacter,
        Self::KeyMismatch,
        Self::NoMessageId,
        Self::UnknownMessage,
        Self::DatabaseRefused,
        Self::Refused,
        Self::RetriesExhausted,
        Self::HandlerPanicked,
        Self::VersionGap,
    ];

    /// The word in the header and the label.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::NoKey => "no_key",
            Self::NoValue => "no_value",
            Self::NotJson => "not_json",
            Self::UnknownType => "unknown_type",
            Self::MissingField => "missing_field",
            Self::WrongType => "wrong_type",
            Self::BadValue => "bad_value",
            Self::UnsupportedSchema => "unsupported_schema",
            Self::NulCharacter => "nul_character",
            Self::KeyMismatch => "key_mismatch",
            Self::NoMessageId => "no_message_id",
            Self::UnknownMessage => "unknown_message",
            Self::DatabaseRefused => "database_refused",
            Self::Refused => "refused",
            Self::RetriesExhausted => "retries_exhausted",
            Self::HandlerPanicked => "handler_panicked",
            Self::VersionGap => "version_gap",
        }
    }
}

/// A record that can never be applied, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Poison {
    pub reason: Reason,
    /// For a person: which field, what was found.
    pub error: String,
}

impl Poison {
    pub fn new(reason: Reason, error: impl Into<String>) -> Self {
        Self { reason, error: error.into() }
    }
}

impl fmt::Display for Poison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason.as_str(), self.error)
    }
}

/// Whom a failed attempt waits for: a metric's label and the state in `/health/ready`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The database is away, busy or refuses us.
    Database,
    /// The dead-letter topic does not exist or refuses us.
    DeadLetterTopic,
    /// Kafka does not acknowledge.
    Kafka,
    /// An event fails for a reason that may pass.
    Event,
    /// An event's predecessor is missing.
    Gap,
    /// Somebody has paused the group.
    Paused,
}

impl Cause {
    /// All of them.
    pub(crate) const ALL: [Self; 6] =
        [Self::Database, Self::DeadLetterTopic, Self::Kafka, Self::Event, Self::Gap, Self::Paused];

    /// The word in the label.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Database => "database",
            Self::DeadLetterTopic => "dead_letter_topic",
            Self::Kafka => "kafka",
            Self::Event => "event",
            Self::Gap => "gap",
            Self::Paused => "paused",
        }
    }
}

/// Why an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Something in the records themselves, that no repetition changes.
    Record(Poison),
    /// Something about these events that may pass: tried again a few times, then dead-lettered.
    Transient(String),
    /// An event of an aggregate came whose predecessor has not been applied: the version guard's.
    Gap {
        /// Which aggregate.
        aggregate: String,
        /// The version that was applied last; 0 for none.
        after: i64,
        /// That of the event.
        version: i64,
    },
    /// Something around us that a record is not to blame for.
    Around { cause: Cause, error: String },
}

impl Fault {
    /// The database is away, busy or refuses us, whatever the record.
    pub fn database(error: impl fmt::Display) -> Self {
        Self::Around { cause: Cause::Database, error: error.to_string() }
    }

    /// Whether it is one event's and not that of everything around.
    pub(crate) fn is_of_an_event(&self) -> bool {
        !matches!(self, Self::Around { .. })
    }

    /// The fault that an error with this SQLSTATE is.
    pub(crate) fn from_sqlstate(code: &str, message: &str) -> Self {
        let error = format!("SQLSTATE {code}: {message}");
        // 22 data exception, 23 integrity constraint, 54 a limit such as an index row's size, P0001 a trigger's
        // RAISE: the row is refused, and would be again. 42 (a missing table or grant) is not the record's fault.
        let of_the_record = ["22", "23", "54"].iter().any(|class| code.starts_with(class)) || code == "P0001";
        if of_the_record {
            Self::Record(Poison::new(Reason::DatabaseRefused, error))
        } else {
            Self::Around { cause: Cause::Database, error }
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Record(poison) => poison.fmt(f),
            Self::Transient(error) | Self::Around { error, .. } => f.write_str(error),
            Self::Gap { aggregate, after, version } => {
                write!(f, "version {version} of {aggregate} came, and {} has not", after + 1)
            }
        }
    }
}

/// What to do next.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Decision {
    /// Done: go on.
    Apply,
    /// The same again after a while, in place.
    Retry { after: Duration, cause: Cause, error: String },
    /// Never again: off to the dead-letter topic.
    DeadLetter(Poison),
}

/// Exponential backoff: `first`, twice that, … up to `max`, each between half and the whole of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Backoff {
    pub(crate) first: Duration,
    pub(crate) max: Duration,
}

impl Backoff {
    /// The pause after the `attempt`th failure (from 1); `jitter` is uniform in 0..1.
    pub(crate) fn after(&self, attempt: u32, jitter: f64) -> Duration {
        let doublings = attempt.saturating_sub(1).min(20);
        let whole = self.first.saturating_mul(1 << doublings).min(self.max);
        whole.mul_f64(0.5 + 0.5 * jitter.clamp(0.0, 1.0))
    }
}

/// What becomes of the record(s) after the `attempt`th attempt (from 1); `jitter` is uniform in 0..1.
pub(crate) fn decide(
    outcome: Result<(), Fault>,
    attempt: u32,
    retries_max: u32,
    backoff: Backoff,
    jitter: f64,
) -> Decision {
    match outcome {
        Ok(()) => Decision::Apply,
        Err(Fault::Record(poison)) => Decision::DeadLetter(poison),
        Err(Fault::Transient(error)) if attempt <= retries_max => {
            Decision::Retry { after: backoff.after(attempt, jitter), cause: Cause::Event, error }
        }
        Err(Fault::Transient(error)) => {
            let error = format!("still failing after {attempt} attempts: {error}");
            Decision::DeadLetter(Poison::new(Reason::RetriesExhausted, error))
        }
        // Whoever waits for the missing ones has done so before it asks.
        Err(gap @ Fault::Gap { .. }) => {
            Decision::DeadLetter(Poison::new(Reason::VersionGap, gap.to_string()))
        }
        Err(Fault::Around { cause, error }) => {
            Decision::Retry { after: backoff.after(attempt, jitter), cause, error }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Backoff = Backoff { first: Duration::from_secs(1), max: Duration::from_secs(10) };

    #[test]
    fn pauses_double_up_to_the_bound_and_never_leave_their_half() {
        let whole: Vec<u64> = (1..=6).map(|n| BACKOFF.after(n, 1.0).as_secs()).collect();
        assert_eq!(whole, [1, 2, 4, 8, 10, 10]);
        assert_eq!(BACKOFF.after(1, 0.0), Duration::from_millis(500));
        assert_eq!(BACKOFF.after(u32::MAX, 0.0), Duration::from_secs(5));
    }

    #[test]
    fn only_what_the_record_is_to_blame_for_is_dead_lettered_and_only_at_once() {
        for code in ["22P05", "22003", "23505", "23514", "54000", "P0001"] {
            let decision = decide(Err(Fault::from_sqlstate(code, "no")), 1, 3, BACKOFF, 0.5);
            let Decision::DeadLetter(poison) = decision else { panic!("{code}: {decision:?}") };
            assert_eq!(poison.reason, Reason::DatabaseRefused);
            assert!(poison.error.contains(code));
        }
    }

    #[test]
    fn what_the_surroundings_are_to_blame_for_is_tried_again_however_often() {
        // Away, conflicts, too many connections, shutting down, a wrong password, a missing table or grant, disk full.
        for code in [
            "08006", "40001", "40P01", "53300", "57P01", "57P03", "28P01", "3D000", "42P01", "42501", "53100",
        ] {
            let decision = decide(Err(Fault::from_sqlstate(code, "no")), 1_000_000, 3, BACKOFF, 1.0);
            assert!(
                matches!(decision, Decision::Retry { after, cause: Cause::Database, .. } if after == BACKOFF.max),
                "{code}: {decision:?}"
            );
        }
    }

    #[test]
    fn what_may_pass_is_tried_again_as_often_as_told() {
        let decided =
            |attempt, retries| decide(Err(Fault::Transient("503".into())), attempt, retries, BACKOFF, 1.0);
        let pauses: Vec<_> = (1..=3)
            .map(|attempt| match decided(attempt, 3) {
                Decision::Retry { after, cause: Cause::Event, .. } => after.as_secs(),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(pauses, [1, 2, 4]);
        for (attempt, retries) in [(4, 3), (1, 0)] {
            let Decision::DeadLetter(poison) = decided(attempt, retries) else { panic!() };
            assert_eq!(poison.reason, Reason::RetriesExhausted);
        }
    }

    #[test]
    fn success_applies() {
        assert_eq!(decide(Ok(()), 7, 3, BACKOFF, 0.0), Decision::Apply);
    }
}

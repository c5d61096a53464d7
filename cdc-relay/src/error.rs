//! The relay's errors: their kinds, and the one policy that says what follows from each.

use std::fmt;

use relay_core::{Lsn, poison::Poison, record::Identity};
use service::{Failure, exit};

use crate::position::{Beyond, REPUBLISH};

/// What went wrong, as far as it decides what to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Postgres cannot be reached, is starting, stopping or overloaded, or cut the connection.
    PostgresAway,
    /// Another process streams from the slot (SQLSTATE 55006).
    SlotInUse,
    /// Kafka gave up on a record, or the producer is broken: rewind with a new one.
    DeliveryFailed,
    /// Kafka has ended our transaction, or gave our transactional id to another producer: rewind with a new one.
    Fenced,
    /// A row halts in the midst of a Kafka transaction: rewind, and commit what is before it first.
    Entangled,
    /// Kafka refused a batch of several records as too large: rewind, and send smaller ones.
    BatchTooLarge,
    /// Kafka refused a batch of several records for what one of them is: rewind, and send them one by one.
    BatchRefused,
    /// Kafka refused a record for what it is: rewind, and do with it what its policy says.
    RecordRefused,
    /// Nothing went on for the configured time.
    GaveUp,
    /// Postgres or Kafka refused us in a way that time does not heal.
    Refused,
    /// The configuration cannot work.
    Misconfigured,
    /// Poison, or a position that is lost: a person has to decide.
    Halted,
    /// What must not happen, happened.
    Internal,
}

/// What follows from an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Policy {
    /// Try again from the confirmed LSN, waiting longer each time.
    Retry,
    /// Wait until somebody else stops doing the work.
    StandBy,
    /// Stop the process.
    Stop(exit::Kind),
}

impl Kind {
    /// All of them.
    pub(crate) const ALL: [Self; 13] = [
        Self::PostgresAway,
        Self::SlotInUse,
        Self::DeliveryFailed,
        Self::Fenced,
        Self::Entangled,
        Self::BatchTooLarge,
        Self::BatchRefused,
        Self::RecordRefused,
        Self::GaveUp,
        Self::Refused,
        Self::Misconfigured,
        Self::Halted,
        Self::Internal,
    ];

    /// The one place that decides.
    pub(crate) fn policy(self) -> Policy {
        match self {
            Self::PostgresAway
            | Self::DeliveryFailed
            | Self::Fenced
            | Self::Entangled
            | Self::BatchTooLarge
            | Self::BatchRefused
            | Self::RecordRefused => Policy::Retry,
            Self::GaveUp => Policy::Stop(exit::Kind::GaveUp),
            Self::SlotInUse => Policy::StandBy,
            Self::Refused => Policy::Stop(exit::Kind::Refused),
            Self::Misconfigured => Policy::Stop(exit::Kind::BadConfiguration),
            Self::Halted => Policy::Stop(exit::Kind::Halted),
            Self::Internal => Policy::Stop(exit::Kind::Internal),
        }
    }

    /// Whether the next session follows soon, in the same process.
    pub(crate) fn is_retried_soon(self) -> bool {
        // Without Postgres there is none, and another relay may be the next.
        self.policy() == Policy::Retry && self != Self::PostgresAway
    }

    /// The value of the `kind` label of `cdc_relay_errors_total`.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::PostgresAway => "postgres_away",
            Self::SlotInUse => "slot_in_use",
            Self::DeliveryFailed => "delivery_failed",
            Self::Fenced => "fenced",
            Self::Entangled => "entangled",
            Self::BatchTooLarge => "batch_too_large",
            Self::BatchRefused => "batch_refused",
            Self::RecordRefused => "record_refused",
            Self::GaveUp => "gave_up",
            Self::Refused => "refused",
            Self::Misconfigured => "misconfigured",
            Self::Halted => "halted",
            Self::Internal => "internal",
        }
    }
}

/// An error with what an operator needs to know. Never holds a secret.
#[derive(Debug, Clone)]
pub(crate) struct Error {
    pub(crate) kind: Kind,
    pub(crate) message: String,
    /// The exact next step, where there is one.
    pub(crate) hint: Option<String>,
    /// Postgres' code, where it is Postgres' error.
    pub(crate) sqlstate: Option<String>,
    /// The row that Kafka refused, and why.
    pub(crate) refused: Option<Box<(Identity, Poison)>>,
    /// Records from here on exist only in Kafka.
    pub(crate) beyond: Option<Beyond>,
}

impl Error {
    pub(crate) fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None, sqlstate: None, refused: None, beyond: None }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same error with the row that Kafka refused.
    pub(crate) fn poison(mut self, identity: Identity, poison: Poison) -> Self {
        self.refused = Some(Box::new((identity, poison)));
        self
    }

    /// The connection to Postgres failed.
    pub(crate) fn postgres_io(what: &str, error: &std::io::Error) -> Self {
        Self::new(Kind::PostgresAway, format!("{what}: {error}"))
    }

    /// Postgres answered with an error
    /// (<https://www.postgresql.org/docs/current/errcodes-appendix.html>).
    pub(crate) fn postgres(sqlstate: &str, message: &str) -> Self {
        let (kind, hint) = classify(sqlstate);
        let message = format!("Postgres: {message} (SQLSTATE {sqlstate})");
        let sqlstate = Some(sqlstate.into());
        Self { sqlstate, hint: hint.map(Into::into), ..Self::new(kind, message) }
    }

    /// This error as the end of the process.
    pub(crate) fn into_failure(self) -> Failure {
        let kind = match self.kind.policy() {
            Policy::Stop(kind) => kind,
            Policy::Retry | Policy::StandBy => exit::Kind::GaveUp,
        };
        Failure { kind, message: self.message, hint: self.hint }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// How to go on after a row that cannot be published.
const POISON_HINT: &str = "everything before this row's transaction is published and confirmed. Nothing from there on is confirmed, \
     but rows of its transaction that come before it may be published (with exactly-once delivery: the first part of one that \
     had to be split). Mend the cause and start again: the row is read again from the log. Or set its kind's policy in [poison] \
     to dead-letter, park-key or skip. Or leave out for good what is left of its transaction, while no relay runs: cdc-relay \
     accept-gap --through COMMIT_LSN";

/// What mends the cause.
fn remedy(poison: &Poison) -> String {
    match poison {
        Poison::MissingColumn(_) | Poison::NullColumn(_) | Poison::BadColumn(..) | Poison::WrongNumberOfValues => {
            "look at [outbox] in the configuration and at the row".into()
        }
        Poison::BadHeaders(_) => "look at outbox.headers in the configuration and at the row".into(),
        Poison::BadMessage(_) => {
            "look at what calls pg_logical_emit_message with our prefix ([messages] in the configuration): its first argument has \
             to be true, its content a JSON object"
                .into()
        }
        Poison::UnlistedTopic(topic) => {
            format!("add {topic:?} to messages.topics, if messages may go there, or mend what emits them")
        }
        Poison::IllegalTopic(_) => "look at [route] in the configuration and at the row".into(),
        Poison::UnknownTopic { topic, .. } => format!(
            "create it (kafka-topics.sh --create --topic {topic} --partitions N --replication-factor N) or mend [route]"
        ),
        Poison::Unauthorized { topic } => {
            format!("grant it (kafka-acls.sh --add --producer --topic {topic} --allow-principal User:…)")
        }
        Poison::TooLarge { topic, .. } => format!(
            "raise the topic's limit (kafka-configs.sh --alter --topic {topic} --add-config max.message.bytes=N), and \
             kafka.properties.\"message.max.bytes\" if you have set it"
        ),
        Poison::Refused { .. } => {
            "the timestamp is the commit time, or outbox.timestamp's: look at message.timestamp.before.max.ms and message.timestamp.after.max.ms of \
             the topic, and at the broker's log"
                .into()
        }
        Poison::BehindParked => "redrive its aggregate: cdc-relay dlq redrive".into(),
    }
}

/// How to go on after an update of an outbox row.
const UPDATED_HINT: &str = "updates of an outbox are never published. Find out who updates it; to go on without the update, \
     set updates = \"ignore\" in the outbox's configuration, or leave its transaction out for good, while no relay runs: \
     cdc-relay accept-gap --through COMMIT_LSN";

/// How to go on after a row that came under the name of a partition.
const UNDER_PARTITION_HINT: &str = "the publication did not publish via the partition root when the row was written. ALTER \
     PUBLICATION … SET (publish_via_partition_root = true) mends it for later rows; for this one, and those around it, make \
     the partition an outbox of its own until they are through: [[outboxes]] table = \"…\" with the root's keys. A table \
     that inherits from the outbox without being its partition always needs that";

/// How to go on where the server has something else than what was published up to the checkpoint.
fn another_log(checkpoint: Lsn) -> String {
    format!(
        "it was restored from a backup, perhaps, and has written something else since. Nothing of it is published: consumers have \
         events that this database never had, and what it has in their place, up to {checkpoint}, would be taken for published. To \
         go back: put the server that has those events into postgres.url, and start again. To stay with this one: `cdc-relay \
         accept-gap --from-slot` says what it would do, and `cdc-relay accept-gap --from-slot --yes` goes on from the slot's confirmed \
         LSN: what it has from there on is published, some of it perhaps again, and new events may repeat the LSNs of old ones. {REPUBLISH}"
    )
}

impl From<relay_core::relay::Halt> for Error {
    fn from(halt: relay_core::relay::Halt) -> Self {
        use relay_core::{relay::Halt, source::StreamError};
        let error = Self::new(Kind::Halted, halt.to_string());
        match halt {
            Halt::Poison { poison, .. } => error.hint(format!("{}; {POISON_HINT}", remedy(&poison))),
            Halt::TooManyParked { .. } => error.hint(
                "see `cdc-relay dlq list`; `cdc-relay dlq redrive` frees an aggregate once its cause is mended",
            ),
            Halt::Stream(StreamError::Updated { .. }) => error.hint(UPDATED_HINT),
            Halt::Stream(StreamError::UnderPartition { .. }) => error.hint(UNDER_PARTITION_HINT),
            Halt::Stream(_) => error.hint(
                "this is a bug, or the server is not PostgreSQL 15 to 18: please report it with this message",
            ),
            Halt::AnotherLog { checkpoint, .. } => error.hint(another_log(checkpoint)),
            Halt::UnknownTicket(_) => Self { kind: Kind::Internal, ..error },
        }
    }
}

fn classify(sqlstate: &str) -> (Kind, Option<&'static str>) {
    match sqlstate {
        "55006" => (Kind::SlotInUse, None),
        "28P01" => (
            Kind::Refused,
            Some(
                "check the role in postgres.url and its password: postgres.password, or CDC_RELAY_POSTGRES__PASSWORD(_FILE)",
            ),
        ),
        "28000" => (
            Kind::Refused,
            Some(
                "check the role and pg_hba.conf: a replication connection to a database is matched by the database's name there",
            ),
        ),
        "3D000" => (Kind::Refused, Some("check the database in postgres.url")),
        "42501" => (
            Kind::Refused,
            Some("the role needs REPLICATION: ALTER ROLE … REPLICATION; and SELECT on the outbox table"),
        ),
        // The slot or the publication does not exist.
        "42704" => (
            Kind::Halted,
            Some(
                "`cdc-relay init` creates publication and slot where they never were; where they were, `cdc-relay accept-gap` does",
            ),
        ),
        // A segment of the log, or pgoutput itself, is missing on the server's disk.
        "58P01" => (
            Kind::Halted,
            Some(
                "the server misses a file: its log has the name. A segment that is gone means that the slot is lost",
            ),
        ),
        // wal_level is too low, or the slot was invalidated.
        "55000" => (
            Kind::Halted,
            Some(
                "look at wal_status and invalidation_reason in pg_replication_slots, and at wal_level; `cdc-relay accept-gap` makes a new slot in the place of one whose log is gone; what it had not delivered is lost to it",
            ),
        ),
        _ => match sqlstate.get(..2).unwrap_or_default() {
            // Connection, resources, operator intervention, system error, internal error.
            "08" | "53" | "57" | "58" | "XX" => (Kind::PostgresAway, None),
            _ => (Kind::Refused, None),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_log_says_what_is_lost_and_both_ways_on() {
        let published = relay_core::checkpoint::Mark { commit_lsn: Lsn(40), committed_at_us: 7 };
        let halt = relay_core::relay::Halt::AnotherLog { published, found: None, checkpoint: Lsn(50) };
        let hint = Error::from(halt).hint.unwrap();
        for said in [
            "events that this database never had",
            "up to 0/32, would be taken for published",
            "into postgres.url, and start again",
            "cdc-relay accept-gap --from-slot --yes",
            "cdc-relay replay --id ID --yes",
        ] {
            assert!(hint.contains(said), "{said}: {hint}");
        }
    }

    #[test]
    fn what_time_heals_is_tried_again_and_nothing_else() {
        let policy = |state| Error::postgres(state, "").kind.policy();
        for away in ["57P01", "57P02", "57P03", "08006", "53300", "XX000"] {
            assert_eq!(policy(away), Policy::Retry, "{away}");
        }
        assert_eq!(policy("55006"), Policy::StandBy);
        for refused in ["28P01", "28000", "3D000", "42501", "0A000", "", "ä"] {
            assert_eq!(policy(refused), Policy::Stop(exit::Kind::Refused), "{refused}");
        }
        for halted in ["42704", "55000", "58P01"] {
            assert_eq!(policy(halted), Policy::Stop(exit::Kind::Halted), "{halted}");
        }
    }
}

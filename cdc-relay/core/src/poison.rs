//! Rows that cannot be published, and what follows from each.

use std::fmt;

/// Why a row cannot become a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Poison {
    /// The table, or the message, has no such column.
    MissingColumn(String),
    /// The column must have a value.
    NullColumn(String),
    /// The column's value is not what it has to be.
    BadColumn(String, &'static str),
    /// The row has another number of values than the relation has columns.
    WrongNumberOfValues,
    /// The headers column is not what it has to be.
    BadHeaders(&'static str),
    /// The message is not what it has to be.
    BadMessage(&'static str),
    /// The topic's name is not legal.
    IllegalTopic(String),
    /// Messages may not go to this topic.
    UnlistedTopic(String),
    /// There is no such topic, or it has no such partition.
    UnknownTopic { topic: String, partition: Option<i32> },
    /// Kafka does not let us write to the topic.
    Unauthorized { topic: String },
    /// The record is larger than its topic, or the producer, takes. Sizes in bytes, where they are known.
    TooLarge { topic: String, bytes: Option<usize>, limit_bytes: Option<usize> },
    /// The broker refuses this record, and would again.
    Refused { topic: String, why: String },
    /// The row itself is good, but an earlier one of its aggregate is parked.
    BehindParked,
}

/// The kinds of poison that have a policy each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A value, or a message, is not what it has to be.
    Undecodable,
    /// A column that must be there, or must have a value, does not.
    MissingColumn,
    /// The topic's name is not legal, not one that messages may go to, or there is no such topic or partition.
    Unroutable,
    /// Larger than the topic or the producer takes.
    TooLarge,
    /// Not allowed to write to the topic.
    Unauthorized,
    /// The row's own headers cannot be read.
    InvalidHeader,
    /// Refused by the broker for what it is, for instance for its timestamp.
    Refused,
    /// Good, but behind a parked row of its aggregate. Its policy is always [`Policy::ParkKey`].
    Parked,
}

impl Kind {
    /// The kinds that have a policy of their own.
    pub const CONFIGURABLE: [Self; 7] = [
        Self::Undecodable,
        Self::MissingColumn,
        Self::Unroutable,
        Self::TooLarge,
        Self::Unauthorized,
        Self::InvalidHeader,
        Self::Refused,
    ];

    /// The kind's name: in the configuration, in the `dlq.reason` header and as a metric's label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Undecodable => "undecodable",
            Self::MissingColumn => "missing_column",
            Self::Unroutable => "unroutable",
            Self::TooLarge => "too_large",
            Self::Unauthorized => "unauthorized",
            Self::InvalidHeader => "invalid_header",
            Self::Refused => "refused",
            Self::Parked => "parked",
        }
    }
}

impl Poison {
    /// The kind whose policy applies.
    pub fn kind(&self) -> Kind {
        match self {
            Self::MissingColumn(_) | Self::NullColumn(_) => Kind::MissingColumn,
            Self::BadColumn(..) | Self::WrongNumberOfValues | Self::BadMessage(_) => Kind::Undecodable,
            Self::BadHeaders(_) => Kind::InvalidHeader,
            Self::IllegalTopic(_) | Self::UnlistedTopic(_) | Self::UnknownTopic { .. } => Kind::Unroutable,
            Self::Unauthorized { .. } => Kind::Unauthorized,
            Self::TooLarge { .. } => Kind::TooLarge,
            Self::Refused { .. } => Kind::Refused,
            Self::BehindParked => Kind::Parked,
        }
    }
}

/// What to do with a row that is poison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Policy {
    /// Stop, so that a person decides. Nothing from the row on is confirmed.
    #[default]
    Halt,
    /// Send it to the dead-letter topic and go on.
    DeadLetter,
    /// Send it to the dead-letter topic, and every later row of its aggregate behind it.
    ParkKey,
    /// Leave it out.
    Skip,
}

/// The policy of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policies([Policy; Kind::CONFIGURABLE.len()]);

impl Policies {
    /// The same policy for every kind.
    pub fn all(policy: Policy) -> Self {
        Self([policy; Kind::CONFIGURABLE.len()])
    }

    /// Sets one kind's policy.
    #[must_use]
    pub fn with(mut self, kind: Kind, policy: Policy) -> Self {
        if let Some(own) = self.0.get_mut(kind as usize) {
            *own = policy;
        }
        self
    }

    /// The policy of a kind.
    pub fn of(&self, kind: Kind) -> Policy {
        self.0.get(kind as usize).copied().unwrap_or(Policy::ParkKey)
    }

    /// Whether any kind has this policy.
    pub fn any(&self, policy: Policy) -> bool {
        self.0.contains(&policy)
    }
}

impl fmt::Display for Poison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MissingColumn(name) => write!(f, "there is no column {name:?}"),
            Self::NullColumn(name) => write!(f, "column {name:?} is NULL"),
            Self::BadColumn(name, why) => write!(f, "column {name:?} {why}"),
            Self::WrongNumberOfValues => {
                write!(f, "the row does not have as many values as the table has columns")
            }
            Self::BadHeaders(why) => write!(f, "the headers column {why}"),
            Self::BadMessage(why) => write!(f, "the message {why}"),
            Self::IllegalTopic(topic) => {
                write!(f, "its topic {topic:?} is not a legal name of a Kafka topic")
            }
            Self::UnlistedTopic(topic) => {
                write!(f, "messages may not go to topic {topic:?}: it is not in messages.topics")
            }
            Self::UnknownTopic { topic, partition: None } => write!(f, "topic {topic:?} does not exist"),
            Self::UnknownTopic { topic, partition: Some(partition) } => {
                write!(f, "topic {topic:?} has no partition {partition}")
            }
            Self::Unauthorized { topic } => write!(f, "Kafka does not allow us to write to topic {topic:?}"),
            Self::TooLarge { topic, bytes, limit_bytes } => {
                write!(f, "it is larger than topic {topic:?} takes")?;
                let size = |n: &Option<usize>| n.map_or("unknown".into(), |n| n.to_string());
                write!(f, " (size in bytes: {}, limit: {})", size(bytes), size(limit_bytes))
            }
            Self::Refused { topic, why } => write!(f, "topic {topic:?} refuses it: {why}"),
            Self::BehindParked => write!(f, "an earlier row of its aggregate is parked"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_own_policy() {
        for (kind, policy) in [(Kind::Undecodable, Policy::Skip), (Kind::Refused, Policy::ParkKey)] {
            let policies = Policies::default().with(kind, policy);
            for other in Kind::CONFIGURABLE {
                assert_eq!(policies.of(other), if other == kind { policy } else { Policy::Halt });
            }
        }
        assert_eq!(Policies::default().of(Kind::Parked), Policy::ParkKey);
    }
}

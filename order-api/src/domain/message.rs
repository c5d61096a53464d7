//! Generic messages: what clients may put through the outbox, and how far each has come.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{MessageKey, Payload};

/// The most consumer groups that a message waits for.
pub const MAX_GROUPS: usize = 16;

/// The most headers a client gives a message.
pub const MAX_HEADERS: usize = 32;

/// The longest value of a header, in characters.
pub const MAX_HEADER_CHARS: usize = 1024;

/// The longest time to wait for acknowledgements, in seconds, of the first attempt as of any other.
pub const MAX_ACK_TIMEOUT_SECONDS: i32 = 86_400;

/// The longest name of a topic or a group, in bytes, as Kafka has it.
pub(crate) const MAX_KAFKA_NAME_BYTES: usize = 249;

/// The longest name of a header, in bytes.
pub(crate) const MAX_HEADER_NAME_BYTES: usize = 100;

fn is_name(text: &str, most_bytes: usize) -> bool {
    (1..=most_bytes).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// What a topic or a consumer group is called.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct KafkaName(String);

impl KafkaName {
    /// Takes 1 to 249 characters of `A-Z a-z 0-9 . _ -`.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn parse(text: impl Into<String>) -> Result<Self, String> {
        let text = text.into();
        if is_name(&text, MAX_KAFKA_NAME_BYTES) {
            return Ok(Self(text));
        }
        Err(format!("must be 1 to {MAX_KAFKA_NAME_BYTES} characters of A-Z a-z 0-9 . _ -"))
    }

    /// The text itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The client's own headers of a message.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Headers(BTreeMap<String, String>);

/// What the relay, consumers' dead letters and we ourselves put beside the client's headers.
const RESERVED: [&str; 9] =
    ["id", "type", "aggregatetype", "lsn", "seq", "traceparent", "message-id", "attempt", "require-ack"];
const RESERVED_PREFIXES: [&str; 2] = ["ce_", "dlq."];

impl Headers {
    /// Adds one: a name of 1 to 100 characters of `A-Z a-z 0-9 . _ -` that is not reserved, and a text without control
    /// characters. Nothing looks at how many there are.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn add(&mut self, name: &str, value: String) -> Result<(), String> {
        if !is_name(name, MAX_HEADER_NAME_BYTES) {
            return Err(format!(
                "must have a name of 1 to {MAX_HEADER_NAME_BYTES} characters of A-Z a-z 0-9 . _ -"
            ));
        }
        let lower = name.to_ascii_lowercase();
        if RESERVED.contains(&lower.as_str()) || RESERVED_PREFIXES.iter().any(|p| lower.starts_with(p)) {
            return Err(format!(
                "has a reserved name; reserved are {} and what begins with {}",
                RESERVED.join(", "),
                RESERVED_PREFIXES.join(" or ")
            ));
        }
        if value.chars().count() > MAX_HEADER_CHARS {
            return Err(format!("must have at most {MAX_HEADER_CHARS} characters"));
        }
        if value.chars().any(char::is_control) {
            return Err("must not contain control characters".into());
        }
        self.0.insert(name.to_owned(), value);
        Ok(())
    }
}

/// What a client sends, parsed: nothing in it can be refused any more.
#[derive(Debug, Clone)]
pub struct NewMessage {
    /// Where it goes: one of the topics that are allowed.
    pub topic: String,
    /// What keeps messages in order among each other.
    pub key: Option<MessageKey>,
    /// What it says.
    pub payload: Payload,
    /// The client's own.
    pub headers: Headers,
    /// Who has to acknowledge it, each once.
    pub require_ack: Vec<KafkaName>,
    /// How long the first attempt waits for that, in seconds.
    pub ack_timeout_seconds: i32,
}

/// How far a message has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum MessageState {
    /// It is in the outbox; nothing has been heard of it.
    Committed,
    /// A consumer has acknowledged it, so it went out. Others are waited for.
    Published,
    /// Every group has acknowledged it.
    Acknowledged,
    /// Given up: too many attempts went by without all acknowledgements.
    Undelivered,
}

impl MessageState {
    /// All of them.
    pub const ALL: [(Self, &'static str); 4] = [
        (Self::Committed, "committed"),
        (Self::Published, "published"),
        (Self::Acknowledged, "acknowledged"),
        (Self::Undelivered, "undelivered"),
    ];

    /// The state that is written so.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, name)| *name == text).map(|(state, _)| *state)
    }
}

/// That a group has applied a message, by the first acknowledgement that was heard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Acknowledgement {
    /// Who.
    pub consumer_group: String,
    /// Which attempt it acknowledged.
    pub attempt: i32,
    /// When the group applied the message.
    pub applied_at: DateTime<Utc>,
    /// The commit LSN of the attempt, `X/Y`, if it was told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lsn: Option<String>,
}

/// What a message has from one of the groups it waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum GroupState {
    /// Nothing yet.
    #[serde(rename_all = "camelCase")]
    Waiting {
        /// Who.
        consumer_group: String,
    },
    /// Its acknowledgement.
    Acknowledged(Acknowledgement),
}

/// A message and how far it has come, as the API answers it.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Message {
    /// The same for all its attempts.
    pub message_id: Uuid,
    /// How far it has come.
    pub state: MessageState,
    /// Where it goes.
    pub topic: String,
    /// What keeps messages in order among each other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<MessageKey>,
    /// What it says; not in lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload: Option<Payload>,
    /// The client's own; not in lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub headers: Option<Headers>,
    /// Who has to acknowledge it.
    pub require_ack: Vec<String>,
    /// How long its first attempt waits for that, in seconds; each later one twice as long as the one before.
    pub ack_timeout: i32,
    /// How often it was put in the outbox.
    pub attempt: i32,
    /// How often after the first time.
    pub redeliveries: i32,
    /// When it was committed.
    pub created_at: DateTime<Utc>,
    /// When it is put in the outbox again or, after the last attempt, given up, unless all acknowledge it before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_attempt_at: Option<DateTime<Utc>>,
    /// When the last group's acknowledgement was heard.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acknowledged_at: Option<DateTime<Utc>>,
    /// When it was given up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub undelivered_at: Option<DateTime<Utc>>,
    /// The commit LSN that the first acknowledgement told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lsn: Option<String>,
    /// What there is from each group that has to acknowledge it.
    pub acknowledgements: Vec<GroupState>,
}

impl Message {
    /// One that is sent for the first time.
    pub fn begin(new: NewMessage, message_id: Uuid, now: DateTime<Utc>) -> Self {
        let groups = new.require_ack.into_iter().map(|group| group.0).collect::<Vec<_>>();
        let due_at = now + TimeDelta::seconds(new.ack_timeout_seconds.into());
        let message = Self {
            message_id,
            state: MessageState::Committed,
            topic: new.topic,
            key: new.key,
            payload: Some(new.payload),
            headers: Some(new.headers),
            next_attempt_at: (!groups.is_empty()).then_some(due_at),
            require_ack: groups,
            ack_timeout: new.ack_timeout_seconds,
            attempt: 1,
            redeliveries: 0,
            created_at: now,
            acknowledged_at: None,
            undelivered_at: None,
            lsn: None,
            acknowledgements: Vec::new(),
        };
        message.with(&[])
    }

    /// The same with what has been heard of it, in the order in which it was.
    #[must_use]
    pub fn with(mut self, heard: &[Acknowledgement]) -> Self {
        self.redeliveries = self.attempt - 1;
        self.state = match (self.acknowledged_at, self.undelivered_at) {
            (Some(_), _) => MessageState::Acknowledged,
            (None, Some(_)) => MessageState::Undelivered,
            (None, None) if heard.is_empty() => MessageState::Committed,
            (None, None) => MessageState::Published,
        };
        self.lsn = heard.iter().find_map(|ack| ack.lsn.clone());
        let of = |group: &String| match heard.iter().find(|ack| ack.consumer_group == *group) {
            Some(ack) => GroupState::Acknowledged(ack.clone()),
            None => GroupState::Waiting { consumer_group: group.clone() },
        };
        self.acknowledgements = self.require_ack.iter().map(of).collect();
        self
    }

    /// Why it is not put in the outbox again, if it is not.
    pub fn settled(&self) -> Option<&'static str> {
        if self.require_ack.is_empty() {
            Some("It waits for no acknowledgement, so nobody knows whether it is missing. Send a new one.")
        } else if self.acknowledged_at.is_some() {
            Some("Every consumer group it waits for has acknowledged it.")
        } else {
            None
        }
    }
}

//! Where a record goes: its topic.

use std::{collections::BTreeMap, fmt, str};

use crate::{
    outbox::{Outbox, Slots},
    poison::Poison,
};

/// Kafka's limit on a topic's name, in characters
/// (<https://kafka.apache.org/documentation/#basic_ops_add_topic>).
pub const TOPIC_MAX_LENGTH: usize = 249;

/// A topic's name with places for a row's columns, such as `outbox.event.${aggregatetype}`.
///
/// `${id}`, `${aggregatetype}` (also `${routedByValue}`, as Debezium calls it), `${aggregateid}` and `${type}` are
/// those of the outbox, whatever their columns are called; any other place is a column of that name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicTemplate(Vec<Part<String>>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part<Place> {
    Literal(String),
    Place(Place),
}

/// The template cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TemplateError {
    Empty,
    /// `${` without its `}`.
    Unclosed,
    /// `${}`.
    EmptyPlace,
    /// A character that no topic's name may have.
    IllegalCharacter(char),
}

impl fmt::Display for TemplateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "the topic template is empty"),
            Self::Unclosed => write!(f, "the topic template has a ${{ without its }}"),
            Self::EmptyPlace => write!(f, "the topic template has ${{}}, which names no column"),
            Self::IllegalCharacter(c) => {
                write!(f, "the topic template has {c:?}; topics are made of [A-Za-z0-9._-]")
            }
        }
    }
}

impl std::error::Error for TemplateError {}

impl Default for TopicTemplate {
    /// Debezium's: `outbox.event.${aggregatetype}`.
    fn default() -> Self {
        Self(vec![Part::Literal("outbox.event.".into()), Part::Place("aggregatetype".into())])
    }
}

impl TopicTemplate {
    /// Parses a template.
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let (literal, place) = rest.split_once("${").map_or((rest, None), |(l, p)| (l, Some(p)));
            if let Some(c) = literal.chars().find(|c| !is_topic_character(*c)) {
                return Err(TemplateError::IllegalCharacter(c));
            }
            if !literal.is_empty() {
                parts.push(Part::Literal(literal.to_owned()));
            }
            let Some(place) = place else { break };
            let (name, after) = place.split_once('}').ok_or(TemplateError::Unclosed)?;
            if name.is_empty() {
                return Err(TemplateError::EmptyPlace);
            }
            parts.push(Part::Place(name.to_owned()));
            rest = after;
        }
        if parts.is_empty() { Err(TemplateError::Empty) } else { Ok(Self(parts)) }
    }

    /// Gives each place its slot.
    pub(crate) fn resolve(&self, mut slot_of: impl FnMut(&str) -> usize) -> Route {
        let resolve = |part: &Part<String>| match part {
            Part::Literal(text) => Part::Literal(text.clone()),
            Part::Place(name) => Part::Place(slot_of(name)),
        };
        Route(self.0.iter().map(resolve).collect())
    }
}

/// A template whose places are slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Route(Vec<Part<usize>>);

/// Writes a row's topic into `out`: its own where it has one, else what `by_type` has for its type, else what the
/// outbox's template says.
///
/// # Errors
/// That is not a legal name, which `out` then holds, or a column that the template names is NULL.
pub(crate) fn put_topic(
    out: &mut String,
    outbox: &Outbox,
    slots: &Slots<'_>,
    (own, event_type): (Option<&str>, &str),
    by_type: &BTreeMap<String, String>,
) -> Result<(), Poison> {
    out.clear();
    if let Some(topic) = own {
        out.push_str(topic);
    } else if let Some(topic) = by_type.get(event_type) {
        out.push_str(topic);
        return Ok(());
    } else {
        for part in &outbox.route().0 {
            match part {
                Part::Literal(text) => out.push_str(text),
                Part::Place(slot) => {
                    let name = || outbox.slot_name(*slot).to_owned();
                    let value =
                        slots.get(*slot).copied().flatten().ok_or_else(|| Poison::NullColumn(name()))?;
                    let not_text = |_| Poison::BadColumn(name(), "is not UTF-8");
                    out.push_str(str::from_utf8(value).map_err(not_text)?);
                }
            }
        }
    }
    if is_legal_topic(out) { Ok(()) } else { Err(Poison::IllegalTopic(out.clone())) }
}

fn is_topic_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

/// Whether Kafka would take the name.
pub fn is_legal_topic(name: &str) -> bool {
    let length = 1..=TOPIC_MAX_LENGTH;
    length.contains(&name.len()) && !matches!(name, "." | "..") && name.chars().all(is_topic_character)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::outbox::{Field, OutboxTable, SLOTS};

    const AGGREGATE_TYPE: usize = Field::AggregateType as usize;

    /// The topic of a row of aggregate type `order`, type `OrderCreated`, and as column `tenant` what is given.
    fn topic(template: &str, own: Option<&str>, tenant: Option<&[u8]>) -> (String, Result<(), Poison>) {
        let topic = TopicTemplate::parse(template).unwrap();
        let outbox = Outbox::new(OutboxTable { topic, ..OutboxTable::default() }).unwrap();
        let mut slots: Slots<'_> = [None; SLOTS];
        slots[AGGREGATE_TYPE] = Some(b"order");
        slots[Field::EventType as usize] = Some(b"OrderCreated");
        if let Some(slot) = outbox.slot("tenant") {
            slots[slot] = tenant;
        }
        let by_type = BTreeMap::from([("OrderMapped".to_owned(), "mapped".to_owned())]);
        let mut out = "left over".to_owned();
        let result = put_topic(&mut out, &outbox, &slots, (own, "OrderCreated"), &by_type);
        (out, result)
    }

    #[test]
    fn places_are_filled_and_the_rows_own_topic_wins() {
        let tenant = Some(&b"t1"[..]);
        for (template, own, expected) in [
            ("outbox.event.${aggregatetype}", None, "outbox.event.order"),
            ("outbox.event.${routedByValue}", None, "outbox.event.order"),
            ("${aggregatetype}-${type}", None, "order-OrderCreated"),
            ("${tenant}.${aggregatetype}.${tenant}", None, "t1.order.t1"),
            ("constant", None, "constant"),
            ("${aggregatetype}-events", Some("mine"), "mine"),
        ] {
            assert_eq!(topic(template, own, tenant), (expected.to_owned(), Ok(())));
        }
    }

    #[test]
    fn a_types_topic_comes_before_the_template_and_after_the_rows_own() {
        let outbox = Outbox::new(OutboxTable::default()).unwrap();
        let by_type = BTreeMap::from([("T".to_owned(), "t-topic".to_owned())]);
        let (mut out, slots) = (String::new(), [None; SLOTS]);
        put_topic(&mut out, &outbox, &slots, (None, "T"), &by_type).unwrap();
        assert_eq!(out, "t-topic");
        put_topic(&mut out, &outbox, &slots, (Some("own"), "T"), &by_type).unwrap();
        assert_eq!(out, "own");
    }

    #[test]
    fn a_place_without_a_value_and_an_illegal_name_are_told() {
        assert_eq!(topic("${tenant}", None, None).1, Err(Poison::NullColumn("tenant".into())));
        let not_text = Poison::BadColumn("tenant".into(), "is not UTF-8");
        assert_eq!(topic("${tenant}", None, Some(b"\xFF")).1, Err(not_text));
        let illegal = |name: &str| Err(Poison::IllegalTopic(name.into()));
        assert_eq!(topic("${tenant}", None, Some(b"a b")), ("a b".into(), illegal("a b")));
        assert_eq!(topic("x", Some("a/b"), None), ("a/b".into(), illegal("a/b")));
        assert_eq!(topic("x", Some(""), None).1, illegal(""));
        let limit = TOPIC_MAX_LENGTH;
        for bad in ["", ".", "..", "a b", "ä", "a\0", &"x".repeat(limit + 1)] {
            assert!(!is_legal_topic(bad), "{bad:?}");
        }
        assert!(is_legal_topic(&"x".repeat(limit)));
    }

    #[test]
    fn a_bad_template_says_why() {
        let parse = TopicTemplate::parse;
        assert_eq!(parse("outbox.event.${aggregatetype}"), Ok(TopicTemplate::default()));
        assert_eq!(parse(""), Err(TemplateError::Empty));
        assert_eq!(parse("a${b"), Err(TemplateError::Unclosed));
        assert_eq!(parse("a${}"), Err(TemplateError::EmptyPlace));
        assert_eq!(parse("a b"), Err(TemplateError::IllegalCharacter(' ')));
        assert_eq!(parse("a}"), Err(TemplateError::IllegalCharacter('}')));
    }

    proptest! {
        #[test]
        fn parsing_is_total(text: String) {
            let _ = TopicTemplate::parse(&text);
        }

        /// Whatever a row holds: a legal topic, or poison.
        #[test]
        fn a_topic_is_legal_or_poison(tenant: Vec<u8>, own: Option<String>) {
            let (name, result) = topic("a${tenant}", own.as_deref(), Some(&tenant));
            prop_assert_eq!(result.is_ok(), is_legal_topic(&name) && (own.is_some() || str::from_utf8(&tenant).is_ok()));
        }
    }
}

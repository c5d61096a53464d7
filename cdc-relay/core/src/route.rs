//! Where a record goes: its topic.

use std::{fmt, str};

use crate::poison::Poison;

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

impl Route {
    /// Adds the topic to `out`. The values are by their slots, and `name_of` is what a slot's is called.
    ///
    /// # Errors
    /// A value that it needs is NULL, or not text.
    pub(crate) fn put(
        &self,
        out: &mut String,
        slots: &[Option<&[u8]>],
        name_of: impl Fn(usize) -> String,
    ) -> Result<(), Poison> {
        for part in &self.0 {
            match part {
                Part::Literal(text) => out.push_str(text),
                Part::Place(slot) => {
                    let value = slots.get(*slot).copied().flatten();
                    let value = value.ok_or_else(|| Poison::NullColumn(name_of(*slot)))?;
                    let not_text = |_| Poison::BadColumn(name_of(*slot), "is not UTF-8");
                    out.push_str(str::from_utf8(value).map_err(not_text)?);
                }
            }
        }
        Ok(())
    }
}

impl Route {
    /// The name that every row makes; None where it depends on the row.
    pub(crate) fn constant(&self) -> Option<String> {
        let literal = |part: &Part<usize>| match part {
            Part::Literal(text) => Some(text.clone()),
            Part::Place(_) => None,
        };
        self.0.iter().map(literal).collect()
    }

    /// Whether some row could make this name.
    pub(crate) fn may_make(&self, topic: &str) -> bool {
        let mut rest = topic;
        let mut is_open = false;
        for (i, part) in self.0.iter().enumerate() {
            let is_last = i + 1 == self.0.len();
            let after = match part {
                Part::Place(_) => {
                    is_open = true;
                    continue;
                }
                // Behind a place any text may come before it.
                Part::Literal(text) if is_open && is_last => rest.strip_suffix(text.as_str()).map(|_| ""),
                Part::Literal(text) if is_open => rest.split_once(text.as_str()).map(|(_, after)| after),
                Part::Literal(text) => rest.strip_prefix(text.as_str()),
            };
            let Some(after) = after else { return false };
            (rest, is_open) = (after, false);
        }
        is_open || rest.is_empty()
    }
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

    #[test]
    fn names_are_legal_that_kafka_takes() {
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

    #[test]
    fn a_name_that_rows_could_make_is_known() {
        let route = |text: &str| TopicTemplate::parse(text).unwrap().resolve(|_| 0);
        for (template, made, not) in [
            ("outbox.event.${aggregatetype}", "outbox.event.order", "outbox.events"),
            ("${tenant}.${aggregatetype}-events", "a-events.order-events", "a.order-event"),
            ("fixed", "fixed", "fixed-2"),
            ("a${x}b", "abb", "ab-c"),
            ("${a}${b}", "anything", ""),
        ] {
            assert!(route(template).may_make(made), "{template}: {made}");
            assert!(not.is_empty() || !route(template).may_make(not), "{template}: {not}");
        }
    }

    proptest! {
        /// Whatever values a row has.
        #[test]
        fn what_a_row_makes_could_be_made(
            template in r"([a-b.]{0,3}(\$\{[xy]\})?){1,3}", x in "[ab.]{1,4}", y in "[ab.]{1,4}"
        ) {
            let Ok(template) = TopicTemplate::parse(&template) else { return Ok(()) };
            let route = template.resolve(|name| usize::from(name == "y"));
            let mut topic = String::new();
            let slots = [Some(x.as_bytes()), Some(y.as_bytes())];
            route.put(&mut topic, &slots, |_| String::new()).unwrap();
            prop_assert!(route.may_make(&topic), "{:?}", topic);
        }

        #[test]
        fn parsing_is_total(text: String) {
            let _ = TopicTemplate::parse(&text);
        }
    }
}

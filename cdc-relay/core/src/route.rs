//! Where a record goes: its topic.

use std::fmt;

use crate::outbox::OutboxRow;

/// Kafka's limit on a topic's name, in characters
/// (<https://kafka.apache.org/documentation/#basic_ops_add_topic>).
pub const TOPIC_MAX_LENGTH: usize = 249;

/// A topic's name with places for a row's columns, such as `outbox.event.${aggregatetype}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicTemplate(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Literal(String),
    AggregateType,
    EventType,
}

/// The template cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TemplateError {
    Empty,
    /// `${` without its `}`.
    Unclosed,
    /// A place that is not `${aggregatetype}` or `${type}`.
    UnknownPlace(String),
    /// A character that no topic's name may have.
    IllegalCharacter(char),
}

impl fmt::Display for TemplateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "the topic template is empty"),
            Self::Unclosed => write!(f, "the topic template has a ${{ without its }}"),
            Self::UnknownPlace(name) => {
                write!(
                    f,
                    "the topic template names ${{{name}}}; it may name ${{aggregatetype}} and ${{type}}"
                )
            }
            Self::IllegalCharacter(c) => {
                write!(f, "the topic template has {c:?}; topics are made of [A-Za-z0-9._-]")
            }
        }
    }
}

impl std::error::Error for TemplateError {}

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
            parts.push(match name {
                "aggregatetype" => Part::AggregateType,
                "type" => Part::EventType,
                other => return Err(TemplateError::UnknownPlace(other.to_owned())),
            });
            rest = after;
        }
        if parts.is_empty() { Err(TemplateError::Empty) } else { Ok(Self(parts)) }
    }

    /// Writes the row's topic into `out`: the row's own `topic` where it has one, else the template's. `false`
    /// when that is not a legal name; `out` then holds the illegal one.
    pub fn render(&self, row: &OutboxRow<'_>, out: &mut String) -> bool {
        out.clear();
        if let Some(topic) = row.topic {
            out.push_str(topic);
        } else {
            for part in &self.0 {
                out.push_str(match part {
                    Part::Literal(text) => text,
                    Part::AggregateType => row.aggregate_type,
                    Part::EventType => row.event_type,
                });
            }
        }
        is_legal_topic(out)
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
    use super::*;

    fn row(topic: Option<&'static str>) -> OutboxRow<'static> {
        OutboxRow { aggregate_type: "order", event_type: "OrderCreated", topic, ..OutboxRow::default() }
    }

    fn rendered(template: &str, row: &OutboxRow<'_>) -> (String, bool) {
        let mut out = "left over".to_owned();
        let legal = TopicTemplate::parse(template).unwrap().render(row, &mut out);
        (out, legal)
    }

    #[test]
    fn places_are_filled_and_the_rows_own_topic_wins() {
        assert_eq!(
            rendered("outbox.event.${aggregatetype}", &row(None)),
            ("outbox.event.order".into(), true)
        );
        assert_eq!(rendered("${aggregatetype}-${type}", &row(None)), ("order-OrderCreated".into(), true));
        assert_eq!(rendered("${aggregatetype}-events", &row(Some("mine"))), ("mine".into(), true));
    }

    #[test]
    fn an_illegal_name_is_told() {
        let limit = TOPIC_MAX_LENGTH;
        for bad in ["", ".", "..", "a b", "ä", "a\0", &"x".repeat(limit + 1)] {
            assert!(!is_legal_topic(bad), "{bad:?}");
        }
        assert!(is_legal_topic(&"x".repeat(limit)));
        assert!(!rendered("${aggregatetype}", &row(Some("a/b"))).1);
    }

    #[test]
    fn a_bad_template_says_why() {
        let parse = TopicTemplate::parse;
        assert_eq!(parse(""), Err(TemplateError::Empty));
        assert_eq!(parse("a${b"), Err(TemplateError::Unclosed));
        assert_eq!(parse("${Type}"), Err(TemplateError::UnknownPlace("Type".into())));
        assert_eq!(parse("a b"), Err(TemplateError::IllegalCharacter(' ')));
        assert_eq!(parse("a}"), Err(TemplateError::IllegalCharacter('}')));
    }
}

//! What is known of topics, and what they would not take.

use std::time::Instant;

use relay_core::{poison::Poison, progress::Ticket, record::Record};

use super::{
    MISSING_GRACE, Offer, Producer, REFUSAL_LASTS, size,
    topics::{Found, Topic},
};

/// What is known of a topic.
#[derive(Debug)]
pub(super) enum Known {
    /// It is there. Which record asked: what it knew then is not old for that one.
    Topic(Topic, Ticket),
    /// It was first reported missing then.
    MissingSince(Instant),
    Refused(Poison, Instant),
}

impl Producer {
    /// Why the topic would not take the record.
    pub(super) fn against(&self, record: &Record<'_>, topic: Topic) -> Option<Poison> {
        if let Some(partition) = record.partition.filter(|p| *p >= topic.partitions) {
            return Some(Poison::UnknownTopic { topic: record.topic.into(), partition: Some(partition) });
        }
        let limit_bytes = topic.limit_bytes.filter(|_| !self.compresses)?;
        // Far below the limit, as almost always, the exact size does not matter.
        if record.cost_bytes() + size::HEADER_MOST_BYTES * record.headers.len() < limit_bytes {
            return None;
        }
        let bytes = size::batch_bytes(record);
        (bytes > limit_bytes).then(|| Poison::TooLarge {
            topic: record.topic.into(),
            bytes: Some(bytes),
            limit_bytes: Some(limit_bytes),
        })
    }

    /// What is known of a topic, or what to tell of a record for it instead.
    pub(super) fn find(&mut self, name: &str, ticket: Ticket) -> Result<Topic, Offer> {
        while let Some((answered, found)) = self.lookup.answer() {
            let asked_for = self.asked.take().map_or(ticket, |(_, ticket)| ticket);
            self.learn(answered, found, asked_for);
        }
        let ask = match self.topics.get(name) {
            Some(Known::Topic(topic, _)) => return Ok(*topic),
            Some(Known::Refused(poison, since)) if since.elapsed() < REFUSAL_LASTS => {
                return Err(Offer::Refused(poison.clone()));
            }
            _ => self.asked.is_none(),
        };
        if ask {
            self.lookup.ask(name);
            self.asked = Some((name.to_owned(), ticket));
        }
        Err(Offer::Later)
    }

    pub(super) fn learn(&mut self, topic: String, found: Found, asked_for: Ticket) {
        let now = Instant::now();
        let known = match found {
            Found::NoAnswer => return,
            Found::Topic(it) => Known::Topic(it, asked_for),
            Found::Unauthorized => Known::Refused(Poison::Unauthorized { topic: topic.clone() }, now),
            Found::Missing => match self.topics.get(&topic) {
                Some(Known::MissingSince(since)) if since.elapsed() < MISSING_GRACE => return,
                Some(Known::MissingSince(_) | Known::Refused(..)) => {
                    Known::Refused(Poison::UnknownTopic { topic: topic.clone(), partition: None }, now)
                }
                _ => Known::MissingSince(now),
            },
        };
        self.topics.insert(topic, known);
    }

    /// Forgets what is known of topics: each is asked about again.
    pub(crate) fn forget_topics(&mut self) {
        self.topics.clear();
    }
}

//! Aggregates that are parked: their rows go to the dead-letter topic, in order, until a redrive frees them.

use std::collections::BTreeMap;

use crate::{
    progress::Ticket,
    record::{Identity, Record},
};

/// The most aggregates that can be parked. Each is held in memory.
pub const PARKED_LIMIT: usize = 100_000;
/// What a marker in Kafka costs beside its key, in bytes: a round figure for the credit.
const MARKER_BYTES: usize = 512;

/// An aggregate.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub aggregate_type: String,
    pub aggregate_id: String,
}

impl Key {
    /// The aggregate that the record belongs to; None where it cannot be told.
    pub fn of(record: &Record<'_>) -> Option<Self> {
        let known = !record.aggregate_type.is_empty() && !record.aggregate_id.is_empty();
        known.then(|| Self {
            aggregate_type: record.aggregate_type.to_owned(),
            aggregate_id: record.aggregate_id.to_owned(),
        })
    }

    pub(crate) fn cost_bytes(&self) -> usize {
        MARKER_BYTES + self.aggregate_type.len() + self.aggregate_id.len()
    }
}

/// The parked aggregates, each with the first row of it that was parked.
#[derive(Debug, Default)]
pub struct Parking {
    keys: BTreeMap<Key, Identity>,
}

/// [`PARKED_LIMIT`] is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

impl Parking {
    pub(crate) fn new(keys: BTreeMap<Key, Identity>) -> Self {
        Self { keys }
    }

    /// Whether the row has to go behind a parked one. Rows before that one do not: after a crash they come again.
    pub(crate) fn holds(&self, record: &Record<'_>) -> bool {
        if self.keys.is_empty() {
            return false;
        }
        let first = Key::of(record).and_then(|key| self.keys.get(&key));
        first.is_some_and(|first| record.identity >= *first)
    }

    /// Parks an aggregate from this row on. Whether it was not before: Kafka may refuse a row after a later one of
    /// the aggregate was parked for what it is.
    pub(crate) fn park(&mut self, key: Key, first: Identity) -> Result<bool, Full> {
        if let Some(known) = self.keys.get_mut(&key) {
            let is_earlier = first < *known;
            *known = first.min(*known);
            return Ok(is_earlier);
        }
        if self.keys.len() >= PARKED_LIMIT {
            return Err(Full);
        }
        self.keys.insert(key, first);
        Ok(true)
    }

    /// Frees an aggregate. Whether it was parked.
    pub(crate) fn free(&mut self, key: &Key) -> bool {
        self.keys.remove(key).is_some()
    }

    /// Whether the aggregate is parked.
    pub fn is_parked(&self, key: &Key) -> bool {
        self.keys.contains_key(key)
    }

    /// The aggregates that are parked.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.keys.keys()
    }

    /// How many aggregates are parked.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

/// An aggregate was parked, or freed again: to be written to the topic of parked keys, and acknowledged like a
/// record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marker {
    pub ticket: Ticket,
    pub key: Key,
    /// The first row of it that was parked; None when it was freed.
    pub parked: Option<Identity>,
}

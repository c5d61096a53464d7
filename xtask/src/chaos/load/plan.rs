//! What a transaction does, before it does it. Pure: it follows from random numbers.

use fastrand::Rng;
use serde_json::{Value, json};
use uuid::Uuid;

/// The prefix of the messages that are the outbox without a table.
pub(in crate::chaos) const OUTBOX_PREFIX: &str = "outbox";
/// The prefix of messages that are no outbox's.
pub(super) const PREFIX: &str = "chaos";

/// Keys that many rows have.
const HOT_KEYS: u32 = 6;
/// Keys that few rows have.
const KEYS: u32 = 5_000;
/// The most bytes of a large payload.
const LARGE_BYTES: usize = 500_000;
/// The most bytes of any other.
const SMALL_BYTES: usize = 600;

/// A row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) id: Uuid,
    pub(super) key: String,
    pub(super) kind: &'static str,
    /// JSON; none is a tombstone.
    pub(super) payload: Option<String>,
    /// A JSON object.
    pub(super) headers: Option<String>,
    pub(super) traceparent: Option<String>,
}

/// A statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// One statement with as many rows.
    Insert(Vec<Row>),
    /// One statement with as many messages, each a row of the outbox without a table.
    Emit(Vec<Row>),
    /// Of rows of the same transaction.
    Delete(Vec<Uuid>),
    /// A logical message that is no outbox's, as part of the transaction or not.
    Message { transactional: bool },
    /// All savepoints have one name.
    Savepoint,
    /// To the last savepoint, which stays.
    RollBackTo,
    /// The last savepoint is forgotten.
    Release,
}

/// A transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) steps: Vec<Step>,
    /// Or it is rolled back.
    pub(super) committed: bool,
}

impl Row {
    /// As a message of the outbox without a table.
    pub(super) fn message(&self, aggregate_type: &str) -> String {
        let json = |text: &Option<String>| -> Value {
            text.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
        };
        json!({
            "id": self.id,
            "aggregatetype": aggregate_type,
            "aggregateid": self.key,
            "type": self.kind,
            "payload": json(&self.payload),
            "headers": json(&self.headers),
            "traceparent": self.traceparent,
        })
        .to_string()
    }
}

impl Plan {
    /// The next one.
    pub(super) fn draw(random: &mut Rng) -> Self {
        let steps = match random.u32(0..1_000) {
            0..400 => vec![insert(random, 1)],
            400..600 => some(random, 4, 8),
            600..610 => some(random, 3, 130),
            610..750 => savepoints(random),
            750..850 => messages(random),
            850..995 => inserted_and_deleted(random),
            _ => vec![Step::Insert(vec![row(random, LARGE_BYTES)])],
        };
        Self { steps, committed: random.u32(0..10) > 0 }
    }
}

/// Up to so many statements of up to so many rows.
fn some(random: &mut Rng, statements: usize, rows: usize) -> Vec<Step> {
    (0..random.usize(1..=statements)).map(|_| insert(random, rows)).collect()
}

/// Parts that are rolled back, parts that are kept, and one in another.
fn savepoints(random: &mut Rng) -> Vec<Step> {
    let mut steps = vec![insert(random, 2)];
    let mut depth = 0;
    for _ in 0..random.u32(2..6) {
        match random.u32(0..3) {
            0 => {
                steps.push(Step::Savepoint);
                depth += 1;
            }
            1 if depth > 0 => steps.push(Step::RollBackTo),
            2 if depth > 0 => {
                steps.push(Step::Release);
                depth -= 1;
            }
            _ => {}
        }
        steps.push(if random.u32(0..4) == 0 { emit(random, 3) } else { insert(random, 3) });
    }
    if depth > 0 && random.bool() {
        steps.push(Step::RollBackTo);
    }
    steps
}

/// Messages of both kinds before, between and behind rows; sometimes there is no row.
fn messages(random: &mut Rng) -> Vec<Step> {
    let count = random.u32(1..6);
    let step = |_| match random.u32(0..4) {
        0 => insert(random, 2),
        1 | 2 => emit(random, 2),
        _ => Step::Message { transactional: random.u32(0..4) > 0 },
    };
    (0..count).map(step).collect()
}

/// As an outbox is written that stays empty.
fn inserted_and_deleted(random: &mut Rng) -> Vec<Step> {
    let rows: Vec<Row> = (0..random.usize(1..=4)).map(|_| row(random, SMALL_BYTES)).collect();
    let ids = rows.iter().map(|row| row.id).collect();
    vec![Step::Insert(rows), Step::Delete(ids)]
}

/// A statement of up to so many rows.
fn insert(random: &mut Rng, rows: usize) -> Step {
    Step::Insert((0..random.usize(1..=rows)).map(|_| row(random, SMALL_BYTES)).collect())
}

/// A statement of up to so many messages.
fn emit(random: &mut Rng, rows: usize) -> Step {
    Step::Emit((0..random.usize(1..=rows)).map(|_| row(random, SMALL_BYTES)).collect())
}

fn row(random: &mut Rng, bytes: usize) -> Row {
    let hot = random.bool();
    let key =
        if hot { format!("hot-{}", random.u32(0..HOT_KEYS)) } else { format!("key-{}", random.u32(0..KEYS)) };
    // What compression cannot make small, and what has to be escaped.
    let text: String = (0..random.usize(1..bytes)).map(|_| random.alphanumeric()).collect();
    let payload = json!({"n": random.u64(..), "text": text, "odd": "it's \"a\\b\" – ü\n", "none": null});
    let headers = json!({"tenant": key, "n": random.u8(..), "none": null, "odd": "it's \"ü\""});
    let trace = format!("00-{:032x}-{:016x}-01", random.u128(1..), random.u64(1..));
    Row {
        id: Uuid::now_v7(),
        kind: if hot { "Warmed" } else { "Noticed" },
        payload: (random.u32(0..50) > 0).then(|| payload.to_string()),
        headers: (random.u32(0..4) == 0).then(|| headers.to_string()),
        traceparent: hot.then_some(trace),
        key,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_says_what_is_done_and_everything_is() {
        let draw = |seed| {
            let mut random = Rng::with_seed(seed);
            (0..2_000).map(|_| Plan::draw(&mut random)).collect::<Vec<_>>()
        };
        let plans = draw(1);
        let shape = |plans: &[Plan]| {
            let keys = |step: &Step| match step {
                Step::Insert(rows) | Step::Emit(rows) => rows.iter().map(|row| row.key.clone()).collect(),
                other => vec![format!("{:?}", std::mem::discriminant(other))],
            };
            plans.iter().flat_map(|plan| plan.steps.iter().flat_map(keys)).collect::<Vec<_>>()
        };
        assert_eq!(shape(&plans), shape(&draw(1)));
        assert_ne!(shape(&plans), shape(&draw(2)));
        let steps: Vec<&Step> = plans.iter().flat_map(|plan| &plan.steps).collect();
        for step in [
            Step::Savepoint,
            Step::RollBackTo,
            Step::Release,
            Step::Message { transactional: true },
            Step::Message { transactional: false },
        ] {
            assert!(steps.contains(&&step), "{step:?}");
        }
        assert!(steps.iter().any(|step| matches!(step, Step::Delete(_))));
        assert!(plans.iter().any(|plan| plan.steps.iter().all(|step| matches!(step, Step::Emit(_)))));
        assert!(plans.iter().any(|plan| !plan.committed) && plans.iter().any(|plan| plan.committed));
        let rows: Vec<&Row> = steps
            .iter()
            .filter_map(|s| if let Step::Insert(rows) | Step::Emit(rows) = s { Some(rows) } else { None })
            .flatten()
            .collect();
        let longest = rows.iter().filter_map(|row| row.payload.as_ref()).map(String::len).max().unwrap();
        assert!(longest > 300_000 && longest < 600_000, "{longest}");
        assert!(rows.iter().any(|row| row.payload.is_none()));
        let ids: BTreeSet<Uuid> = rows.iter().map(|row| row.id).collect();
        assert_eq!(ids.len(), rows.len());
        let most = plans.iter().map(|plan| {
            plan.steps.iter().map(|s| if let Step::Insert(rows) = s { rows.len() } else { 0 }).sum::<usize>()
        });
        assert!(most.max().unwrap() > 200);
    }

    #[test]
    fn savepoints_are_rolled_back_and_released_only_where_there_is_one() {
        let mut random = Rng::with_seed(3);
        for _ in 0..2_000 {
            let mut depth = 0;
            for step in Plan::draw(&mut random).steps {
                match step {
                    Step::Savepoint => depth += 1,
                    Step::RollBackTo => assert!(depth > 0),
                    Step::Release => {
                        assert!(depth > 0);
                        depth -= 1;
                    }
                    _ => {}
                }
            }
        }
    }
}

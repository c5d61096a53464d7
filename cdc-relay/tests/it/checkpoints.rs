//! What a relay has written down of its position.

use std::collections::BTreeSet;

use rdkafka::Message as _;
use serde_json::Value;

use crate::{
    database::Database,
    topics::{put, read_keyed},
};

/// The topic, unless a test has one of its own.
pub(crate) const TOPIC: &str = "cdc-relay-checkpoints";

/// The cluster's identifier, as the relay's keys and ids have it.
pub(crate) fn system(database: &mut Database) -> String {
    database.text("SELECT system_identifier::text FROM pg_control_system()")
}

/// The key of the slot's checkpoints.
pub(crate) fn key(database: &mut Database) -> String {
    format!("{}/{}", system(database), database.slot)
}

/// The slot's checkpoints, oldest first.
pub(crate) fn all(database: &mut Database) -> Vec<Value> {
    let records = read_keyed(TOPIC, &key(database));
    records.iter().map(|record| serde_json::from_slice(record.payload().unwrap()).unwrap()).collect()
}

pub(crate) fn last(database: &mut Database) -> Value {
    all(database).pop().unwrap()
}

/// Writes one in the relay's place.
pub(crate) fn write(database: &mut Database, checkpoint: &Value) {
    put(TOPIC, &key(database), Some(&checkpoint.to_string()));
}

/// Asserts that no relay writes a checkpoint after another one has: with exactly-once delivery a checkpoint is in the
/// same transaction of Kafka as what it covers, so only one publishes at a time. Who wrote them, in turn; the first is
/// `cdc-relay init`. Holds where no relay gets the slot a second time.
pub(crate) fn assert_one_writes_at_a_time(database: &mut Database) -> Vec<String> {
    let mut writers: Vec<String> =
        all(database).iter().map(|entry| entry["instance"].as_str().unwrap().to_owned()).collect();
    writers.dedup();
    let distinct: BTreeSet<_> = writers.iter().collect();
    assert_eq!(distinct.len(), writers.len(), "one wrote again after another had: {writers:?}");
    writers
}

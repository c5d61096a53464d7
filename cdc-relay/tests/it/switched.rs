//! The delivery of a slot is changed from one run to the next.

use std::collections::BTreeMap;

use rdkafka::Message as _;

use crate::{
    checkpoints,
    database::{Database, eventually},
    exactly_once::{EXACTLY_ONCE, settled},
    load::Load,
    relay::{Relay, init},
    topics::{Topic, assert_complete_and_ordered, headers},
};

/// What a killed relay leaves open in Kafka nobody ends but Kafka, unless the next one has exactly-once delivery, too.
const SOON_ENDED: (&str, &str) = ("CDC_RELAY_TRANSACTIONS__TIMEOUT_SECONDS", "2");
const AT_LEAST_ONCE: &[(&str, &str)] = &[];
const ONCE: &[(&str, &str)] = &[EXACTLY_ONCE, SOON_ENDED];

/// One relay, from its start to its end.
struct Run {
    is_exactly_once: bool,
    /// What came from this offset on, up to the next run's, it has published.
    offset: i64,
    /// Everything committed before it was published, by the last checkpoint.
    checkpoint: u64,
}

fn lsn(text: &str) -> u64 {
    let (high, low) = text.split_once('/').unwrap();
    (u64::from_str_radix(high, 16).unwrap() << 32) | u64::from_str_radix(low, 16).unwrap()
}

fn start(database: &mut Database, topic: &Topic, delivery: &[(&str, &str)]) -> (Relay, Run) {
    let offset = topic.size();
    let checkpoint = lsn(checkpoints::last(database)["lsn"].as_str().unwrap());
    let run = Run { is_exactly_once: delivery == ONCE, offset, checkpoint };
    let relay = Relay::start(database, delivery);
    eventually("it has published something", || (topic.size() > offset).then_some(()));
    (relay, run)
}

#[test]
fn the_delivery_is_changed_and_changed_back_with_a_kill_in_each_while_rows_flow() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let load = Load::start(&database, &topic.kind, 0);
    let mut runs = Vec::new();
    for delivery in [AT_LEAST_ONCE, AT_LEAST_ONCE, ONCE, ONCE, AT_LEAST_ONCE] {
        let (relay, run) = start(&mut database, &topic, delivery);
        runs.push(run);
        let confirmed = || relay.metric("cdc_relay_confirmed_lsn");
        let before = confirmed();
        eventually("a checkpoint covers some of it", || (confirmed() > before).then_some(()));
        relay.kill();
    }
    let (relay, run) = start(&mut database, &topic, ONCE);
    runs.push(run);
    let count = load.stop();
    settled(&mut database);
    let messages = topic.read(count);
    let repeated = assert_complete_and_ordered(&messages, count);

    let mut rows: BTreeMap<Vec<u8>, Vec<(i64, u64)>> = BTreeMap::new();
    for message in &messages {
        let committed = lsn(headers(message)[3].1.as_deref().unwrap());
        rows.entry(message.payload().unwrap().to_vec()).or_default().push((message.offset(), committed));
    }
    for (row, seen) in &rows {
        let row = String::from_utf8_lossy(row);
        for (offset, committed) in &seen[..seen.len() - 1] {
            let next = runs.partition_point(|run| run.offset <= *offset);
            assert!(!runs[next - 1].is_exactly_once, "{row} was published exactly once, and again");
            assert!(*committed >= runs[next].checkpoint, "{row} is covered by a checkpoint, and came again");
        }
    }
    println!("{count} rows, {} runs, {repeated} repeated", runs.len());
    relay.stop();
}

#[test]
fn a_transaction_of_which_a_part_is_committed_is_gone_on_with_at_least_once() {
    const ROWS: usize = 60_000;
    let (mut database, topic) = (Database::new(), Topic::new(3, &[]));
    init(&database);
    let kind = &topic.kind;
    database.run(&format!(
        "INSERT INTO outbox SELECT gen_random_uuid(), '{kind}', 'a' || n % 100, 'Counted', \
         json_build_object('n', n, 'x', repeat('x', 300)) FROM generate_series(0, {}) n",
        ROWS - 1
    ));
    let (relay, _) = start(
        &mut database,
        &topic,
        &[EXACTLY_ONCE, SOON_ENDED, ("CDC_RELAY_TRANSACTIONS__BYTES", "262144")],
    );
    relay.kill();
    assert!(topic.size() < i64::try_from(ROWS).unwrap(), "it is not killed in its midst");
    let relay = Relay::start(&database, AT_LEAST_ONCE);
    settled(&mut database);
    let messages = topic.read(ROWS);
    assert_eq!((assert_complete_and_ordered(&messages, ROWS), messages.len()), (0, ROWS));
    relay.stop();
}

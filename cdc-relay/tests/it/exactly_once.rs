//! Exactly-once delivery: whoever reads committed records sees each row once, whatever happens to the relay.

use std::time::Duration;

use rdkafka::{
    ClientConfig, Message as _,
    producer::{BaseProducer, BaseRecord, Producer as _},
};

use crate::{
    checkpoints,
    database::{Database, Servers, eventually},
    relay::{Relay, command, init},
    topics::{Topic, assert_complete_and_ordered, headers},
};

pub(crate) const EXACTLY_ONCE: (&str, &str) = ("CDC_RELAY_KAFKA__DELIVERY", "exactly-once");
pub(crate) const CALL: Duration = Duration::from_secs(30);

pub(crate) fn settled(database: &mut Database) {
    let lsn = database.current_lsn();
    eventually("everything is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
}

/// Another program that writes with transactions.
pub(crate) fn transactional(id: &str) -> BaseProducer {
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", Servers::shared().kafka)
        .set("transactional.id", id)
        .create()
        .unwrap();
    producer.init_transactions(CALL).unwrap();
    producer
}

#[test]
fn a_transaction_larger_than_kafkas_is_seen_once_however_often_the_relay_is_killed_in_its_midst() {
    const ROWS: usize = 60_000;
    let (mut database, topic) = (Database::new(), Topic::new(3, &[]));
    init(&database);
    let kind = &topic.kind;
    database.run(&format!(
        "BEGIN; INSERT INTO outbox SELECT gen_random_uuid(), '{kind}', 'a' || n % 100, 'Counted', \
         json_build_object('n', n, 'x', repeat('x', 300)) FROM generate_series(0, {}) n; COMMIT",
        ROWS - 1
    ));
    let small = [EXACTLY_ONCE, ("CDC_RELAY_TRANSACTIONS__BYTES", "262144")];
    let mut before = 0;
    for _ in 0..4 {
        let relay = Relay::start(&database, &small);
        eventually("a part is committed", || {
            let committed = relay.metric("cdc_relay_kafka_transactions_total")?;
            (committed >= 3.0 && topic.size() > before).then_some(())
        });
        relay.kill();
        before = topic.size();
    }
    assert!(before < i64::try_from(ROWS).unwrap(), "it is not killed in its midst");
    let relay = Relay::start(&database, &small);
    settled(&mut database);
    assert!(relay.metric("cdc_relay_passed_over_rows_total") > Some(0.0));
    let messages = topic.read(ROWS);
    assert_eq!((assert_complete_and_ordered(&messages, ROWS), messages.len()), (0, ROWS));
    relay.stop();
}

#[test]
fn what_shares_a_transaction_of_postgres_is_seen_together() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    // Long enough that many of them share one of Kafka's, were it not for their bytes.
    let sizes = [
        EXACTLY_ONCE,
        ("CDC_RELAY_TRANSACTIONS__BYTES", "16384"),
        ("CDC_RELAY_TRANSACTIONS__MILLISECONDS", "3000"),
    ];
    let relay = Relay::start(&database, &sizes);
    let kind = &topic.kind;
    for first in (0..600).step_by(6) {
        database.run(&format!(
            "INSERT INTO outbox SELECT gen_random_uuid(), '{kind}', 'a', 'Counted', json_build_object('n', n, 'x', repeat('x', 400)) \
             FROM generate_series({first}, {first} + 5) n"
        ));
    }
    settled(&mut database);
    let messages = topic.read(600);
    assert_eq!(assert_complete_and_ordered(&messages, 600), 0);
    // Kafka's marker of a transaction's end takes an offset.
    let mut transactions = 1;
    for pair in messages.windows(2) {
        if pair[1].offset() > pair[0].offset() + 1 {
            transactions += 1;
            assert_ne!(headers(&pair[0])[3], headers(&pair[1])[3], "a transaction of six rows is split");
        }
    }
    assert!((10..100).contains(&transactions), "{transactions} of Kafka's transactions");
    relay.stop();
}

#[test]
fn a_row_that_halts_lets_everything_before_its_transaction_be_seen_and_nothing_of_it() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    database.insert(&topic.kind, 0, 5);
    let kind = &topic.kind;
    let row =
        |n, headers| format!("(gen_random_uuid(), '{kind}', 'a', 'Counted', '{{\"n\": {n}}}', '{headers}')");
    database.run("ALTER TABLE outbox ADD headers jsonb");
    let slow = [EXACTLY_ONCE, ("CDC_RELAY_TRANSACTIONS__MILLISECONDS", "3000")];
    database.run(&format!("INSERT INTO outbox VALUES {}, {}", row(5, "{}"), row(6, "[]")));
    database.insert(&topic.kind, 7, 1);
    for _ in 0..2 {
        let mut relay = Relay::spawn(&database, &slow);
        assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
        assert!(relay.log().contains("change 1"), "{}", relay.log());
        let messages = topic.read(5);
        assert_eq!((assert_complete_and_ordered(&messages, 5), messages.len()), (0, 5));
    }
    let skip = [slow[0], slow[1], ("CDC_RELAY_POISON__INVALID_HEADER", "skip")];
    let relay = Relay::start(&database, &skip);
    let bodies: Vec<_> =
        topic.read(7).iter().map(|m| String::from_utf8_lossy(m.payload().unwrap()).into_owned()).collect();
    let counted: Vec<_> = [0, 1, 2, 3, 4, 5, 7].map(|n| format!("{{\"n\": {n}}}")).into();
    assert_eq!(
        bodies.iter().map(|b| b.replace(' ', "")).collect::<Vec<_>>(),
        counted.iter().map(|c| c.replace(' ', "")).collect::<Vec<_>>()
    );
    relay.stop();
}

#[test]
fn a_rival_with_our_transactional_id_is_fenced_in_its_turn_but_not_for_ever() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let mut relay = Relay::start(&database, &[EXACTLY_ONCE]);
    let id = format!("cdc-relay-{}-{}", checkpoints::system(&mut database), database.slot);
    database.insert(&topic.kind, 0, 10);
    topic.read(10);
    let mut next = 10;
    for _ in 0..5 {
        let sessions = relay.metric("cdc_relay_sessions_total");
        drop(transactional(&id));
        database.insert(&topic.kind, next, 10);
        next += 10;
        eventually("another session", || (relay.metric("cdc_relay_sessions_total") > sessions).then_some(()));
        let messages = topic.read(next);
        assert_eq!((assert_complete_and_ordered(&messages, next), messages.len()), (0, next));
    }
    drop(transactional(&id));
    database.insert(&topic.kind, next, 10);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(relay.log().contains("6 times") && relay.log().contains("second relay"), "{}", relay.log());
    let relay = Relay::start(&database, &[EXACTLY_ONCE]);
    next += 10;
    let messages = topic.read(next);
    assert_eq!((assert_complete_and_ordered(&messages, next), messages.len()), (0, next));
    relay.stop();
}

/// What is committed behind another's open transaction cannot be read before that one ends.
#[test]
fn a_checkpoint_behind_an_open_transaction_of_another_is_not_overlooked() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    // A topic of its own, so that no other test waits.
    let checkpoints = Topic::new(1, &[("cleanup.policy", "compact")]);
    let environment = [EXACTLY_ONCE, ("CDC_RELAY_KAFKA__CHECKPOINT_TOPIC", checkpoints.name.as_str())];
    let made = command(&database).arg("init").envs(environment).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let relay = Relay::start(&database, &environment);
    let other = transactional(&format!("other-{}", database.name));
    other.begin_transaction().unwrap();
    other.send(BaseRecord::to(&checkpoints.name).key("1/another").payload("{}")).unwrap();
    other.flush(CALL).unwrap();
    database.insert(&topic.kind, 0, 10);
    settled(&mut database);
    relay.kill();
    let mut relay = Relay::spawn(&database, &environment);
    eventually("it waits", || relay.log().contains("a transaction is open on it").then_some(()));
    database.insert(&topic.kind, 10, 10);
    other.abort_transaction(CALL).unwrap();
    relay.wait_for_state("streaming");
    let messages = topic.read(20);
    assert_eq!((assert_complete_and_ordered(&messages, 20), messages.len()), (0, 20));
    relay.stop();
}

/// A server that was restored without its writes, and has gone on since, has something else where a checkpoint says that
/// all is published.
#[test]
fn a_log_that_is_not_the_one_that_was_published_halts() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let relay = Relay::start(&database, &[EXACTLY_ONCE]);
    database.insert(&topic.kind, 0, 10);
    settled(&mut database);
    relay.stop();
    let mut body = checkpoints::last(&mut database);
    assert!(body["last"]["commitLsn"].is_string(), "{body}");
    database.insert(&topic.kind, 10, 10);
    body["lsn"] = database.current_lsn().into();
    checkpoints::write(&mut database, &body);
    let mut relay = Relay::spawn(&database, &[EXACTLY_ONCE]);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(relay.log().contains("not the one that was published"), "{}", relay.log());
    assert_eq!(topic.read(10).len(), 10, "nothing more is published");
    let accepted = command(&database).args(["accept-gap", "--from-slot", "--yes"]).output().unwrap();
    assert!(accepted.status.success(), "{}", String::from_utf8_lossy(&accepted.stderr));
    let relay = Relay::start(&database, &[EXACTLY_ONCE]);
    let messages = topic.read(20);
    assert_eq!((assert_complete_and_ordered(&messages, 20), messages.len()), (0, 20));
    relay.stop();
}

#[test]
fn a_part_is_gone_on_with_only_as_it_was_counted() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    database.insert(&topic.kind, 0, 1);
    let relay = Relay::start(&database, &[EXACTLY_ONCE]);
    settled(&mut database);
    relay.stop();
    let mut body = checkpoints::last(&mut database);
    // As if three changes of a transaction that comes next were published.
    let kind = &topic.kind;
    database.run(&format!(
        "INSERT INTO outbox SELECT gen_random_uuid(), '{kind}', 'a', 'Counted', json_build_object('n', n) FROM generate_series(0, 9) n"
    ));
    let slot = database.slot.clone();
    let begun = database.row(&format!(
        "SELECT get_byte(data, 0), encode(substr(data, 2, 8), 'hex'), ('x' || encode(substr(data, 10, 8), 'hex'))::bit(64)::int8 \
         FROM pg_logical_slot_peek_binary_changes('{slot}', NULL, NULL, 'proto_version', '1', 'publication_names', 'cdc_relay') LIMIT 1"
    ));
    let (hex, at): (String, i64) = (sqlx::Row::get(&begun, 1), sqlx::Row::get(&begun, 2));
    let lsn = u64::from_str_radix(&hex, 16).unwrap();
    body["last"] = serde_json::json!({"commitLsn": format!("{:X}/{:X}", lsn >> 32, lsn & 0xFFFF_FFFF), "committedAtUs": at});
    body["seq"] = 3.into();
    checkpoints::write(&mut database, &body);
    let messages = ("CDC_RELAY_MESSAGES__PREFIX", "outbox");
    let mut relay = Relay::spawn(&database, &[EXACTLY_ONCE, messages]);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(
        relay.log().contains("up to its change 3") && relay.log().contains("messages.prefix"),
        "{}",
        relay.log()
    );
    let relay = Relay::start(&database, &[EXACTLY_ONCE]);
    settled(&mut database);
    let counted: Vec<_> = topic.read(8)[1..].iter().map(|m| m.payload().unwrap().to_vec()).collect();
    let expected: Vec<_> = (3..10).map(|n| format!("{{\"n\": {n}}}").into_bytes()).collect();
    assert_eq!(counted, expected);
    relay.stop();
}

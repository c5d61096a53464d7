//! Exactly-once delivery: what becomes of a transaction that is open in Kafka when a relay ends, or is given up.

use rdkafka::{
    Message as _,
    error::KafkaError,
    message::OwnedMessage,
    producer::{BaseProducer, BaseRecord, Producer as _},
};

use crate::{
    checkpoints,
    database::{Database, eventually, unique},
    exactly_once::{CALL, EXACTLY_ONCE, settled, transactional},
    network::Network,
    relay::{Relay, command, init},
    topics::{Topic, assert_complete_and_ordered, put},
};

/// Longer than any test waits.
const NEVER_ENDED: (&str, &str) = ("CDC_RELAY_TRANSACTIONS__TIMEOUT_SECONDS", "600");

fn accept_gap(database: &Database, arguments: &[&str]) {
    let output = command(database).arg("accept-gap").args(arguments).envs([EXACTLY_ONCE]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// What a relay hands over in one of its transactions, and whether Kafka took it.
fn hand_over(zombie: &BaseProducer, record: BaseRecord<'_, str, str>) -> Result<(), KafkaError> {
    zombie.send(record).map_err(|(e, _)| e)?;
    zombie.flush(CALL)
}

/// A relay that was frozen in the midst of a transaction, before it wrote its checkpoint or behind it.
#[test]
fn a_relay_that_wakes_up_after_a_gap_was_accepted_commits_nothing() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let id = format!("cdc-relay-{}-{}", checkpoints::system(&mut database), database.slot);
    let key = checkpoints::key(&mut database);
    for (round, is_closed) in [(0, false), (1, true)] {
        let first = round * 10;
        let relay = Relay::start(&database, &[EXACTLY_ONCE]);
        database.insert(&topic.kind, first, 10);
        settled(&mut database);
        relay.stop();
        let zombie = transactional(&id);
        zombie.begin_transaction().unwrap();
        let row = format!("{{\"n\": {}}}", first + 10);
        hand_over(&zombie, BaseRecord::to(&topic.name).key("a0").payload(row.as_str())).unwrap();
        let mut body = checkpoints::last(&mut database);
        database.insert(&topic.kind, first + 10, 1);
        body["lsn"] = database.current_lsn().into();
        let checkpoint = body.to_string();
        let close = || {
            hand_over(
                &zombie,
                BaseRecord::to(checkpoints::TOPIC).key(key.as_str()).payload(checkpoint.as_str()),
            )
        };
        if is_closed {
            close().unwrap();
        }
        accept_gap(&database, &["--through", "now", "--yes"]);
        let committed =
            if is_closed { Ok(()) } else { close() }.and_then(|()| zombie.commit_transaction(CALL));
        assert!(committed.is_err(), "what was given up is published after all");
    }
    let relay = Relay::start(&database, &[EXACTLY_ONCE]);
    database.insert(&topic.kind, 20, 10);
    let messages = topic.read(30);
    assert_eq!((assert_complete_and_ordered(&messages, 30), messages.len()), (0, 30));
    relay.stop();
}

#[test]
fn a_relay_that_halts_leaves_no_transaction_open() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let (kind, missing) = (&topic.kind, unique());
    let row = |kind: &str| format!("(gen_random_uuid(), '{kind}', 'k', 'T', '{{}}')");
    // Whether a topic is missing is not believed at once, so the first row is in Kafka by then.
    database.run(&format!("INSERT INTO outbox VALUES {}, {}", row(kind), row(&missing)));
    let mut relay = Relay::spawn(&database, &[EXACTLY_ONCE, NEVER_ENDED]);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(relay.log().contains(&missing), "{}", relay.log());
    put(&topic.name, "another", Some("{}"));
    let messages = topic.read(1);
    assert_eq!(messages.iter().map(|m| m.key().unwrap()).collect::<Vec<_>>(), [b"another"]);
}

#[test]
fn a_relay_that_has_lost_postgres_leaves_no_transaction_open() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    let role = database.name.clone();
    database.run(&format!("ALTER ROLE {role} SET wal_sender_timeout = '2s'"));
    init(&database);
    let network = Network::to(&database);
    let environment = [
        EXACTLY_ONCE,
        NEVER_ENDED,
        ("CDC_RELAY_TRANSACTIONS__MILLISECONDS", "200000"),
        ("CDC_RELAY_POSTGRES__URL", &network.url),
        ("CDC_RELAY_POSTGRES__SILENCE_TIMEOUT_SECONDS", "1"),
    ];
    let relay = Relay::start(&database, &environment);
    database.insert(&topic.kind, 0, 1);
    eventually("its row is in Kafka, and not committed", || {
        (relay.metric("cdc_relay_records_acknowledged_total") == Some(1.0)).then_some(())
    });
    network.cut();
    put(&topic.name, "another", Some("{}"));
    let messages = topic.read(1);
    assert_eq!(messages.iter().map(|m| m.key().unwrap()).collect::<Vec<_>>(), [b"another"]);
    relay.kill();
}

#[test]
fn a_row_that_halts_behind_a_part_that_is_published_says_so_and_the_rest_can_be_left_out() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    database.run("ALTER TABLE outbox ADD headers jsonb");
    let kind = topic.kind.clone();
    database.run(&format!(
        "BEGIN; INSERT INTO outbox SELECT gen_random_uuid(), '{kind}', 'a', 'Counted', \
         json_build_object('n', n, 'x', repeat('x', 300)) FROM generate_series(0, 199) n; \
         INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'a', 'Counted', '{{\"n\": 200}}', '[]'); COMMIT"
    ));
    let small = [EXACTLY_ONCE, ("CDC_RELAY_TRANSACTIONS__BYTES", "16384")];
    let mut halts = [(); 2].map(|()| {
        let mut relay = Relay::spawn(&database, &small);
        assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
        (topic.read(1).len(), relay.log())
    });
    let (published, log) = std::mem::take(&mut halts[1]);
    assert!((1..200).contains(&published) && halts[0].0 == published, "{published}, before {}", halts[0].0);
    assert!(log.contains("rows of its transaction that come before it may be published"), "{log}");
    let lsn = log.split("commit LSN ").nth(1).and_then(|rest| rest.split(',').next()).unwrap();
    accept_gap(&database, &["--through", lsn, "--yes"]);
    let relay = Relay::start(&database, &small);
    database.insert(&kind, 201, 10);
    let numbers: Vec<_> = topic.read(published + 10).iter().map(number).collect();
    assert_eq!(numbers, (0..published).chain(201..211).collect::<Vec<_>>());
    relay.stop();
}

fn number(message: &OwnedMessage) -> usize {
    let body: serde_json::Value = serde_json::from_slice(message.payload().unwrap()).unwrap();
    body["n"].as_u64().unwrap().try_into().unwrap()
}

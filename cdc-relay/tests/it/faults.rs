//! Relays with a deliberate fault each, in the circumstances in which it shows, and the relay as it is in the same
//! circumstances: what looks for losses and disorder finds them in the first, and none in the second.

use std::path::{Path, PathBuf};

use rdkafka::{Message as _, message::OwnedMessage};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};

use crate::{
    database::{Database, eventually},
    load::Load,
    relay::{RELAY, Relay, init},
    stack::{Stack, program},
    topics::{Findings, Topic, compare},
};

/// A relay as it is, or with a fault.
struct Build {
    program: PathBuf,
    fault: &'static str,
}

impl Build {
    fn as_it_is() -> Self {
        Self { program: Path::new(RELAY).to_owned(), fault: "" }
    }

    fn with(fault: &'static str) -> Self {
        Self { program: program("cdc-relay-faulty"), fault }
    }

    fn start(&self, database: &Database, environment: &[(&str, &str)]) -> Relay {
        let environment: Vec<_> =
            environment.iter().copied().chain([("CDC_RELAY_FAULT", self.fault)]).collect();
        let mut relay = Relay::spawn_of(&self.program, database, &environment);
        relay.wait_for_state("streaming");
        relay
    }
}

/// Kafka of three brokers, one of which is down. What has it for a replica takes no more records, and refuses none for
/// good, while it wants two: [`AWAY`]. Everything else goes on, the checkpoint, too.
struct Half {
    stack: Stack,
}

const AWAY: (&str, &str) = ("min.insync.replicas", "2");
const EXACTLY_ONCE: [(&str, &str); 1] = [("CDC_RELAY_KAFKA__DELIVERY", "exactly-once")];
const BACK: (&str, &str) = ("min.insync.replicas", "1");

impl Half {
    fn start() -> Self {
        let stack = Stack::start("faults", &["--brokers", "3"]);
        // What belongs to all is made while all are there.
        init(&Database::on(&stack.servers));
        stack.stop("kafka-2");
        Self { stack }
    }

    fn topic(&self, configuration: &[(&str, &str)]) -> Topic {
        Topic::replicated(&self.stack.servers, &[1, 2], configuration)
    }
}

#[test]
fn each_fault_is_found_where_it_shows_and_nothing_without_one() {
    let half = Half::start();
    let (as_it_is, with) = (Build::as_it_is(), Build::with);

    let lost = killed_while_kafka_takes_nothing(&half, &with("confirm-on-enqueue"), &[]);
    assert_eq!(lost.missing, (0..100).collect::<Vec<_>>(), "what was only enqueued is lost");
    let lost = killed_while_kafka_takes_nothing(&half, &with("checkpoint-outside"), &EXACTLY_ONCE);
    assert!(!lost.missing.is_empty(), "what the checkpoint covered was never committed");
    for delivery in [&[], &EXACTLY_ONCE[..]] {
        let kept = killed_while_kafka_takes_nothing(&half, &as_it_is, delivery);
        assert!(kept.is_faultless() && (delivery.is_empty() || kept.repeated == 0), "{kept:?}");
    }

    let mut rounds = 0;
    let lost = killed_between_two_that_commit_together(&half, &with("resume-behind"), |findings| {
        rounds += 1;
        !findings.missing.is_empty()
    });
    println!("after {rounds} kills, lost: {:?}", lost.missing);
    let kept = killed_between_two_that_commit_together(&half, &as_it_is, |_| {
        rounds -= 1;
        rounds <= 0
    });
    assert!(kept.is_faultless() && kept.repeated == 0, "{kept:?}");

    let mut rounds = 0;
    let disordered = kafka_comes_and_goes(&half, &with("retry-reorders"), |findings| {
        rounds += 1;
        !findings.disordered.is_empty()
    });
    println!("out of order after {rounds} rounds: {:?}", disordered.disordered.first());
    // A fresh producer whose first records wait while later ones are taken: librdkafka calls them delivered.
    let mut left = rounds.max(3);
    let ordered = kafka_comes_and_goes(&half, &as_it_is, |_| {
        left -= 1;
        left == 0
    });
    assert!(ordered.is_faultless(), "{ordered:?}");
}

fn killed_while_kafka_takes_nothing(half: &Half, build: &Build, delivery: &[(&str, &str)]) -> Findings {
    let (mut database, topic) = (Database::on(&half.stack.servers), half.topic(&[AWAY]));
    init(&database);
    let relay = build.start(&database, delivery);
    database.insert(&topic.kind, 0, 100);
    let lsn = database.current_lsn();
    eventually("they wait for Kafka, or are confirmed by mistake", || {
        let wait = relay.metric("cdc_relay_in_flight_records").is_some_and(|n| n > 0.0);
        let done =
            if build.fault == "confirm-on-enqueue" { database.unconfirmed_bytes(&lsn) <= 0 } else { wait };
        done.then_some(())
    });
    let up = || relay.metric("cdc_relay_process_uptime_seconds");
    let since = up().unwrap();
    eventually("Kafka's transaction is long full", || up().filter(|up| *up > since + 2.0));
    relay.kill();
    topic.configure(BACK.0, BACK.1);
    let relay = build.start(&database, delivery);
    let findings = findings(&mut database, &topic, 100);
    relay.kill();
    findings
}

/// Writes one more row, waits until it has arrived, and looks at all up to it.
fn findings(database: &mut Database, topic: &Topic, count: usize) -> Findings {
    database.insert(&topic.kind, count, 1);
    let last = |message: &OwnedMessage| {
        let body: serde_json::Value = serde_json::from_slice(message.payload().unwrap()).unwrap();
        body["n"].as_u64() == Some(count as u64)
    };
    let messages = eventually("the last row has arrived", || {
        let messages = topic.read(1);
        messages.iter().any(last).then_some(messages)
    });
    compare(&messages, count + 1)
}

/// Each of Kafka's transactions has one of the database's, and of those each second commits right where the one before
/// it ends: for a relay that is killed between the two, and counts one byte too many as done, it never was.
fn killed_between_two_that_commit_together(
    half: &Half,
    build: &Build,
    mut enough: impl FnMut(&Findings) -> bool,
) -> Findings {
    let (mut database, topic) = (Database::on(&half.stack.servers), half.topic(&[BACK]));
    init(&database);
    let environment = [EXACTLY_ONCE[0], ("CDC_RELAY_TRANSACTIONS__MILLISECONDS", "0")];
    let mut relay = build.start(&database, &environment);
    let mut other = database.runtime.block_on(PgConnection::connect_with(&database.options)).unwrap();
    let mut count = 0;
    loop {
        let before = topic.size();
        for n in (count..count + 60).step_by(2) {
            let [first, second] = [n, n + 1].map(|n| {
                let (kind, key) = (&topic.kind, n % 10);
                format!("BEGIN; INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'a{key}', 'T', '{{\"n\": {n}}}')")
            });
            database.runtime.block_on(other.execute(AssertSqlSafe(second))).unwrap();
            database.run(&first);
            database.run("COMMIT");
            database.runtime.block_on(other.execute("COMMIT")).unwrap();
        }
        eventually("some have arrived", || (topic.size() > before + 10).then_some(()));
        relay.kill();
        relay = build.start(&database, &environment);
        count += 60;
        let findings = findings(&mut database, &topic, count);
        count += 1;
        if enough(&findings) {
            relay.stop();
            return findings;
        }
    }
}

/// Several requests are under way at a time, and Kafka begins to take records again between one and the next.
fn kafka_comes_and_goes(half: &Half, build: &Build, mut enough: impl FnMut(&Findings) -> bool) -> Findings {
    let (mut database, topic) = (Database::on(&half.stack.servers), half.topic(&[]));
    init(&database);
    let environment = [
        ("CDC_RELAY_KAFKA__PROPERTIES__LINGER_MS", "0"),
        ("CDC_RELAY_KAFKA__PROPERTIES__BATCH_NUM_MESSAGES", "1"),
        ("CDC_RELAY_KAFKA__PROPERTIES__RETRY_BACKOFF_MS", "1"),
    ];
    let relay = build.start(&database, &environment);
    let mut count = 0;
    loop {
        let load = Load::start(&database, &topic.kind, count);
        topic.configure(AWAY.0, AWAY.1);
        let waiting = || relay.metric("cdc_relay_in_flight_records").filter(|n| *n > 100.0);
        eventually("records wait for Kafka", waiting);
        topic.configure(BACK.0, BACK.1);
        count = load.stop();
        let lsn = database.current_lsn();
        eventually("all is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
        let findings = compare(&topic.read(count), count);
        if enough(&findings) {
            relay.stop();
            return findings;
        }
    }
}

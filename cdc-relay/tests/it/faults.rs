//! A relay whose retries overtake each other, where that shows, and the relay as it is in the same circumstances: what
//! looks for disorder finds it in the first, and none in the second. What the other deliberate faults lose, the campaign
//! finds.

use std::path::{Path, PathBuf};

use crate::{
    database::{Database, eventually},
    load::Load,
    relay::{RELAY, Relay, init},
    stack::{Stack, program},
    topics::{Findings, Topic, assert_complete_and_ordered, compare},
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
const BACK: (&str, &str) = ("min.insync.replicas", "1");

impl Half {
    fn start() -> Self {
        let stack = Stack::start("faults", &["--brokers", "3"]);
        // What belongs to all is made while all are there.
        init(&Database::on(&stack.servers));
        stack.stop("kafka-2");
        Self { stack }
    }

    fn topic(&self) -> Topic {
        let topic = Topic::replicated(&self.stack.servers, &[1, 2]);
        topic.configure(BACK.0, BACK.1);
        topic
    }
}

#[test]
fn retries_that_overtake_are_found_out_of_order_and_those_of_the_relay_as_it_is_are_not() {
    let half = Half::start();
    let mut rounds = 0;
    let disordered = kafka_comes_and_goes(&half, &Build::with("retry-reorders"), |findings| {
        rounds += 1;
        !findings.disordered.is_empty()
    });
    println!("out of order after {rounds} rounds: {:?}", disordered.disordered.first());
    let mut left = rounds.max(3);
    let ordered = kafka_comes_and_goes(&half, &Build::as_it_is(), |_| {
        left -= 1;
        left == 0
    });
    assert!(ordered.is_faultless(), "{ordered:?}");
    for _ in 0..3 {
        kafka_refuses_a_producers_first_records(&half);
    }
}

/// A broker takes any sequence number from a producer that it does not know, so nothing may be under way behind the first
/// record: else the next one could be written before it.
fn kafka_refuses_a_producers_first_records(half: &Half) {
    let (mut database, topic) = (Database::on(&half.stack.servers), half.topic());
    init(&database);
    topic.configure(AWAY.0, AWAY.1);
    let relay = Build::as_it_is().start(&database, &HASTY);
    database.insert(&topic.kind, 0, 200);
    eventually("the first waits for Kafka", || relay.metric(IN_FLIGHT).filter(|n| *n > 0.0));
    topic.configure(BACK.0, BACK.1);
    let repeated = assert_complete_and_ordered(&topic.read(200), 200);
    assert_eq!(repeated, 0, "{}", relay.log());
    relay.stop();
}

/// A record to a request, several of which are under way at a time.
const HASTY: [(&str, &str); 3] = [
    ("CDC_RELAY_KAFKA__PROPERTIES__LINGER_MS", "0"),
    ("CDC_RELAY_KAFKA__PROPERTIES__BATCH_NUM_MESSAGES", "1"),
    ("CDC_RELAY_KAFKA__PROPERTIES__RETRY_BACKOFF_MS", "1"),
];
const IN_FLIGHT: &str = "cdc_relay_in_flight_records";

/// After so many without disorder, what should find it does not; as a rule it is there in the first.
const ROUNDS_MAX: usize = 20;

/// Several requests are under way at a time, and Kafka begins to take records again between one and the next.
fn kafka_comes_and_goes(half: &Half, build: &Build, mut enough: impl FnMut(&Findings) -> bool) -> Findings {
    let (mut database, topic) = (Database::on(&half.stack.servers), half.topic());
    init(&database);
    let relay = build.start(&database, &HASTY);
    let mut count = 0;
    for _ in 0..ROUNDS_MAX {
        let load = Load::start(&database, &topic.kind, count);
        eventually("Kafka knows the producer", || {
            relay.metric("cdc_relay_records_acknowledged_total").filter(|n| *n > 0.0)
        });
        topic.configure(AWAY.0, AWAY.1);
        let waiting = || relay.metric(IN_FLIGHT).filter(|n| *n > 100.0);
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
    panic!("{:?}: not enough was found in {ROUNDS_MAX} rounds of {count} rows", build.fault);
}

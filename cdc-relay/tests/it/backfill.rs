//! `cdc-relay init --backfill`: what was in the outbox before the slot.

use std::{
    process::{Child, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use rdkafka::Message as _;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};

use crate::{
    audit::{audit, counts},
    database::{Database, eventually},
    load::Load,
    relay::{Relay, command, init},
    topics::{Topic, assert_complete_and_ordered, headers},
};

const WRITERS: usize = 8;
const ROWS: usize = 200_000;

/// An outbox whose rows say in which order they were written, and that the relay's role may read.
fn database() -> Database {
    let mut database = Database::new();
    let name = database.name.clone();
    database.run("ALTER TABLE outbox ADD place bigserial, ADD processed_at timestamptz");
    database.run(&format!("GRANT SELECT ON outbox TO {name}"));
    database
}

fn begin(database: &Database, arguments: &[&str]) -> Child {
    let mut command = command(database);
    command.args(["init", "--backfill"]).args(arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn backfill(database: &Database, arguments: &[&str]) -> Output {
    begin(database, arguments).wait_with_output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned()
}

/// Writers that go on until they are stopped, each with an aggregate of its own.
struct Writers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Writers {
    fn start(database: &Database, kind: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let writer = |number: usize| {
            let (stop, options) = (Arc::clone(&stop), database.options.clone());
            let insert = format!(
                "INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload) VALUES \
                 (gen_random_uuid(), '{kind}', 'writer-{number}', 'T', '{{}}')"
            );
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let mut connection = PgConnection::connect_with(&options).await.unwrap();
                    while !stop.load(Ordering::Relaxed) {
                        connection.execute(AssertSqlSafe(insert.clone())).await.unwrap();
                        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                    }
                });
            })
        };
        let threads = (0..WRITERS).map(writer).collect();
        Self { stop, threads }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().unwrap();
        }
    }
}

#[test]
fn what_was_there_before_is_published_first_and_nothing_is_missing_or_repeated_at_the_seam() {
    let (mut database, topic) = (database(), Topic::new(3, &[]));
    database.insert(&topic.kind, 0, 1000);
    let load = Load::start(&database, &topic.kind, 1000);
    let output = backfill(&database, &["--order-by", "place"]);
    assert!(output.status.success() && said(&output).contains("rows published"), "{}", said(&output));
    let relay = Relay::start(&database, &[]);
    let before = topic.size();
    eventually("the stream goes on", || (topic.size() > before + 500).then_some(()));
    let count = load.stop();
    let messages = topic.read(count);
    assert_eq!(assert_complete_and_ordered(&messages, count), 0);
    let lsn = database.current_lsn();
    eventually("all is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    assert_eq!(topic.size(), i64::try_from(count).unwrap(), "some are there twice");
    relay.stop();
    // It comes before the slot, or not at all.
    let again = backfill(&database, &["--order-by", "place"]);
    assert_eq!(again.status.code(), Some(69), "{}", said(&again));
    assert!(said(&again).contains("pg_drop_replication_slot"), "{}", said(&again));
}

#[test]
fn an_interrupted_backfill_starts_over_and_repeats_what_it_says() {
    let (mut database, topic) = (database(), Topic::new(3, &[]));
    let kind = &topic.kind;
    database.run(&format!(
        "INSERT INTO outbox SELECT gen_random_uuid(), '{kind}', 'a' || n % 100, 'T', json_build_object('n', n) \
         FROM generate_series(1, {ROWS}) n"
    ));
    let writers = Writers::start(&database, kind);
    let mut killed = begin(&database, &["--order-by", "place"]);
    eventually("some are published", || (topic.size() > 10_000).then_some(()));
    killed.kill().unwrap();
    killed.wait().unwrap();

    // Nobody goes on from a slot whose rows were not published.
    let mut relay = Relay::spawn(&database, &[]);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(relay.log().contains("init --backfill"), "{}", relay.log());
    let plain = command(&database).arg("init").output().unwrap();
    assert_eq!(plain.status.code(), Some(65), "{}", said(&plain));

    let output = backfill(&database, &["--order-by", "place"]);
    assert!(output.status.success(), "{}", said(&output));
    let declared = said(&output);
    let declared = declared.split_once("under the lsn header ").expect(&declared).1;
    let declared = declared.split_once(',').unwrap().0.to_owned();
    let relay = Relay::start(&database, &[]);
    writers.stop();
    let (code, report) = audit(&database, &["--wait", "60"], &[]);
    let [rows, published, missing, out_of_order, duplicates, records] =
        counts(&report, ["rows", "published", "missing", "out_of_order", "duplicates", "records"]);
    assert_eq!((published, missing, out_of_order), (rows, 0, 0), "{code} {report}");
    assert!(rows > ROWS as u64, "the writers have written nothing");
    let messages = topic.read(usize::try_from(records).unwrap());
    let of_the_first = messages.iter().filter(|m| {
        headers(m).iter().any(|(name, value)| name == "lsn" && value.as_deref() == Some(&declared))
    });
    assert_eq!(of_the_first.count() as u64, duplicates, "the repeats are those of {declared}");
    println!("{rows} rows, {duplicates} repeated");
    relay.stop();
}

#[test]
fn a_backfill_after_a_slot_that_was_dropped_says_that_it_repeats() {
    let (mut database, topic) = (database(), Topic::new(1, &[]));
    init(&database);
    database.insert(&topic.kind, 0, 5);
    let relay = Relay::start(&database, &[]);
    topic.read(5);
    relay.stop();
    let slot = database.slot.clone();
    database.run(&format!("SELECT pg_drop_replication_slot('{slot}')"));
    database.insert(&topic.kind, 5, 2);
    let output = backfill(&database, &["--order-by", "place"]);
    assert!(output.status.success(), "{}", said(&output));
    for out in [&output.stdout, &output.stderr] {
        let out = String::from_utf8_lossy(out);
        assert!(out.contains("had published, up to ") && out.contains("is published again"), "{out}");
    }
    let relay = Relay::start(&database, &[]);
    let (_, report) = audit(&database, &[], &[]);
    assert_eq!(counts(&report, ["published", "missing", "duplicates"]), [7, 0, 5], "{report}");
    relay.stop();
    // Where there was no slot there is nothing to say.
    let (mut fresh, topic) = (self::database(), Topic::new(1, &[]));
    fresh.insert(&topic.kind, 0, 1);
    let output = backfill(&fresh, &["--order-by", "place"]);
    assert!(output.status.success() && !said(&output).contains("again"), "{}", said(&output));
}

#[test]
fn a_polling_outbox_migrates_with_what_it_had_not_published() {
    let (mut database, topic) = (database(), Topic::new(1, &[]));
    database.insert(&topic.kind, 0, 20);
    database.run("UPDATE outbox SET processed_at = now() WHERE (payload ->> 'n')::int < 15");
    let output = backfill(&database, &["--order-by", "place desc", "--where", "processed_at IS NULL"]);
    assert!(output.status.success(), "{}", said(&output));
    let numbers: Vec<u64> = topic
        .read(5)
        .iter()
        .map(|m| {
            serde_json::from_slice::<serde_json::Value>(m.payload().unwrap()).unwrap()["n"].as_u64().unwrap()
        })
        .collect();
    assert_eq!(numbers, [19, 18, 17, 16, 15]);
}

#[test]
fn what_cannot_be_read_is_said_before_anything_is_made() {
    let (mut database, topic) = (database(), Topic::new(1, &[]));
    database.insert(&topic.kind, 0, 1);
    let refused = |database: &Database, arguments: &[&str], code: i32, hint: &str| {
        let output = backfill(database, arguments);
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert!(said(&output).contains(hint), "{}", said(&output));
    };
    refused(&database, &[], 64, "--order-by");
    refused(&database, &["--order-by", "place; DROP TABLE outbox"], 64, "is not a column");
    refused(&database, &["--order-by", "nowhere"], 64, "--order-by");
    refused(&database, &["--order-by", "place", "--where", "nowhere IS NULL"], 64, "--where");
    let name = database.name.clone();
    database.run(&format!("REVOKE SELECT ON outbox FROM {name}"));
    refused(&database, &["--order-by", "place"], 69, "GRANT SELECT");
    let slot = database.slot.clone();
    let slots = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{slot}'");
    assert_eq!(database.number(&slots), 0);
    // And nothing is in the way of going on without.
    init(&database);
}

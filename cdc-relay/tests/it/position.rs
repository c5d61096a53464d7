//! The position is known twice: what Kafka remembers of it and what Postgres does must belong together.

use crate::{
    checkpoints,
    database::{Database, eventually},
    relay::{Relay, command, init},
    topics::{Topic, assert_complete_and_ordered, headers, put},
};

/// Starts a relay that must halt, and returns what it said.
fn halted(database: &Database) -> String {
    let mut relay = Relay::spawn(database, &[]);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    relay.log()
}

/// Runs `cdc-relay accept-gap`: its exit code, and everything it said.
fn accept_gap(database: &Database, arguments: &[&str]) -> (Option<i32>, String) {
    let output = command(database).arg("accept-gap").args(arguments).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

/// Publishes ten rows from `first` on and stops.
fn run_once(database: &mut Database, topic: &Topic, first: usize) {
    let relay = Relay::start(database, &[]);
    database.insert(&topic.kind, first, 10);
    topic.read(first + 10);
    relay.stop();
}

fn confirmed(database: &mut Database) -> String {
    let slot = database.slot.clone();
    database.text(&format!(
        "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{slot}'"
    ))
}

#[test]
fn a_checkpoint_covers_whatever_postgres_was_told() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    run_once(&mut database, &topic, 0);
    let body = checkpoints::last(&mut database);
    assert_eq!(body["lsn"], confirmed(&mut database).as_str(), "{body}");
    assert_eq!((&body["seq"], &body["timeline"]), (&0.into(), &1.into()), "{body}");
}

#[test]
fn a_slot_that_was_advanced_by_hand_halts_until_the_gap_is_accepted() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    run_once(&mut database, &topic, 0);
    database.insert(&topic.kind, 10, 5);
    let slot = database.slot.clone();
    database.run(&format!("SELECT pg_replication_slot_advance('{slot}', pg_current_wal_lsn())"));
    let log = halted(&database);
    assert!(log.contains("advanced by hand") && log.contains("cdc-relay accept-gap"), "{log}");
    let (code, told) = accept_gap(&database, &[]);
    assert!(code == Some(65) && told.contains("go on from the slot's confirmed LSN"), "{told}");
    halted(&database);
    assert_eq!(accept_gap(&database, &["--yes"]).0, Some(0));
    let (code, told) = accept_gap(&database, &[]);
    assert!(code == Some(0) && told.contains("nothing to accept"), "{told}");
    let relay = Relay::start(&database, &[]);
    database.insert(&topic.kind, 10, 10);
    assert_complete_and_ordered(&topic.read(20), 20);
    relay.stop();
}

#[test]
fn a_slot_that_was_dropped_is_not_made_again_by_init() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    run_once(&mut database, &topic, 0);
    let slot = database.slot.clone();
    database.run(&format!("SELECT pg_drop_replication_slot('{slot}')"));
    let log = halted(&database);
    assert!(log.contains("does not exist"), "{log}");
    let output = command(&database).arg("init").output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(65) && errors.contains("was dropped"), "{errors}");
    // Nor by a relay that may make the slot.
    let mut relay = Relay::spawn(&database, &[("CDC_RELAY_POSTGRES__CREATE_SLOT", "true")]);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert_eq!(accept_gap(&database, &["--yes"]).0, Some(0));
    run_once(&mut database, &topic, 10);
}

#[test]
fn a_slot_that_was_dropped_and_made_again_behind_our_back_halts() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    run_once(&mut database, &topic, 0);
    let slot = database.slot.clone();
    database.run(&format!("SELECT pg_drop_replication_slot('{slot}')"));
    database.run(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')"));
    let log = halted(&database);
    assert!(log.contains("dropped and created again"), "{log}");
}

#[test]
fn a_log_that_ends_before_the_checkpoint_halts() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    run_once(&mut database, &topic, 0);
    let body = r#"{"lsn":"FFFFFFFF/0","seq":0,"timeline":1,"instance":"i","publication":"p","at":"t"}"#;
    put(checkpoints::TOPIC, &checkpoints::key(&mut database), Some(body));
    // By the default template the topics of all tests would be searched for what the server does not have.
    let route = ("CDC_RELAY_ROUTE__TOPIC", topic.name.as_str());
    let mut relay = Relay::spawn(&database, &[route]);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    let log = relay.log();
    assert!(log.contains("restored from a backup") && log.contains("no event was found in Kafka"), "{log}");
    let accepted = command(&database).args(["accept-gap", "--yes"]).env(route.0, route.1).output().unwrap();
    assert_eq!(accepted.status.code(), Some(0));
    run_once(&mut database, &topic, 10);
}

#[test]
fn without_a_checkpoint_nothing_is_read_and_another_clusters_is_named() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    run_once(&mut database, &topic, 0);
    let body = r#"{"lsn":"0/77","seq":0,"timeline":1,"instance":"i","publication":"p","at":"t"}"#;
    put(checkpoints::TOPIC, &format!("12345/{}", database.slot), Some(body));
    put(checkpoints::TOPIC, &checkpoints::key(&mut database), None);
    let log = halted(&database);
    assert!(log.contains("has no checkpoint") && log.contains("at 0/77 of another cluster, 12345"), "{log}");
    let (code, told) = accept_gap(&database, &["--yes"]);
    assert!(code == Some(0) && told.contains("another cluster"), "{told}");
    run_once(&mut database, &topic, 10);
}

#[test]
fn a_checkpoint_that_cannot_be_read_halts() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    run_once(&mut database, &topic, 0);
    for damaged in ["", "{}", "not json", r#"{"lsn":"x","seq":0}"#] {
        put(checkpoints::TOPIC, &checkpoints::key(&mut database), Some(damaged));
        let log = halted(&database);
        assert!(log.contains("cannot be read"), "{damaged:?}: {log}");
    }
}

#[test]
fn a_gap_is_not_accepted_while_a_relay_streams() {
    let (database, _topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let relay = Relay::start(&database, &[]);
    let (code, told) = accept_gap(&database, &["--through", "now", "--yes"]);
    assert!(code == Some(75) && told.contains("stop every relay"), "{told}");
    relay.stop();
}

#[test]
fn what_a_dropped_publication_left_out_can_be_given_up() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    run_once(&mut database, &topic, 0);
    database.run("DROP PUBLICATION cdc_relay");
    database.insert(&topic.kind, 10, 5);
    database.run("CREATE PUBLICATION cdc_relay FOR TABLE outbox WITH (publish = 'insert')");
    halted(&database);
    let (code, told) = accept_gap(&database, &["--through", "now", "--yes"]);
    assert_eq!(code, Some(0), "{told}");
    run_once(&mut database, &topic, 10);
}

/// After a crash a slot may have forgotten what its checkpoint covers.
#[test]
fn what_is_published_already_cannot_be_given_up() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let slot = database.slot.clone();
    let copy = |from: &str, to: &str| format!("SELECT pg_copy_logical_replication_slot('{from}', '{to}')");
    let drop = |slot: &str| format!("SELECT pg_drop_replication_slot('{slot}')");
    let before = format!("{slot}_before");
    database.run(&copy(&slot, &before));
    run_once(&mut database, &topic, 0);
    for sql in [drop(&slot), copy(&before, &slot), drop(&before)] {
        database.run(&sql);
    }
    let written = checkpoints::all(&mut database).len();
    let fifth = headers(&topic.read(10)[4])[3].1.clone().unwrap();
    for yes in [&[][..], &["--yes"]] {
        let (code, told) = accept_gap(&database, &[&["--through", &fifth], yes].concat());
        assert!(code == Some(0) && told.contains("is published already"), "{told}");
    }
    assert_eq!(checkpoints::all(&mut database).len(), written, "nothing was written");
    run_once(&mut database, &topic, 10);
    assert_eq!(assert_complete_and_ordered(&topic.read(20), 20), 0);
}

#[test]
fn a_clean_restart_and_a_kill_leave_no_doubt() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    for round in 0..3 {
        let relay = Relay::start(&database, &[]);
        database.insert(&topic.kind, round * 200, 200);
        topic.read(round * 200 + 100);
        relay.kill();
    }
    let relay = Relay::start(&database, &[]);
    assert_complete_and_ordered(&topic.read(600), 600);
    let lsn = database.current_lsn();
    eventually("all is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    relay.stop();
}

//! The relay and its servers are killed, cut and refused.

use crate::{
    database::{Database, eventually},
    relay::{Relay, command, init},
    topics::{Topic, assert_complete_and_ordered},
};

#[test]
fn a_relay_that_is_killed_again_and_again_loses_nothing_and_keeps_order() {
    let (mut database, topic) = (Database::new(), Topic::new(3, &[]));
    init(&database);
    let (kind, rounds, each) = (topic.kind.clone(), 5, 2000);
    for round in 0..rounds {
        let relay = Relay::start(&database, &[]);
        database.insert(&kind, round * each, each);
        let wanted = i64::try_from(round * each + 1).unwrap();
        eventually("some of the round has arrived", || (topic.size() >= wanted).then_some(()));
        relay.kill();
    }
    let relay = Relay::start(&database, &[]);
    let lsn = database.current_lsn();
    eventually("everything is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    let messages = topic.read(rounds * each);
    let repeated = assert_complete_and_ordered(&messages, rounds * each);
    println!("{} rows, {repeated} records repeated after {rounds} kills", rounds * each);
    relay.stop();
}

#[test]
fn a_clean_stop_repeats_nothing() {
    let (mut database, topic) = (Database::new(), Topic::new(3, &[]));
    init(&database);
    for round in 0..3 {
        let relay = Relay::start(&database, &[]);
        database.insert(&topic.kind, round * 1000, 1000);
        relay.stop();
    }
    let relay = Relay::start(&database, &[]);
    let messages = topic.read(3000);
    assert_eq!(assert_complete_and_ordered(&messages, 3000), 0);
    relay.stop();
}

#[test]
fn a_session_that_postgres_cuts_is_taken_up_again() {
    let (mut database, topic) = (Database::new(), Topic::new(2, &[]));
    init(&database);
    let relay = Relay::start(&database, &[]);
    for round in 0..5 {
        database.insert(&topic.kind, round * 500, 500);
        let name = database.name.clone();
        database
            .run(&format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{name}'"));
    }
    assert_complete_and_ordered(&topic.read(2500), 2500);
    assert!(relay.metric("cdc_relay_sessions_total").unwrap() > 1.0);
    relay.stop();
}

#[test]
fn a_topic_that_is_missing_halts_with_the_command_and_nothing_is_lost() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let mut relay = Relay::start(&database, &[]);
    database.insert(&topic.kind, 0, 5);
    database.run("INSERT INTO outbox VALUES (gen_random_uuid(), 'no-such-kind', 'k', 'T', '{}')");
    database.insert(&topic.kind, 5, 5);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(
        relay.log().contains("kafka-topics.sh --create --topic outbox.event.no-such-kind"),
        "{}",
        relay.log()
    );
    let relay = Relay::start(&database, &[("CDC_RELAY_ROUTE__TOPIC", &topic.name)]);
    eventually("all eleven are there", || (topic.size() >= 11).then_some(()));
    relay.stop();
}

#[test]
fn a_row_that_cannot_be_published_can_be_left_out_by_the_hints_command_and_nothing_else_is() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    database.insert(&topic.kind, 0, 500);
    database.run("INSERT INTO outbox VALUES (gen_random_uuid(), 'not a topic', 'k', 'T', '{}')");
    database.insert(&topic.kind, 500, 500);
    let mut relay = Relay::spawn(&database, &[]);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    let log = relay.log();
    assert!(log.contains("cdc-relay accept-gap --through"), "{log}");
    let lsn = log.split("commit LSN ").nth(1).and_then(|rest| rest.split(',').next()).unwrap();
    let accept = |yes: &[&str]| {
        let output = command(&database).args(["accept-gap", "--through", lsn]).args(yes).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, told) = accept(&[]);
    assert!(code == Some(65) && told.contains("would        move the slot on to"), "{told}");
    assert_eq!(accept(&["--yes"]).0, Some(0));
    assert_eq!(accept(&["--yes"]).0, Some(0), "it may be said twice");
    let relay = Relay::start(&database, &[]);
    assert_eq!(assert_complete_and_ordered(&topic.read(1000), 1000), 0);
    relay.stop();
}

#[test]
fn a_slot_of_another_database_is_refused_although_it_is_in_use() {
    let (mut database, other) = (Database::new(), Database::new());
    init(&other);
    let relay = Relay::start(&other, &[]);
    database.slot.clone_from(&other.slot);
    let mut lost = Relay::spawn(&database, &[]);
    assert_eq!(lost.wait().code(), Some(65), "{}", lost.log());
    assert!(lost.log().contains("belongs to database"), "{}", lost.log());
    relay.stop();
}

#[test]
fn a_row_that_is_too_large_halts_and_is_published_once_the_limit_is_raised() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[("max.message.bytes", "1000000")]));
    init(&database);
    let mut relay = Relay::start(&database, &[]);
    let kind = &topic.kind;
    let large = format!(
        "INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'k', 'T', to_jsonb(repeat('x', 2000000)))"
    );
    database.run(&large);
    database.run(&format!("INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'k', 'T', '{{}}')"));
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(relay.log().contains("--add-config max.message.bytes=N"), "{}", relay.log());
    assert_eq!(topic.size(), 0);
    topic.configure("max.message.bytes", "3000000");
    let relay = Relay::start(&database, &[]);
    assert_eq!(topic.read(2).len(), 2);
    relay.stop();
}

#[test]
fn a_record_that_the_broker_refuses_halts_and_nothing_behind_it_is_confirmed() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[("max.message.bytes", "10000")]));
    init(&database);
    let before = database.current_lsn();
    let mut relay = Relay::start(&database, &[]);
    let kind = &topic.kind;
    let id = uuid::Uuid::now_v7();
    database.run(&format!(
        "INSERT INTO outbox VALUES ('{id}', '{kind}', 'k', 'T', to_jsonb(repeat('x', 20000)))"
    ));
    let lsn = database.current_lsn();
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(
        relay.log().contains(&format!("larger than topic {:?} takes", topic.name))
            && relay.log().contains(&format!("outbox row {id} (commit LSN ")),
        "{}",
        relay.log()
    );
    assert_eq!(topic.size(), 0);
    assert!(
        database.unconfirmed_bytes(&lsn) > 0,
        "the row's commit is confirmed; before it the log was at {before}"
    );
}

#[test]
fn rows_that_fit_are_published_although_a_batch_of_them_does_not() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[("max.message.bytes", "10000")]));
    init(&database);
    database.insert(&topic.kind, 0, 2000);
    let relay = Relay::start(&database, &[("CDC_RELAY_KAFKA__PROPERTIES__LINGER_MS", "100")]);
    assert_complete_and_ordered(&topic.read(2000), 2000);
    assert!(relay.log().contains("batch.size"), "{}", relay.log());
    relay.stop();
}

#[test]
fn a_record_that_the_topic_refuses_for_its_age_halts() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[("message.timestamp.before.max.ms", "1")]));
    init(&database);
    database.insert(&topic.kind, 0, 1);
    let mut relay = Relay::spawn(&database, &[]);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(relay.log().contains("message.timestamp.before.max.ms"), "{}", relay.log());
}

#[test]
fn a_publication_that_is_dropped_while_rows_are_written_halts_and_confirms_none_of_them() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let mut relay = Relay::start(&database, &[]);
    database.run("DROP PUBLICATION cdc_relay");
    database.insert(&topic.kind, 0, 1);
    let lsn = database.current_lsn();
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(relay.log().contains("publication"), "{}", relay.log());
    assert!(database.unconfirmed_bytes(&lsn) > 0);
    // It is back, but was not there where the row is in the log.
    database.run("CREATE PUBLICATION cdc_relay FOR TABLE outbox WITH (publish = 'insert')");
    let mut relay = Relay::spawn(&database, &[]);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(database.unconfirmed_bytes(&lsn) > 0);
}

#[test]
fn a_publication_without_the_tables_inserts_is_refused_before_anything_is_confirmed() {
    let mut database = Database::new();
    init(&database);
    database.run("CREATE TABLE another (n int)");
    let before = database.current_lsn();
    let slot = database.slot.clone();
    let confirmed =
        format!("SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{slot}'");
    let at = database.text(&confirmed);
    for (change, said) in [
        ("ALTER PUBLICATION cdc_relay SET (publish = 'update')", "does not publish inserts"),
        (
            "ALTER PUBLICATION cdc_relay SET (publish = 'insert'); ALTER PUBLICATION cdc_relay SET TABLE another",
            "does not have the table public.outbox",
        ),
    ] {
        database.run(change);
        let mut relay = Relay::spawn(&database, &[]);
        assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
        assert!(relay.log().contains(said), "{}", relay.log());
        assert_eq!(database.text(&confirmed), at, "the log was at {before}");
    }
}

#[test]
fn the_servers_silence_means_nothing_while_kafka_keeps_us_from_listening() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    database.insert(&topic.kind, 0, 10);
    let mut relay = Relay::spawn(
        &database,
        &[("CDC_RELAY_KAFKA__BROKERS", "127.0.0.1:1"), ("CDC_RELAY_POSTGRES__SILENCE_TIMEOUT_SECONDS", "1")],
    );
    relay.wait_for_state("starting");
    let up_for = |seconds: f64| relay.metric("cdc_relay_process_uptime_seconds").filter(|s| *s > seconds);
    eventually("five silence time-outs have passed", || up_for(5.0));
    assert_eq!(relay.metric("cdc_relay_sessions_total"), Some(1.0), "{}", relay.log());
    relay.kill();
}

#[test]
fn without_kafka_the_relay_gives_up_after_the_configured_time_and_can_be_stopped() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    database.insert(&topic.kind, 0, 10);
    let nobody = ("CDC_RELAY_KAFKA__BROKERS", "127.0.0.1:1");
    let mut relay = Relay::spawn(&database, &[nobody, ("CDC_RELAY_POSTGRES__GIVE_UP_SECONDS", "2")]);
    assert_eq!(relay.wait().code(), Some(75), "{}", relay.log());
    let mut relay = Relay::spawn(&database, &[nobody, ("CDC_RELAY_LIMITS__DRAIN_SECONDS", "1")]);
    relay.wait_for_state("starting");
    relay.stop();
    let relay = Relay::start(&database, &[]);
    assert_complete_and_ordered(&topic.read(10), 10);
    relay.stop();
}

#[test]
fn time_with_nothing_to_send_is_no_reason_to_give_up() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let relay = Relay::start(&database, &[("CDC_RELAY_POSTGRES__GIVE_UP_SECONDS", "1")]);
    // Others write without a pause, so there is always something more to confirm.
    database.run("CREATE TABLE other (id int)");
    let up_for = |seconds: f64| relay.metric("cdc_relay_process_uptime_seconds").filter(|s| *s > seconds);
    eventually("it has been idle for longer than it would wait", || {
        database.run("DO 'BEGIN FOR n IN 1..5000 LOOP INSERT INTO other VALUES (n); COMMIT; END LOOP; END'");
        up_for(3.0)
    });
    database.insert(&topic.kind, 0, 100);
    assert_complete_and_ordered(&topic.read(100), 100);
    relay.stop();
}

#[test]
fn two_relays_that_may_make_the_slot_make_one() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    let make = [("CDC_RELAY_POSTGRES__CREATE_SLOT", "true")];
    let (mut a, mut b) = (Relay::spawn(&database, &make), Relay::spawn(&database, &make));
    let streaming = |relay: &Relay| relay.metric("cdc_relay_streaming") == Some(1.0);
    eventually("one of them streams", || (streaming(&a) || streaming(&b)).then_some(()));
    let standby = if streaming(&a) { &mut b } else { &mut a };
    standby.wait_for_state("standby");
    database.insert(&topic.kind, 0, 10);
    assert_complete_and_ordered(&topic.read(10), 10);
    a.stop();
    b.stop();
}

#[test]
fn a_broker_that_is_not_there_is_waited_for_within_bounds() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    // Nobody listens on port 1; the relay must neither end nor confirm.
    let mut relay = Relay::spawn(&database, &[("CDC_RELAY_KAFKA__BROKERS", "127.0.0.1:1")]);
    relay.wait_for_state("starting");
    database.insert(&topic.kind, 0, 2000);
    let lsn = database.current_lsn();
    eventually("the relay has said so", || {
        relay.log().contains("no Kafka broker can be reached").then_some(())
    });
    eventually("the metric says so", || relay.metric("cdc_relay_kafka_up").filter(|up| *up == 0.0));
    assert!(database.unconfirmed_bytes(&lsn) > 0);
    relay.kill();
    let relay = Relay::start(&database, &[]);
    assert_complete_and_ordered(&topic.read(2000), 2000);
    relay.stop();
}

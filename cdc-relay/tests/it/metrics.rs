//! What the relay tells about itself, against what the servers say and what was published.

use std::collections::BTreeSet;

use sqlx::{Connection as _, Executor as _, PgConnection};

use crate::{
    database::{Database, eventually},
    relay::{Relay, command, init},
    stack::Stack,
    topics::Topic,
};

const RULES: &str = include_str!("../../alerts/cdc-relay.rules.yml");
const OPERATING: &str = include_str!("../../../OPERATING.md");

/// A metric that has the slot for a label.
fn of_slot(relay: &Relay, database: &Database, name: &str) -> Option<f64> {
    relay.labelled(&format!("cdc_relay_{name}"), &format!("slot=\"{}\"", database.slot))
}

fn is_in(relay: &Relay, state: &str) -> bool {
    relay.labelled("cdc_relay_state", &format!("state=\"{state}\"")) == Some(1.0)
}

/// What a link to a heading of a document ends with.
fn anchors(document: &str) -> BTreeSet<String> {
    let mut is_code = false;
    let headings = document.lines().filter_map(|line| {
        is_code ^= line.trim_start().starts_with("```");
        line.strip_prefix('#').filter(|_| !is_code)
    });
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    let anchor = |heading: &str| {
        let heading = heading.trim_start_matches('#').trim().to_lowercase();
        heading.chars().filter(kept).map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn every_alert_has_its_paragraph() {
    let anchors = anchors(OPERATING);
    let value = |key: &'static str| RULES.lines().filter_map(move |line| line.trim_start().strip_prefix(key));
    let alerts: Vec<_> = value("- alert: ").collect();
    let books: Vec<_> = value("runbook_url: ").collect();
    assert!(alerts.len() > 10 && alerts.len() == books.len(), "{alerts:?} {books:?}");
    for (alert, book) in alerts.iter().zip(&books) {
        let anchor = book.strip_prefix("OPERATING.md#").unwrap();
        assert!(anchors.contains(anchor), "{alert} points to {book}");
        let row =
            OPERATING.lines().find(|line| line.starts_with('|') && line.contains(&format!("`{alert}`")));
        assert!(
            row.is_some_and(|row| row.contains(&format!("(#{anchor})"))),
            "{alert} in the table of symptoms"
        );
    }
    for link in OPERATING.split("](#").skip(1).filter_map(|rest| rest.split(')').next()) {
        assert!(anchors.contains(link), "#{link}");
    }
}

#[test]
fn what_is_published_is_counted_and_timed_with_either_delivery() {
    for delivery in ["at-least-once", "exactly-once"] {
        let (mut database, topic) = (Database::new(), Topic::new(2, &[]));
        init(&database);
        let relay = Relay::start(&database, &[("CDC_RELAY_KAFKA__DELIVERY", delivery)]);
        database.insert(&topic.kind, 0, 100);
        let kind = &topic.kind;
        database.run(&format!(
            "INSERT INTO outbox SELECT gen_random_uuid(), '{kind}', 'a', 'T', '{{}}' FROM generate_series(1, 50)"
        ));
        database.run("CREATE TABLE other AS SELECT 1");
        let count = |name: &str| relay.metric(&format!("cdc_relay_{name}"));
        eventually("all is published", || count("transactions_published_total").filter(|n| *n >= 101.0));
        eventually("nothing lags", || of_slot(&relay, &database, "lag_seconds").filter(|lag| *lag == 0.0));
        assert_eq!(count("transactions_published_total"), Some(101.0));
        assert_eq!(count("records_acknowledged_total"), Some(150.0));
        assert!(count("acknowledged_bytes_total") > Some(150.0 * 256.0));
        let times = ["acknowledgement_seconds", "commit_to_acknowledgement_seconds"].map(|name| {
            assert_eq!(count(&format!("{name}_count")), Some(101.0));
            assert_eq!(relay.labelled(&format!("cdc_relay_{name}_bucket"), "le=\"+Inf\""), Some(101.0));
            count(&format!("{name}_sum")).unwrap()
        });
        // One machine, one clock: a transaction is committed before it is read.
        assert!(times[0] > 0.0 && times[1] >= times[0] && times[1] < 101.0 * 60.0, "{times:?}");
        // The server sets no limit, so nobody knows how far the slot is from it.
        eventually("the slot was looked at twice", || of_slot(&relay, &database, "wal_bytes_per_second"));
        assert!(of_slot(&relay, &database, "slot_confirmed_lag_bytes").is_some());
        for unknown in ["slot_safe_wal_bytes", "slot_time_to_loss_seconds"] {
            assert_eq!(of_slot(&relay, &database, unknown), None, "{unknown}");
        }
        relay.stop();
    }
}

#[test]
fn a_relay_that_does_not_stream_says_what_it_does_and_makes_up_no_numbers() {
    let database = Database::new();
    init(&database);
    let mut lonely = Relay::spawn(&database, &[("CDC_RELAY_KAFKA__BROKERS", "127.0.0.1:1")]);
    lonely.wait_for_state("starting");
    eventually("Kafka is away", || lonely.metric("cdc_relay_kafka_up").filter(|up| *up == 0.0));
    assert!(is_in(&lonely, "connecting") && !lonely.is_streaming());
    assert_eq!(of_slot(&lonely, &database, "lag_seconds"), None);
    lonely.kill();
    let active = Relay::start(&database, &[]);
    let mut standby = Relay::spawn(&database, &[]);
    standby.wait_for_state("standby");
    eventually("it has looked at the slot", || of_slot(&standby, &database, "slot_confirmed_lag_bytes"));
    assert!(is_in(&standby, "standby") && is_in(&active, "streaming"));
    let held = standby.labelled("cdc_relay_errors_total", "kind=\"slot_in_use\"");
    assert_eq!((held, standby.sum("cdc_relay_state")), (Some(1.0), Some(1)), "one of the states");
    for unknown in ["kafka_up", "parked_aggregates", "received_lsn"] {
        assert_eq!(standby.metric(&format!("cdc_relay_{unknown}")), None, "{unknown}");
    }
    assert_eq!(of_slot(&standby, &database, "lag_seconds"), None);
    standby.stop();
    active.stop();
}

#[test]
fn the_slot_is_shown_as_the_server_sees_it_and_readiness_follows_kafka() {
    let stack = Stack::start("metrics", &["--postgres-set", "max_slot_wal_keep_size=1GB"]);
    the_slots_gauges_agree_with_the_server_and_the_rules_with_the_gauges(&stack);
    readiness_follows_the_oldest_record(&stack);
}

fn the_slots_gauges_agree_with_the_server_and_the_rules_with_the_gauges(stack: &Stack) {
    let mut database = Database::on(&stack.servers);
    let environment = [
        ("CDC_RELAY_POISON__TOO_LARGE", "dead-letter"),
        ("CDC_RELAY_RETENTION__MODE", "delete"),
        ("CDC_RELAY_RETENTION__OLDER_THAN_SECONDS", "10"),
    ];
    let name = database.name.clone();
    database.run(&format!(
        "ALTER TABLE outbox ADD created_at timestamptz; GRANT SELECT, DELETE ON outbox TO {name}"
    ));
    assert!(command(&database).arg("init").envs(environment).status().unwrap().success());
    let relay = Relay::start(&database, &environment);

    // A transaction that is open keeps log for the slot behind what is confirmed.
    database.run("CREATE TABLE busy (n int, filler text)");
    let mut open = database.runtime.block_on(PgConnection::connect_with(&database.options)).unwrap();
    database.runtime.block_on(open.execute("BEGIN; INSERT INTO busy VALUES (1, '')")).unwrap();
    for _ in 0..3 {
        database.run(
            "INSERT INTO busy SELECT n, repeat(md5(random()::text), 32) FROM generate_series(1, 20000) n",
        );
    }
    let slot = database.slot.clone();
    eventually("the gauges agree with the server", || {
        let row = |database: &mut Database, what: &str| {
            database
                .text(&format!("SELECT ({what})::text FROM pg_replication_slots WHERE slot_name = '{slot}'"))
        };
        let agrees = |database: &mut Database, gauge: &str, what: &str| {
            let said = of_slot(&relay, database, gauge)?;
            let is: f64 = row(database, what).parse().unwrap();
            ((said - is).abs() < 1_000_000.0).then_some(said)
        };
        let database = &mut database;
        let lag = |lsn: &str| format!("pg_wal_lsn_diff(pg_current_wal_lsn(), {lsn})");
        let confirmed = agrees(database, "slot_confirmed_lag_bytes", &lag("confirmed_flush_lsn"))?;
        let restart = agrees(database, "slot_restart_lag_bytes", &lag("restart_lsn"))?;
        let safe = agrees(database, "slot_safe_wal_bytes", "safe_wal_size")?;
        assert!(safe > 0.0);
        let rate = of_slot(&relay, database, "wal_bytes_per_second")?;
        let left = of_slot(&relay, database, "slot_time_to_loss_seconds")?;
        let is_estimate = (left * rate - safe).abs() < safe / 100.0;
        (is_estimate && restart > 50_000_000.0 && confirmed < 5_000_000.0).then_some(())
    });
    assert_eq!(relay.labelled("cdc_relay_slot_wal_status", "status=\"reserved\""), Some(1.0));
    assert_eq!(relay.labelled("cdc_relay_slot_wal_status", "status=\"lost\""), Some(0.0));
    database.runtime.block_on(open.close()).unwrap();

    let overdue =
        eventually("the outbox was looked at", || relay.metric("cdc_relay_retention_overdue_seconds"));
    assert_eq!(overdue.to_bits(), 0.0_f64.to_bits(), "the outbox is empty");
    let words = RULES.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let named: BTreeSet<_> = words.filter(|word| word.starts_with("cdc_relay_")).collect();
    assert!(named.len() > 10, "{named:?}");
    let metrics = relay.metrics().unwrap();
    let exported: BTreeSet<_> = metrics.lines().filter_map(|line| line.split(['{', ' ']).next()).collect();
    let missing: Vec<_> = named.difference(&exported).collect();
    assert!(missing.is_empty(), "the rules name what is not exported: {missing:?}\n{metrics}");
    relay.stop();
}

/// A record that waits for Kafka too long makes the relay unready until it is acknowledged.
fn readiness_follows_the_oldest_record(stack: &Stack) {
    let (mut database, topic) = (Database::on(&stack.servers), Topic::on(&stack.servers, 1, &[]));
    init(&database);
    let environment =
        [("CDC_RELAY_HTTP__UNREADY_AFTER_SECONDS", "1"), ("CDC_RELAY_LIMITS__IN_FLIGHT_BYTES", "65536")];
    let relay = Relay::start(&database, &environment);
    assert!(relay.readiness().unwrap().0 == 200 && is_in(&relay, "streaming"));
    stack.stop("kafka-1");
    // More than may be in flight.
    database.insert(&topic.kind, 0, 500);
    let (_, why) = eventually("it is not ready", || relay.readiness().filter(|(status, _)| *status == 503));
    assert!(why.contains("\"stalled\"") && why.contains("http.unready_after_seconds"), "{why}");
    eventually("it is paused", || is_in(&relay, "paused").then_some(()));
    assert!(!is_in(&relay, "streaming") && relay.is_streaming(), "it has the slot all the same");
    let lag = of_slot(&relay, &database, "lag_seconds");
    assert!(lag >= Some(1.0), "{lag:?}");
    stack.start_again("kafka-1");
    eventually("it is ready again", || relay.readiness().filter(|(status, _)| *status == 200));
    topic.read(500);
    eventually("it goes on", || is_in(&relay, "streaming").then_some(()));
    eventually("nothing lags", || of_slot(&relay, &database, "lag_seconds").filter(|lag| *lag == 0.0));

    // Without a session there is no position.
    let positions = || ["received_lsn", "confirmed_lsn"].map(|lsn| relay.metric(&format!("cdc_relay_{lsn}")));
    assert!(positions().iter().all(Option::is_some));
    stack.stop("postgres");
    eventually("it tries to connect", || is_in(&relay, "connecting").then_some(()));
    assert_eq!(positions(), [None, None]);
    stack.start_again("postgres");
    eventually("they are known again", || positions().iter().all(Option::is_some).then_some(()));
    relay.stop();
}

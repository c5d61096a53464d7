//! The primary is lost and a standby promoted. Slots survive that from version 17 on; for earlier ones, what is
//! refused is tested in `init.rs`.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use rdkafka::Message as _;
use serde_json::Value;
use sqlx::{Connection as _, Executor as _, PgConnection};

use crate::{
    checkpoints,
    database::{eventually, unique},
    pair::{Pair, READY, major_version},
    relay::Relay,
    topics::{assert_complete_and_ordered, headers},
};

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Both servers, and the test's own topic only: by the default template those of all tests could be this relay's.
fn start(pair: &Pair) -> Relay {
    let mut relay = spawn(pair);
    relay.wait_for_state("streaming");
    relay
}

fn spawn(pair: &Pair) -> Relay {
    spawn_with(pair, "at-least-once")
}

fn spawn_with(pair: &Pair, delivery: &str) -> Relay {
    let route = ("CDC_RELAY_ROUTE__TOPIC", pair.topic.name.as_str());
    let delivery = ("CDC_RELAY_KAFKA__DELIVERY", delivery);
    Relay::spawn(&pair.database, &[("CDC_RELAY_POSTGRES__URL", &pair.url()), route, delivery])
}

/// Starts a relay that must halt, and returns what it said.
fn halted(pair: &Pair) -> String {
    let mut relay = spawn(pair);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    relay.log()
}

/// Inserts rows one by one at whichever server takes writes, until it is told to stop.
fn write_on(ports: [u16; 2], name: &str, kind: &str, written: &AtomicUsize, stop: &AtomicBool) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        while !stop.load(Ordering::Relaxed) {
            for port in ports {
                let url = format!("postgres://postgres@127.0.0.1:{port}/{name}");
                let Ok(mut connection) = PgConnection::connect(&url).await else { continue };
                while !stop.load(Ordering::Relaxed) {
                    let n = written.fetch_add(1, Ordering::Relaxed);
                    let insert = format!(
                        "INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'a' || {n} % 10, 'Counted', '{{\"n\": {n}}}')"
                    );
                    if connection.execute(sqlx::AssertSqlSafe(insert)).await.is_err() {
                        break;
                    }
                }
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    });
}

#[test]
fn a_promotion_under_load_is_followed_and_kafka_has_what_the_new_primary_has() {
    promoted_under_load("at-least-once");
}

#[test]
fn a_promotion_under_load_is_followed_and_kafka_has_each_row_once() {
    promoted_under_load("exactly-once");
}

fn promoted_under_load(delivery: &str) {
    if major_version() < 17 {
        return;
    }
    let standby = [READY[0], READY[1], ("sync_replication_slots", "on")];
    let mut pair = Pair::start(&[("synchronized_standby_slots", "standby1")], &standby);
    pair.init();
    let mut relay = spawn_with(&pair, delivery);
    relay.wait_for_state("streaming");
    let (written, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (name, kind) = (pair.database.name.clone(), pair.topic.kind.clone());
    let ports = [pair.primary.port, pair.standby.port];
    std::thread::scope(|scope| {
        scope.spawn(|| write_on(ports, &name, &kind, &written, &stop));
        let more = |what: &str, count: usize| {
            let wanted = written.load(Ordering::Relaxed) + count;
            eventually(what, || (written.load(Ordering::Relaxed) >= wanted).then_some(()));
        };
        eventually("the slot is synchronised", || pair.is_synced().then_some(()));
        more("rows are written before", 500);
        let size = pair.topic.size();
        eventually("the relay publishes", || (pair.topic.size() > size).then_some(()));
        pair.fail_over();
        more("rows are written after", 500);
        stop.store(true, Ordering::Relaxed);
    });
    let lsn = pair.database.current_lsn();
    eventually("everything is confirmed", || (pair.database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    let ids = pair.database.text("SELECT string_agg(id::text, ' ') FROM outbox");
    let in_postgres: BTreeSet<String> = ids.split(' ').map(str::to_owned).collect();
    let records = pair.topic.read(in_postgres.len());
    let id = |record| headers(record).into_iter().find(|(name, _)| name == "id").unwrap().1.unwrap();
    let in_kafka: BTreeSet<String> = records.iter().map(id).collect();
    assert_eq!(in_kafka, in_postgres, "with synchronized_standby_slots neither has more than the other");
    let (mut seen, mut last) = (BTreeSet::new(), std::collections::BTreeMap::new());
    for record in &records {
        let n = serde_json::from_slice::<Value>(record.payload().unwrap()).unwrap()["n"].as_i64().unwrap();
        if seen.insert(n) {
            let before = last.insert(text(record.key().unwrap()), n);
            assert!(before.is_none_or(|before| before < n), "{n} comes first after {before:?}");
        }
    }
    let repeated = records.len() - in_kafka.len();
    println!("{delivery}: {} rows, {repeated} records repeated", in_postgres.len());
    assert!(delivery == "at-least-once" || repeated == 0, "{repeated} records are there twice");
    relay.stop();
    let timelines: Vec<_> =
        checkpoints::all(&mut pair.database).iter().map(|c| c["timeline"].as_i64().unwrap()).collect();
    assert!(timelines.is_sorted() && timelines.contains(&1) && timelines.last() == Some(&2), "{timelines:?}");
}

#[test]
fn what_a_slot_that_is_behind_sends_again_is_passed_over() {
    if major_version() < 17 {
        return;
    }
    for delivery in ["at-least-once", "exactly-once"] {
        passes_over(delivery);
    }
}

/// Fails over to a slot that was synchronised halfway.
fn passes_over(delivery: &str) {
    let mut pair = Pair::start(&[], &READY);
    pair.init();
    let route = ("CDC_RELAY_ROUTE__TOPIC", pair.topic.name.as_str());
    let delivery = ("CDC_RELAY_KAFKA__DELIVERY", delivery);
    let mut relay =
        Relay::start(&pair.database, &[("CDC_RELAY_POSTGRES__URL", &pair.url()), route, delivery]);
    let kind = pair.topic.kind.clone();
    pair.database.insert(&kind, 0, 20);
    pair.topic.read(20);
    pair.sync();
    pair.database.insert(&kind, 20, 20);
    let lsn = pair.database.current_lsn();
    eventually("everything is confirmed", || (pair.database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    pair.catch_up();
    pair.fail_over();
    pair.database.insert(&kind, 40, 20);
    pair.topic.read(60);
    relay.wait_for_state("streaming");
    let lsn = pair.database.current_lsn();
    eventually("everything is confirmed", || (pair.database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    assert_eq!(assert_complete_and_ordered(&pair.topic.read(60), 60), 0);
    assert!(relay.metric("cdc_relay_passed_over_rows_total") >= Some(20.0), "the slot was not behind");
    relay.stop();
}

#[test]
fn what_the_lost_primary_had_alone_is_listed_and_is_for_a_person_to_decide() {
    if major_version() < 17 {
        return;
    }
    let mut pair = Pair::start(&[], &READY);
    pair.init();
    let relay = start(&pair);
    let kind = pair.topic.kind.clone();
    pair.database.insert(&kind, 0, 20);
    pair.topic.read(20);
    pair.sync();
    pair.catch_up();
    pair.cut();
    pair.database.insert(&kind, 20, 10);
    pair.topic.read(30);
    relay.stop();
    pair.fail_over();

    let log = halted(&pair);
    assert!(log.contains("10 events exist only in Kafka") && log.contains("cdc-relay accept-gap"), "{log}");
    let records = pair.topic.read(30);
    let lost = &records[20..];
    let first = lost[0].offset();
    let lost: Vec<_> =
        lost.iter().map(|r| (headers(r)[0].1.clone().unwrap(), headers(r)[3].1.clone().unwrap())).collect();
    assert!(
        log.contains(&format!(
            "{} (Counted of {kind}/a0, {}/0/{first}, LSN {})",
            lost[0].0, pair.topic.name, lost[0].1
        )),
        "{log}"
    );

    let route = ("CDC_RELAY_ROUTE__TOPIC", pair.topic.name.as_str());
    let output = pair.run(&["accept-gap", "--json"], &[route]);
    assert_eq!(output.status.code(), Some(65));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let events = told["onlyInKafka"]["events"].as_array().unwrap();
    let events: Vec<_> =
        events.iter().map(|e| (e["id"].as_str().unwrap(), e["lsn"].as_str().unwrap())).collect();
    assert_eq!(events, lost.iter().map(|(id, lsn)| (id.as_str(), lsn.as_str())).collect::<Vec<_>>());
    let table = text(&pair.run(&["accept-gap"], &[route]).stdout);
    assert!(lost.iter().all(|(id, _)| table.contains(id)) && table.contains("left timeline 1"), "{table}");
    halted(&pair);

    assert_eq!(pair.run(&["accept-gap", "--yes"], &[route]).status.code(), Some(0));
    let relay = start(&pair);
    pair.database.insert(&kind, 30, 10);
    assert_complete_and_ordered(&pair.topic.read(40), 40);
    let accepted = pair.run(&["accept-gap"], &[]);
    assert_eq!(accepted.status.code(), Some(75), "in use: {}", text(&accepted.stderr));
    relay.stop();
    assert_eq!(pair.run(&["accept-gap"], &[]).status.code(), Some(0));
}

#[test]
fn a_slot_that_did_not_survive_halts_and_nothing_is_skipped_in_silence() {
    // On 15 and 16 no slot survives.
    let ready = if major_version() < 17 { [READY[0], READY[1]] } else { READY };
    let mut pair = Pair::start(&[], &ready);
    let made = pair.run(&["init"], &[]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let mut relay = start(&pair);
    let kind = pair.topic.kind.clone();
    pair.database.insert(&kind, 0, 10);
    pair.topic.read(10);
    pair.catch_up();
    pair.fail_over();
    pair.database.insert(&kind, 10, 5);
    // The one that runs, a new one, and one that may make slots.
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(relay.log().contains("does not exist") && relay.log().contains("accept-gap"), "{}", relay.log());
    halted(&pair);
    let init = pair.run(&["init"], &[]);
    assert!(
        init.status.code() == Some(65) && text(&init.stderr).contains("was dropped"),
        "{}",
        text(&init.stderr)
    );
    assert_eq!(pair.run(&["accept-gap", "--yes"], &[]).status.code(), Some(0));
    let relay = start(&pair);
    // What the new slot does not have is taken from the table by hand: here, written again.
    pair.database.run("DELETE FROM outbox WHERE (payload ->> 'n')::int >= 10");
    pair.database.insert(&kind, 10, 10);
    assert_complete_and_ordered(&pair.topic.read(20), 20);
    relay.stop();
}

#[test]
fn a_slot_that_is_made_in_the_place_of_a_lost_one_is_synchronised_again() {
    if major_version() < 17 {
        return;
    }
    let mut pair = Pair::start(&[("max_slot_wal_keep_size", "1MB")], &[]);
    pair.init();
    let sql = format!(
        "SELECT wal_status || failover FROM pg_replication_slots WHERE slot_name = '{}'",
        pair.database.slot
    );
    eventually("the slot is lost", || {
        pair.database.run("SELECT pg_logical_emit_message(false, '', repeat('x', 1000000)), pg_switch_wal()");
        pair.database.run("CHECKPOINT");
        (pair.database.text(&sql) == "losttrue").then_some(())
    });
    let output = pair.run(&["accept-gap", "--yes"], &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(pair.database.text(&sql), "reservedtrue");
}

#[test]
fn an_old_primary_that_comes_back_is_not_taken_for_the_new_one() {
    if major_version() < 17 {
        return;
    }
    let mut pair = Pair::start(&[], &READY);
    pair.init();
    let relay = start(&pair);
    let kind = pair.topic.kind.clone();
    pair.database.insert(&kind, 0, 10);
    pair.topic.read(10);
    pair.sync();
    pair.catch_up();
    pair.fail_over();
    pair.database.insert(&kind, 10, 10);
    eventually("the relay goes on", || (pair.topic.size() >= 20).then_some(()));
    relay.stop();
    // It comes back alone, and goes on by itself for longer than the checkpoint.
    pair.standby.kill();
    pair.come_back();
    pair.database.run(&format!("SELECT pg_logical_emit_message(true, '{}', repeat('x', 100000))", unique()));
    let log = halted(&pair);
    assert!(log.contains("is on timeline 2, and the server is on timeline 1"), "{log}");
}

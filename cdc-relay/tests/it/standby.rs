//! Several relays on one slot: one streams, the others stand by and take over.

use std::{net::TcpListener, time::Instant};

use rdkafka::message::OwnedMessage;
use rustix::process::Signal;

use crate::{
    checkpoints,
    database::{Database, eventually},
    load::Load,
    network::{Network, free_ports, pass_on},
    relay::{Relay, init},
    topics::{Topic, assert_complete_and_ordered},
};

/// A delivery mode, and what it promises of repetitions.
struct Delivery {
    environment: &'static [(&'static str, &'static str)],
    may_repeat: bool,
}

const AT_LEAST_ONCE: Delivery = Delivery { environment: &[], may_repeat: true };
const EXACTLY_ONCE: Delivery =
    Delivery { environment: &[("CDC_RELAY_KAFKA__DELIVERY", "exactly-once")], may_repeat: false };

impl Delivery {
    /// Asserts what this mode promises of who publishes: one at a time, and at least `least` in turn.
    fn assert_one_at_a_time(&self, database: &mut Database, least: usize) {
        if self.may_repeat {
            return;
        }
        let writers = checkpoints::assert_one_writes_at_a_time(database);
        assert!(writers.len() > least, "{writers:?}, the first of which is init");
    }

    /// Asserts what both modes promise, and that nothing is there twice where that is promised. How many records
    /// were repetitions.
    fn assert(&self, messages: &[OwnedMessage], count: usize) -> usize {
        let repeated = assert_complete_and_ordered(messages, count);
        assert!(self.may_repeat || repeated == 0, "{repeated} records are there twice");
        repeated
    }
}

/// The one that streams.
fn active(relays: &[Relay]) -> usize {
    let streams = || relays.iter().position(Relay::is_streaming);
    eventually("one of them streams", streams)
}

/// Waits until more records are there than now.
fn wait_for_progress(topic: &Topic) {
    let before = topic.size();
    eventually("more has arrived", || (topic.size() > before).then_some(()));
}

/// What a relay's connections are called in `pg_stat_activity`.
fn name(relay: &Relay) -> String {
    format!("cdc-relay/{}", instance(relay))
}

fn instance(relay: &Relay) -> String {
    format!("{}/{}", rustix::system::uname().nodename().to_str().unwrap(), relay.child.id())
}

/// How many threads the process has for Kafka.
fn kafka_threads(relay: &Relay) -> usize {
    let threads = std::fs::read_dir(format!("/proc/{}/task", relay.child.id())).unwrap();
    let names = threads.map(|t| std::fs::read_to_string(t.unwrap().path().join("comm")).unwrap_or_default());
    names.filter(|name| name.starts_with("rdk:")).count()
}

#[test]
fn standbys_say_who_is_active_and_ask_neither_for_the_slot_nor_for_kafka() {
    let database = Database::new();
    init(&database);
    let first = Relay::start(&database, &[]);
    let mut others = [Relay::spawn(&database, &[]), Relay::spawn(&database, &[])];
    let active_name = name(&first);
    for standby in &mut others {
        standby.wait_for_state("standby");
        let health = standby.health();
        assert!(health.contains("\"ready\":true"), "{health}");
        assert!(
            health.contains(&format!("is held by {active_name} from 127.0.0.1 by server process")),
            "{health}"
        );
        assert_eq!(standby.metric("cdc_relay_standby"), Some(1.0));
        assert_eq!(standby.sum(&format!("cdc_relay_slot_holder{{application=\"{active_name}\",")), Some(1));
    }
    let started = others[0].metric("cdc_relay_process_uptime_seconds").unwrap();
    eventually("they have looked a few times", || {
        others[0].metric("cdc_relay_process_uptime_seconds").filter(|up| *up > started + 2.0)
    });
    for standby in &others {
        assert_eq!(standby.sum("cdc_relay_errors_total"), Some(1), "it asked once: {}", standby.log());
        assert_eq!(kafka_threads(standby), 0);
        assert_eq!(standby.log().matches("standing by").count(), 1, "{}", standby.log());
    }
    assert!(kafka_threads(&first) > 0);

    first.kill();
    let next = active(&others);
    let (now_active, other) = (name(&others[next]), &others[1 - next]);
    eventually("the other one says so", || other.health().contains(&now_active).then_some(()));
    assert!(other.log().contains(&format!("is held by {now_active}")), "{}", other.log());
    assert_eq!(others[next].sum("cdc_relay_slot_holder"), Some(0), "it holds the slot itself");
    let [a, b] = others;
    a.stop();
    b.stop();
}

#[test]
fn two_relays_that_start_at_once_share_the_work_as_one() {
    at_once(&AT_LEAST_ONCE);
}

#[test]
fn two_relays_that_start_at_once_publish_each_row_once() {
    at_once(&EXACTLY_ONCE);
}

fn at_once(delivery: &Delivery) {
    let (mut database, topic) = (Database::new(), Topic::new(2, &[]));
    init(&database);
    database.insert(&topic.kind, 0, 1000);
    let mut relays = [(); 2].map(|()| Relay::spawn(&database, delivery.environment));
    let first = active(&relays);
    relays[1 - first].wait_for_state("standby");
    database.insert(&topic.kind, 1000, 1000);
    assert_eq!(assert_complete_and_ordered(&topic.read(2000), 2000), 0);
    delivery.assert_one_at_a_time(&mut database, 1);
    for relay in relays {
        relay.stop();
    }
}

#[test]
fn the_active_one_of_three_is_killed_again_and_again_and_nothing_is_lost_or_out_of_order() {
    killed(&AT_LEAST_ONCE, 6);
}

#[test]
fn the_active_one_of_three_is_killed_again_and_again_and_each_row_is_there_once() {
    killed(&EXACTLY_ONCE, 6);
}

fn killed(delivery: &Delivery, rounds: usize) {
    let (mut database, topic) = (Database::new(), Topic::new(3, &[]));
    init(&database);
    let spawn = || Relay::spawn(&database, delivery.environment);
    let mut relays: Vec<_> = (0..3).map(|_| spawn()).collect();
    let load = Load::start(&database, &topic.kind, 0);
    let mut slowest_ms = 0;
    for _ in 0..rounds {
        let killed = active(&relays);
        wait_for_progress(&topic);
        relays.swap_remove(killed).kill();
        let (since, before) = (Instant::now(), topic.size());
        eventually("another one publishes", || (topic.size() > before).then_some(()));
        slowest_ms = slowest_ms.max(since.elapsed().as_millis());
        relays.push(spawn());
    }
    let count = load.stop();
    let lsn = database.current_lsn();
    eventually("everything is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    let repeated = delivery.assert(&topic.read(count), count);
    println!(
        "{count} rows, {rounds} kills, {repeated} repeated; at most {slowest_ms} ms until another one published"
    );
    assert_eq!(relays.iter().filter(|relay| relay.is_streaming()).count(), 1);
    delivery.assert_one_at_a_time(&mut database, rounds + 1);
    for relay in relays {
        relay.stop();
    }
}

#[test]
fn a_relay_that_is_asked_to_stop_hands_over_without_a_repetition() {
    handed_over(&AT_LEAST_ONCE);
}

#[test]
fn a_relay_that_is_asked_to_stop_hands_over_with_exactly_once_delivery_too() {
    handed_over(&EXACTLY_ONCE);
}

fn handed_over(delivery: &Delivery) {
    let (mut database, topic) = (Database::new(), Topic::new(3, &[]));
    init(&database);
    let mut relays = vec![Relay::start(&database, delivery.environment)];
    let load = Load::start(&database, &topic.kind, 0);
    for _ in 0..6 {
        let mut next = Relay::spawn(&database, delivery.environment);
        next.wait_for_state("standby");
        relays.push(next);
        wait_for_progress(&topic);
        relays.remove(0).stop();
        relays[0].wait_for_state("streaming");
    }
    let count = load.stop();
    let lsn = database.current_lsn();
    eventually("everything is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    assert_eq!(assert_complete_and_ordered(&topic.read(count), count), 0);
    delivery.assert_one_at_a_time(&mut database, 7);
    relays.remove(0).stop();
}

#[test]
fn a_machine_that_vanished_is_followed_once_the_server_gives_it_up() {
    vanished(&AT_LEAST_ONCE);
}

#[test]
fn a_machine_that_vanished_leaves_each_row_there_once_with_exactly_once_delivery() {
    vanished(&EXACTLY_ONCE);
}

fn vanished(delivery: &Delivery) {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    let role = database.name.clone();
    database.run(&format!("ALTER ROLE {role} SET wal_sender_timeout = '3s'"));
    init(&database);
    let network = Network::to(&database);
    let url = ("CDC_RELAY_POSTGRES__URL", network.url.as_str());
    let first = Relay::start(&database, &[delivery.environment, &[url]].concat());
    let load = Load::start(&database, &topic.kind, 0);
    wait_for_progress(&topic);
    // The server hears nothing more of it, not even its end.
    network.cut();
    first.kill();
    let since = Instant::now();
    let slot = database.slot.clone();
    let held = format!("SELECT active::int::int8 FROM pg_replication_slots WHERE slot_name = '{slot}'");
    assert_eq!(database.number(&held), 1, "the server has noticed already");
    let mut second = Relay::spawn(&database, delivery.environment);
    second.wait_for_state("standby");
    second.wait_for_state("streaming");
    println!(
        "wal_sender_timeout is 3 s; the standby streamed {} ms after the cut",
        since.elapsed().as_millis()
    );
    let count = load.stop();
    let lsn = database.current_lsn();
    eventually("everything is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    delivery.assert(&topic.read(count), count);
    delivery.assert_one_at_a_time(&mut database, 2);
    second.stop();
}

#[test]
fn what_another_published_before_the_past_was_read_is_no_other_log() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    let role = database.name.clone();
    database.run(&format!("ALTER ROLE {role} SET wal_sender_timeout = '2s'"));
    init(&database);
    let network = Network::to(&database);
    // The first one has the slot, and cannot ask Kafka what the position is.
    let [port] = free_ports();
    let broker = format!("127.0.0.1:{port}");
    let environment = [("CDC_RELAY_POSTGRES__URL", &*network.url), ("CDC_RELAY_KAFKA__BROKERS", &broker)];
    let mut first = Relay::spawn(&database, &environment);
    let slot = database.slot.clone();
    let held = format!("SELECT active::int::int8 FROM pg_replication_slots WHERE slot_name = '{slot}'");
    eventually("the first one has the slot", || (database.number(&held) == 1).then_some(()));
    // And has looked at it: what is left is to read the past.
    let has_begun = || first.metric("cdc_relay_sessions_total").filter(|sessions| *sessions >= 1.0).map(drop);
    eventually("its session has begun", has_begun);
    network.cut();
    let mut second = Relay::spawn(&database, &[]);
    second.wait_for_state("streaming");
    database.insert(&topic.kind, 0, 100);
    let lsn = database.current_lsn();
    eventually("all is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    pass_on(TcpListener::bind(&broker).unwrap(), database.servers.kafka.clone());
    first.wait_for_state("standby");
    assert_complete_and_ordered(&topic.read(100), 100);
    first.stop();
    second.stop();
}

#[test]
fn a_relay_that_was_frozen_and_wakes_up_without_its_slot_stands_by() {
    frozen(&AT_LEAST_ONCE);
}

#[test]
fn a_relay_that_was_frozen_publishes_nothing_with_exactly_once_delivery() {
    frozen(&EXACTLY_ONCE);
}

fn frozen(delivery: &Delivery) {
    let (mut database, topic) = (Database::new(), Topic::new(3, &[]));
    let role = database.name.clone();
    database.run(&format!("ALTER ROLE {role} SET wal_sender_timeout = '2s'"));
    init(&database);
    let mut first = Relay::start(&database, delivery.environment);
    let mut second = Relay::spawn(&database, delivery.environment);
    second.wait_for_state("standby");
    let load = Load::start(&database, &topic.kind, 0);
    wait_for_progress(&topic);
    first.signal(Signal::STOP);
    second.wait_for_state("streaming");
    wait_for_progress(&topic);
    first.signal(Signal::CONT);
    first.wait_for_state("standby");
    assert!(first.health().contains(&name(&second)), "{}", first.health());
    wait_for_progress(&topic);
    assert!(second.is_streaming(), "{}", second.log());
    let count = load.stop();
    let lsn = database.current_lsn();
    eventually("everything is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    let repeated = delivery.assert(&topic.read(count), count);
    println!("{count} rows, {repeated} repeated by a relay that was frozen");
    assert_nothing_taken_back(&mut database, &instance(&first), &instance(&second));
    delivery.assert_one_at_a_time(&mut database, 2);
    // And the next one goes on where everything is published.
    first.stop();
    second.kill();
    let third = Relay::start(&database, delivery.environment);
    database.insert(&topic.kind, count, 100);
    let lsn = database.current_lsn();
    eventually("everything is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    delivery.assert(&topic.read(count + 100), count + 100);
    third.stop();
}

/// Asserts that no checkpoint of the former relay takes back what its successor has written, or goes beyond it.
fn assert_nothing_taken_back(database: &mut Database, former: &str, successor: &str) {
    let (mut highest, mut successors) = (0, 0);
    for entry in checkpoints::all(database) {
        let (high, low) = entry["lsn"].as_str().unwrap().split_once('/').unwrap();
        let lsn = (u64::from_str_radix(high, 16).unwrap() << 32) + u64::from_str_radix(low, 16).unwrap();
        if entry["instance"] == successor {
            successors += 1;
            highest = highest.max(lsn);
        } else if successors > 0 {
            assert!(entry["instance"] == former && lsn < highest, "{entry}");
        }
    }
    assert!(successors > 0, "the successor has written none");
}

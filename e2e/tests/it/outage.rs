//! Kafka says nothing for 90 seconds, then is killed, while orders come in.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use rustix::process::Signal;

use crate::{
    stack::{Api, Stack, eventually, tell},
    views::{Database, assert_nothing_lost},
};

const OUTAGE: Duration = Duration::from_secs(90);
/// Orders that are posted as fast as they go: more than twice of what may be in flight.
const ORDERS: usize = 40_000;
const CLIENTS: usize = 8;
/// Far above what the relay needs with its 16 MiB in flight, far below what an unbounded one would reach.
const MEMORY_LIMIT_BYTES: u64 = 128 * 1024 * 1024;

/// `VmHWM`: the most memory the process has had, in bytes.
fn peak_memory_bytes(stack: &Stack) -> u64 {
    let pid = stack.pid("cdc-relay").expect("the relay runs").as_raw_nonzero();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn a_silent_kafka_is_outlived_and_nothing_is_confirmed_that_it_has_not_acknowledged() {
    let stack = Stack::start("outage", &["--postgres-set", "wal_sender_timeout=10s"]);
    let (api, orders) = (Api::of(&stack), Database::of(&stack, "postgres"));
    api.post("before").expect("the order is taken");
    assert_nothing_lost(&stack);
    let relay = stack.pid("cdc-relay");

    // A stopped broker keeps its connections and answers nothing: acknowledgements are withheld. From the first
    // order on, nothing may be confirmed.
    stack.signal("kafka-1", Signal::STOP);
    let frozen_at = Instant::now();
    api.post("first").expect("the order is taken");
    let bound = orders.text("SELECT pg_current_wal_lsn()::text");
    let unconfirmed = format!(
        "SELECT pg_wal_lsn_diff('{bound}', confirmed_flush_lsn) FROM pg_replication_slots WHERE slot_name = 'cdc_relay'"
    );
    let (taken, mut peak_bytes) = (AtomicUsize::new(2), 0);
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                while frozen_at.elapsed() < OUTAGE {
                    let count = taken.fetch_add(usize::from(api.post("during").is_some()), Ordering::Relaxed);
                    if count > ORDERS {
                        // The backlog is as long as it has to be; from here on orders just go on.
                        std::thread::sleep(Duration::from_millis(500));
                    }
                }
            });
        }
        while frozen_at.elapsed() < OUTAGE {
            peak_bytes = peak_bytes.max(peak_memory_bytes(&stack));
            assert!(orders.number(&unconfirmed) > 0, "an event is confirmed that Kafka has not acknowledged");
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    let attached = "SELECT active::int FROM pg_replication_slots WHERE slot_name = 'cdc_relay'";
    assert_eq!(orders.number(attached), 1, "the relay has lost its slot");
    assert_eq!(stack.pid("cdc-relay"), relay, "the relay was started again");
    assert!(peak_bytes < MEMORY_LIMIT_BYTES, "the relay took {peak_bytes} bytes");

    // What the frozen broker has in its sockets dies with it.
    stack.kill("kafka-1");
    let count = assert_nothing_lost(&stack);
    assert_eq!(count.orders, taken.into_inner());
    tell(&format!(
        "{} orders over an outage of {} s, relay's peak memory {} MiB, {} records repeated: 0 lost, 0 confirmed early",
        count.orders,
        OUTAGE.as_secs(),
        peak_bytes >> 20,
        count.repeated
    ));
}

#[test]
fn postgres_shuts_down_although_the_relay_waits_for_kafka() {
    let stack = Stack::start("shutdown", &[]);
    let api = Api::of(&stack);
    api.post("before").expect("the order is taken");
    assert_nothing_lost(&stack);
    stack.signal("kafka-1", Signal::STOP);
    api.post("during").expect("the order is taken");
    // A fast shutdown: the server waits for its walsenders to have everything confirmed. The supervisor starts it
    // again once it has ended.
    let before = stack.pid("postgres");
    stack.signal("postgres", Signal::INT);
    eventually("Postgres has shut down and is back", || {
        stack.pid("postgres").filter(|now| Some(*now) != before)
    });
    stack.kill("kafka-1");
    let count = assert_nothing_lost(&stack);
    assert_eq!(count.orders, 2);
}

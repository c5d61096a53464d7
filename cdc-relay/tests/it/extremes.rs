//! What needs servers of its own: a slot that is lost, a log beyond 4 GB, rows of 20 MB, transactions that take
//! longer than the server waits.

use crate::{
    database::{Database, eventually},
    relay::{Relay, init},
    stack::Stack,
    status::{AWAY, status},
    topics::{Topic, assert_complete_and_ordered},
};

#[test]
fn a_slot_whose_log_is_gone_halts_by_name() {
    let stack = Stack::start("lost", &["--postgres-set", "max_slot_wal_keep_size=32MB"]);
    let (mut database, topic) = (Database::on(&stack.servers), Topic::on(&stack.servers, 1, &[]));
    init(&database);
    database.insert(&topic.kind, 0, 1);
    let before = status(&database, AWAY, &[]);
    let safe = before["safe_wal_bytes"].as_i64().unwrap();
    assert!(0 < safe && safe <= 64 << 20, "{before}");
    let slot = database.slot.clone();
    eventually("the slot is lost", || {
        database.run("SELECT pg_logical_emit_message(false, 'x', repeat('x', 1000)); SELECT pg_switch_wal()");
        database.run("CHECKPOINT");
        let status = format!("SELECT wal_status FROM pg_replication_slots WHERE slot_name = '{slot}'");
        (database.text(&status) == "lost").then_some(())
    });
    let lost = status(&database, AWAY, &[]);
    assert_eq!(lost["wal_status"], "lost");
    for unknown in ["restart_lsn", "restart_lag_bytes", "safe_wal_bytes", "seconds_to_slot_loss"] {
        assert!(lost[unknown].is_null(), "{unknown} in {lost}");
    }
    let mut relay = Relay::spawn(&database, &[]);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(relay.log().contains("is lost"), "{}", relay.log());
    assert_eq!(topic.size(), 0);
}

#[test]
fn a_log_that_crosses_4_gb_stays_in_order_and_is_confirmed() {
    let stack =
        Stack::start("4gb", &["--postgres-set", "wal_init_zero=off", "--postgres-set", "max_wal_size=512MB"]);
    let (mut database, topic) = (Database::on(&stack.servers), Topic::on(&stack.servers, 1, &[]));
    init(&database);
    let relay = Relay::start(&database, &[]);
    database.insert(&topic.kind, 0, 10);
    // An LSN is two numbers of 32 bits; a segment has 16 MB. One is left before the first number changes.
    let high = "SELECT (pg_current_wal_lsn() - '0/0')::int8 >> 32";
    let left = "SELECT ((1::int8 << 32) - (pg_current_wal_lsn() - '0/0')::int8) / (16 * 1024 * 1024)";
    while database.number(left) > 1 {
        database.run("SELECT pg_logical_emit_message(false, 'x', ''); SELECT pg_switch_wal()");
    }
    assert_eq!(database.number(high), 0);
    // A transaction that begins before and ends after, and rows on both sides.
    database.insert(&topic.kind, 10, 10);
    let mut rows = 20;
    while database.number(high) == 0 {
        let kind = &topic.kind;
        database.run(&format!(
            "INSERT INTO outbox SELECT gen_random_uuid(), '{kind}', 'a' || n % 10, 'Counted', json_build_object('n', n, 'x', repeat('x', 1000)) \
             FROM generate_series({rows}, {}) n",
            rows + 999
        ));
        rows += 1000;
    }
    database.insert(&topic.kind, rows, 10);
    let lsn = database.current_lsn();
    assert!(lsn.starts_with("1/"), "{lsn}");
    assert_eq!(assert_complete_and_ordered(&topic.read(rows + 10), rows + 10), 0);
    eventually("it is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    relay.stop();
    let relay = Relay::start(&database, &[]);
    database.insert(&topic.kind, rows + 10, 10);
    assert_eq!(assert_complete_and_ordered(&topic.read(rows + 20), rows + 20), 0);
    relay.stop();
}

#[test]
fn keepalives_in_the_middle_of_a_transaction_confirm_nothing_of_it() {
    // The server asks for a sign of life after half a second, wherever in a transaction it is.
    let stack = Stack::start("keepalive", &["--postgres-set", "wal_sender_timeout=1s"]);
    let (mut database, topic) = (Database::on(&stack.servers), Topic::on(&stack.servers, 1, &[]));
    init(&database);
    let relay = Relay::start(&database, &[("CDC_RELAY_LIMITS__IN_FLIGHT_BYTES", "1000000")]);
    // Without Kafka the relay stops reading at its bound, in the middle.
    stack.stop("kafka-1");
    let kind = &topic.kind;
    database.run(&format!(
        "INSERT INTO outbox SELECT gen_random_uuid(), '{kind}', 'a' || n % 10, 'Counted', json_build_object('n', n, 'x', repeat('x', 500)) \
         FROM generate_series(0, 19999) n"
    ));
    let lsn = database.current_lsn();
    eventually("a part of it is in flight", || {
        relay.metric("cdc_relay_in_flight_records").filter(|n| *n > 0.0)
    });
    let up_for = |seconds: f64| relay.metric("cdc_relay_process_uptime_seconds").filter(|s| *s > seconds);
    let now = up_for(0.0).unwrap();
    eventually("several of the server's time-outs have passed", || up_for(now + 4.0));
    assert!(database.unconfirmed_bytes(&lsn) > 0, "a part of the transaction is confirmed");
    stack.start_again("kafka-1");
    assert_eq!(assert_complete_and_ordered(&topic.read(20_000), 20_000), 0);
    assert_eq!(relay.metric("cdc_relay_sessions_total"), Some(1.0), "{}", relay.log());
    relay.stop();
}

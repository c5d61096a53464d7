//! One order, from the request to each place where it must arrive; and a stack that leaves nothing behind.

use rdkafka::Message as _;

use crate::{
    stack::{Api, Stack, eventually},
    views::{Database, assert_nothing_lost, header, order_events},
};

#[test]
fn an_order_arrives_in_postgres_in_kafka_and_at_both_consumers() {
    let stack = Stack::start("flow", &[]);
    let id = Api::of(&stack).post("c1").expect("the order is taken");
    let count = assert_nothing_lost(&stack);
    assert_eq!((count.orders, count.records), (1, 1));

    let event = &order_events(&stack)[0];
    assert_eq!(event.key(), Some(id.as_bytes()));
    let body: serde_json::Value = serde_json::from_slice(event.payload().unwrap()).unwrap();
    assert_eq!(
        (&body["eventType"], &body["version"], &body["totalAmount"]),
        (&"OrderCreated".into(), &1.into(), &"6.50".into())
    );
    assert_eq!(header(event, "type").as_deref(), Some("OrderCreated"));
    assert_eq!(header(event, "aggregatetype").as_deref(), Some("order"));
    assert_eq!(header(event, "id").as_deref(), body["eventId"].as_str());
    assert_eq!(header(event, "seq").as_deref(), Some("0"));
    let orders = Database::of(&stack, "postgres");
    assert_eq!(orders.text("SELECT total_amount::text FROM orders"), "6.50");
    let lsn = header(event, "lsn").unwrap();
    eventually("the slot has confirmed the order's commit", || {
        let sql = format!(
            "SELECT pg_wal_lsn_diff(confirmed_flush_lsn, '{lsn}') FROM pg_replication_slots WHERE slot_name = 'cdc_relay'"
        );
        (orders.number(&sql) > 0).then_some(())
    });

    assert_eq!(stack.down(), Vec::<String>::new(), "processes are left after down");
}

#[test]
fn other_tables_traffic_does_not_hold_the_log() {
    let stack = Stack::start("idle", &[]);
    let orders = Database::of(&stack, "postgres");
    orders.texts("CREATE TABLE busy (n int, filler text)");
    let before = orders.text("SELECT pg_current_wal_lsn()::text");
    for _ in 0..10 {
        orders.texts(
            "INSERT INTO busy SELECT n, repeat(md5(random()::text), 32) FROM generate_series(1, 20000) n",
        );
    }
    assert!(
        orders.number(&format!("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '{before}')")) > 200_000_000
    );
    eventually("the slot's lag is near zero again", || {
        let sql = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn) FROM pg_replication_slots WHERE slot_name = 'cdc_relay'";
        (orders.number(sql) < 1_000_000).then_some(())
    });
}

//! Postgres shuts down (fast: its walsenders may wait for whoever reads from them) while a relay streams.

use crate::{
    database::{Database, eventually},
    relay::{Relay, init},
    stack::Stack,
    topics::{Topic, assert_complete_and_ordered},
};

/// What Postgres writes once it has shut down in order. The supervisor kills it if it takes longer than 30 s.
const IN_ORDER: &str = "database system is shut down";

/// A fast shutdown that ends in order, and another start.
fn restart_postgres(stack: &Stack) {
    let count = || stack.log("postgres").matches(IN_ORDER).count();
    let before = count();
    stack.stop("postgres");
    assert_eq!(count(), before + 1, "Postgres had to be killed:\n{}", stack.log("postgres"));
    stack.start_again("postgres");
}

#[test]
fn postgres_is_not_held_up_by_an_idle_relay_nor_by_one_whose_kafka_is_down() {
    let stack = Stack::start("shutdown", &[]);
    let (mut database, topic) = (Database::on(&stack.servers), Topic::on(&stack.servers, 2, &[]));
    init(&database);
    let relay = Relay::start(&database, &[]);
    database.insert(&topic.kind, 0, 10);
    topic.read(10);

    // Idle.
    restart_postgres(&stack);
    database.reconnect();
    database.insert(&topic.kind, 10, 10);
    assert_complete_and_ordered(&topic.read(20), 20);

    // With records that nobody acknowledges.
    stack.stop("kafka-1");
    database.insert(&topic.kind, 20, 500);
    eventually("records wait", || relay.metric("cdc_relay_in_flight_records").filter(|n| *n > 0.0));
    restart_postgres(&stack);
    database.reconnect();
    database.insert(&topic.kind, 520, 10);
    stack.start_again("kafka-1");
    let repeated = assert_complete_and_ordered(&topic.read(530), 530);
    println!("530 rows over two restarts of Postgres, {repeated} records repeated");
    relay.stop();
}

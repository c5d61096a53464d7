//! An outbox that nobody writes to.

use crate::{
    database::{Database, eventually},
    relay::{Relay, init},
    topics::Topic,
};

#[test]
fn an_idle_outbox_on_a_busy_database_holds_no_log() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    database.run("CREATE TABLE busy (n int, filler text)");
    init(&database);
    let relay = Relay::start(&database, &[]);
    database.insert(&topic.kind, 0, 1);
    topic.read(1);
    let before = database.current_lsn();
    for _ in 0..10 {
        database.run(
            "INSERT INTO busy SELECT n, repeat(md5(random()::text), 32) FROM generate_series(1, 20000) n",
        );
    }
    let lsn = database.current_lsn();
    let written = database.number(&format!("SELECT pg_wal_lsn_diff('{lsn}', '{before}')::int8"));
    assert!(written > 200_000_000, "{written} bytes of log were written");
    eventually("the slot's confirmed LSN has followed the log", || {
        (database.unconfirmed_bytes(&lsn) <= 0).then_some(())
    });
    assert_eq!(topic.size(), 1);
    relay.stop();
}

#[test]
fn a_relay_that_has_waited_asks_nobody_before_it_publishes() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let relay = Relay::start(&database, &[]);
    let opened = "SELECT sessions FROM pg_stat_database WHERE datname = current_database()";
    let uptime = || relay.metric("cdc_relay_process_uptime_seconds").unwrap();
    let mut before = None;
    for number in 0..4 {
        // Longer than a process stands still that was frozen, and has to ask for its slot.
        let until = uptime() + 1.5;
        eventually("it has waited", || (uptime() > until).then_some(()));
        database.insert(&topic.kind, number, 1);
        topic.read(number + 1);
        let now = database.number(opened);
        assert_eq!(*before.get_or_insert(now), now, "a connection was opened for row {number}");
    }
    relay.stop();
}

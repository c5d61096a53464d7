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

//! `cdc-relay probe`: reads the slot's log and changes nothing.

use serde_json::Value;

use crate::{
    database::Database,
    relay::{Relay, command, init},
    topics::Topic,
};

fn probe(database: &Database, arguments: &[&str]) -> Value {
    let output = command(database).args(["probe", "--json"]).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("--json prints JSON and nothing else")
}

#[test]
fn a_probe_reads_the_same_rows_each_time_and_leaves_them_to_the_relay() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let slot = database.slot.clone();
    let confirmed =
        format!("SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{slot}'");
    let before = database.text(&confirmed);
    database.insert(&topic.kind, 0, 50);
    let between = database.current_lsn();
    database.insert(&topic.kind, 50, 50);
    for arguments in [&[][..], &["--eager"], &["--latency"], &["--rows", "100"]] {
        let told = probe(&database, arguments);
        assert_eq!(told["rows"], 100, "{arguments:?}");
        assert_eq!(told["from_lsn"], *before);
    }
    assert_eq!(probe(&database, &["--until", &between])["rows"], 50);
    assert_eq!(database.text(&confirmed), before, "nothing is confirmed");

    let relay = Relay::start(&database, &[]);
    assert_eq!(topic.read(100).len(), 100);
    relay.stop();
}

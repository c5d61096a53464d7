//! `cdc-relay tail`: the rows as they come, from a slot of its own.

use std::{
    io::{BufRead as _, BufReader, Lines},
    process::{Child, ChildStderr, ChildStdout, Stdio},
};

use serde_json::{Value, json};

use crate::{
    database::{Database, eventually},
    relay::command,
};

/// A tail that follows, and what it prints.
struct Tail {
    child: Child,
    out: Lines<BufReader<ChildStdout>>,
    error: Lines<BufReader<ChildStderr>>,
}

impl Tail {
    fn start(database: &Database, arguments: &[&str]) -> Self {
        let mut command = command(database);
        command.arg("tail").args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut error = BufReader::new(child.stderr.take().unwrap()).lines();
        assert!(error.next().unwrap().unwrap().starts_with("following publication"));
        Self { child, out, error }
    }
}

#[test]
fn rows_are_shown_as_they_come_and_no_slot_is_left_behind() {
    let mut database = Database::new();
    let name = database.name.clone();
    let slots = format!("SELECT count(*) FROM pg_replication_slots WHERE database = '{name}'");
    let mut tail = Tail::start(&database, &["--json", "--rows", "2"]);
    assert_eq!(database.number(&slots), 1, "and none of the relay's");
    database.run("INSERT INTO outbox VALUES ('00000000-0000-0000-0000-000000000001', 'order', 'o1', 'Placed', '{\"n\": 1}')");
    let row: Value = serde_json::from_str(&tail.out.next().unwrap().unwrap()).unwrap();
    assert_eq!((&row["topic"], &row["key"]), (&json!("outbox.event.order"), &json!("o1")), "{row}");
    assert_eq!((&row["value_bytes"], &row["seq"], &row["poison"]), (&json!(8), &json!(0), &Value::Null));
    assert_eq!((&row["value"], row.get("value_hex")), (&json!("{\"n\": 1}"), None));
    assert_eq!(row["headers"][0], json!({"name": "id", "value": "00000000-0000-0000-0000-000000000001"}));
    database.run("INSERT INTO outbox VALUES (gen_random_uuid(), 'no topic', 'o1', 'Placed', NULL)");
    let row: Value = serde_json::from_str(&tail.out.next().unwrap().unwrap()).unwrap();
    assert!(row["poison"].as_str().unwrap().contains("not a legal name"), "{row}");
    assert!(row["value_bytes"].is_null() && row["value"].is_null(), "a tombstone");
    assert_eq!(tail.child.wait().unwrap().code(), Some(0));
    eventually("the slot is gone", || (database.number(&slots) == 0).then_some(()));

    // Whoever reads it goes away, and then Ctrl-C.
    let mut tail = Tail::start(&database, &[]);
    drop(tail.out);
    database.run("INSERT INTO outbox VALUES (gen_random_uuid(), 'order', 'o1', 'Placed', '{}')");
    assert_eq!(tail.child.wait().unwrap().code(), Some(0));
    assert!(tail.error.next().is_none(), "nothing is said about it");
    let mut tail = Tail::start(&database, &[]);
    database.run("INSERT INTO outbox VALUES (gen_random_uuid(), 'order', 'o1', 'Placed', '{}')");
    let line = tail.out.next().unwrap().unwrap();
    assert!(line.starts_with("outbox.event.order  o1  2 bytes  id=") && line.ends_with("  {}"), "{line}");
    let pid = rustix::process::Pid::from_child(&tail.child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    tail.child.wait().unwrap();
    eventually("the slot is gone", || (database.number(&slots) == 0).then_some(()));

    // Bytes that are no text.
    database.run("ALTER TABLE outbox ALTER payload TYPE bytea USING NULL");
    for arguments in [["--rows", "1", "--json"].as_slice(), &["--rows", "1"]] {
        let mut tail = Tail::start(&database, arguments);
        database.run("INSERT INTO outbox VALUES (gen_random_uuid(), 'order', 'o1', 'Placed', '\\x00ff')");
        let line = tail.out.next().unwrap().unwrap();
        let shown = if arguments.len() == 3 { "\"value_hex\":\"00ff\"" } else { "  0x00ff" };
        assert!(line.contains(shown), "{line}");
        tail.child.wait().unwrap();
    }

    database.run(&format!("ALTER ROLE {name} NOREPLICATION"));
    let output = command(&database).arg("tail").output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(69), "{error}");
    assert!(error.contains("REPLICATION"), "{error}");
}

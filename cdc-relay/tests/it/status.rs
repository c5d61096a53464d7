//! `cdc-relay status`: it says what the servers say, and nothing where they say nothing.

use serde_json::{Value, json};

use crate::{
    database::{Database, eventually},
    relay::{Relay, command, init},
};

/// Where no relay is.
pub(crate) const AWAY: &str = "http://127.0.0.1:1";

pub(crate) fn status(database: &Database, relay: &str, environment: &[(&str, &str)]) -> Value {
    let mut command = command(database);
    command.args(["status", "--json", "--relay", relay]).envs(environment.iter().copied());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("--json prints JSON and nothing else")
}

#[test]
fn it_agrees_with_the_server_and_the_relay() {
    let mut database = Database::new();
    let none = status(&database, AWAY, &[]);
    assert_eq!(
        (&none["exists"], &none["active"], &none["lag_seconds"]),
        (&json!(false), &Value::Null, &Value::Null)
    );
    assert_eq!((&none["confirmed_lag_bytes"], &none["safe_wal_bytes"]), (&Value::Null, &Value::Null));
    assert!(
        none["checkpoint"].is_null()
            && none["relay"].is_null()
            && none["notes"].as_array().unwrap().len() == 2
    );

    init(&database);
    let slot = database.slot.clone();
    let word = |database: &mut Database, column: &str| {
        database.text(&format!("SELECT {column}::text FROM pg_replication_slots WHERE slot_name = '{slot}'"))
    };
    let idle = status(&database, AWAY, &[]);
    assert_eq!(
        (&idle["exists"], &idle["active"], &idle["holder"]),
        (&json!(true), &json!(false), &Value::Null)
    );
    assert_eq!(idle["confirmed_lsn"], word(&mut database, "confirmed_flush_lsn"));
    assert_eq!(idle["restart_lsn"], word(&mut database, "restart_lsn"));
    assert_eq!(idle["wal_status"], word(&mut database, "wal_status"));
    assert_eq!(idle["checkpoint"]["lsn"], idle["confirmed_lsn"]);
    // The server of the tests sets no limit.
    assert!(idle["safe_wal_bytes"].is_null() && idle["seconds_to_slot_loss"].is_null(), "{idle}");
    // Both are differences to the same end of the log.
    let lsn = |name: &str| format!("'{}'::pg_lsn", idle[name].as_str().unwrap());
    let apart = database.number(&format!("SELECT ({} - {})::int8", lsn("confirmed_lsn"), lsn("restart_lsn")));
    let lag = |name: &str| idle[name].as_i64().unwrap();
    assert_eq!(lag("restart_lag_bytes") - lag("confirmed_lag_bytes"), apart);

    let relay = Relay::start(&database, &[]);
    let held = status(&database, &relay.url().unwrap(), &[]);
    assert_eq!((&held["active"], &held["relay"]["state"]), (&json!(true), &json!("streaming")), "{held}");
    assert_eq!(held["holder"]["pid"], word(&mut database, "active_pid"));
    let application = held["holder"]["application"].as_str().unwrap();
    assert!(application.ends_with(&format!("/{}", relay.child.id())), "{application}");
    assert_eq!(held["relay"]["in_flight_records"], 0);

    // What went wrong is told also once it is over.
    assert!(held["relay"]["last_error"].is_null(), "{held}");
    let url = relay.url().unwrap();
    database.run(&format!(
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{slot}'"
    ));
    let over = eventually("it streams again", || {
        let relay = status(&database, &url, &[])["relay"].take();
        (relay["state"] == "streaming" && !relay["last_error"].is_null()).then_some(relay)
    });
    let error = &over["last_error"];
    assert!(relay.log().contains(error["message"].as_str().unwrap()), "{over}");
    let told = command(&database).args(["status", "--relay", &url]).output().unwrap();
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    let at = error["at"].as_str().unwrap();
    assert!(told.lines().any(|line| line.contains("last error") && line.contains(at)), "{told}");

    let brief =
        [("CDC_RELAY_POSTGRES__CONNECT_TIMEOUT_SECONDS", "1"), ("CDC_RELAY_KAFKA__BROKERS", "127.0.0.1:1")];
    let without = status(&database, AWAY, &brief);
    assert!(without["checkpoint"].is_null() && without["relay"].is_null(), "{without}");
    assert_eq!(without["active"], true);
    let told = command(&database).args(["status", "--relay", AWAY]).output().unwrap();
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.lines().any(|line| line.split_whitespace().eq(["relay", "-"])), "{told}");
    relay.stop();

    let dead = ("CDC_RELAY_POSTGRES__URL", "postgres://u:p@127.0.0.1:1/d");
    let output = command(&database).arg("status").envs([brief[0], dead]).output().unwrap();
    assert_eq!(output.status.code(), Some(75), "{}", String::from_utf8_lossy(&output.stderr));
}

//! `cdc-relay check` with a primary and a standby: what it finds, and that what it says mends it.

use serde_json::Value;

use crate::{
    database::eventually,
    pair::{Pair, Setting, major_version},
    relay::{Relay, init},
};

/// Runs it with both servers: its exit code, and its report.
fn check(pair: &Pair) -> (Option<i32>, Value) {
    let output = pair.run(&["check", "--json"], &[]);
    let report = serde_json::from_slice(&output.stdout);
    (output.status.code(), report.unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr))))
}

fn names(report: &Value) -> Vec<&str> {
    let mut names: Vec<_> =
        report["findings"].as_array().unwrap().iter().map(|f| f["name"].as_str().unwrap()).collect();
    names.sort_unstable();
    names
}

/// Does what the findings say.
fn mend(pair: &Pair, report: &Value) {
    for finding in report["findings"].as_array().unwrap() {
        let server = finding["server"].as_str().unwrap();
        let is_primary = server.ends_with(&format!(":{}", pair.primary.port));
        let server = if is_primary { &pair.primary } else { &pair.standby };
        for line in finding["mend"].as_array().unwrap() {
            match line.as_str().unwrap() {
                "CDC_RELAY_POSTGRES__FAILOVER=true cdc-relay init" => pair.init(),
                // By the worker, which does not let others do it.
                "SELECT pg_sync_replication_slots();" => {}
                sql if sql.starts_with("SELECT") || sql.starts_with("ALTER") => {
                    server.ask(sql).unwrap_or_else(|e| panic!("{sql}: {e}"));
                }
                _ => {}
            }
        }
    }
}

/// What `check` wants of every server.
const LIMITED: [Setting<'_>; 2] = [("max_slot_wal_keep_size", "1GB"), ("fsync", "on")];

#[test]
fn that_no_host_takes_writes_is_found_until_one_is_promoted() {
    let mut pair = Pair::start(&LIMITED, &[]);
    pair.primary.kill();
    let (code, report) = check(&pair);
    assert!(code == Some(65) && names(&report).contains(&"no-primary"), "{report}");
    let finding = report["findings"].as_array().unwrap().iter().find(|f| f["name"] == "no-primary").unwrap();
    pair.standby.ask(finding["mend"][1].as_str().unwrap()).unwrap();
    let report = check(&pair).1;
    assert!(!names(&report).contains(&"no-primary"), "{report}");
}

#[test]
fn what_it_says_mends_what_it_finds() {
    let conninfo = |pair: &Pair, more: &str| {
        let value = format!("host=127.0.0.1 port={} user=postgres{more}", pair.primary.port);
        pair.standby.set(&[("primary_conninfo", &value)]);
    };
    if major_version() < 17 {
        let pair = Pair::start(&LIMITED, &[]);
        init(&pair.database);
        let (code, report) = check(&pair);
        assert_eq!((code, names(&report)), (Some(65), vec!["server-too-old", "server-too-old"]));
        return;
    }
    let mut pair = Pair::start(&LIMITED, &[]);
    conninfo(&pair, "");
    let name = pair.database.name.clone();
    assert!(names(&check(&pair).1).contains(&"slot-missing"));
    init(&pair.database);
    let (code, report) = check(&pair);
    assert!(report["notes"].to_string().contains("may not see primary_conninfo"), "{report}");
    assert_eq!(code, Some(65));
    pair.database.run(&format!("GRANT pg_read_all_settings TO {name}"));
    eventually("the grant is on the standby", || names(&check(&pair).1).contains(&"no-dbname").then_some(()));
    let (_, report) = check(&pair);
    assert_eq!(
        names(&report),
        [
            "no-dbname",
            "no-feedback",
            "no-primary-slot",
            "slot-not-failover",
            "slot-not-synced",
            "slots-not-synchronised",
            "standby-slots-not-set",
        ]
    );
    conninfo(&pair, " dbname=postgres");
    mend(&pair, &report);
    let relay = Relay::start(&pair.database, &[("CDC_RELAY_POSTGRES__URL", &pair.url())]);
    let kind = pair.topic.kind.clone();
    let mut written = 0;
    eventually("nothing is found any more", || {
        pair.database.insert(&kind, written, 1);
        written += 1;
        let (code, report) = check(&pair);
        (code == Some(0) && names(&report).is_empty()).then_some(())
    });
    relay.stop();

    // What comes apart later is found, too.
    pair.standby.set(&[("primary_slot_name", "")]);
    pair.primary.set(&[("synchronized_standby_slots", "standby1, nobody")]);
    eventually("the standby's slot is let go", || {
        (names(&check(&pair).1) == ["no-primary-slot", "standby-slot-inactive", "standby-slot-missing"])
            .then_some(())
    });
    let table = pair.run(&["check"], &[]);
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(text.contains("SELECT pg_create_physical_replication_slot('nobody');"), "{text}");
    pair.standby.promote();
    assert!(names(&check(&pair).1).contains(&"several-primaries"));
    pair.standby.kill();
    let (_, report) = check(&pair);
    let notes = report["notes"].to_string();
    assert!(notes.contains("no standby among the hosts") && notes.contains("cannot connect"), "{report}");
}

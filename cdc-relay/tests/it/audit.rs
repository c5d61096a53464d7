//! `cdc-relay audit`: it finds what was planted, and nothing where nothing is wrong.

use std::{process::Output, time::Duration};

use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions},
    client::DefaultClientContext,
    message::{Header, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, Producer as _},
};
use serde_json::Value;

use crate::{
    database::{Database, Servers},
    poison::Morgue,
    relay::{Relay, command, init},
    topics::{Topic, headers},
};

fn run(database: &Database, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = command(database);
    command.arg("audit").args(arguments).envs(environment.iter().copied()).output().unwrap()
}

/// Its exit code and its report.
pub(crate) fn audit(database: &Database, arguments: &[&str], environment: &[(&str, &str)]) -> (i32, Value) {
    let output = run(database, &[&["--json"], arguments].concat(), environment);
    let report = serde_json::from_slice(&output.stdout);
    let report = report.unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code().unwrap(), report)
}

/// The counts of that name.
pub(crate) fn counts<const N: usize>(report: &Value, names: [&str; N]) -> [u64; N] {
    names.map(|name| report[name].as_u64().unwrap_or_else(|| panic!("{name} in {report}")))
}

fn with_grant() -> Database {
    let mut database = Database::new();
    let name = database.name.clone();
    database.run(&format!("GRANT SELECT ON outbox TO {name}"));
    database
}

fn insert(database: &mut Database, kind: &str, aggregate: &str) -> String {
    database.text(&format!(
        "INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', '{aggregate}', 'T', '{{}}') RETURNING id::text"
    ))
}

fn produce(topic: &str, key: &str, headers: &[(String, Option<String>)]) {
    let producer: BaseProducer =
        ClientConfig::new().set("bootstrap.servers", Servers::shared().kafka).create().unwrap();
    let headers = headers
        .iter()
        .fold(OwnedHeaders::new(), |all, (key, value)| all.insert(Header { key, value: value.as_deref() }));
    producer.send(BaseRecord::to(topic).key(key).payload("{}").headers(headers)).unwrap();
    producer.flush(Duration::from_secs(30)).unwrap();
}

/// As retention does: a topic's only partition begins there from then on.
fn delete_before(database: &Database, topic: &Topic, offset: i64) {
    let mut end = TopicPartitionList::new();
    end.add_partition_offset(&topic.name, 0, Offset::Offset(offset)).unwrap();
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", &database.servers.kafka).create().unwrap();
    database.runtime.block_on(admin.delete_records(&end, &AdminOptions::new())).unwrap();
}

#[test]
fn what_is_missing_there_twice_or_out_of_order_is_found() {
    let (mut database, topic) = (with_grant(), Topic::new(1, &[]));
    init(&database);
    let relay = Relay::start(&database, &[]);
    database.insert(&topic.kind, 0, 10);
    let published = topic.read(10);
    let (code, report) = audit(&database, &[], &[]);
    assert_eq!((code, counts(&report, ["rows", "published", "records"])), (0, [10, 10, 10]), "{report}");

    relay.stop();
    let ids: Vec<_> = (0..3).map(|_| insert(&mut database, &topic.kind, "swapped")).collect();
    let gap = command(&database).args(["accept-gap", "--through", "now", "--yes"]).output().unwrap();
    assert!(gap.status.success(), "{}", String::from_utf8_lossy(&gap.stderr));
    let relay = Relay::start(&database, &[]);
    // The third one's record is missing, and the other two are swapped.
    for (id, lsn) in [(&ids[1], "0/20"), (&ids[0], "0/10")] {
        let header = |name: &str, value: &str| (name.to_owned(), Some(value.to_owned()));
        produce(&topic.name, "swapped", &[header("id", id), header("lsn", lsn), header("seq", "0")]);
    }
    let copied = &published[4];
    let key = String::from_utf8(copied.key().unwrap().to_vec()).unwrap();
    let mut copy = headers(copied);
    produce(&topic.name, &key, &copy);
    copy.push(("replayed".into(), Some("1".into())));
    produce(&topic.name, &key, &copy);
    // Somebody else's.
    produce(&topic.name, "k", &[("id".into(), Some("x".into()))]);

    let (code, report) = audit(&database, &[], &[]);
    let names =
        ["published", "missing", "duplicates", "out_of_order", "replayed", "other_records", "not_listed"];
    assert_eq!((code, counts(&report, names)), (65, [12, 1, 1, 1, 1, 1, 0]), "{report}");
    let findings = report["findings"].as_array().unwrap();
    let found = |kind: &str| findings.iter().find(|f| f["kind"] == kind).unwrap();
    assert_eq!(found("missing")["id"], ids[2].as_str());
    assert_eq!(found("missing")["key"], "swapped");
    assert_eq!(
        (&found("out-of-order")["id"], &found("out-of-order")["offset"]),
        (&ids[0].as_str().into(), &11.into())
    );
    assert_eq!(
        (&found("duplicate")["id"], &found("duplicate")["offset"]),
        (&copy[0].1.clone().into(), &12.into())
    );
    let table = run(&database, &[], &[]);
    let told = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(told.contains("MISSING") && told.contains(&ids[2]), "{told}");

    let (code, report) = audit(&database, &["--where", "aggregateid <> 'swapped'"], &[]);
    assert_eq!((code, counts(&report, ["rows", "missing", "duplicates"])), (65, [10, 0, 1]));
    relay.stop();
}

#[test]
fn what_is_no_loss_is_told_apart() {
    let (mut database, topic, cut) = (with_grant(), Topic::new(1, &[]), Topic::new(1, &[]));
    let morgue = Morgue::new(&[("unroutable", "dead-letter"), ("missing_column", "skip")]);
    let environment = morgue.environment();
    init(&database);
    database.run("ALTER TABLE outbox ALTER type DROP NOT NULL, ADD topic text");
    let kind = topic.kind.clone();
    let relay = Relay::start(&database, &environment);
    database.insert(&kind, 0, 5);
    for (aggregate, kind, event_type, topic) in [
        ("letter", format!("no-such-{kind}"), "'T'", "NULL"),
        ("letter", kind.clone(), "'T'", "'not a topic'"),
        ("left out", kind.clone(), "NULL", "NULL"),
    ] {
        database.run(&format!(
            "INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', '{aggregate}', {event_type}, '{{}}', {topic})"
        ));
    }
    insert(&mut database, &cut.kind, "a");
    insert(&mut database, &cut.kind, "a");
    cut.read(2);
    morgue.letters.read(2);
    let names = ["published", "dead_lettered", "left_out", "unknown", "missing"];
    let (code, report) = audit(&database, &[], &environment);
    assert_eq!((code, counts(&report, names)), (0, [7, 2, 1, 0, 0]), "{report}");

    delete_before(&database, &cut, 1);
    let (code, report) = audit(&database, &[], &environment);
    assert_eq!((code, counts(&report, names)), (0, [6, 2, 1, 1, 0]), "{report}");
    assert!(report["notes"].to_string().contains(&format!("the beginning of topic {} is deleted", cut.name)));
    relay.stop();
}

#[test]
fn a_loss_is_told_from_what_retention_deleted() {
    let (mut database, topic) = (with_grant(), Topic::new(1, &[]));
    init(&database);
    database.run("ALTER TABLE outbox ADD created_at timestamptz NOT NULL DEFAULT now()");
    let relay = Relay::start(&database, &[]);
    database.insert(&topic.kind, 0, 3);
    topic.read(3);
    relay.stop();
    // Never published: one at the time of the others, one long after them.
    insert(&mut database, &topic.kind, "now");
    let lost = insert(&mut database, &topic.kind, "later");
    database.run("UPDATE outbox SET created_at = now() + interval '1 hour' WHERE aggregateid = 'later'");
    let gap = command(&database).args(["accept-gap", "--through", "now", "--yes"]).output().unwrap();
    assert!(gap.status.success(), "{}", String::from_utf8_lossy(&gap.stderr));
    let relay = Relay::start(&database, &[]);
    let names = ["published", "missing", "unknown"];
    let (code, report) = audit(&database, &[], &[]);
    assert_eq!((code, counts(&report, names)), (65, [3, 2, 0]), "{report}");

    delete_before(&database, &topic, 1);
    let (code, report) = audit(&database, &[], &[]);
    assert_eq!((code, counts(&report, names)), (65, [2, 1, 2]), "{report}");
    let findings = report["findings"].as_array().unwrap();
    assert_eq!((findings.len(), &findings[0]["id"]), (1, &lost.as_str().into()), "{report}");
    let (code, report) = audit(&database, &["--time-column", "nothing"], &[]);
    assert_eq!((code, counts(&report, names)), (0, [2, 0, 3]), "{report}");
    assert!(report["notes"].to_string().contains("--time-column"), "{report}");
    relay.stop();
}

#[test]
fn what_cannot_be_told_is_said() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let says = |database: &Database, environment: &[(&str, &str)], code: i32| {
        let output = run(database, &["--wait", "0"], environment);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{error}");
        error
    };
    let name = database.name.clone();
    let grant = format!("GRANT SELECT ON \"public\".\"outbox\" TO \"{name}\"");
    assert!(says(&database, &[], 69).contains(&grant));
    database.run(&grant);
    let (code, report) = audit(&database, &["--wait", "0"], &[]);
    assert_eq!((code, counts(&report, ["rows", "records", "missing"])), (0, [0, 0, 0]), "an empty outbox");
    assert_eq!(report["notes"], serde_json::json!([]));

    // Nobody confirms it.
    insert(&mut database, &topic.kind, "a");
    assert!(says(&database, &[], 75).contains("1 rows are in no topic"));
    let brief = ("CDC_RELAY_POSTGRES__CONNECT_TIMEOUT_SECONDS", "1");
    assert!(
        says(&database, &[brief, ("CDC_RELAY_KAFKA__BROKERS", "127.0.0.1:1")], 75).contains("127.0.0.1:1")
    );
    assert!(
        says(&database, &[brief, ("CDC_RELAY_POSTGRES__URL", "postgres://u:p@127.0.0.1:1/d")], 75)
            .contains(":1")
    );
    assert!(says(&database, &[("CDC_RELAY_OUTBOX__ID", "nr")], 65).contains("no column \"nr\""));
    let output = run(&database, &["--where", "no_such = 1"], &[]);
    assert_eq!(output.status.code(), Some(64));

    // Nobody ever will.
    let slot = database.slot.clone();
    database.run(&format!("SELECT pg_drop_replication_slot('{slot}')"));
    let (code, report) = audit(&database, &[], &[]);
    assert_eq!((code, counts(&report, ["missing", "unconfirmed"])), (65, [1, 0]), "{report}");
}

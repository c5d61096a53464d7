//! `cdc-relay check` against what is broken on purpose: it finds each thing, and what it says mends it.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use serde_json::Value;

use crate::{
    certificates::Authority,
    database::{Database, eventually},
    pair::Alone,
    relay::{command, init},
    stack::{Stack, folder},
    status::{AWAY, status},
    topics::Topic,
};

type Environment<'a> = &'a [(&'a str, &'a str)];

/// Its exit code, and its report.
fn check(database: &Database, environment: Environment<'_>) -> (Option<i32>, Value) {
    let output =
        command(database).args(["check", "--json"]).envs(environment.iter().copied()).output().unwrap();
    let report = serde_json::from_slice(&output.stdout);
    (output.status.code(), report.unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr))))
}

/// What mends a finding, if it is there.
fn find(database: &Database, environment: Environment<'_>, name: &str) -> Option<Vec<String>> {
    let (code, report) = check(database, environment);
    let findings = report["findings"].as_array().unwrap();
    assert_eq!(code, Some(if findings.is_empty() { 0 } else { 65 }), "{report}");
    let finding = findings.iter().find(|finding| finding["name"] == name)?;
    let lines = finding["mend"].as_array().unwrap();
    Some(lines.iter().map(|line| line.as_str().unwrap().to_owned()).collect())
}

/// Does what the finding says, statement by statement as the superuser, and it is gone.
fn mends(database: &mut Database, environment: Environment<'_>, name: &str) {
    let lines = find(database, environment, name)
        .unwrap_or_else(|| panic!("{name} is not found: {:?}", check(database, environment)));
    for line in lines {
        if line.starts_with("--") || line.starts_with('#') {
            continue;
        }
        if let Some(arguments) = line.strip_prefix("cdc-relay ") {
            let arguments = arguments.split('#').next().unwrap().split_whitespace();
            let output =
                command(database).args(arguments).envs(environment.iter().copied()).output().unwrap();
            assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
            if line.starts_with("cdc-relay init") {
                break;
            }
            continue;
        }
        database.run(&line);
    }
    eventually(&format!("{name} is mended"), || find(database, environment, name).is_none().then_some(()));
}

/// The same of what is mended by another setting of a topic.
fn mends_topic(database: &Database, environment: Environment<'_>, name: &str, topic: &Topic) {
    let lines = find(database, environment, name)
        .unwrap_or_else(|| panic!("{name} is not found: {:?}", check(database, environment)));
    let (_, set) =
        lines[0].split_once(&format!("--entity-name {} --add-config ", topic.name)).expect(&lines[0]);
    let (key, value) = set.split_once('=').unwrap();
    topic.configure(key, value);
    eventually(&format!("{name} is mended"), || find(database, environment, name).is_none().then_some(()));
}

#[test]
fn the_servers_settings() {
    let mut alone = Alone::start(&[("wal_level", "replica"), ("fsync", "off")]);
    let mut database = alone.database();
    mends_after_restart(&mut alone, &mut database);
    mends(&mut database, &[], "log-without-limit");
    mends(&mut database, &[], "fsync-off");
    mends(&mut database, &[], "slot-missing");
    // From here on no transaction that writes would end.
    alone.server.set(&[("synchronous_standby_names", "*")]);
    mends(&mut database, &[], "synchronous-relay");
    assert_eq!(check(&database, &[]).0, Some(0));
    let table = command(&database).arg("check").output().unwrap();
    assert!(table.status.success() && table.stdout.starts_with(b"nothing was found"), "{table:?}");
}

fn mends_after_restart(alone: &mut Alone, database: &mut Database) {
    let lines = find(database, &[], "wal-level").unwrap();
    assert_eq!(lines[1], "-- and restart the server");
    database.run(&lines[0]);
    alone.restart();
    database.reconnect();
    assert_eq!(find(database, &[], "wal-level"), None);
}

#[test]
fn the_role_and_the_publication() {
    let mut database = Database::new();
    let name = database.name.clone();
    init(&database);
    for (damage, finding) in [
        (&*format!("ALTER ROLE {name} NOREPLICATION"), "no-replication"),
        ("ALTER PUBLICATION cdc_relay SET (publish = 'update')", "publication-no-inserts"),
        ("ALTER PUBLICATION cdc_relay SET (publish = 'insert, update')", "publication-more"),
        ("ALTER PUBLICATION cdc_relay DROP TABLE outbox", "publication-no-table"),
        (
            "CREATE TABLE other (id int); ALTER PUBLICATION cdc_relay ADD TABLE other",
            "publication-more-tables",
        ),
        ("ALTER PUBLICATION cdc_relay ADD TABLES IN SCHEMA public", "publication-more-tables"),
        (
            "DROP PUBLICATION cdc_relay; CREATE PUBLICATION cdc_relay FOR ALL TABLES WITH (publish = 'insert')",
            "publication-all-tables",
        ),
        ("ALTER PUBLICATION cdc_relay SET TABLE outbox WHERE (aggregateid <> 'a')", "publication-filter"),
        (
            "ALTER PUBLICATION cdc_relay SET TABLE outbox (id, aggregatetype, aggregateid, type)",
            "publication-no-column",
        ),
    ] {
        database.run(damage);
        mends(&mut database, &[], finding);
    }
    // What mends the outbox leaves the other tables in.
    database
        .run("ALTER PUBLICATION cdc_relay SET TABLE other, outbox (id, aggregatetype, aggregateid, type)");
    let lines = find(&database, &[], "publication-no-column").unwrap();
    lines.iter().filter(|line| !line.starts_with("--")).for_each(|line| database.run(line));
    let tables = "SELECT count(*) FROM pg_publication_tables WHERE pubname = 'cdc_relay'";
    assert_eq!((find(&database, &[], "publication-no-column"), database.number(tables)), (None, 2));
    mends(&mut database, &[], "publication-more-tables");
    database.run("DROP PUBLICATION cdc_relay");
    database.run(&format!("GRANT CREATE ON DATABASE {name} TO {name}; ALTER TABLE outbox OWNER TO {name}"));
    mends(&mut database, &[], "publication-missing");
    let halts = [("CDC_RELAY_OUTBOX__UPDATES", "halt")];
    mends(&mut database, &halts, "publication-no-updates");
    let lacks = |environment: Environment<'_>, finding: &str, mend: &str| {
        let lines = find(&database, environment, finding)
            .unwrap_or_else(|| panic!("{:?}", check(&database, environment)));
        assert!(lines[0].contains(mend), "{lines:?}");
    };
    lacks(&[("CDC_RELAY_OUTBOX__TABLE", "public.nothing")], "outbox-missing", "mend outbox.table");
    lacks(&[("CDC_RELAY_OUTBOX__PAYLOAD", "nothing")], "column-missing", "mend the column's name");
    lacks(&[("CDC_RELAY_POSTGRES__URL", "postgres://x:x@127.0.0.1:1/x")], "postgres-away", "postgres.url");
    lacks(&[("CDC_RELAY_KAFKA__BROKERS", "127.0.0.1:1")], "kafka-away", "check kafka.brokers");
    database.run(&format!("ALTER ROLE {name} NOLOGIN"));
    let lines = find(&database, &[], "postgres-refused").unwrap();
    assert_eq!(lines.len(), 1, "{lines:?}");
    database.run(&format!("ALTER ROLE {name} LOGIN"));
    assert_eq!(find(&database, &[], "postgres-refused"), None);
}

#[test]
fn an_outbox_that_is_partitioned_or_a_partition() {
    let mut database = Database::new();
    database.run(
        "CREATE TABLE root (LIKE outbox) PARTITION BY LIST (aggregatetype); CREATE TABLE part PARTITION OF root DEFAULT; \
         ALTER PUBLICATION cdc_relay SET TABLE root",
    );
    mends(&mut database, &[("CDC_RELAY_OUTBOX__TABLE", "root")], "publication-partitions");
    // Published through its root now, which has to be the outbox then.
    let lines = find(&database, &[("CDC_RELAY_OUTBOX__TABLE", "part")], "publication-other-table").unwrap();
    assert!(lines[0].contains("\"public.root\""), "{lines:?}");
    assert_eq!(find(&database, &[("CDC_RELAY_OUTBOX__TABLE", "root")], "publication-other-table"), None);
}

#[test]
fn what_retention_needs() {
    let mut database = Database::new();
    init(&database);
    let deletes = [("CDC_RELAY_RETENTION__MODE", "delete")];
    mends(&mut database, &deletes, "retention-no-right");
    mends(&mut database, &deletes, "retention-no-column");
    mends(&mut database, &deletes, "retention-no-index");
    mends(&mut database, &[("CDC_RELAY_RETENTION__MODE", "drop-partitions")], "retention-no-right");
    database.run("ALTER PUBLICATION cdc_relay SET (publish = 'insert, delete')");
    mends(&mut database, &deletes, "publication-removals");
}

/// Somebody who streams from the slot and is no relay, by the protocol's own bytes.
fn hold(database: &Database) -> TcpStream {
    let mut socket = TcpStream::connect((database.options.get_host(), database.options.get_port())).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let name = &database.name;
    let parameters =
        format!("user\0{name}\0database\0{name}\0replication\0database\0application_name\0spy\0\0");
    let mut startup = (u32::try_from(parameters.len()).unwrap() + 8).to_be_bytes().to_vec();
    startup.extend_from_slice(&196_608_u32.to_be_bytes());
    startup.extend_from_slice(parameters.as_bytes());
    socket.write_all(&startup).unwrap();
    let sql = format!(
        "START_REPLICATION SLOT \"{}\" LOGICAL 0/0 (proto_version '1', publication_names 'cdc_relay')\0",
        database.slot
    );
    let mut query = vec![b'Q'];
    query.extend_from_slice(&(u32::try_from(sql.len()).unwrap() + 4).to_be_bytes());
    query.extend_from_slice(sql.as_bytes());
    socket.write_all(&query).unwrap();
    let mut some = [0; 1024];
    assert!(socket.read(&mut some).unwrap() > 0);
    socket
}

#[test]
fn a_slot_that_is_lost_or_that_somebody_else_has() {
    let alone = Alone::start(&[
        ("fsync", "on"),
        ("max_slot_wal_keep_size", "1MB"),
        ("min_wal_size", "32MB"),
        ("max_wal_size", "32MB"),
    ]);
    let mut database = alone.database();
    mends(&mut database, &[], "slot-missing");
    let spy = hold(&database);
    mends(&mut database, &[], "slot-held");
    drop(spy);
    assert_eq!(find(&database, &[("CDC_RELAY_POSTGRES__SLOT", "nobodys")], "slot-missing").unwrap().len(), 2);
    database.run("SELECT pg_create_physical_replication_slot('physical')");
    let lines = find(&database, &[("CDC_RELAY_POSTGRES__SLOT", "physical")], "slot-of-others").unwrap();
    assert!(lines[0].contains("choose another name"), "{lines:?}");
    database.run("SELECT pg_drop_replication_slot('physical')");
    // What it needs is removed.
    eventually("the slot is lost", || {
        database.run("CREATE TABLE IF NOT EXISTS filler (x text); INSERT INTO filler SELECT repeat('x', 1000) FROM generate_series(1, 5000)");
        database.run("SELECT pg_switch_wal()");
        database.run("CHECKPOINT");
        find(&database, &[], "slot-lost")
    });
    database.run(&format!("GRANT SELECT ON outbox TO {}", database.name.clone()));
    mends(&mut database, &[], "slot-lost");
}

#[test]
fn the_topics() {
    let own = Topic::missing(1);
    let environment = [("CDC_RELAY_KAFKA__CHECKPOINT_TOPIC", own.name.as_str())];
    let (mut database, topic) = (Database::new(), Topic::missing(3));
    let name = database.name.clone();
    mends(&mut database, &environment, "own-topic-missing");
    own.configure("cleanup.policy", "delete");
    mends_topic(&database, &environment, "own-topic-forgets", &own);
    let notes = check(&database, &environment).1["notes"].to_string();
    assert!(notes.contains("were not looked at") && notes.contains("GRANT SELECT ON"), "{notes}");
    let (letters, mut dead_letter) = (Topic::new(1, &[("retention.ms", "86400000")]), environment.to_vec());
    dead_letter.push(("CDC_RELAY_POISON__TOO_LARGE", "dead-letter"));
    dead_letter.push(("CDC_RELAY_POISON__DEAD_LETTER_TOPIC", &letters.name));
    mends_topic(&database, &dead_letter, "dead-letters-expire", &letters);
    database.run(&format!("GRANT SELECT ON outbox TO {name}"));
    database.insert(&topic.kind, 0, 3);
    let lines = find(&database, &environment, "topic-missing").unwrap();
    let create = format!("--create --topic {} --partitions 6 --replication-factor 1", topic.name);
    assert!(lines[1].ends_with(&create), "{lines:?}");
    topic.create(&[("min.insync.replicas", "2")]);
    mends_topic(&database, &environment, "too-few-replicas", &topic);
    topic.configure("max.message.bytes", "2000");
    assert_eq!(find(&database, &environment, "topic-too-small"), None);
    database.run(&format!(
        "INSERT INTO outbox SELECT gen_random_uuid(), '{}', 'a', 'T', jsonb_build_object('x', string_agg(md5(n::text), '')) \
         FROM generate_series(1, 100) n",
        topic.kind
    ));
    mends_topic(&database, &environment, "topic-too-small", &topic);
}

#[test]
fn topics_that_only_the_configuration_names() {
    let mut database = Database::new();
    init(&database);
    let name = database.name.clone();
    database.run(&format!("GRANT SELECT ON outbox TO {name}"));
    for key in ["ROUTE__TOPIC", "ROUTE__BY_TYPE__T", "MESSAGES__TOPICS"] {
        let topic = Topic::missing(1);
        let key = format!("CDC_RELAY_{key}");
        let environment = [(key.as_str(), topic.name.as_str()), ("CDC_RELAY_MESSAGES__PREFIX", "outbox")];
        let lines = find(&database, &environment, "topic-missing").unwrap();
        assert!(lines[1].contains(&topic.name), "{lines:?}");
        topic.create(&[]);
        eventually("it is there", || find(&database, &environment, "topic-missing").is_none().then_some(()));
    }
}

#[test]
fn a_slot_that_has_left_its_checkpoint_behind() {
    for delivery in ["at-least-once", "exactly-once"] {
        let environment = [("CDC_RELAY_KAFKA__DELIVERY", delivery)];
        let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
        let (name, slot) = (database.name.clone(), database.slot.clone());
        database.run(&format!("GRANT SELECT ON outbox TO {name}"));
        database.run(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')"));
        mends(&mut database, &environment, "position-in-doubt");
        database.insert(&topic.kind, 0, 1);
        database.run("DELETE FROM outbox");
        database.run(&format!("SELECT pg_replication_slot_advance('{slot}', pg_current_wal_lsn())"));
        let lines = find(&database, &environment, "position-in-doubt").unwrap();
        assert_eq!(lines[3], "cdc-relay accept-gap --yes");
        mends(&mut database, &environment, "position-in-doubt");
    }
}

#[test]
fn a_slot_that_will_be_lost_at_the_next_checkpoint() {
    let alone =
        Alone::start(&[("fsync", "on"), ("max_slot_wal_keep_size", "1MB"), ("checkpoint_timeout", "1h")]);
    let mut database = alone.database();
    init(&database);
    for _ in 0..4 {
        database.run("CREATE TABLE IF NOT EXISTS filler (x text); INSERT INTO filler VALUES ('x')");
        database.run("SELECT pg_switch_wal()");
    }
    assert_eq!(status(&database, AWAY, &[])["seconds_to_slot_loss"], 0.0);
    mends(&mut database, &[], "slot-unreserved");
}

#[test]
fn the_brokers() {
    let stack =
        Stack::start("doctor", &["--brokers", "3", "--kafka-set", "transaction.max.timeout.ms=10000"]);
    let mut database = Database::on(&stack.servers);
    init(&database);
    let name = database.name.clone();
    database.run(&format!("GRANT SELECT ON outbox TO {name}"));
    let topic = Topic::replicated(&stack.servers, &[1, 2]);
    database.insert(&topic.kind, 0, 1);
    topic.configure("min.insync.replicas", "1");
    eventually("it is found", || find(&database, &[], "one-replica-is-enough"));
    mends_topic(&database, &[], "one-replica-is-enough", &topic);
    stack.stop("kafka-2");
    let lines = eventually("the replica is out of sync", || find(&database, &[], "too-few-in-sync"));
    assert_eq!(lines, ["# start the brokers that are behind or away: 2"]);
    stack.start_again("kafka-2");
    eventually("it is back", || find(&database, &[], "too-few-in-sync").is_none().then_some(()));
    let exactly_once = ("CDC_RELAY_KAFKA__DELIVERY", "exactly-once");
    let lines = find(&database, &[exactly_once], "transaction-timeout").unwrap();
    assert_eq!(lines, ["# set transactions.timeout_seconds to 10 at most"]);
    let mended = [exactly_once, ("CDC_RELAY_TRANSACTIONS__TIMEOUT_SECONDS", "10")];
    assert_eq!(find(&database, &mended, "transaction-timeout"), None);
}

#[test]
fn a_certificate_that_ends() {
    let dir = folder("ends");
    let authority = Authority::new(&dir, "ours");
    let alone = Alone::start(&[("max_slot_wal_keep_size", "1GB")]);
    let database = alone.database();
    let name = &database.name;
    let url = format!("postgres://{name}:{name}@127.0.0.1:{}/{name}?sslmode=require", alone.server.port);
    let present = |last_year: i32| {
        let certificate = authority.certificate("localhost", last_year);
        let (cert, key) = (alone.give(&certificate.cert), alone.give(&certificate.key));
        let (cert, key) = (cert.to_str().unwrap(), key.to_str().unwrap());
        alone.server.set(&[("ssl_cert_file", cert), ("ssl_key_file", key), ("ssl", "on")]);
    };
    let environment = [("CDC_RELAY_POSTGRES__URL", url.as_str())];
    present(2025);
    let lines = eventually("it is found", || find(&database, &environment, "certificate-ends"));
    assert_eq!(lines[1], "SELECT pg_reload_conf();");
    let soon = authority.certificate_for_days("localhost", 10);
    alone.server.set(&[
        ("ssl_cert_file", alone.give(&soon.cert).to_str().unwrap()),
        ("ssl_key_file", alone.give(&soon.key).to_str().unwrap()),
    ]);
    eventually("that it ends soon is found", || {
        let (code, report) = check(&database, &environment);
        let findings = report["findings"].to_string();
        (code == Some(65)
            && findings.contains("the server's certificate ends on")
            && findings.contains("days"))
        .then_some(())
    });
    present(2099);
    eventually("it is mended", || find(&database, &environment, "certificate-ends").is_none().then_some(()));
    // A file of the relay's own.
    let soon = authority.certificate_for_days("relay", 10);
    let environment =
        [("CDC_RELAY_KAFKA__PROPERTIES__SSL_CERTIFICATE_LOCATION", soon.cert.to_str().unwrap())];
    assert!(find(&database, &environment, "certificate-ends").is_some());
    let lasts = authority.certificate_for_days("relay", 40);
    let environment =
        [("CDC_RELAY_KAFKA__PROPERTIES__SSL_CERTIFICATE_LOCATION", lasts.cert.to_str().unwrap())];
    assert_eq!(find(&database, &environment, "certificate-ends"), None);
    let old = authority.certificate("relay", 2025);
    let environment = [("CDC_RELAY_KAFKA__PROPERTIES__SSL_CERTIFICATE_LOCATION", old.cert.to_str().unwrap())];
    let lines = find(&database, &environment, "certificate-ends").unwrap();
    assert!(lines[0].contains("then restart the relay"), "{lines:?}");
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_slot_without_a_checkpoint_is_not_taken_from_whoever_streams_from_it() {
    let alone = Alone::start(&[]);
    let mut database = alone.database();
    let slot = database.slot.clone();
    database.run(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')"));
    let spy = hold(&database);
    let output = command(&database).arg("init").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(69), "{said}");
    assert!(said.contains("stop whatever streams from it"), "{said}");
    drop(spy);
    eventually("it is free", || {
        command(&database).arg("init").output().unwrap().status.success().then_some(())
    });
}

//! `cdc-relay init`, and what `run` says where it was not run.

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
};

use sqlx::{Connection as _, Executor as _, PgConnection};

use crate::{
    database::{Database, eventually},
    pair::major_version,
    relay::{Relay, command, init},
};

#[test]
fn init_makes_what_is_missing_and_may_be_repeated() {
    let mut database = Database::new();
    let first = String::from_utf8(init(&database).stdout).unwrap();
    assert!(first.contains("exists") && first.contains("created, confirmed LSN "), "{first}");
    let second = String::from_utf8(init(&database).stdout).unwrap();
    assert!(!second.contains("created"), "{second}");
    let slot = database.slot.clone();
    assert_eq!(
        database.text(&format!("SELECT plugin::text FROM pg_replication_slots WHERE slot_name = '{slot}'")),
        "pgoutput"
    );
}

#[test]
fn a_role_that_may_not_publish_is_told_what_the_owner_has_to_run() {
    let mut database = Database::new();
    database.run("DROP PUBLICATION cdc_relay");
    let output = command(&database).arg("init").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(69), "{said}");
    assert!(
        said.contains("CREATE PUBLICATION cdc_relay FOR TABLE public.outbox WITH (publish = 'insert')"),
        "{said}"
    );
}

#[test]
fn without_slot_publication_or_permission_run_stops_with_the_remedy() {
    let mut database = Database::new();
    let ends = |database: &Database, expected: i32, hint: &str| {
        let mut relay = Relay::spawn(database, &[]);
        assert_eq!(relay.wait().code(), Some(expected), "{}", relay.log());
        assert!(relay.log().contains(hint), "{}", relay.log());
    };
    ends(&database, 65, "cdc-relay init");
    let (name, slot) = (database.name.clone(), database.slot.clone());
    init(&database);
    database.run("DROP PUBLICATION cdc_relay");
    ends(&database, 65, "publication \"cdc_relay\" does not exist");
    database.run("CREATE PUBLICATION cdc_relay FOR TABLE outbox WITH (publish = 'insert')");
    database.run(&format!("ALTER ROLE {name} NOREPLICATION"));
    ends(&database, 69, "REPLICATION");
    database.run(&format!("ALTER ROLE {name} REPLICATION PASSWORD 'another'"));
    ends(&database, 69, "password");
    database.run(&format!("ALTER ROLE {name} PASSWORD '{name}'"));
    database.run(&format!("SELECT pg_drop_replication_slot('{slot}')"));
    database.run(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'test_decoding')"));
    ends(&database, 65, "test_decoding");
}

#[test]
fn init_says_whose_transactions_the_slot_waits_for() {
    let mut database = Database::new();
    let mut open = database.runtime.block_on(PgConnection::connect_with(&database.options)).unwrap();
    database.runtime.block_on(open.execute("BEGIN; CREATE TABLE held (id int)")).unwrap();
    let asked = sqlx::query_scalar::<_, i32>("SELECT pg_backend_pid()").fetch_one(&mut open);
    let pid = database.runtime.block_on(asked).unwrap();
    let mut init = command(&database).arg("init").stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(init.stderr.take().unwrap()).lines();
    let line = said.find_map(|line| line.ok().filter(|line| line.contains("the slot waits for"))).unwrap();
    assert!(line.contains(&format!("SELECT pg_terminate_backend({pid})")), "{line}");
    // It does not go on when init is gone.
    init.kill().unwrap();
    init.wait().unwrap();
    let slot = database.slot.clone();
    let slots = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{slot}'");
    eventually("the server has given the slot up", || (database.number(&slots) == 0).then_some(()));
    // And goes on when they end.
    let mut init = command(&database).arg("init").stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(init.stderr.take().unwrap()).lines();
    said.find_map(|line| line.ok().filter(|line| line.contains("the slot waits for"))).unwrap();
    database.runtime.block_on(open.execute("ROLLBACK")).unwrap();
    assert!(init.wait().unwrap().success());
    assert_eq!(database.number(&slots), 1);
}

#[test]
fn a_slot_is_synchronised_to_standbys_where_it_is_wanted_and_the_server_can() {
    let mut database = Database::new();
    let run = |database: &Database, arguments: &[&str]| {
        let output =
            command(database).args(arguments).env("CDC_RELAY_POSTGRES__FAILOVER", "true").output().unwrap();
        (output.status.code(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
    };
    if major_version() < 17 {
        let (code, said) = run(&database, &["init"]);
        assert!(code == Some(64) && said.contains("needs PostgreSQL 17 or later"), "{said}");
        // One that is there stays as it is.
        init(&database);
        assert_eq!(run(&database, &["init"]).0, Some(64));
        assert_eq!(
            database.number("SELECT count(*) FROM pg_replication_slots WHERE slot_name = current_database()"),
            1
        );
        return;
    }
    let is_failover =
        format!("SELECT failover::text FROM pg_replication_slots WHERE slot_name = '{}'", database.slot);
    init(&database);
    assert_eq!(database.text(&is_failover), "false");
    let relay = Relay::start(&database, &[]);
    let (code, said) = run(&database, &["init"]);
    assert!(
        code == Some(75) && said.contains("NOT synchronised") && said.contains("stop every relay"),
        "{said}"
    );
    relay.stop();
    let (code, said) = run(&database, &["init"]);
    assert!(code == Some(0) && said.contains("synchronised to standbys from now on"), "{said}");
    assert_eq!(database.text(&is_failover), "true");
    let said = String::from_utf8(init(&database).stdout).unwrap();
    assert!(said.contains(", synchronised to standbys\n"), "it is never switched off: {said}");

    let mut another = Database::new();
    assert_eq!(run(&another, &["init"]).0, Some(0));
    let slot = another.slot.clone();
    let made =
        another.text(&format!("SELECT failover::text FROM pg_replication_slots WHERE slot_name = '{slot}'"));
    assert_eq!(made, "true");
}

#[test]
fn bad_configuration_is_64_and_names_the_key() {
    let database = Database::new();
    for (variable, value, said) in [
        ("CDC_RELAY_POSTGRES__SLOTT", "x", "slott"),
        ("CDC_RELAY_LIMITS__IN_FLIGHT_BYTES", "lots", "in_flight_bytes"),
        ("CDC_RELAY_ROUTE__TOPIC", "${nope", "route.topic"),
        ("CDC_RELAY_KAFKA__PROPERTIES__ACKS", "1", "acks"),
        ("CDC_RELAY_KAFKA__PROPERTIES__NO_SUCH_SETTING", "1", "no.such.setting"),
        ("CDC_RELAY_LOG__LEVEL", "((", "log.level"),
        ("CDC_RELAY_LOG__LEVEL", "loud", "log.level"),
    ] {
        let output = command(&database)
            .arg("run")
            .env(variable, value)
            .env("CDC_RELAY_HTTP__LISTEN", "127.0.0.1:0")
            .output();
        let output = output.unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{variable}: {error}");
        assert!(error.contains(said), "{variable}: {error}");
        assert!(!error.contains(&format!(":{}@", database.name)), "a password is told: {error}");
    }
}

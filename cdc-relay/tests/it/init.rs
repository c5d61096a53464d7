//! `cdc-relay init`, and what `run` says where it was not run.

use crate::{
    database::Database,
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

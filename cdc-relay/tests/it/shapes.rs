//! Outboxes of other shapes than Debezium's: what arrives.

use std::{fs, path::PathBuf};

use rdkafka::{Message as _, message::OwnedMessage};

use crate::{
    audit::{audit, counts},
    database::{Database, eventually, unique},
    relay::{Relay, command, init},
    topics::{Topic, headers},
};

/// A relay's configuration file.
pub(crate) struct File(PathBuf);

impl File {
    pub(crate) fn new(text: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.toml", unique()));
        fs::write(&path, text).unwrap();
        Self(path)
    }

    pub(crate) fn variable(&self) -> (&str, &str) {
        ("CDC_RELAY_CONFIG", self.0.to_str().unwrap())
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Runs `cdc-relay init` with a configuration.
pub(crate) fn init_with(database: &Database, file: &File) {
    let output = command(database).arg("init").envs([file.variable()]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A header's value; one without a value is `(null)`.
fn header(message: &OwnedMessage, name: &str) -> Option<String> {
    let found = headers(message).into_iter().find(|(n, _)| n == name);
    found.map(|(_, value)| value.unwrap_or_else(|| "(null)".to_owned()))
}

fn text(message: &OwnedMessage) -> String {
    String::from_utf8(message.payload().unwrap().to_vec()).unwrap()
}

const EVENTS: &str = "CREATE SCHEMA billing; CREATE TABLE billing.events (event_id bigint PRIMARY KEY, kind text NOT NULL, \
     subject text NOT NULL, name text NOT NULL, body json, tenant text, raw bytea, at timestamptz, at_ms bigint)";

#[test]
fn several_tables_of_one_publication_have_their_own_mappings() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    let kind = &topic.kind;
    let (billed, mapped) =
        (Topic::named(&format!("billing.{kind}.t-1")), Topic::named(&format!("mapped-{kind}")));
    let file = File::new(&format!(
        "[route.by_type]\nMapped = 'mapped-{kind}'\n'dotted.type' = 'mapped-{kind}'\n\
         [[outboxes]]\ntable = 'billing.events'\nid = 'event_id'\naggregate_type = 'kind'\naggregate_id = 'subject'\n\
         event_type = 'name'\npayload = 'body'\ntimestamp = 'at'\nroute = 'billing.${{kind}}.${{tenant}}'\n\
         header_columns = ['tenant:x-tenant', 'raw', 'at', 'name:eventType']\n"
    ));
    database.run(EVENTS);
    database.run("DROP PUBLICATION cdc_relay");
    // The role may not; what it is told to have run is right.
    let refused = command(&database).arg("init").envs([file.variable()]).output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    let (_, statement) = said.split_once("let the table's owner run: ").unwrap_or_else(|| panic!("{said}"));
    assert!(
        statement.contains("FOR TABLE public.outbox, billing.events WITH (publish = 'insert')"),
        "{said}"
    );
    database.run(statement.trim());
    init_with(&database, &file);
    // Times must not depend on what the role has set.
    let role = database.name.clone();
    database.run(&format!(
        "ALTER ROLE {role} SET TimeZone = 'Asia/Kolkata'; ALTER ROLE {role} SET DateStyle = 'German'"
    ));
    let relay = Relay::start(&database, &[file.variable()]);
    database.run(&format!(
        "INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'k', 'T', '{{}}'); \
         INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'k', 'Mapped', '{{}}'); \
         INSERT INTO billing.events VALUES (7, '{kind}', 's', 'Billed', '{{ \"b\":1,  \"a\":2 }}', 't-1', '\\x00ff', \
           '2026-01-01 05:30:00.123456+05:30', NULL), (8, '{kind}', 's', 'Billed', NULL, 't-1', NULL, NULL, NULL), \
           (9, '{kind}', 's', 'dotted.type', '{{}}', NULL, NULL, '2026-01-01 00:00:00.5+00', NULL)"
    ));
    assert_eq!(topic.read(1).len(), 1);
    let messages = billed.read(2);
    assert_eq!(messages[0].key(), Some(&b"s"[..]));
    assert_eq!(text(&messages[0]), "{ \"b\":1,  \"a\":2 }", "json is verbatim");
    assert_eq!(messages[0].timestamp().to_millis(), Some(1_767_225_600_123));
    let some = |text: &str| Some(text.to_owned());
    for (name, value) in [
        ("id", some("7")),
        ("type", some("Billed")),
        ("x-tenant", some("t-1")),
        ("raw", some("\\x00ff")),
        ("at", some("2026-01-01 00:00:00.123456+00")),
        ("eventType", some("Billed")),
    ] {
        assert_eq!(header(&messages[0], name), value, "{name}");
    }
    assert_eq!(messages[1].payload(), None, "a tombstone");
    assert_eq!(header(&messages[1], "raw"), some("(null)"), "NULL is a header without a value");
    let now_ms = database.number("SELECT (extract(epoch FROM now()) * 1000)::int8");
    let age_ms = now_ms - messages[1].timestamp().to_millis().unwrap();
    assert!((0..60_000).contains(&age_ms), "without a time, the commit's: {age_ms} ms ago");
    let messages = mapped.read(2);
    let types: Vec<_> = messages.iter().map(|m| header(m, "type").unwrap()).collect();
    assert_eq!(types, ["Mapped", "dotted.type"]);
    assert_eq!(messages[1].timestamp().to_millis(), Some(1_767_225_600_500));
    database.run(&format!(
        "GRANT USAGE ON SCHEMA billing TO {role}; GRANT SELECT ON outbox, billing.events TO {role}"
    ));
    let (code, report) = audit(&database, &[], &[file.variable()]);
    assert_eq!((code, counts(&report, ["rows", "published", "records"])), (0, [5, 5, 5]), "{report}");
    relay.stop();
}

#[test]
fn a_time_in_milliseconds_is_taken_and_a_list_may_be_text() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    database.run("ALTER TABLE outbox ADD at_ms bigint, ADD at timestamp, ADD \"Tenant\" text, ADD zone text");
    init(&database);
    let variables = |time: &'static str| {
        [("CDC_RELAY_OUTBOX__TIMESTAMP", time), ("CDC_RELAY_OUTBOX__HEADER_COLUMNS", "Tenant:tenant, zone")]
    };
    let kind = &topic.kind;
    database.run(&format!(
        "INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'k', 'T', '{{}}', 1767225600123, '2026-01-02 00:00:00', 't', 'z')"
    ));
    let relay = Relay::start(&database, &variables("at_ms"));
    let message = &topic.read(1)[0];
    assert_eq!(message.timestamp().to_millis(), Some(1_767_225_600_123));
    assert_eq!(
        headers(message)[5..],
        [("tenant".into(), Some("t".into())), ("zone".into(), Some("z".into()))]
    );
    relay.stop();
    database
        .run("INSERT INTO outbox SELECT gen_random_uuid(), aggregatetype, 'k', 'T', '{}', 1, at FROM outbox");
    let relay = Relay::start(&database, &variables("at"));
    assert_eq!(topic.read(2)[1].timestamp().to_millis(), Some(1_767_312_000_000), "a timestamp is in UTC");
    relay.stop();
}

/// Makes the outbox a partitioned table of two partitions.
fn partition(database: &mut Database) {
    database.run(
        "DROP TABLE outbox; CREATE TABLE outbox (id uuid, aggregatetype text, aggregateid text, type text, payload jsonb) \
         PARTITION BY LIST (aggregateid); CREATE TABLE outbox_a PARTITION OF outbox FOR VALUES IN ('a'); \
         CREATE TABLE outbox_rest PARTITION OF outbox DEFAULT; ALTER PUBLICATION cdc_relay ADD TABLE outbox",
    );
}

#[test]
fn a_partitioned_outbox_is_published_as_its_root_and_never_passed_over() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    partition(&mut database);
    let output = command(&database).arg("init").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(65), "{said}");
    let (_, statement) = said.split_once("let its owner run: ").unwrap_or_else(|| panic!("{said}"));
    assert!(statement.contains("SET (publish_via_partition_root = true)"), "{said}");
    database.run(statement.trim());
    init(&database);
    let mut relay = Relay::start(&database, &[]);
    let insert = |database: &mut Database, id: &str| {
        let kind = &topic.kind;
        database
            .run(&format!("INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', '{id}', 'T', '{{}}')"));
    };
    for id in ["a", "b"] {
        insert(&mut database, id);
    }
    let keys = |count| topic.read(count).iter().map(|m| m.key().unwrap().to_vec()).collect::<Vec<_>>();
    assert_eq!(keys(2), [b"a", b"b"]);
    // Somebody switches it off while the relay runs.
    database.run("ALTER PUBLICATION cdc_relay SET (publish_via_partition_root = false)");
    insert(&mut database, "a");
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(relay.log().contains("under the name of the partition public.outbox_a"), "{}", relay.log());
    let mut relay = Relay::spawn(&database, &[]);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(
        relay.log().contains("publishes rows of public.outbox under the names of its partitions"),
        "{}",
        relay.log()
    );
    // Switched on again, the row of the meantime is still the partition's, and the hint gets it through.
    database.run("ALTER PUBLICATION cdc_relay SET (publish_via_partition_root = true)");
    let mut relay = Relay::spawn(&database, &[]);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    let file = File::new("[[outboxes]]\ntable = 'public.outbox_a'");
    let relay = Relay::start(&database, &[file.variable()]);
    insert(&mut database, "c");
    assert_eq!(keys(4), [b"a", b"b", b"a", b"c"]);
    relay.stop();
}

#[test]
fn updates_are_ignored_or_halt() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    database.run("ALTER PUBLICATION cdc_relay SET (publish = 'insert, update, delete, truncate')");
    init(&database);
    let relay = Relay::start(&database, &[]);
    database.insert(&topic.kind, 0, 3);
    database.run("UPDATE outbox SET type = 'Changed'; DELETE FROM outbox; TRUNCATE outbox");
    database.insert(&topic.kind, 3, 1);
    assert_eq!(topic.read(4).len(), 4);
    eventually("they are counted", || relay.metric("cdc_relay_ignored_changes_total").filter(|n| *n >= 7.0));
    relay.stop();
    assert_eq!(topic.size(), 4);
    let halt = [("CDC_RELAY_OUTBOX__UPDATES", "halt")];
    let mut relay = Relay::start(&database, &halt);
    database.run("UPDATE outbox SET type = 'Changed'");
    let lsn = database.current_lsn();
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(
        relay.log().contains("a row of the outbox public.outbox was updated (commit LSN "),
        "{}",
        relay.log()
    );
    assert!(database.unconfirmed_bytes(&lsn) > 0);
    // Ignored, it is behind us.
    let relay = Relay::start(&database, &[]);
    eventually("it is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    relay.stop();
    database.run("ALTER PUBLICATION cdc_relay SET (publish = 'insert')");
    let mut relay = Relay::spawn(&database, &halt);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(relay.log().contains("SET (publish = 'insert, update')"), "{}", relay.log());
}

#[test]
fn a_record_is_a_cloud_event_when_asked() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let relay = Relay::start(&database, &[("CDC_RELAY_CLOUDEVENTS__SOURCE", "/shop/orders")]);
    let kind = &topic.kind;
    let id = "00000000-0000-0000-0000-000000000001";
    database.run(&format!(
        "INSERT INTO outbox VALUES ('{id}', '{kind}', 'o-7', 'OrderCreated', '{{}}'), (gen_random_uuid(), '{kind}', 'o', 'T', NULL)"
    ));
    let messages = topic.read(2);
    let found = headers(&messages[0]);
    let names: Vec<_> = found.iter().map(|(n, _)| n.as_str()).collect();
    assert_eq!(names[..5], ["id", "type", "aggregatetype", "lsn", "seq"], "ours are there, too");
    let expected =
        ["ce_specversion", "ce_id", "ce_source", "ce_type", "ce_time", "ce_subject", "content-type"];
    assert_eq!(names[5..], expected);
    let value = |name| header(&messages[0], name).unwrap();
    assert_eq!((value("ce_specversion"), value("ce_id")), ("1.0".into(), id.into()));
    assert_eq!((value("ce_source"), value("ce_type")), ("/shop/orders".into(), "OrderCreated".into()));
    assert_eq!((value("ce_subject"), value("content-type")), ("o-7".into(), "application/json".into()));
    let ms = messages[0].timestamp().to_millis().unwrap();
    let time = value("ce_time");
    assert_eq!(
        database.number(&format!("SELECT (extract(epoch FROM '{time}'::timestamptz) * 1000)::int8")),
        ms
    );
    assert_eq!(header(&messages[1], "content-type"), None, "a tombstone has no content");
    relay.stop();
}

#[test]
fn messages_are_rows_without_a_table() {
    let (mut database, topic, own) = (Database::new(), Topic::new(1, &[]), Topic::new(2, &[]));
    database.run("DROP TABLE outbox");
    let (kind, own_name) = (&topic.kind, &own.name);
    let file = File::new(&format!(
        "[outbox]\ntable = ''\n[messages]\nprefix = 'outbox'\ntopics = ['{}', '{own_name}']",
        topic.name
    ));
    init_with(&database, &file);
    let relay = Relay::start(&database, &[file.variable()]);
    database.run(&format!(
        "BEGIN; SELECT pg_logical_emit_message(true, 'another', 'x'); SELECT pg_logical_emit_message(false, 'another', 'x'); \
         SELECT pg_logical_emit_message(true, 'outbox', '{{\"id\": \"e-1\", \"aggregatetype\": \"{kind}\", \"aggregateid\": \"o-1\", \
           \"type\": \"OrderCreated\", \"payload\": {{\"b\": 1.50,  \"a\": \"ä\"}}, \"headers\": {{\"tenant\": \"t\"}}, \
           \"traceparent\": \"00-tp\", \"timestamp\": \"2026-01-01T00:00:00Z\"}}'); \
         SELECT pg_logical_emit_message(true, 'outbox', '{{\"id\": 2, \"aggregatetype\": \"{kind}\", \"aggregateid\": \"o-2\", \
           \"type\": \"T\", \"payload\": \"plain \\\"text\\\"\", \"topic\": \"{own_name}\", \"partition\": 1}}'); COMMIT"
    ));
    database.run("BEGIN; SELECT pg_logical_emit_message(true, 'outbox', '{}'); ROLLBACK");
    let message = &topic.read(1)[0];
    assert_eq!(message.key(), Some(&b"o-1"[..]));
    assert_eq!(text(message), "{\"b\": 1.50,  \"a\": \"ä\"}");
    assert_eq!(message.timestamp().to_millis(), Some(1_767_225_600_000));
    let found = headers(message);
    let some = |name: &str, value: &str| (name.to_owned(), Some(value.to_owned()));
    assert_eq!(found[..3], [some("id", "e-1"), some("type", "OrderCreated"), some("aggregatetype", kind)]);
    assert_eq!(found[4..], [some("seq", "1"), some("traceparent", "00-tp"), some("tenant", "t")]);
    let message = &own.read(1)[0];
    assert_eq!((text(message).as_str(), message.partition()), ("plain \"text\"", 1));
    assert_eq!(header(message, "seq").as_deref(), Some("2"));
    assert_eq!(header(message, "lsn"), header(&topic.read(1)[0], "lsn"));
    let lsn = database.current_lsn();
    eventually("all of it is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    eventually("both others are counted", || {
        relay.metric("cdc_relay_ignored_changes_total").filter(|n| *n >= 2.0)
    });
    relay.stop();
}

//! Outboxes of other shapes than Debezium's: what cannot be, and what is said.

use rdkafka::Message as _;

use crate::{
    database::{Database, eventually, unique},
    relay::{Relay, command, init},
    shapes::{File, init_with},
    topics::{Topic, headers},
};

#[test]
fn what_the_publication_or_the_table_lacks_is_named_at_the_start() {
    let mut database = Database::new();
    database.run("ALTER TABLE outbox ADD headers jsonb, ADD g text GENERATED ALWAYS AS ('x') STORED");
    init(&database);
    database.run("CREATE TABLE whole (LIKE outbox INCLUDING ALL)");
    let slot = database.slot.clone();
    let confirmed =
        format!("SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{slot}'");
    let at = database.text(&confirmed);
    let columns = "id, aggregatetype, aggregateid, type";
    // The table of the publication, the configuration, and what is said.
    for (publication, configuration, said) in [
        ("outbox", "[route]\ntopic = '${tenant}'", "public.outbox has no column \"tenant\""),
        ("outbox", "[outbox]\npayload = 'body'", "public.outbox has no column \"body\""),
        ("outbox", "[outbox]\nheader_columns = ['zone']", "public.outbox has no column \"zone\""),
        ("outbox", "[[outboxes]]\ntable = 'nope'", "there is no table public.nope"),
        ("outbox", "[[outboxes]]\ntable = 'whole'", "does not have the table public.whole"),
        ("outbox", "[outbox]\nheader_columns = ['g']", "does not publish the column \"g\" of public.outbox"),
        ("outbox WHERE (type <> 'T')", "", "leaves rows of public.outbox out by a row filter: "),
        (&format!("outbox ({columns})"), "", "does not publish the column \"payload\" of public.outbox"),
        (
            &format!("outbox ({columns}, payload)"),
            "",
            "does not publish the column \"headers\" of public.outbox",
        ),
    ] {
        database.run(&format!("ALTER PUBLICATION cdc_relay SET TABLE {publication}"));
        let file = File::new(configuration);
        let mut relay = Relay::spawn(&database, &[file.variable()]);
        assert_eq!(relay.wait().code(), Some(65), "{configuration}\n{}", relay.log());
        assert!(relay.log().contains(said), "{configuration}\n{}", relay.log());
    }
    assert_eq!(database.text(&confirmed), at);
    database
        .run("ALTER PUBLICATION cdc_relay SET TABLE outbox (id, aggregatetype, aggregateid, type, payload)");
    let file = File::new("[outbox]\nheaders = ''");
    Relay::start(&database, &[file.variable()]).stop();
}

#[test]
fn what_cannot_work_at_all_is_bad_configuration() {
    let database = Database::new();
    for (configuration, said) in [
        ("[[outboxes]]\ntable = 'public.outbox'", "outboxes[0].table is public.outbox"),
        ("[route.by_type]\nOrderCreated = 'a/b'", "route.by_type.\"OrderCreated\" is \"a/b\""),
        ("[outbox]\nroute = 'a b'", "outbox.route"),
        ("[outbox]\nheader_columns = ['tenant:lsn']", "the header \"lsn\", which is taken"),
        ("[messages]\nprefix = 'outbox'\ntopics = ['ä']", "messages.topics"),
    ] {
        let file = File::new(configuration);
        let output = command(&database).arg("--check-config").envs([file.variable()]).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{configuration}: {error}");
        assert!(error.contains(said), "{configuration}: {error}");
    }
}

/// What a bad row or message is dead-lettered for, and a word of why.
const BAD: [(&str, &str); 11] = [
    ("missing_column", "column \"tenant\" is NULL"),
    ("unroutable", "\"a b\" is not a legal name"),
    ("undecodable", "column \"at\" is not a time after 1970"),
    ("undecodable", "column \"partition\" is not a partition"),
    ("invalid_header", "the headers column is not a JSON object"),
    ("undecodable", "the message is not a JSON object"),
    ("missing_column", "there is no column \"payload\""),
    ("undecodable", "column \"id\" is not text or a number"),
    ("unroutable", "messages may not go to topic \"elsewhere\""),
    ("undecodable", "the message is not transactional"),
    ("too_large", "it is larger than topic"),
];

#[test]
fn bad_rows_and_messages_are_dead_lettered_and_the_good_ones_go_on() {
    let mut database = Database::new();
    let (id, dead) = (unique(), Topic::named(&format!("dead-{}", unique())));
    let good = Topic::named(&format!("x{id}"));
    database.run("ALTER TABLE outbox ADD tenant text, ADD at text, ADD partition int, ADD headers jsonb");
    let configuration = "[outbox]\ntimestamp = 'at'\n[route]\ntopic = '${tenant}'\n[messages]\nprefix = 'outbox'\n\
         [poison]\ndead_letter_topic = 'DEAD'\nundecodable = 'dead-letter'\nmissing_column = 'dead-letter'\n\
         unroutable = 'dead-letter'\ntoo_large = 'dead-letter'\ninvalid_header = 'dead-letter'\n";
    let file = File::new(&configuration.replace("DEAD", &dead.name));
    init_with(&database, &file);
    let relay = Relay::start(&database, &[file.variable()]);
    let topic = &good.name;
    for values in [
        "NULL, NULL, NULL, NULL".to_owned(),
        "'a b', NULL, NULL, NULL".into(),
        format!("'{topic}', 'infinity', NULL, NULL"),
        format!("'{topic}', NULL, -1, NULL"),
        format!("'{topic}', NULL, NULL, '[1]'"),
    ] {
        database
            .run(&format!("INSERT INTO outbox VALUES (gen_random_uuid(), 'a', 'k', 'T', '{{}}', {values})"));
    }
    let all = format!(
        "\"id\":\"m\",\"aggregatetype\":\"a\",\"aggregateid\":\"k\",\"type\":\"T\",\"tenant\":\"{topic}\""
    );
    let large = "x".repeat(1_100_000);
    for (transactional, content) in [
        (true, "not json".to_owned()),
        (true, format!("{{{all}}}")),
        (true, format!("{{{all},\"payload\":1,\"id\":[]}}")),
        (true, format!("{{{all},\"payload\":1,\"topic\":\"elsewhere\"}}")),
        (false, format!("{{{all},\"payload\":1}}")),
        (true, format!("{{{all},\"payload\":\"{large}\"}}")),
        (true, format!("{{{all},\"payload\":1}}")),
    ] {
        database.run(&format!("SELECT pg_logical_emit_message({transactional}, 'outbox', '{content}')"));
    }
    database.run(&format!(
        "INSERT INTO outbox VALUES (gen_random_uuid(), 'a', 'k', 'T', '{{\"last\": 1}}', '{topic}', '1767225600123', 0, '{{}}')"
    ));
    let messages = good.read(2);
    assert_eq!(messages.len(), 2);
    assert_eq!(messages[1].timestamp().to_millis(), Some(1_767_225_600_123));
    let letters = dead.read(BAD.len());
    for (letter, (reason, error)) in letters.iter().zip(BAD) {
        let found = headers(letter);
        let value = |name: &str| found.iter().find(|(n, _)| n == name).and_then(|(_, v)| v.clone()).unwrap();
        assert_eq!(value("dlq.reason"), reason, "{found:?}");
        assert!(value("dlq.error").contains(error), "{found:?}");
    }
    assert_eq!(letters.len(), BAD.len());
    let lsn = database.current_lsn();
    eventually("all of it is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    relay.stop();
    // Nothing of it comes again.
    let relay = Relay::start(&database, &[file.variable()]);
    database.run(&format!("INSERT INTO outbox VALUES (gen_random_uuid(), 'a', 'k', 'T', '{{}}', '{topic}')"));
    assert_eq!((good.read(3).len(), dead.size()), (3, i64::try_from(BAD.len()).unwrap()));
    relay.stop();
}

#[test]
fn a_message_outside_a_transaction_halts_and_can_be_left_out() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let messages = [("CDC_RELAY_MESSAGES__PREFIX", "outbox")];
    let mut relay = Relay::start(&database, &messages);
    database.insert(&topic.kind, 0, 1);
    database.run("SELECT pg_logical_emit_message(false, 'outbox', '{}')");
    database.insert(&topic.kind, 1, 1);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    let log = relay.log();
    assert!(log.contains("the message is not transactional"), "{log}");
    let (_, rest) = log.split_once("outbox message unknown (commit LSN ").unwrap_or_else(|| panic!("{log}"));
    let (lsn, _) = rest.split_once(',').unwrap();
    assert_eq!(topic.read(1).len(), 1, "nothing behind it is published");
    let output = command(&database).args(["accept-gap", "--through", lsn, "--yes"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let relay = Relay::start(&database, &messages);
    assert_eq!(topic.read(2).len(), 2);
    relay.stop();
    assert_eq!(topic.size(), 2);
}

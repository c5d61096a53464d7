//! What the log holds, and in which order: events that share an LSN, commits that begin where the one before ended,
//! values stored out of line, tables that change.

use rdkafka::Message as _;
use sqlx::Row as _;

use crate::{
    database::{Database, eventually},
    relay::{Relay, init},
    topics::{Topic, assert_complete_and_ordered, headers},
};

/// Rows whose payload counts `count` from `first` on, all of one aggregate.
fn rows(kind: &str, first: usize, count: usize) -> String {
    let row = |n| format!("(gen_random_uuid(), '{kind}', 'one', 'Counted', '{{\"n\": {n}}}')");
    (first..first + count).map(row).collect::<Vec<_>>().join(", ")
}

#[test]
fn events_that_share_an_lsn_survive_a_kill_between_them() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let kind = topic.kind.clone();
    // Rows of one multi-row INSERT and of one COPY go into the log together; what follows begins where they end.
    let path = format!("{}/rows-{}", database.text("SHOW data_directory"), database.name);
    let mut next = 0;
    for _ in 0..20 {
        database.run(&format!("INSERT INTO outbox VALUES {}", rows(&kind, next, 10)));
        let copied = format!(
            "SELECT gen_random_uuid(), '{kind}', 'one', 'Counted', json_build_object('n', n) FROM generate_series({}, {}) n",
            next + 10,
            next + 19
        );
        database.run(&format!("COPY ({copied}) TO '{path}'; COPY outbox FROM '{path}'"));
        // A COMMIT and the next BEGIN and INSERT.
        database.run(&format!(
            "BEGIN; INSERT INTO outbox VALUES {}; COMMIT; BEGIN; INSERT INTO outbox VALUES {}; COMMIT",
            rows(&kind, next + 20, 1),
            rows(&kind, next + 21, 1)
        ));
        next += 22;
    }
    // The case is really there: changes with the same LSN.
    let slot = database.slot.clone();
    let shared = format!(
        "SELECT count(*) - count(DISTINCT lsn) FROM pg_logical_slot_peek_binary_changes('{slot}', NULL, NULL, 'proto_version', '1', \
         'publication_names', 'cdc_relay')"
    );
    assert!(database.number(&shared) > 0, "no two messages share an LSN");
    // A kill after each few records: small batches, so that some transactions are cut in two.
    let small = [("CDC_RELAY_KAFKA__PROPERTIES__BATCH_NUM_MESSAGES", "3")];
    for round in 1..=3 {
        let relay = Relay::start(&database, &small);
        eventually("some have arrived", || (topic.size() >= round * 50).then_some(()));
        relay.kill();
    }
    let relay = Relay::start(&database, &small);
    let lsn = database.current_lsn();
    eventually("everything is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    let messages = topic.read(next);
    assert_complete_and_ordered(&messages, next);
    let mut identities: Vec<_> = messages.iter().map(|m| headers(m)[3..5].to_vec()).collect();
    identities.sort();
    identities.dedup();
    assert_eq!(
        identities.len(),
        next,
        "a repetition has the identity of what it repeats, and nothing else has"
    );
    relay.stop();
    std::fs::remove_file(path).unwrap();
}

#[test]
fn a_commit_that_ends_where_the_next_change_begins_is_confirmed_alone() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let slot = database.slot.clone();
    let touching = format!(
        "WITH m AS (SELECT lsn, get_byte(data, 0) AS tag, lag(data) OVER (ORDER BY n) AS before \
         FROM pg_logical_slot_peek_binary_changes('{slot}', NULL, NULL, 'proto_version', '1', 'publication_names', 'cdc_relay') \
         WITH ORDINALITY AS t (lsn, xid, data, n)) \
         SELECT count(*) FROM m WHERE tag = ascii('B') AND get_byte(before, 0) = ascii('C') \
         AND ('x' || encode(substr(before, 11, 8), 'hex'))::bit(64)::int8 = (lsn - '0/0')::int8"
    );
    let mut next = 0;
    // Other tests write to the same log, so that it takes a few tries until nothing comes in between.
    eventually("a commit ends where the next change is", || {
        database.insert(&topic.kind, next, 50);
        next += 50;
        (database.number(&touching) > 0).then_some(())
    });
    for _ in 0..2 {
        let relay = Relay::start(&database, &[]);
        eventually("some have arrived", || (topic.size() > 0).then_some(()));
        relay.kill();
    }
    let relay = Relay::start(&database, &[]);
    assert_complete_and_ordered(&topic.read(next), next);
    relay.stop();
}

#[test]
fn a_payload_stored_out_of_line_arrives_whole_and_updates_of_its_row_are_ignored() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    // All changes are published, as a publication of somebody else's may have it.
    database.run("ALTER PUBLICATION cdc_relay SET (publish = 'insert, update, delete')");
    database.run("ALTER TABLE outbox ALTER payload TYPE text, ALTER payload SET STORAGE EXTERNAL");
    init(&database);
    let relay = Relay::start(&database, &[]);
    let kind = &topic.kind;
    database.run(&format!(
        "INSERT INTO outbox SELECT gen_random_uuid(), '{kind}', 'k', 'T', string_agg(md5(n::text), '') FROM generate_series(1, 1000) n"
    ));
    let toasted = "SELECT pg_relation_size(reltoastrelid) FROM pg_class WHERE oid = 'outbox'::regclass";
    assert!(database.number(toasted) > 0, "the payload is stored in line");
    // The payload is not in the log of these.
    database.run("UPDATE outbox SET type = 'Another'; DELETE FROM outbox");
    database.run(&format!("INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'k', 'T', 'last')"));
    let messages = topic.read(2);
    let whole = database.text("SELECT string_agg(md5(n::text), '') FROM generate_series(1, 1000) n");
    assert_eq!(messages[0].payload(), Some(whole.as_bytes()));
    assert_eq!(messages[1].payload(), Some(&b"last"[..]));
    assert_eq!(messages.len(), 2);
    relay.stop();
}

#[test]
fn a_column_is_added_to_the_outbox_while_the_relay_streams() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let relay = Relay::start(&database, &[]);
    database.insert(&topic.kind, 0, 10);
    database.run("ALTER TABLE outbox ADD traceparent text, ADD unknown int DEFAULT 7");
    let row = rows(&topic.kind, 10, 1);
    database.run(&format!("INSERT INTO outbox VALUES {}, '00-aa-bb-01', 1)", row.trim_end_matches(')')));
    database.run(
        "ALTER TABLE outbox DROP unknown; ALTER TABLE outbox RENAME traceparent TO unused; ALTER TABLE outbox ADD more text",
    );
    database.run(&format!("INSERT INTO outbox VALUES {}", rows(&topic.kind, 11, 1)));
    let messages = topic.read(12);
    assert_eq!(assert_complete_and_ordered(&messages, 12), 0);
    let traced: Vec<_> =
        messages.iter().map(|m| headers(m).into_iter().any(|(name, _)| name == "traceparent")).collect();
    assert_eq!(traced.iter().filter(|t| **t).count(), 1);
    assert!(traced[10], "the one row that has it");
    assert_eq!(relay.metric("cdc_relay_sessions_total"), Some(1.0), "{}", relay.log());
    relay.stop();
}

#[test]
fn a_publication_that_is_younger_than_the_slot_halts_at_what_it_does_not_cover() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    database.run("DROP PUBLICATION cdc_relay");
    database.insert(&topic.kind, 0, 1);
    let lsn = database.current_lsn();
    database.run("CREATE PUBLICATION cdc_relay FOR TABLE outbox WITH (publish = 'insert')");
    let mut relay = Relay::spawn(&database, &[]);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(relay.log().contains("publication"), "{}", relay.log());
    assert!(database.unconfirmed_bytes(&lsn) > 0);
    assert_eq!(topic.size(), 0);
}

#[test]
fn after_a_batch_that_failed_nothing_of_it_is_missing() {
    // The broker takes no record that is older than this, so the first batch fails as a whole.
    let (mut database, topic) = (Database::new(), Topic::new(1, &[("message.timestamp.before.max.ms", "1")]));
    init(&database);
    database.insert(&topic.kind, 0, 200);
    let lsn = database.current_lsn();
    let mut relay = Relay::spawn(&database, &[]);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(database.unconfirmed_bytes(&lsn) > 0);
    topic.configure("message.timestamp.before.max.ms", "9223372036854775807");
    let relay = Relay::start(&database, &[]);
    database.insert(&topic.kind, 200, 200);
    assert_complete_and_ordered(&topic.read(400), 400);
    relay.stop();
}

#[test]
fn a_row_of_20_mb_arrives_byte_for_byte() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[("max.message.bytes", "31457280")]));
    database.run("ALTER TABLE outbox ALTER payload TYPE text");
    init(&database);
    let relay = Relay::start(&database, &[]);
    let kind = &topic.kind;
    database.run(&format!(
        "INSERT INTO outbox SELECT gen_random_uuid(), '{kind}', 'k', 'T', string_agg(md5(n::text), '') FROM generate_series(1, 655360) n"
    ));
    let messages = topic.read(1);
    let payload = messages[0].payload().unwrap();
    assert_eq!(payload.len(), 20 << 20);
    let hash: Vec<u8> = database.row("SELECT sha256(convert_to(payload, 'UTF8')) FROM outbox").get(0);
    let arrived = ring::digest::digest(&ring::digest::SHA256, payload);
    assert_eq!(arrived.as_ref(), hash);
    let peak = relay.peak_memory_bytes();
    println!("a row of 20 MiB: the relay's peak memory is {} MiB", peak >> 20);
    assert!(peak < (64 + 3 * 20 + 8) << 20, "{peak} bytes");
    relay.stop();
}

#[test]
fn a_large_transaction_needs_no_more_memory_than_the_bound() {
    const ROWS: i64 = 200_000;
    let (mut database, topic) = (Database::new(), Topic::new(3, &[]));
    init(&database);
    let relay = Relay::start(&database, &[]);
    let kind = &topic.kind;
    database.run(&format!(
        "INSERT INTO outbox SELECT gen_random_uuid(), '{kind}', 'a' || n % 1000, 'T', json_build_object('n', n, 'x', repeat('x', 400)) \
         FROM generate_series(1, {ROWS}) n"
    ));
    let lsn = database.current_lsn();
    eventually("all has arrived", || (topic.size() == ROWS).then_some(()));
    eventually("it is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    let peak = relay.peak_memory_bytes();
    println!("one transaction of {ROWS} rows: the relay's peak memory is {} MiB", peak >> 20);
    assert!(peak < 80 << 20, "{peak} bytes");
    relay.stop();
}

//! What arrives in Kafka.

use rdkafka::Message as _;

use crate::{
    database::Database,
    relay::{Relay, init},
    topics::{Topic, assert_complete_and_ordered, headers},
};

#[test]
fn debeziums_default_table_needs_no_configuration_but_the_connection() {
    let (mut database, topic) = (Database::new(), Topic::new(3, &[]));
    init(&database);
    let relay = Relay::start(&database, &[]);
    let kind = &topic.kind;
    database.run(&format!(
        "INSERT INTO outbox VALUES ('00000000-0000-0000-0000-000000000001', '{kind}', 'order-7', 'OrderCreated', '{{\"b\": 1, \"a\": \"ä\"}}')"
    ));
    let messages = topic.read(1);
    let message = &messages[0];
    assert_eq!(message.key(), Some(&b"order-7"[..]));
    // jsonb as its text: Postgres' own order of keys and spacing.
    assert_eq!(message.payload().map(String::from_utf8_lossy).as_deref(), Some("{\"a\": \"ä\", \"b\": 1}"));
    // Java's murmur2 of "order-7", as org.apache.kafka.clients.producer's BuiltInPartitioner computes it.
    assert_eq!(message.partition(), murmur2_partition(b"order-7", 3));
    let age_ms = database.number("SELECT (extract(epoch FROM now()) * 1000)::int8")
        - message.timestamp().to_millis().unwrap();
    assert!((0..60_000).contains(&age_ms), "the timestamp is the commit time; it is {age_ms} ms old");
    let found = headers(message);
    let names: Vec<_> = found.iter().map(|(n, _)| n.as_str()).collect();
    assert_eq!(names, ["id", "type", "aggregatetype", "lsn", "seq"]);
    assert_eq!(found[0].1.as_deref(), Some("00000000-0000-0000-0000-000000000001"));
    assert_eq!((found[1].1.as_deref(), found[2].1.as_deref()), (Some("OrderCreated"), Some(kind.as_str())));
    assert_eq!(found[4].1.as_deref(), Some("0"));
    let lsn = found[3].1.clone().unwrap();
    assert!(database.number(&format!("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '{lsn}')::int8")) >= 0);
    relay.stop();
}

/// Kafka's `Utils.murmur2`, positive, modulo the partitions.
fn murmur2_partition(key: &[u8], partitions: i32) -> i32 {
    const M: u32 = 0x5bd1_e995;
    let mut h = 0x9747_b28c_u32 ^ u32::try_from(key.len()).unwrap();
    let mut chunks = key.chunks_exact(4);
    for chunk in &mut chunks {
        let mut k = u32::from_le_bytes(chunk.try_into().unwrap()).wrapping_mul(M);
        k = (k ^ (k >> 24)).wrapping_mul(M);
        h = h.wrapping_mul(M) ^ k;
    }
    let rest = chunks.remainder();
    if !rest.is_empty() {
        for (i, byte) in rest.iter().enumerate() {
            h ^= u32::from(*byte) << (8 * i);
        }
        h = h.wrapping_mul(M);
    }
    h = (h ^ (h >> 13)).wrapping_mul(M);
    h ^= h >> 15;
    i32::try_from(h & 0x7fff_ffff).unwrap() % partitions
}

#[test]
fn the_optional_columns_are_used_where_the_table_has_them() {
    let (mut database, topic, other) = (Database::new(), Topic::new(4, &[]), Topic::new(1, &[]));
    database
        .run("ALTER TABLE outbox ADD headers jsonb, ADD traceparent text, ADD partition int, ADD topic text");
    init(&database);
    let relay = Relay::start(&database, &[]);
    let kind = &topic.kind;
    database.run(&format!(
        "INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'k', 'T', NULL, '{{\"tenant\": \"t1\"}}', '00-aa-bb-01', 3)"
    ));
    let message = &topic.read(1)[0];
    assert_eq!((message.payload(), message.partition()), (None, 3), "a NULL payload is a tombstone");
    let found = headers(message);
    assert_eq!(found[5], ("traceparent".into(), Some("00-aa-bb-01".into())));
    assert_eq!(found[6], ("tenant".into(), Some("t1".into())));
    let name = &other.name;
    database.run(&format!("INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'k', 'T', '{{}}', NULL, NULL, NULL, '{name}')"));
    assert_eq!(other.read(1).len(), 1);
    relay.stop();
}

#[test]
fn bytea_arrives_raw_and_text_verbatim() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let relay = Relay::start(&database, &[]);
    let kind = &topic.kind;
    // The role's own setting would give another text form.
    let name = database.name.clone();
    database.run(&format!("ALTER ROLE {name} SET bytea_output = 'escape'"));
    database.run("ALTER TABLE outbox ALTER payload TYPE bytea USING NULL");
    database
        .run(&format!("INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'k', 'T', '\\x00ff0a5c')"));
    database.run("ALTER TABLE outbox ALTER payload TYPE text USING NULL");
    database
        .run(&format!("INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'k', 'T', ' {{ not json')"));
    let messages = topic.read(2);
    assert_eq!(messages[0].payload(), Some(&b"\x00\xff\n\\"[..]));
    assert_eq!(messages[1].payload(), Some(&b" { not json"[..]));
    relay.stop();
}

#[test]
fn rows_that_are_deleted_at_once_and_rows_of_one_transaction_arrive_in_order() {
    let (mut database, topic) = (Database::new(), Topic::new(3, &[]));
    init(&database);
    let relay = Relay::start(&database, &[]);
    let kind = &topic.kind;
    database.run(&format!(
        "BEGIN; INSERT INTO outbox SELECT gen_random_uuid(), '{kind}', 'a' || n % 10, 'Counted', json_build_object('n', n) \
         FROM generate_series(0, 4999) n; DELETE FROM outbox; COMMIT"
    ));
    database.run(&format!(
        "BEGIN; INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'x', 'T', '{{\"n\": 0}}'); ROLLBACK"
    ));
    database.insert(kind, 5000, 100);
    let messages = topic.read(5100);
    assert_eq!(assert_complete_and_ordered(&messages, 5100), 0);
    let mut identities: Vec<_> = messages
        .iter()
        .map(|m| {
            let h = headers(m);
            (h[3].1.clone(), h[4].1.clone())
        })
        .collect();
    identities.sort();
    identities.dedup();
    assert_eq!(identities.len(), 5100, "each record has an identity of its own");
    relay.stop();
}

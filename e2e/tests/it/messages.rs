//! A generic message, from its row in the orders database to the acknowledgement in the same.

use serde_json::Value;

use crate::{
    stack::{Stack, eventually},
    views::Database,
};

/// What the order API writes, in one transaction: `count` messages, each of which waits for `groups`. Gives back their
/// ids.
fn send(orders: &Database, count: usize, groups: &str) -> Vec<String> {
    orders.texts(&format!(
        "WITH new AS (
             INSERT INTO messages
                 (message_id, topic, payload, headers, require_ack, ack_timeout_seconds, attempt, due_at)
             SELECT gen_random_uuid(), 'notifications', '{{\"text\": \"your order is ready\"}}', '{{}}', '{{{groups}}}',
                    3600, 1, now() + interval '1 hour'
             FROM generate_series(1, {count})
             RETURNING *
         ), sent AS (
             INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload, headers, topic)
             SELECT gen_random_uuid(), 'message', message_id::text, 'Message', payload,
                    jsonb_build_object('message-id', message_id, 'attempt', attempt::text, 'require-ack', '{groups}'),
                    topic
             FROM new
         )
         SELECT message_id::text FROM new"
    ))
}

/// Puts a message that was sent into the outbox again.
fn redeliver(orders: &Database, id: &str) {
    orders.texts(&format!(
        "WITH due AS (
             UPDATE messages SET attempt = attempt + 1, due_at = now() + interval '1 hour'
             WHERE message_id = '{id}' RETURNING *
         )
         INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload, headers, topic)
         SELECT gen_random_uuid(), 'message', message_id::text, 'Message', payload,
                jsonb_build_object('message-id', message_id, 'attempt', attempt::text, 'require-ack', 'messages'), topic
         FROM due RETURNING id::text"
    ));
}

fn until(database: &Database, sql: &str, wanted: i64) {
    eventually(&format!("{sql} is {wanted}"), || (database.number(sql) == wanted).then_some(()));
}

#[test]
fn a_message_is_applied_and_its_acknowledgement_comes_back_through_the_consumers_own_outbox() {
    let stack = Stack::start("messages", &[]);
    let (orders, consumers) = (Database::of(&stack, "postgres"), Database::of(&stack, "consumer_postgres"));
    let id = send(&orders, 1, "messages").remove(0);
    until(&orders, "SELECT count(*) FROM messages WHERE acknowledged_at IS NOT NULL AND due_at IS NULL", 1);
    assert_eq!(consumers.texts("SELECT message_id::text FROM messages_applied"), [id.as_str()]);
    assert_eq!(consumers.count("outbox"), 0, "the outbox stays empty");
    let applied: Value =
        serde_json::from_str(&consumers.text("SELECT headers::text FROM messages_applied")).unwrap();
    let ack = orders.text("SELECT concat_ws(' ', consumer_group, attempt, lsn) FROM message_acks");
    assert_eq!(
        ack,
        format!("messages 1 {}", applied["lsn"].as_str().unwrap()),
        "the LSN is the message's commit"
    );

    // Delivered again, it is acknowledged again and not applied again; the first acknowledgement counts.
    redeliver(&orders, &id);
    until(&orders, "SELECT count(*) FROM inbox WHERE consumer_group = 'acks'", 2);
    assert_eq!(consumers.text("SELECT string_agg(attempt::text, ',') FROM messages_applied"), "1");
    assert_eq!(orders.text("SELECT string_agg(attempt::text, ',') FROM message_acks"), "1");

    // Killed in the middle of many, each link of the chain in turn.
    let count = send(&orders, 2000, "messages").len();
    for (link, process) in ["messages", "consumers-relay", "acks", "cdc-relay"].into_iter().enumerate() {
        let enough = i64::try_from(count * (link + 1) / 6).unwrap();
        eventually(&format!("{enough} are applied"), || {
            (consumers.number("SELECT count(*) FROM messages_applied") >= enough).then_some(())
        });
        stack.kill(process);
        send(&orders, 200, "messages");
    }
    let count = i64::try_from(count + 4 * 200 + 1).unwrap();
    until(&orders, "SELECT count(*) FROM messages WHERE acknowledged_at IS NOT NULL", count);
    until(&consumers, "SELECT count(*) FROM messages_applied", count);
    assert_eq!(consumers.count("outbox"), 0);
}

#[test]
fn the_consumers_relay_reads_the_log_and_no_table_of_either_database() {
    let stack = Stack::start("least-privilege", &[]);
    let superuser = stack.url("postgres_superuser");
    let as_relay = |database: &str| {
        let (_, rest) = superuser.split_once('@').unwrap();
        let (address, _) = rest.split_once('/').unwrap();
        Database::at(&format!("postgres://consumers_relay:consumers_relay@{address}/{database}"))
    };
    let code = |result: Result<Vec<String>, sqlx::Error>| {
        let error = result.unwrap_err();
        error.as_database_error().and_then(sqlx::error::DatabaseError::code).unwrap_or_default().into_owned()
    };
    assert_eq!(code(as_relay("orders").try_texts("SELECT 'x'")), "42501", "it may not connect");
    for table in ["outbox", "inbox", "messages_applied"] {
        let sql = format!("SELECT 'x' FROM {table}");
        assert_eq!(code(as_relay("consumers").try_texts(&sql)), "42501", "{table}");
    }
    let server = Database::at(&superuser);
    assert_eq!(
        server.text("SELECT active::text FROM pg_replication_slots WHERE slot_name = 'consumers_relay'"),
        "true"
    );
}

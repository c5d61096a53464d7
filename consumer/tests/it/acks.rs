//! Acknowledgements, into an orders database with its real schema and grants.

use std::process::Command;

use serde_json::{Value, json};
use sqlx::AssertSqlSafe;
use uuid::Uuid;

use crate::{
    records::Record,
    stage::{Stage, eventually, on_stage},
};

/// Makes this stage's database an orders database.
async fn prepare(stage: &Stage) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../postgres/init.sql");
    stage.run(&std::fs::read_to_string(path).unwrap()).await;
}

/// The handler with the rights of its role, whose password no test knows.
fn command(stage: &Stage) -> Command {
    let mut command = stage.command("acks");
    let url = stage.url();
    let separator = if url.contains('?') { '&' } else { '?' };
    command.env("CONSUMER_POSTGRES__URL", format!("{url}{separator}options[role]=order_acks"));
    command
}

/// A message that was sent `attempt` times and waits for these groups.
async fn sent(stage: &Stage, groups: &[&str], attempt: i32) -> Uuid {
    let id = Uuid::now_v7();
    sqlx::query(
        "INSERT INTO messages (message_id, topic, payload, headers, require_ack, ack_timeout_seconds, attempt, due_at)
         VALUES ($1, 'notifications', '{}', '{}', $2, 60, $3, now() + interval '1 minute')",
    )
    .bind(id)
    .bind(groups)
    .bind(attempt)
    .execute(&stage.pool)
    .await
    .unwrap();
    id
}

fn body(id: Uuid, group: &str, attempt: i64) -> Value {
    json!({
        "messageId": id, "consumerGroup": group, "attempt": attempt,
        "appliedAt": "2026-11-21T12:00:00.123456Z", "lsn": "1/ABC",
    })
}

/// The record of an acknowledgement, as the relay writes it.
fn record(body: &Value) -> Record {
    let mut record = Record {
        key: Some(body["messageId"].as_str().unwrap_or_default().into()),
        value: Some(body.to_string().into_bytes()),
        ..Record::default()
    };
    record.header("id", &Uuid::now_v7().to_string());
    record
}

fn ack(id: Uuid, group: &str, attempt: i64) -> Record {
    record(&body(id, group, attempt))
}

/// `acknowledged due undelivered`, each + or -.
async fn state(stage: &Stage, id: Uuid) -> String {
    let sql = "SELECT CASE WHEN acknowledged_at IS NULL THEN '-' ELSE '+' END
                   || CASE WHEN due_at IS NULL THEN '-' ELSE '+' END
                   || CASE WHEN undelivered_at IS NULL THEN '-' ELSE '+' END
               FROM messages WHERE message_id = $1";
    sqlx::query_scalar(sql).bind(id).fetch_one(&stage.pool).await.unwrap()
}

#[test]
fn the_last_of_the_groups_acknowledges_the_message() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        let consumer = stage.spawn(command(&stage)).await;
        let [both, mine] = [sent(&stage, &["a", "b"], 1).await, sent(&stage, &["a"], 2).await];
        let first = ack(both, "a", 1);
        stage.produce([first.clone(), ack(mine, "a", 1)]).await;
        stage.until_number("SELECT count(*) FROM message_acks", 2).await;
        assert_eq!((&*state(&stage, both).await, &*state(&stage, mine).await), ("-+-", "+--"));
        let told = "SELECT concat_ws(' ', consumer_group, attempt, lsn, applied_at AT TIME ZONE 'UTC')
                    FROM message_acks WHERE message_id = ";
        let told = stage.texts(&format!("{told}'{both}'")).await;
        assert_eq!(told, ["a 1 1/ABC 2026-11-21 12:00:00.123456"]);

        // The same again, and of another delivery: the first one counts.
        let acknowledged_at = "SELECT string_agg(acknowledged_at::text, ' ') FROM messages";
        let before = stage.texts(acknowledged_at).await;
        stage.produce([first, ack(both, "a", 1), ack(mine, "a", 2), ack(mine, "a", 2)]).await;
        eventually("they are taken in", async || (stage.committed().await == 6).then_some(())).await;
        assert_eq!(stage.number("SELECT count(*) FROM message_acks").await, 2);
        assert_eq!(stage.number("SELECT max(attempt)::bigint FROM message_acks").await, 1);
        assert_eq!(stage.texts(acknowledged_at).await, before);
        assert_eq!(stage.number("SELECT count(*) FROM inbox").await, 5);

        stage.produce([ack(both, "b", 1)]).await;
        stage.until_number("SELECT count(*) FROM messages WHERE acknowledged_at IS NOT NULL", 2).await;
        assert_eq!(state(&stage, both).await, "+--");
        let done = consumer.metric("consumer_processed_total{type=\"MessageAcknowledged\"}").await;
        assert!((done - 6.0).abs() < 0.1, "{done}");
    });
}

#[test]
fn a_message_that_was_given_up_is_acknowledged_all_the_same() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        let _consumer = stage.spawn(command(&stage)).await;
        let id = sent(&stage, &["a", "b"], 5).await;
        stage.produce([ack(id, "a", 1)]).await;
        stage.until_number("SELECT count(*) FROM message_acks", 1).await;
        stage.run("UPDATE messages SET due_at = NULL, undelivered_at = now()").await;
        // Not the last one: it stays given up.
        let other = sent(&stage, &["a", "b"], 1).await;
        stage
            .run(&format!(
                "UPDATE messages SET due_at = NULL, undelivered_at = now() WHERE message_id = '{other}'"
            ))
            .await;
        stage.produce([ack(other, "a", 1), ack(id, "b", 2)]).await;
        stage.until_number("SELECT count(*) FROM message_acks", 3).await;
        assert_eq!((&*state(&stage, id).await, &*state(&stage, other).await), ("+--", "--+"));
    });
}

#[test]
fn an_acknowledgement_that_cannot_be_is_dead_lettered_and_the_others_flow_on() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        stage.create_topic(&stage.dlq()).await;
        let consumer = stage.spawn(command(&stage)).await;
        let id = sent(&stage, &["a"], 2).await;
        let with = |field: &str, value: Value| {
            let mut body = body(id, "a", 1);
            body[field] = value;
            record(&body)
        };
        let mut without_id = ack(id, "a", 1);
        without_id.headers.clear();
        let poison = [
            ("unknown_message", ack(Uuid::now_v7(), "a", 1)),
            ("bad_value", ack(id, "a", 3)),
            ("bad_value", ack(id, "b", 1)),
            ("bad_value", with("attempt", json!(0))),
            ("bad_value", with("messageId", json!("m-1"))),
            ("bad_value", with("appliedAt", json!("noon"))),
            ("bad_value", with("lsn", json!("0/1/2"))),
            ("missing_field", without_id),
            ("not_json", Record { value: Some(b"{".to_vec()), ..ack(id, "a", 1) }),
            ("unknown_message", ack(Uuid::now_v7(), "a", 1)),
        ];
        let mut fine = Vec::new();
        let mut records = Vec::new();
        for (_, record) in &poison {
            let id = sent(&stage, &["a"], 1).await;
            fine.push(id);
            records.extend([ack(id, "a", 1), record.clone()]);
        }
        stage.produce(records).await;
        let letters = stage.dead_letters(poison.len()).await;
        for (letter, (reason, record)) in letters.iter().zip(&poison) {
            assert_eq!(letter.header("dlq.reason"), *reason, "{}", letter.header("dlq.error"));
            assert_eq!(letter.value, record.value);
        }
        let count = i64::try_from(fine.len()).unwrap();
        stage.until_number("SELECT count(*) FROM messages WHERE acknowledged_at IS NOT NULL", count).await;
        assert_eq!(state(&stage, id).await, "-+-");
        consumer.until_ready().await;
    });
}

/// The order API's redelivery takes due messages while acknowledgements of the same ones arrive in every partition, in
/// every order.
#[test]
fn acknowledgements_and_redeliveries_of_the_same_messages_do_not_deadlock() {
    on_stage(4, async |stage| {
        const MESSAGES: usize = 400;
        prepare(&stage).await;
        let mut ids = Vec::new();
        for _ in 0..MESSAGES {
            ids.push(sent(&stage, &["a", "b", "c"], 1).await);
        }
        stage.run("UPDATE messages SET due_at = now() - interval '1 minute'").await;
        let mut records = Vec::new();
        for (number, group) in ["a", "b", "c"].into_iter().enumerate() {
            let mut ids = ids.clone();
            ids.rotate_left(number * MESSAGES / 3);
            if number == 1 {
                ids.reverse();
            }
            let partition = Some(i32::try_from(number).unwrap());
            records.extend(ids.iter().map(|id| Record { partition, ..ack(*id, group, 1) }));
        }
        let redeliver = async {
            let waiting = "SELECT count(*) FROM messages WHERE acknowledged_at IS NULL";
            while stage.number(waiting).await > 0 {
                let sql = "
                    UPDATE messages SET attempt = attempt + 1, due_at = now() - interval '1 minute'
                    FROM (SELECT message_id AS due FROM messages WHERE due_at < now() ORDER BY due_at, message_id DESC
                          LIMIT 100 FOR UPDATE SKIP LOCKED) AS d
                    WHERE message_id = due";
                sqlx::query(AssertSqlSafe(sql)).execute(&stage.pool).await.unwrap();
            }
        };
        let mut command = command(&stage);
        command.env("CONSUMER_CONSUMER__BATCH_RECORDS_MAX", "50");
        stage.produce(records).await;
        let consumer = stage.spawn(command).await;
        tokio::time::timeout(crate::stage::PATIENCE, redeliver).await.expect("all are acknowledged");
        assert_eq!(
            stage.number("SELECT count(*) FROM message_acks").await,
            3 * i64::try_from(MESSAGES).unwrap()
        );
        assert_eq!(stage.number("SELECT count(*) FROM messages WHERE due_at IS NOT NULL").await, 0);
        let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
        assert_eq!(stage.number(deadlocks).await, 0);
        assert!(consumer.metric("consumer_retried_total").await < 0.1, "{}", consumer.log());
    });
}

#[test]
fn a_database_without_the_schema_or_the_grants_is_refused_with_the_command() {
    on_stage(1, async |stage| {
        let refused = async |mut command: Command| {
            let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(69), "{said}");
            assert!(said.contains("psql -v ON_ERROR_STOP=1 -f postgres/init.sql postgres://"), "{said}");
            assert!(said.contains(&stage.name), "the database is named: {said}");
            said
        };
        let said = refused(stage.command("acks")).await;
        assert!(said.contains("INSERT on public.message_acks"), "{said}");
        assert_eq!(stage.number("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").await, 0);

        prepare(&stage).await;
        stage
            .run("REVOKE UPDATE (due_at, acknowledged_at, undelivered_at) ON messages FROM order_acks")
            .await;
        let said = refused(command(&stage)).await;
        assert!(said.contains("no UPDATE on public.messages") && !said.contains("no SELECT"), "{said}");
        prepare(&stage).await;
        stage.spawn(command(&stage)).await.until_ready().await;
    });
}

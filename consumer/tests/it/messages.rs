//! Generic messages: applied once, acknowledged as often as they are delivered, never the one without the other.

use serde_json::{Value, json};
use sqlx::Row;
use uuid::Uuid;

use crate::{
    records::{Record, message},
    stage::{Stage, eventually, on_stage},
};

/// Rows of the outbox are deleted in the transaction that inserts them: a trigger keeps a copy of each, committed
/// with it.
const COPY: &str = "
    CREATE TABLE published (LIKE outbox);
    CREATE FUNCTION copy() RETURNS trigger LANGUAGE plpgsql
        AS 'BEGIN INSERT INTO published VALUES (NEW.*); RETURN NEW; END';
    CREATE TRIGGER copy AFTER INSERT ON outbox FOR EACH ROW EXECUTE FUNCTION copy();";

async fn prepare(stage: &Stage) {
    stage.migrate().await;
    stage.run(COPY).await;
}

/// The acknowledgements of a message, in the order of their attempts.
async fn acks(stage: &Stage, id: Uuid) -> Vec<Value> {
    let sql = "SELECT payload FROM published WHERE aggregateid = $1 ORDER BY payload -> 'attempt'";
    sqlx::query_scalar(sql).bind(id.to_string()).fetch_all(&stage.pool).await.unwrap()
}

#[test]
fn a_message_is_applied_once_and_each_delivery_of_it_is_acknowledged() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        let consumer = stage.start("messages").await;
        let [asked, of_others, of_nobody] = [Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7()];
        let groups = format!("other, {}", stage.name);
        let payload = "{\"amount\": 12345678901234567890.10}";
        let mut first = message(asked, 1, &groups, payload);
        first.header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        first.header("colour", "red");
        // Twice in one batch, and among others.
        let second = message(asked, 2, &groups, payload);
        let batch = [first, second, message(of_others, 1, "other", "[]"), message(of_nobody, 1, "", "null")];
        stage.produce(batch).await;
        stage.until_number("SELECT count(*) FROM messages_applied", 3).await;
        // And once more, long after.
        stage.produce([message(asked, 3, &groups, payload)]).await;
        stage.until_number("SELECT count(*) FROM published", 3).await;

        let row = sqlx::query("SELECT *, payload::text AS body FROM messages_applied WHERE message_id = $1")
            .bind(asked)
            .fetch_one(&stage.pool)
            .await
            .unwrap();
        assert_eq!(
            (row.get::<&str, _>("consumer_group"), row.get::<&str, _>("topic")),
            (&*stage.name, &*stage.topic)
        );
        assert_eq!((row.get::<&str, _>("key"), row.get::<i32, _>("attempt")), (&*asked.to_string(), 1));
        assert_eq!(row.get::<&str, _>("body"), payload);
        assert_eq!(row.get::<Value, _>("headers")["colour"], "red");

        let acks = acks(&stage, asked).await;
        let schema =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../contracts/acks/MessageAcknowledged.schema.json");
        let schema: Value = serde_json::from_str(&std::fs::read_to_string(schema).unwrap()).unwrap();
        for (ack, attempt) in acks.iter().zip(1..) {
            jsonschema::validate(&schema, ack).unwrap_or_else(|e| panic!("{ack}: {e}"));
            assert_eq!((&ack["messageId"], &ack["consumerGroup"]), (&json!(asked), &json!(stage.name)));
            assert_eq!((&ack["attempt"], &ack["lsn"]), (&json!(attempt), &json!(format!("0/{attempt}"))));
            assert_eq!(ack["appliedAt"], acks[0]["appliedAt"], "it was applied once");
        }
        assert_eq!(acks.len(), 3);
        let told = "SELECT aggregatetype || ' ' || type || ' ' || topic || ' ' || coalesce(traceparent, '-')
                    FROM published ORDER BY payload -> 'attempt'";
        let told = stage.texts(told).await;
        assert_eq!(
            told[0],
            "ack MessageAcknowledged order-acks 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        );
        assert_eq!(told[1], "ack MessageAcknowledged order-acks -");
        assert_eq!(stage.number("SELECT count(*) FROM outbox").await, 0, "the outbox stays empty");
        assert!((consumer.metric("consumer_processed_total{type=\"Message\"}").await - 3.0).abs() < 0.1);
    });
}

#[test]
fn what_is_no_message_is_dead_lettered_and_the_others_flow_on() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        stage.create_topic(&stage.dlq()).await;
        let _consumer = stage.start("messages").await;
        let fine = || message(Uuid::now_v7(), 1, &stage.name, "{}");
        let foreign = Record { key: Some(b"k".to_vec()), value: Some(b"{}".to_vec()), ..Record::default() };
        let mut without_attempt = fine();
        without_attempt.headers.retain(|(name, _)| name != "attempt");
        let mut bad_lsn = fine();
        bad_lsn.header("lsn", "yesterday");
        let poison = [
            ("no_message_id", foreign),
            ("missing_field", without_attempt),
            ("bad_value", bad_lsn),
            ("not_json", message(Uuid::now_v7(), 1, &stage.name, "{")),
            // Parsed here, refused there: jsonb has no such character, nor such a depth.
            ("database_refused", message(Uuid::now_v7(), 1, &stage.name, "\"\\u0000\"")),
            (
                "database_refused",
                message(
                    Uuid::now_v7(),
                    1,
                    &stage.name,
                    &format!("{}{}", "[".repeat(50_000), "]".repeat(50_000)),
                ),
            ),
        ];
        stage.produce(poison.iter().flat_map(|(_, record)| [fine(), record.clone(), fine()])).await;
        let letters = stage.dead_letters(poison.len()).await;
        for (letter, (reason, record)) in letters.iter().zip(&poison) {
            assert_eq!(letter.header("dlq.reason"), *reason, "{}", letter.header("dlq.error"));
            assert_eq!(letter.value, record.value);
        }
        assert!(letters[0].header("dlq.error").contains("message-id"), "{}", letters[0].header("dlq.error"));
        stage.until_number("SELECT count(*) FROM messages_applied", 12).await;
        stage.until_number("SELECT count(*) FROM published", 12).await;
    });
}

/// Acknowledged, and not applied.
const HOLLOW: &str = "
    SELECT count(*) FROM published
    WHERE NOT EXISTS (SELECT FROM messages_applied WHERE message_id::text = published.aggregateid)";

#[test]
fn killed_again_and_again_nothing_is_acknowledged_unapplied_applied_twice_or_lost() {
    on_stage(4, async |stage| {
        const MESSAGES: i64 = 3000;
        const KILLS: i64 = 8;
        prepare(&stage).await;
        // A second application would be seen: each one is counted, whatever becomes of its row.
        stage
            .run(
                "CREATE TABLE applications (message_id uuid);
                 CREATE FUNCTION count_it() RETURNS trigger LANGUAGE plpgsql
                     AS 'BEGIN INSERT INTO applications VALUES (NEW.message_id); RETURN NEW; END';
                 CREATE TRIGGER count_it BEFORE INSERT ON messages_applied FOR EACH ROW EXECUTE FUNCTION count_it();",
            )
            .await;
        let ids: Vec<Uuid> = (0..MESSAGES).map(|_| Uuid::now_v7()).collect();
        // The redelivery follows at once, so that repetitions are in the middle of it all.
        let deliveries = ids.iter().map(|id| (id, 1)).chain(ids.iter().step_by(3).map(|id| (id, 2)));
        stage.produce(deliveries.map(|(id, attempt)| message(*id, attempt, &stage.name, "{\"n\": 1}"))).await;
        let command = || {
            let mut command = stage.command("messages");
            command.env("CONSUMER_CONSUMER__BATCH_RECORDS_MAX", "20");
            command
        };
        let mut consumers = vec![stage.spawn(command()).await, stage.spawn(command()).await];
        let mut killed_in_the_middle = 0;
        for kill in 1..=KILLS {
            let enough = kill * MESSAGES / (KILLS + 2) + fastrand::i64(0..40);
            eventually("progress between two kills", async || {
                (stage.number("SELECT count(*) FROM messages_applied").await >= enough).then_some(())
            })
            .await;
            let mut victim = consumers.remove(0);
            victim.kill();
            assert_eq!(stage.number(HOLLOW).await, 0);
            if stage.number("SELECT count(*) FROM messages_applied").await < MESSAGES {
                killed_in_the_middle += 1;
            }
            consumers.push(stage.spawn(command()).await);
        }
        assert!(killed_in_the_middle >= KILLS / 2, "only {killed_in_the_middle} kills were in the middle");
        stage.until_number("SELECT count(*) FROM messages_applied", MESSAGES).await;
        eventually("everything committed", async || {
            (stage.committed().await == MESSAGES + MESSAGES / 3).then_some(())
        })
        .await;
        assert_eq!(stage.number("SELECT count(*) FROM applications").await, MESSAGES);
        assert_eq!(stage.number(HOLLOW).await, 0);
        let acknowledged = "SELECT count(DISTINCT (aggregateid, payload ->> 'attempt')) FROM published";
        assert_eq!(stage.number(acknowledged).await, MESSAGES + MESSAGES / 3);
    });
}

#[test]
fn migrate_makes_the_tables_and_needs_nothing_but_the_database() {
    on_stage(1, async |stage| {
        stage.migrate().await;
        stage.migrate().await;
        assert_eq!(stage.number("SELECT count(*) FROM outbox").await, 0);
        let published =
            "SELECT pubname || ' ' || tablename || ' ' || pubinsert || pubupdate || pubdelete || pubtruncate
                         FROM pg_publication_tables JOIN pg_publication USING (pubname)";
        assert_eq!(stage.texts(published).await, ["consumers_relay outbox truefalsefalsefalse"]);
    });
}

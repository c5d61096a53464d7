//! What is parked is let go whenever nothing holds it back any more, whoever was killed on the way there.

use std::net::TcpListener;

use rdkafka::admin::AdminOptions;
use serde_json::{Value, json};

use crate::{
    parking::answer,
    records::{Record, confirmed, created, incompressible, updated},
    stage::{Stage, eventually, on_stage},
};

const PARKED: &str = "SELECT count(*) FROM parked_records";
/// Batches that wait at a gate.
pub(crate) const WAITING: &str = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
const OPEN: &str = "SELECT count(*) FROM dead_letters WHERE settled_at IS NULL";

/// An open dead letter of o-1 from an earlier time.
async fn letter(stage: &Stage, partition: i32, offset: i64) {
    stage
        .run(&format!(
            "INSERT INTO dead_letters (consumer_group, topic, partition, record_offset, key, reason, error, attempts,
                                       blocks_key, dlq_partition, dlq_offset)
             VALUES ('{}', '{}', {partition}, {offset}, 'o-1', 'unsupported_schema', 'new', 1, true, 0, {offset})",
            stage.name, stage.topic
        ))
        .await;
}

/// A record of o-1 that was parked at an earlier time.
async fn parked(stage: &Stage, partition: i32, offset: i64, body: &Value) {
    sqlx::query(
        "INSERT INTO parked_records (consumer_group, topic, partition, record_offset, key, value)
         VALUES ($1, $2, $3, $4, 'o-1', $5)",
    )
    .bind(&stage.name)
    .bind(&stage.topic)
    .bind(partition)
    .bind(offset)
    .bind(body.to_string().into_bytes())
    .execute(&stage.pool)
    .await
    .unwrap();
}

fn redriven(stage: &Stage, body: &Value, partition: i32, offset: i64) -> Record {
    Record::of(body).redriven(&stage.topic, partition, offset, 1, "apply")
}

async fn versions(stage: &Stage) -> Vec<String> {
    stage.texts("SELECT version::text FROM pharmacy_tasks ORDER BY created_at, version").await
}

#[test]
fn two_letters_of_a_key_that_are_redriven_at_once_let_go_all_that_is_behind_them() {
    on_stage(1, async |stage| {
        stage.migrate().await;
        stage.create_topic(&stage.redrive()).await;
        let (second, third) = (updated("o-1", 2, "2"), updated("o-1", 3, "3"));
        letter(&stage, 0, 10).await;
        letter(&stage, 0, 11).await;
        parked(&stage, 0, 12, &confirmed("o-1", 4)).await;
        // One batch of both.
        let both = [redriven(&stage, &second, 0, 10), redriven(&stage, &third, 0, 11)];
        stage.produce_to(&stage.redrive(), both).await;
        let _consumer = stage.start("pharmacy").await;
        stage.until_number("SELECT count(*) FROM pharmacy_tasks", 3).await;
        stage.until_number(PARKED, 0).await;
        stage.until_number(OPEN, 0).await;
        assert_eq!(versions(&stage).await, ["2", "3", "4"]);
    });
}

#[test]
fn two_letters_of_a_key_in_different_partitions_do_not_wait_for_each_other() {
    on_stage(2, async |stage| {
        stage.migrate().await;
        stage.create_topic(&stage.redrive()).await;
        letter(&stage, 0, 10).await;
        letter(&stage, 1, 5).await;
        let both = [
            redriven(&stage, &updated("o-1", 2, "2"), 0, 10),
            redriven(&stage, &updated("o-1", 3, "3"), 1, 5),
        ];
        stage.produce_to(&stage.redrive(), both).await;
        let _consumer = stage.start("pharmacy").await;
        stage.until_number(OPEN, 0).await;
        assert_eq!(versions(&stage).await, ["2", "3"]);
        assert_eq!(stage.number(PARKED).await, 0);
    });
}

/// Killed before the offset was committed, or seeked back once the cause was mended.
#[test]
fn a_letter_whose_record_comes_again_and_goes_well_lets_go_what_is_behind_it() {
    on_stage(1, async |stage| {
        stage.create_topic(&stage.dlq()).await;
        let mut consumer = stage.start("pharmacy").await;
        stage.run("ALTER TABLE pharmacy_orders ADD CONSTRAINT cheap CHECK (total_amount < 1000000)").await;
        let bodies = [created("o-1"), updated("o-1", 2, "1000000"), confirmed("o-1", 3)];
        stage.produce(bodies.iter().map(Record::of)).await;
        stage.until_number(PARKED, 1).await;
        stage.until_number("SELECT count(*) FROM dead_letters WHERE dlq_offset IS NOT NULL", 1).await;
        assert!(consumer.terminate().await.success(), "{}", consumer.log());
        stage.run("ALTER TABLE pharmacy_orders DROP CONSTRAINT cheap").await;
        stage.admin().delete_groups(&[&stage.name], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
        let _consumer = stage.start("pharmacy").await;
        stage.until_number("SELECT version FROM pharmacy_orders", 3).await;
        stage.until_number(PARKED, 0).await;
        assert_eq!(versions(&stage).await, ["1", "2", "3"]);
        assert_eq!(stage.number(OPEN).await, 0);
        assert_eq!(stage.dead_letter_count().await, 1);
    });
}

#[test]
fn a_released_record_that_fails_stays_until_kafka_has_its_letter() {
    on_stage(1, async |stage| {
        stage.migrate().await;
        stage.create_topic(&stage.redrive()).await;
        stage.run("ALTER TABLE pharmacy_orders ADD CONSTRAINT cheap CHECK (total_amount < 1000000)").await;
        letter(&stage, 0, 10).await;
        let third = updated("o-1", 3, "1000000");
        parked(&stage, 0, 11, &third).await;
        parked(&stage, 0, 12, &confirmed("o-1", 4)).await;
        stage.produce_to(&stage.redrive(), [redriven(&stage, &updated("o-1", 2, "2"), 0, 10)]).await;
        {
            let mut consumer = stage.start("pharmacy").await;
            stage.until_number("SELECT version FROM pharmacy_orders", 2).await;
            consumer.until_state("waiting_for_dead_letter_topic").await;
            consumer.kill();
        }
        assert_eq!(stage.number(PARKED).await, 2);
        stage.create_topic(&stage.dlq()).await;
        let consumer = stage.start("pharmacy").await;
        let letters = stage.dead_letters(1).await;
        assert_eq!(letters[0].value, Some(third.to_string().into_bytes()));
        assert_eq!(letters[0].header("dlq.offset"), "11");
        stage.until_number(PARKED, 1).await;
        consumer.until_ready().await;
        assert_eq!(stage.number(OPEN).await, 1);
        assert_eq!(stage.dead_letter_count().await, 1);
    });
}

/// An index of Postgres' cannot hold such a key.
#[test]
fn a_poison_with_a_key_of_many_bytes_is_dead_lettered_like_any_other() {
    on_stage(1, async |stage| {
        stage.create_topic(&stage.dlq()).await;
        let _consumer = stage.start("pharmacy").await;
        let key = incompressible(4000);
        let poison = || Record { key: Some(key.clone()), value: Some(b"no".to_vec()), ..Record::default() };
        stage.produce([poison(), poison(), Record::of(&created("o-1"))]).await;
        stage.until_number("SELECT count(*) FROM pharmacy_orders", 1).await;
        let letters = stage.dead_letters(2).await;
        assert!(letters.iter().all(|letter| letter.key.as_ref() == Some(&key)));
        eventually("all committed", async || (stage.committed().await == 3).then_some(())).await;
    });
}

/// What a batch knows of its group it must learn behind the gate, not before it waits there.
#[test]
fn a_batch_that_waited_at_the_gate_sees_what_was_done_meanwhile() {
    on_stage(1, async |stage| {
        let _consumer = stage.start("pharmacy").await;
        stage.produce([created("o-1"), created("o-2")].iter().map(Record::of)).await;
        stage.until_number("SELECT count(*) FROM pharmacy_orders", 2).await;
        let mut alone = stage.pool.begin().await.unwrap();
        sqlx::query("SELECT pg_advisory_xact_lock(hashtextextended('consumer group ' || $1, 0))")
            .bind(&stage.name)
            .execute(&mut *alone)
            .await
            .unwrap();
        stage.produce([Record::of(&confirmed("o-1", 2))]).await;
        stage.until_number(WAITING, 1).await;
        sqlx::query(
            "INSERT INTO dead_letters (consumer_group, topic, partition, record_offset, key, reason, error, attempts,
                                       blocks_key, dlq_partition, dlq_offset)
             VALUES ($1, $2, 0, 1, 'o-1', 'not_json', '', 1, true, 0, 0)",
        )
        .bind(&stage.name)
        .bind(&stage.topic)
        .execute(&mut *alone)
        .await
        .unwrap();
        alone.commit().await.unwrap();
        stage.until_number(PARKED, 1).await;
        assert_eq!(stage.number("SELECT version FROM pharmacy_orders WHERE order_id = 'o-1'").await, 1);
    });
}

/// A gap is filled, and then the event itself is refused: its dead letter stays open.
#[test]
fn what_is_fetched_because_of_an_event_does_not_settle_its_letter() {
    on_stage(1, async |stage| {
        stage.migrate().await;
        stage.run("ALTER TABLE pharmacy_orders ADD CONSTRAINT cheap CHECK (total_amount < 1000000)").await;
        letter(&stage, 0, 1).await;
        let second = updated("o-1", 2, "2");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/{{aggregate}}", listener.local_addr().unwrap());
        let page = json!({"events": [second], "nextCursor": null});
        let api = std::thread::spawn(move || answer(&listener, 200, &page));
        let mut command = stage.command("pharmacy");
        command.env("CONSUMER_CONSUMER__ON_GAP", "fetch").env("CONSUMER_CONSUMER__GAP_URL", url);
        stage.produce([created("o-1"), updated("o-1", 3, "1000000")].iter().map(Record::of)).await;
        let _consumer = stage.spawn(command).await;
        eventually("both are done with", async || (stage.committed().await == 2).then_some(())).await;
        api.join().unwrap();
        assert_eq!(versions(&stage).await, ["1", "2"]);
        assert_eq!(stage.number(OPEN).await, 1);
    });
}

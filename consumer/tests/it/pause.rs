//! `consumer pause` and `consumer resume`.

use serde_json::json;
use sqlx::Connection as _;

use crate::{
    records::{Record, created},
    stage::{eventually, on_stage},
};

#[test]
fn pausing_and_resuming_twice_changes_nothing_more_and_tells_what_was_so() {
    on_stage(1, async |stage| {
        stage.migrate().await;
        let said = stage.operate("pharmacy", &["resume"]).await;
        assert!(said.well().contains("was not paused"), "{said:?}");
        let said = stage.operate("pharmacy", &["pause", "--reason", "a migration"]).await;
        assert!(said.well().contains("is paused"), "{said:?}");
        let paused_at = stage.texts("SELECT paused_at::text FROM consumer_groups").await;

        let said = stage.operate("pharmacy", &["pause"]).await;
        assert!(said.well().contains("paused already") && said.well().contains("a migration"), "{said:?}");
        let said = stage.operate("pharmacy", &["pause", "--json", "--reason", "longer"]).await;
        assert_eq!(said.objects()[0]["before"]["reason"], "a migration");
        let now =
            stage.texts("SELECT paused_at::text FROM consumer_groups WHERE paused_for = 'longer'").await;
        assert_eq!(now, paused_at, "it is paused since the first time");

        let said = stage.operate("pharmacy", &["resume"]).await;
        assert!(said.well().contains("goes on") && said.well().contains("longer"), "{said:?}");
        assert_eq!(stage.number("SELECT count(*) FROM consumer_groups WHERE paused_at IS NULL").await, 1);
        let said = stage.operate("pharmacy", &["resume", "--json"]).await;
        assert_eq!(said.objects(), [json!({ "group": stage.name, "paused": false, "before": null })]);
    });
}

/// A batch, as far as a pause sees it: through the gate, and a look at the group.
const GATE: &str =
    "SELECT pg_advisory_xact_lock_shared(hashtextextended('consumer group ' || current_database(), 0))";
const LOOK: &str = "SELECT EXISTS (SELECT FROM consumer_groups WHERE paused_at IS NOT NULL)";

/// There is always a batch before the last has ended.
#[test]
fn a_pause_waits_for_the_batches_under_way_and_is_not_overtaken_by_new_ones() {
    on_stage(1, async |stage| {
        stage.migrate().await;
        let mut connection = stage.pool.acquire().await.unwrap();
        let mut under_way = connection.begin().await.unwrap();
        sqlx::query(GATE).execute(&mut *under_way).await.unwrap();
        let waiting = |count| {
            let stage = stage.clone();
            async move {
                let sql =
                    "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory' AND database =
                           (SELECT oid FROM pg_database WHERE datname = current_database())";
                stage.until_number(sql, count).await;
            }
        };
        let pausing = tokio::spawn({
            let stage = stage.clone();
            async move { stage.operate("pharmacy", &["pause"]).await }
        });
        waiting(1).await;
        let next = tokio::spawn({
            let pool = stage.pool.clone();
            async move {
                let mut batch = pool.begin().await.unwrap();
                sqlx::query(GATE).execute(&mut *batch).await.unwrap();
                sqlx::query_scalar::<_, bool>(LOOK).fetch_one(&mut *batch).await.unwrap()
            }
        });
        waiting(2).await;
        under_way.commit().await.unwrap();
        pausing.await.unwrap().well();
        assert!(next.await.unwrap(), "a batch that came after the pause sees it");
    });
}

#[test]
fn a_batch_that_does_not_end_leaves_the_group_as_it_was() {
    on_stage(1, async |stage| {
        stage.migrate().await;
        let mut connection = stage.pool.acquire().await.unwrap();
        let mut under_way = connection.begin().await.unwrap();
        sqlx::query(GATE).execute(&mut *under_way).await.unwrap();
        let mut command = stage.command("pharmacy");
        command.arg("pause").env("CONSUMER_CONSUMER__APPLY_TIMEOUT_SECONDS", "1");
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(75), "{told}");
        assert!(told.contains("still under way after 6 s"), "{told}");
        under_way.rollback().await.unwrap();
        assert_eq!(stage.number("SELECT count(*) FROM consumer_groups").await, 0);
    });
}

#[test]
fn without_the_tables_or_the_database_it_says_which() {
    on_stage(1, async |stage| {
        let said = stage.operate("pharmacy", &["pause"]).await;
        assert_eq!(said.code, Some(69), "{said:?}");
        assert!(said.err.contains("consumer_groups") && said.err.contains("consumer migrate"), "{said:?}");

        let mut command = stage.command("pharmacy");
        command.arg("resume").env("CONSUMER_POSTGRES__URL", "postgres://consumer@127.0.0.1:1/consumers");
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(75), "{told}");
        assert!(told.contains("the database consumer@127.0.0.1:1/consumers"), "{told}");
    });
}

#[test]
fn a_paused_group_applies_nothing_and_goes_on_when_it_is_resumed() {
    on_stage(1, async |stage| {
        let consumer = stage.start("pharmacy").await;
        stage.produce([Record::of(&created("a"))]).await;
        eventually("all committed", async || (stage.committed().await == 1).then_some(())).await;
        stage.operate("pharmacy", &["pause", "--reason", "a migration"]).await.well();
        stage.produce([Record::of(&created("b"))]).await;
        eventually("the consumer waits", async || {
            let waiting = consumer.metric("consumer_waiting_partitions{cause=\"paused\"}").await;
            (waiting > 0.9).then_some(())
        })
        .await;
        assert_eq!(stage.number("SELECT count(*) FROM pharmacy_orders").await, 1);
        assert_eq!(stage.committed().await, 1);
        stage.operate("pharmacy", &["resume"]).await.well();
        stage.until_number("SELECT count(*) FROM pharmacy_orders", 2).await;
        eventually("all committed", async || (stage.committed().await == 2).then_some(())).await;
    });
}

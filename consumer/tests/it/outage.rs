//! The database goes away: everything waits in place, nothing is dead-lettered, nothing is lost.

use std::time::Duration;

use sqlx::AssertSqlSafe;

use crate::{
    records::{Record, confirmed, created},
    stage::{Stage, eventually, on_stage},
};

pub(crate) async fn terminate_backends(stage: &Stage) -> i64 {
    sqlx::query_scalar(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
         WHERE datname = $1 AND application_name LIKE 'consumer-%'",
    )
    .bind(&stage.name)
    .fetch_one(&stage.server)
    .await
    .unwrap()
}

pub(crate) async fn allow_connections(stage: &Stage, allow: bool) {
    let sql = format!("ALTER DATABASE {} WITH ALLOW_CONNECTIONS {allow}", stage.name);
    sqlx::query(AssertSqlSafe(sql)).execute(&stage.server).await.unwrap();
}

#[test]
fn connections_cut_again_and_again_lose_nothing_and_dead_letter_nothing() {
    on_stage(3, async |stage| {
        const ORDERS: i64 = 2000;
        stage.create_topic(&stage.dlq()).await;
        let mut command = stage.command("fulfillment");
        command.env("CONSUMER_CONSUMER__BATCH_RECORDS_MAX", "10");
        let consumer = stage.spawn(command).await;
        consumer.until_ready().await;
        let bodies = (0..ORDERS).flat_map(|n| [created(&format!("o-{n}")), confirmed(&format!("o-{n}"), 2)]);
        stage.produce(bodies.map(|b| Record::of(&b))).await;
        let mut cut = 0;
        for round in 1..=8 {
            // Again and again in the middle of the work, not before or after it.
            eventually("progress between two cuts", async || {
                let done = stage.number("SELECT count(*) FROM fulfillment_tasks").await;
                (done > round * 2 * ORDERS / 10).then_some(())
            })
            .await;
            cut += terminate_backends(&stage).await;
        }
        stage.until_number("SELECT count(*) FROM fulfillment_tasks", 2 * ORDERS).await;
        assert!(cut >= 8, "only {cut} connections were cut");
        assert!(consumer.metric("consumer_retried_total{cause=\"database\"}").await > 0.9);
        assert_eq!(stage.number("SELECT count(*) FROM fulfillment_orders WHERE version = 2").await, ORDERS);
        assert_eq!(stage.dead_letter_count().await, 0);
        eventually("all offsets committed", async || (stage.committed().await == 2 * ORDERS).then_some(()))
            .await;
    });
}

#[test]
fn a_database_that_refuses_connections_is_waited_for_in_the_group() {
    on_stage(2, async |stage| {
        stage.create_topic(&stage.dlq()).await;
        let consumer = stage.start("pharmacy").await;
        allow_connections(&stage, false).await;
        terminate_backends(&stage).await;
        stage.produce((0..50).map(|n| Record::of(&created(&format!("o-{n}"))))).await;
        let detail = consumer.until_state("waiting_for_database").await;
        assert!(!detail.is_empty());
        eventually("a few attempts", async || {
            (consumer.metric("consumer_retried_total{cause=\"database\"}").await > 5.0).then_some(())
        })
        .await;
        let lag = eventually("the lag is seen", async || {
            Some(consumer.metric("consumer_lag_records").await).filter(|lag| *lag > 0.9)
        })
        .await;
        assert!(lag <= 50.1, "{lag}");
        // A minute, many times the session: whoever did not keep up the membership would be out by now.
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(stage.committed().await, 0);
        assert!(consumer.metric("consumer_assigned_partitions").await > 1.9);
        assert!(!consumer.log().contains("revoked"), "{}", consumer.log());
        assert_eq!(consumer.log().matches(" assigned ").count(), 1, "{}", consumer.log());

        allow_connections(&stage, true).await;
        stage.until_number("SELECT count(*) FROM pharmacy_orders", 50).await;
        consumer.until_ready().await;
        assert_eq!(stage.dead_letter_count().await, 0);
        eventually("all offsets committed", async || (stage.committed().await == 50).then_some(())).await;
    });
}

//! Several instances, and the way out.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{
    records::{Record, created},
    stage::{eventually, on_stage},
};

#[test]
fn two_instances_share_the_partitions_and_one_takes_over_what_the_other_leaves() {
    on_stage(4, async |stage| {
        // Both at once, on an empty database: both migrate.
        let mut first = stage.spawn(stage.command("pharmacy")).await;
        let second = stage.spawn(stage.command("pharmacy")).await;
        first.until_ready().await;
        second.until_ready().await;
        eventually("two partitions each", async || {
            let (a, b) = (
                first.metric("consumer_assigned_partitions").await,
                second.metric("consumer_assigned_partitions").await,
            );
            ((a - 2.0).abs() < 0.1 && (b - 2.0).abs() < 0.1).then_some(())
        })
        .await;
        let orders = |from: usize, to: usize| {
            (from..to).map(|n| Record::of(&created(&format!("o-{n}")))).collect::<Vec<_>>()
        };
        stage.produce(orders(0, 1000)).await;
        stage.until_number("SELECT count(*) FROM pharmacy_tasks", 1000).await;
        let done =
            (first.metric("consumer_processed_total").await, second.metric("consumer_processed_total").await);
        assert!(done.0 > 0.9 && done.1 > 0.9 && (done.0 + done.1 - 1000.0).abs() < 0.1, "{done:?}");

        // One leaves in the middle of the next thousand.
        stage.produce(orders(1000, 2000)).await;
        assert!(first.terminate().await.success(), "{}", first.log());
        stage.until_number("SELECT count(*) FROM pharmacy_tasks", 2000).await;
        eventually("the other has all", async || {
            (second.metric("consumer_assigned_partitions").await > 3.9).then_some(())
        })
        .await;
        // A lawful exit leaves nothing to be done twice.
        assert!(second.metric("consumer_duplicates_dropped_total").await < 0.1);
        assert_eq!(stage.number("SELECT count(*) FROM pharmacy_orders").await, 2000);
    });
}

#[test]
fn an_instance_without_a_partition_is_ready_all_the_same() {
    on_stage(1, async |stage| {
        let _first = stage.start("pharmacy").await;
        let second = stage.start("pharmacy").await;
        let (_, body) = second.get("/health/ready").await.unwrap();
        assert_eq!(serde_json::from_str::<Value>(&body).unwrap()["state"], "consuming");
    });
}

#[test]
fn one_that_is_fenced_joins_again_and_of_two_by_one_name_one_ends() {
    on_stage(2, async |stage| {
        let mut command = stage.command("pharmacy");
        command.env("CONSUMER_KAFKA__PROPERTIES__GROUP_INSTANCE_ID", "one");
        let mut first = stage.spawn(command).await;
        first.until_ready().await;
        let mut command = stage.command("pharmacy");
        command.env("CONSUMER_KAFKA__PROPERTIES__GROUP_INSTANCE_ID", "one");
        let mut second = stage.spawn(command).await;
        // They fence each other in turns.
        let (loser, mut winner) = tokio::select! {
            status = first.until_exit() => ((status, first.log()), second),
            status = second.until_exit() => ((status, second.log()), first),
        };
        assert_eq!(loser.0.code(), Some(69), "{}", loser.1);
        assert!(loser.1.contains("give each one of its own"), "{}", loser.1);
        assert_eq!(loser.1.matches("joining the group again").count(), 3, "{}", loser.1);
        // The other was fenced, too, and works.
        assert!(winner.log().contains("joining the group again"), "{}", winner.log());
        stage.produce((0..100).map(|n| Record::of(&created(&format!("o-{n}"))))).await;
        stage.until_number("SELECT count(*) FROM pharmacy_orders", 100).await;
        assert!(winner.terminate().await.success(), "{}", winner.log());
    });
}

#[test]
fn asked_to_stop_it_commits_what_it_has_done_and_ends_in_time() {
    on_stage(2, async |stage| {
        let mut command = stage.command("pharmacy");
        command.env("CONSUMER_CONSUMER__BATCH_RECORDS_MAX", "10");
        // So rarely that only the drain can have committed.
        command.env("CONSUMER_KAFKA__COMMIT_INTERVAL_MS", "60000");
        let mut consumer = stage.spawn(command).await;
        consumer.until_ready().await;
        stage.produce((0..3000).map(|n| Record::of(&created(&format!("o-{n}"))))).await;
        eventually("some are done", async || {
            (stage.number("SELECT count(*) FROM inbox").await > 300).then_some(())
        })
        .await;
        let asked = Instant::now();
        let status = consumer.terminate().await;
        assert!(status.success(), "{status}: {}", consumer.log());
        assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
        let done = stage.number("SELECT count(*) FROM inbox").await;
        assert!(done < 3000, "it stopped too late to prove anything");
        assert_eq!(stage.committed().await, done);
    });
}

/// The first event of a new group on a new topic must not wait for timers.
#[test]
fn the_first_event_is_applied_without_an_initial_lag() {
    on_stage(6, async |stage| {
        let _consumer = stage.start("pharmacy").await;
        let sent = Instant::now();
        stage.produce([Record::of(&created("first"))]).await;
        stage.until_number("SELECT count(*) FROM pharmacy_orders", 1).await;
        assert!(sent.elapsed() < Duration::from_secs(2), "{:?}", sent.elapsed());
    });
}

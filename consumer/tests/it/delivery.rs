//! Every event has its effect exactly once: in order, twice delivered, killed in the middle.

use std::fs;

use rdkafka::{
    admin::AdminOptions,
    producer::{BaseProducer, BaseRecord, Producer},
};
use serde_json::{Value, json};
use sqlx::Row;
use uuid::Uuid;

use crate::{
    records::{Record, confirmed, created},
    stage::{PATIENCE, Stage, eventually, on_stage},
};

fn golden() -> Vec<Value> {
    ["OrderCreated", "OrderUpdated", "OrderConfirmed", "OrderCancelled"]
        .iter()
        .map(|name| {
            let path = format!("{}/../contracts/events/{name}.example.json", env!("CARGO_MANIFEST_DIR"));
            serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
        })
        .collect()
}

/// A row of text for every row of a table, in order: what "nothing changed" means.
async fn contents(stage: &Stage, table: &str) -> Vec<String> {
    let sql = format!("SELECT t::text AS line FROM {table} t ORDER BY 1");
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql)).fetch_all(&stage.pool).await.unwrap();
    rows.iter().map(|r| r.get("line")).collect()
}

#[test]
fn the_golden_events_become_the_pharmacys_order_and_its_tasks() {
    on_stage(3, async |stage| {
        let consumer = stage.start("pharmacy").await;
        stage.produce(golden().iter().take(3).map(Record::of)).await;
        stage.until_number("SELECT count(*) FROM pharmacy_tasks", 3).await;
        let row = sqlx::query(
            "SELECT status, version, customer_id, currency, total_amount::text AS total, items FROM pharmacy_orders",
        )
        .fetch_one(&stage.pool)
        .await
        .unwrap();
        assert_eq!(row.get::<String, _>("status"), "confirmed");
        assert_eq!(row.get::<i64, _>("version"), 3);
        assert_eq!(row.get::<String, _>("total"), "16.49");
        assert_eq!(row.get::<Value, _>("items")[1]["price"], "3.99");
        assert_eq!(
            (row.get::<&str, _>("customer_id"), row.get::<&str, _>("currency")),
            ("customer-1", "EUR")
        );
        let kinds: Vec<String> = sqlx::query_scalar("SELECT kind FROM pharmacy_tasks ORDER BY version")
            .fetch_all(&stage.pool)
            .await
            .unwrap();
        assert_eq!(kinds, ["check_stock", "check_changes", "prepare"]);

        // And an operator sees it.
        assert!((consumer.metric("consumer_processed_total").await - 3.0).abs() < 0.1);
        assert!((consumer.metric("consumer_apply_latency_seconds_count").await - 3.0).abs() < 0.1);
        eventually("no lag", async || (consumer.metric("consumer_lag_records").await < 0.1).then_some(()))
            .await;
        let (status, body) = consumer.get("/health/live").await.unwrap();
        assert_eq!((status, body.as_str()), (200, "{\"live\":true}"));
    });
}

#[test]
fn the_golden_events_become_fulfillments_order_and_its_tasks() {
    on_stage(1, async |stage| {
        let _consumer = stage.start("fulfillment").await;
        stage.produce(golden().iter().map(Record::of)).await;
        stage.until_number("SELECT count(*) FROM fulfillment_tasks", 4).await;
        let row =
            sqlx::query("SELECT status, version, restaurant_id, total_quantity FROM fulfillment_orders")
                .fetch_one(&stage.pool)
                .await
                .unwrap();
        assert_eq!(row.get::<String, _>("status"), "cancelled");
        assert_eq!(row.get::<i64, _>("version"), 4);
        assert_eq!(row.get::<String, _>("restaurant_id"), "restaurant-1");
        assert_eq!(row.get::<i64, _>("total_quantity"), 3);
    });
}

#[test]
fn an_older_version_never_overwrites() {
    on_stage(1, async |stage| {
        let consumer = stage.start("pharmacy").await;
        let mut late = created("o-1");
        late["version"] = json!(2);
        late["totalAmount"] = json!("99");
        let mut newest = created("o-1");
        newest["version"] = json!(5);
        // One at a time, so that the database and not only the batch is asked; then all in one.
        for (n, body) in [newest, confirmed("o-1", 7), late.clone(), confirmed("o-1", 6)].iter().enumerate() {
            stage.produce([Record::of(body)]).await;
            stage.until_number("SELECT count(*) FROM inbox", i64::try_from(n).unwrap() + 1).await;
        }
        let mut other = late;
        other["eventId"] = json!(Uuid::now_v7());
        stage.produce([confirmed("o-1", 8), other, confirmed("o-1", 8)].iter().map(Record::of)).await;
        stage.until_number("SELECT count(*) FROM inbox", 7).await;
        let tasks = stage.texts("SELECT version::text FROM pharmacy_tasks ORDER BY version").await;
        assert_eq!(tasks, ["5", "7", "8"]);
        assert_eq!(stage.number("SELECT version FROM pharmacy_orders").await, 8);
        assert_eq!(stage.number("SELECT (total_amount * 100)::bigint FROM pharmacy_orders").await, 1250);
        assert!((consumer.metric("consumer_stale_ignored_total").await - 4.0).abs() < 0.1);
        // From nothing to 5, and from 5 to 7.
        assert!((consumer.metric("consumer_version_gaps_accepted_total").await - 2.0).abs() < 0.1);
    });
}

#[test]
fn a_topic_delivered_twice_changes_nothing() {
    on_stage(3, async |stage| {
        let bodies: Vec<Value> =
            (0..200).flat_map(|n| [created(&format!("o-{n}")), confirmed(&format!("o-{n}"), 2)]).collect();
        let mut consumer = stage.start("pharmacy").await;
        stage.produce(bodies.iter().map(Record::of)).await;
        stage.until_number("SELECT count(*) FROM pharmacy_tasks", 400).await;
        let tables = ["inbox", "pharmacy_orders", "pharmacy_tasks"];
        let mut before = Vec::new();
        for table in tables {
            before.push(contents(&stage, table).await);
        }

        // The same records written again, some twice within one batch.
        stage.produce(bodies.iter().chain(&bodies).map(Record::of)).await;
        let dropped = async |wanted: f64| {
            (consumer.metric("consumer_duplicates_dropped_total").await >= wanted).then_some(())
        };
        eventually("800 duplicates dropped", async || dropped(800.0).await).await;

        // And the whole topic read again from its beginning.
        assert!(consumer.terminate().await.success(), "{}", consumer.log());
        stage.admin().delete_groups(&[&stage.name], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
        let consumer = stage.start("pharmacy").await;
        eventually("1200 duplicates dropped", async || {
            (consumer.metric("consumer_duplicates_dropped_total").await >= 1200.0).then_some(())
        })
        .await;

        for (table, before) in tables.iter().zip(before) {
            assert_eq!(contents(&stage, table).await, before, "{table}");
        }
        assert!(consumer.metric("consumer_processed_total").await < 0.1);
    });
}

#[test]
fn killed_in_the_middle_of_thousands_everything_is_applied_exactly_once() {
    on_stage(4, async |stage| {
        const ORDERS: i64 = 4000;
        let bodies = (0..ORDERS).flat_map(|n| [created(&format!("o-{n}")), confirmed(&format!("o-{n}"), 2)]);
        stage.produce(bodies.map(|b| Record::of(&b))).await;
        for kill in 1..=3 {
            let mut command = stage.command("pharmacy");
            // Small batches, so that there is a middle to be killed in.
            command.env("CONSUMER_CONSUMER__BATCH_RECORDS_MAX", "20");
            let mut consumer = stage.spawn(command).await;
            eventually("some progress", async || {
                let sql = "SELECT count(*) FROM pharmacy_tasks";
                let found: Result<i64, _> = sqlx::query_scalar(sql).fetch_one(&stage.pool).await;
                found.ok().filter(|done| *done > kill * ORDERS / 4)
            })
            .await;
            consumer.kill();
            let done = stage.number("SELECT count(*) FROM pharmacy_tasks").await;
            assert!(done < 2 * ORDERS, "killed too late to prove anything: all {done} were done");
        }
        let _consumer = stage.start("pharmacy").await;
        stage.until_number("SELECT count(*) FROM pharmacy_tasks", 2 * ORDERS).await;
        assert_eq!(stage.number("SELECT count(*) FROM pharmacy_orders WHERE version = 2").await, ORDERS);
        assert_eq!(stage.number("SELECT count(*) FROM inbox").await, 2 * ORDERS);
        assert_eq!(
            stage.number("SELECT count(DISTINCT (order_id, version)) FROM pharmacy_tasks").await,
            2 * ORDERS
        );
        eventually("everything committed", async || (stage.committed().await == 2 * ORDERS).then_some(()))
            .await;
    });
}

/// The relay's exactly-once mode writes transactions: an aborted one must never be seen, and the markers at the
/// end of a partition are not records that anybody still has to do.
#[test]
fn aborted_records_are_not_applied_and_markers_are_no_lag() {
    on_stage(1, async |stage| {
        let consumer = stage.start("pharmacy").await;
        let (mut config, topic, name) = (stage.client(), stage.topic.clone(), stage.name.clone());
        let write = move || {
            let producer: BaseProducer = config.set("transactional.id", &name).create().unwrap();
            producer.init_transactions(PATIENCE).unwrap();
            for (order, commit) in [("aborted", false), ("committed", true), ("aborted-2", false)] {
                producer.begin_transaction().unwrap();
                let body = created(order).to_string();
                producer.send(BaseRecord::to(&topic).key(order).payload(&body)).map_err(|(e, _)| e).unwrap();
                producer.flush(PATIENCE).unwrap();
                if commit {
                    producer.commit_transaction(PATIENCE).unwrap();
                } else {
                    producer.abort_transaction(PATIENCE).unwrap();
                }
            }
        };
        tokio::task::spawn_blocking(write).await.unwrap();
        stage.until_number("SELECT count(*) FROM pharmacy_orders WHERE order_id = 'committed'", 1).await;
        eventually("no lag at a marker", async || {
            (consumer.metric("consumer_lag_records").await < 0.1).then_some(())
        })
        .await;
        stage.produce([Record::of(&created("plain"))]).await;
        stage.until_number("SELECT count(*) FROM pharmacy_orders WHERE order_id = 'plain'", 1).await;
        assert_eq!(stage.number("SELECT count(*) FROM pharmacy_orders").await, 2);
    });
}

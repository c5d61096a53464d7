//! What comes behind an event that failed waits for it, and follows it in order once it is redriven or discarded.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::TcpListener,
};

use rdkafka::admin::AdminOptions;
use serde_json::{Value, json};

use crate::{
    records::{Record, confirmed, created, updated},
    stage::{Running, Stage, eventually, on_stage},
};

/// What no order may cost as long as the test's constraint stands.
const TOO_MUCH: &str = "1000000";

async fn redrive(stage: &Stage, records: impl IntoIterator<Item = Record>) {
    stage.produce_to(&stage.redrive(), records).await;
}

async fn prepare(stage: &Stage) {
    stage.create_topic(&stage.dlq()).await;
    stage.create_topic(&stage.redrive()).await;
}

async fn refuse_what_costs_too_much(stage: &Stage) {
    stage.run("ALTER TABLE pharmacy_orders ADD CONSTRAINT cheap CHECK (total_amount < 1000000)").await;
}

async fn mend(stage: &Stage) {
    stage.run("ALTER TABLE pharmacy_orders DROP CONSTRAINT cheap").await;
}

async fn versions(stage: &Stage) -> Vec<String> {
    stage
        .texts("SELECT order_id || ' ' || version FROM pharmacy_tasks ORDER BY created_at, order_id, version")
        .await
}

const LETTERS_SENT: &str = "SELECT count(*) FROM dead_letters WHERE dlq_offset IS NOT NULL";
const PARKED: &str = "SELECT count(*) FROM parked_records";

/// A pharmacy whose o-1 has failed in its second event, with the third parked behind it. Gives back the failed one.
async fn failed(stage: &Stage, consumer: &Running) -> Record {
    refuse_what_costs_too_much(stage).await;
    let refused = Record::of(&updated("o-1", 2, TOO_MUCH));
    let records = [Record::of(&created("o-1")), refused.clone(), Record::of(&confirmed("o-1", 3))];
    stage.produce(records.into_iter().chain([Record::of(&created("o-2"))])).await;
    stage.until_number(LETTERS_SENT, 1).await;
    stage.until_number(PARKED, 1).await;
    // The others flow on.
    stage.until_number("SELECT count(*) FROM pharmacy_orders WHERE order_id = 'o-2'", 1).await;
    assert_eq!(stage.number("SELECT version FROM pharmacy_orders WHERE order_id = 'o-1'").await, 1);
    assert!((consumer.metric("consumer_parked_total").await - 1.0).abs() < 0.1);
    refused
}

#[test]
fn what_is_behind_a_failed_event_follows_it_in_order_once_it_is_redriven() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        let consumer = stage.start("pharmacy").await;
        let refused = failed(&stage, &consumer).await;
        // Also what comes much later, and with headers of its own.
        let mut late = Record::of(&updated("o-1", 4, "7"));
        late.headers.push(("binary".into(), vec![0, 0xff]));
        stage.produce([late]).await;
        stage.until_number(PARKED, 2).await;
        mend(&stage).await;
        redrive(&stage, [refused.redriven(&stage.topic, 0, 1, 1, "apply")]).await;
        stage.until_number("SELECT version FROM pharmacy_orders WHERE order_id = 'o-1'", 4).await;
        stage.until_number(PARKED, 0).await;
        assert_eq!(versions(&stage).await, ["o-1 1", "o-2 1", "o-1 2", "o-1 3", "o-1 4"]);
        assert_eq!(stage.texts("SELECT outcome FROM dead_letters").await, ["applied"]);
        assert_eq!(stage.dead_letter_count().await, 1);
        // The key is free: what comes now is not parked.
        stage.produce([Record::of(&updated("o-1", 5, "8"))]).await;
        stage.until_number("SELECT version FROM pharmacy_orders WHERE order_id = 'o-1'", 5).await;
        assert!((consumer.metric("consumer_parked_total").await - 2.0).abs() < 0.1);
        let settled = consumer.metric("consumer_dead_letters_settled_total{outcome=\"applied\"}").await;
        assert!((settled - 1.0).abs() < 0.1);
    });
}

#[test]
fn one_that_fails_again_is_counted_and_stays_and_keeps_what_is_behind_it() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        let consumer = stage.start("pharmacy").await;
        let refused = failed(&stage, &consumer).await;
        redrive(&stage, [refused.redriven(&stage.topic, 0, 1, 1, "apply")]).await;
        let letters = stage.dead_letters(2).await;
        let redrives: Vec<String> = letters.iter().map(|l| l.header("dlq.redrives")).collect();
        assert_eq!(redrives, ["", "1"]);
        assert_eq!((letters[1].header("dlq.attempts").as_str(), &letters[1].value), ("2", &refused.value));
        assert_eq!(letters[1].header("redrive.number"), "");
        stage.until_number("SELECT attempts::bigint FROM dead_letters WHERE dlq_offset = 1", 2).await;
        assert_eq!(stage.number(PARKED).await, 1);
        mend(&stage).await;
        redrive(&stage, [refused.redriven(&stage.topic, 0, 1, 2, "apply")]).await;
        stage.until_number("SELECT version FROM pharmacy_orders WHERE order_id = 'o-1'", 3).await;
        // Once more changes nothing.
        redrive(&stage, [refused.redriven(&stage.topic, 0, 1, 3, "apply")]).await;
        eventually("the last is dropped", async || {
            (consumer.metric("consumer_duplicates_dropped_total").await > 0.9).then_some(())
        })
        .await;
        assert_eq!(versions(&stage).await, ["o-1 1", "o-2 1", "o-1 2", "o-1 3"]);
        assert_eq!(stage.dead_letter_count().await, 2);
    });
}

#[test]
fn a_discarded_one_is_never_applied_and_lets_the_others_go() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        let mut consumer = stage.start("pharmacy").await;
        let refused = failed(&stage, &consumer).await;
        redrive(&stage, [refused.redriven(&stage.topic, 0, 1, 1, "discard")]).await;
        stage.until_number("SELECT version FROM pharmacy_orders WHERE order_id = 'o-1'", 3).await;
        assert_eq!(stage.texts("SELECT outcome FROM dead_letters").await, ["discarded"]);
        assert_eq!(stage.number(PARKED).await, 0);
        mend(&stage).await;
        // Not by another redrive, and not when the whole topic is read again.
        redrive(&stage, [refused.redriven(&stage.topic, 0, 1, 2, "apply")]).await;
        assert!(consumer.terminate().await.success(), "{}", consumer.log());
        stage.admin().delete_groups(&[&stage.name], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
        let consumer = stage.start("pharmacy").await;
        stage.produce([Record::of(&created("o-3"))]).await;
        stage.until_number("SELECT count(*) FROM pharmacy_orders WHERE order_id = 'o-3'", 1).await;
        assert_eq!(versions(&stage).await, ["o-1 1", "o-2 1", "o-1 3", "o-3 1"]);
        assert!(consumer.metric("consumer_duplicates_dropped_total").await > 2.9);
    });
}

#[test]
fn where_nothing_is_parked_a_redriven_event_that_was_overtaken_is_ignored() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        let mut command = stage.command("pharmacy");
        command.env("CONSUMER_CONSUMER__ON_FAILURE", "skip");
        let consumer = stage.spawn(command).await;
        consumer.until_ready().await;
        refuse_what_costs_too_much(&stage).await;
        let refused = Record::of(&updated("o-1", 2, TOO_MUCH));
        stage.produce([Record::of(&created("o-1")), refused.clone(), Record::of(&confirmed("o-1", 3))]).await;
        stage.until_number(LETTERS_SENT, 1).await;
        stage.until_number("SELECT version FROM pharmacy_orders", 3).await;
        mend(&stage).await;
        redrive(&stage, [refused.redriven(&stage.topic, 0, 1, 1, "apply")]).await;
        stage.until_number("SELECT count(*) FROM dead_letters WHERE settled_at IS NOT NULL", 1).await;
        assert_eq!(versions(&stage).await, ["o-1 1", "o-1 3"]);
        assert!((consumer.metric("consumer_stale_ignored_total").await - 1.0).abs() < 0.1);
    });
}

/// Consumers are killed while hundreds of keys are blocked and while they are redriven.
#[test]
fn killed_in_the_middle_of_a_redrive_every_key_keeps_its_order_and_nothing_is_lost_or_done_twice() {
    on_stage(2, async |stage| {
        const ORDERS: i64 = 300;
        prepare(&stage).await;
        stage.migrate().await;
        refuse_what_costs_too_much(&stage).await;
        let order = |n: i64| format!("o-{n}");
        let second = |n: i64| updated(&order(n), 2, TOO_MUCH);
        let seconds: Vec<Record> = (0..ORDERS).map(|n| Record::of(&second(n))).collect();
        let first = (0..ORDERS).map(|n| Record::of(&created(&order(n))));
        let rest = (0..ORDERS).flat_map(|n| [confirmed(&order(n), 3), updated(&order(n), 4, "5")]);
        stage.produce(first.chain(seconds.iter().cloned()).chain(rest.map(|body| Record::of(&body)))).await;
        let start = async || {
            let mut command = stage.command("pharmacy");
            command.env("CONSUMER_CONSUMER__BATCH_RECORDS_MAX", "20");
            stage.spawn(command).await
        };
        let killed_at = async |sql: &str, more_than: i64| {
            let mut consumer = start().await;
            eventually(sql, async || (stage.number(sql).await > more_than).then_some(())).await;
            consumer.kill();
        };
        killed_at(LETTERS_SENT, ORDERS / 3).await;
        killed_at(PARKED, ORDERS / 2).await;
        {
            let _consumer = start().await;
            stage.until_number(PARKED, 2 * ORDERS).await;
            stage.until_number(LETTERS_SENT, ORDERS).await;
        }
        mend(&stage).await;
        let letters: Vec<(i32, i64, Vec<u8>)> =
            sqlx::query_as("SELECT partition, record_offset, key FROM dead_letters")
                .fetch_all(&stage.pool)
                .await
                .unwrap();
        let letters = letters.iter().map(|(partition, offset, key)| {
            let record = seconds.iter().find(|r| r.key.as_ref() == Some(key)).unwrap();
            record.redriven(&stage.topic, *partition, *offset, 1, "apply")
        });
        redrive(&stage, letters).await;
        let applied = "SELECT count(*) FROM dead_letters WHERE outcome = 'applied'";
        for part in 1..=3 {
            killed_at(applied, part * ORDERS / 4).await;
        }
        let _consumer = stage.start("pharmacy").await;
        stage.until_number(applied, ORDERS).await;
        stage.until_number("SELECT count(*) FROM pharmacy_orders WHERE version = 4", ORDERS).await;
        assert_eq!(stage.number(PARKED).await, 0);
        // Each order's four, in order, once.
        let wrong = "SELECT count(*) FROM (
                SELECT array_agg(version ORDER BY created_at, version) AS done FROM pharmacy_tasks GROUP BY order_id
            ) AS orders WHERE done <> ARRAY[1, 2, 3, 4]::bigint[]";
        assert_eq!(stage.number(wrong).await, 0);
        assert_eq!(stage.number("SELECT count(*) FROM inbox").await, 4 * ORDERS);
    });
}

#[test]
fn a_gap_is_waited_for_and_closed_by_what_comes_over_another_partition() {
    on_stage(2, async |stage| {
        prepare(&stage).await;
        let mut command = stage.command("pharmacy");
        command.env("CONSUMER_CONSUMER__ON_GAP", "wait").env("CONSUMER_CONSUMER__GAP_WAIT_SECONDS", "3600");
        let consumer = stage.spawn(command).await;
        consumer.until_ready().await;
        let on = |partition, body: &Value| Record { partition: Some(partition), ..Record::of(body) };
        stage.produce([on(0, &created("o-1"))]).await;
        stage.until_number("SELECT count(*) FROM pharmacy_orders", 1).await;
        stage.produce([on(1, &created("o-2")), on(1, &confirmed("o-1", 3))]).await;
        let detail = consumer.until_state("waiting_for_gap").await;
        assert!(detail.contains("version 3 of o-1"), "{detail}");
        stage.produce([on(0, &updated("o-1", 2, "9"))]).await;
        stage.until_number("SELECT version FROM pharmacy_orders WHERE order_id = 'o-1'", 3).await;
        consumer.until_ready().await;
        assert_eq!(stage.dead_letter_count().await, 0);
    });
}

#[test]
fn a_gap_that_nothing_closes_is_dead_lettered_and_accepted_when_it_is_redriven() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        let mut command = stage.command("pharmacy");
        command.env("CONSUMER_CONSUMER__ON_GAP", "wait").env("CONSUMER_CONSUMER__GAP_WAIT_SECONDS", "1");
        let consumer = stage.spawn(command).await;
        consumer.until_ready().await;
        let third = Record::of(&confirmed("o-1", 3));
        stage
            .produce([Record::of(&created("o-1")), third.clone(), Record::of(&updated("o-1", 4, "1"))])
            .await;
        let letters = stage.dead_letters(1).await;
        assert_eq!(letters[0].header("dlq.reason"), "version_gap");
        stage.until_number(PARKED, 1).await;
        stage.until_number(LETTERS_SENT, 1).await;
        redrive(&stage, [third.redriven(&stage.topic, 0, 1, 1, "apply")]).await;
        stage.until_number("SELECT version FROM pharmacy_orders", 4).await;
        assert_eq!(versions(&stage).await, ["o-1 1", "o-1 3", "o-1 4"]);
    });
}

#[test]
fn a_gap_is_filled_with_the_events_that_the_order_api_has() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        // Two pages, the first after a failure.
        let (second, third) = (updated("o-1", 2, "9"), confirmed("o-1", 3));
        let pages = [
            (503, json!({})),
            (200, json!({"events": [created("o-1"), second.clone()], "nextCursor": "n 1"})),
            (200, json!({"events": [third.clone()], "nextCursor": null})),
        ];
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/api/orders/{{aggregate}}/events", listener.local_addr().unwrap());
        let api = std::thread::spawn(move || pages.map(|(status, body)| answer(&listener, status, &body)));
        let mut command = stage.command("pharmacy");
        command.env("CONSUMER_CONSUMER__ON_GAP", "fetch").env("CONSUMER_CONSUMER__GAP_URL", url);
        let consumer = stage.spawn(command).await;
        consumer.until_ready().await;
        stage.produce([Record::of(&created("o-1")), Record::of(&updated("o-1", 4, "7"))]).await;
        stage.until_number("SELECT version FROM pharmacy_orders", 4).await;
        assert_eq!(versions(&stage).await, ["o-1 1", "o-1 2", "o-1 3", "o-1 4"]);
        let asked = api.join().unwrap();
        let path = "GET /api/orders/o-1/events";
        assert_eq!(
            asked,
            [format!("{path} HTTP/1.1"), format!("{path} HTTP/1.1"), format!("{path}?cursor=n%201 HTTP/1.1")]
        );
        // What comes late after all was fetched before.
        stage.produce([Record::of(&second), Record::of(&third)]).await;
        eventually("they are dropped", async || {
            (consumer.metric("consumer_duplicates_dropped_total").await > 1.9).then_some(())
        })
        .await;
        assert_eq!(stage.dead_letter_count().await, 0);
    });
}

/// Takes one request and answers it; gives back its first line.
pub(crate) fn answer(listener: &TcpListener, status: u16, body: &Value) -> String {
    let (stream, _) = listener.accept().unwrap();
    let mut lines = BufReader::new(&stream).lines().map(Result::unwrap);
    let asked = lines.next().unwrap();
    for line in lines {
        if line.is_empty() {
            break;
        }
    }
    let body = body.to_string();
    write!(
        &stream,
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    asked
}

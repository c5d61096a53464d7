//! `consumer status` and `consumer seek`.

use serde_json::{Value, json};

use crate::{
    records::{Record, created},
    stage::{Stage, eventually, on_stage},
};

async fn status(stage: &Stage) -> Value {
    let said = stage.operate("pharmacy", &["status", "--json"]).await;
    said.well();
    said.objects().remove(0)
}

fn in_partition(stage: &Stage, partition: i32, order: &str) -> Record {
    assert!(partition < stage.partitions);
    Record { partition: Some(partition), ..Record::of(&created(order)) }
}

#[test]
fn the_status_of_a_group_is_told_with_and_without_instances() {
    on_stage(2, async |stage| {
        stage.migrate().await;
        stage.create_topic(&stage.redrive()).await;
        stage.produce([in_partition(&stage, 0, "a"), in_partition(&stage, 0, "b")]).await;
        let told = status(&stage).await;
        assert_eq!((&told["instances"], &told["lagRecords"]), (&json!([]), &json!(2)), "{told}");
        let partition = |told: &Value, n: usize| told["partitions"][n].clone();
        assert_eq!(partition(&told, 0)["committed"], Value::Null);
        assert!(partition(&told, 0)["lagSeconds"].is_i64());
        assert_eq!(partition(&told, 0)["lagRecords"], 2);
        assert_eq!(partition(&told, 1)["lagRecords"], 0);
        assert_eq!(partition(&told, 2)["topic"], stage.redrive());

        let mut consumer = stage.start("pharmacy").await;
        eventually("all committed", async || (stage.committed().await == 2).then_some(())).await;
        let told = status(&stage).await;
        assert_eq!((&told["lagRecords"], &told["lagSeconds"]), (&json!(0), &json!(0)), "{told}");
        assert_eq!(told["state"], "Stable");
        let instance = &told["instances"][0];
        assert_eq!(instance["client"], format!("consumer-{}", stage.name));
        let all = [&stage.topic, &stage.redrive()].map(|topic| [format!("{topic}/0"), format!("{topic}/1")]);
        assert_eq!(instance["partitions"], json!(all.concat()));
        assert_eq!(partition(&told, 0)["instance"], instance["id"]);
        assert_eq!((&partition(&told, 0)["committed"], &partition(&told, 0)["end"]), (&json!(2), &json!(2)));

        stage.operate("pharmacy", &["pause", "--reason", "a migration"]).await.well();
        let said = stage.operate("pharmacy", &["status"]).await;
        let text = said.well();
        for part in ["stable, 1 instance\n", "a migration", "PARTITION", "LAG SECONDS", "all "] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(consumer.terminate().await.success());
        let told = status(&stage).await;
        assert_eq!((&told["state"], &told["paused"]["reason"]), (&json!("Empty"), &json!("a migration")));
    });
}

#[test]
fn open_letters_and_what_is_parked_is_counted() {
    on_stage(1, async |stage| {
        stage.migrate().await;
        let letters = format!(
            "INSERT INTO dead_letters (consumer_group, topic, partition, record_offset, key, reason, error, attempts,
                 blocks_key, settled_at, outcome)
             VALUES ('{0}', 't', 0, 1, 'a', 'not_json', '', 1, true, NULL, NULL),
                    ('{0}', 't', 0, 2, 'b', 'not_json', '', 1, false, NULL, NULL),
                    ('{0}', 't', 0, 3, 'c', 'no_key', '', 1, true, now(), 'applied'),
                    ('another', 't', 0, 1, 'd', 'no_key', '', 1, true, NULL, NULL);
             INSERT INTO parked_records (consumer_group, topic, partition, record_offset, key)
             VALUES ('{0}', 't', 0, 4, 'a'), ('{0}', 't', 0, 5, 'a'), ('another', 't', 0, 4, 'd')",
            stage.name
        );
        stage.run(&letters).await;
        let told = status(&stage).await;
        assert_eq!(told["openLettersByReason"], json!({ "not_json": 2 }));
        assert_eq!((&told["blockedKeys"], &told["parkedRecords"]), (&json!(1), &json!(2)), "{told}");
        // The redrive topic is not there.
        let said = stage.operate("pharmacy", &["status"]).await;
        assert!(said.well().contains("2 open (2 not_json); blocked keys: 1, parked records: 2"), "{said:?}");
        assert!(said.err.contains(&stage.redrive()), "{said:?}");
        let said = stage.operate("pharmacy", &["status", "--brokers", "127.0.0.1:1"]).await;
        assert!(said.code == Some(75) && said.err.contains("Kafka at 127.0.0.1:1"), "{said:?}");
    });
}

#[test]
fn a_seek_is_refused_while_somebody_consumes_and_moves_what_it_is_told_to() {
    on_stage(2, async |stage| {
        let mut consumer = stage.start("pharmacy").await;
        let records = (0..3).map(|n| in_partition(&stage, n % 2, &format!("o-{n}")));
        stage.produce(records).await;
        eventually("all committed", async || (stage.committed().await == 3).then_some(())).await;

        let seek =
            async |arguments: &[&str]| stage.operate("pharmacy", &[&["seek"], arguments].concat()).await;
        let said = seek(&["--to-beginning"]).await;
        assert_eq!(said.code, Some(65), "{said:?}");
        assert!(said.err.contains(&format!("consumer-{}", stage.name)) && said.err.contains("stop them"));
        let said = seek(&["--to-beginning", "--dry-run", "--json"]).await;
        said.well();
        let moved = |partition: i32, from: Value, to: i64, records: i64| json!({ "topic": stage.topic, "partition": partition, "from": from, "to": to, "records": records });
        assert_eq!(said.objects(), [moved(0, json!(2), 0, -2), moved(1, json!(1), 0, -1)]);
        assert_eq!(stage.committed().await, 3);

        assert!(consumer.terminate().await.success());
        let said = seek(&["--to-beginning", "--partition", "0", "--json"]).await;
        said.well();
        assert_eq!(said.objects(), [moved(0, json!(2), 0, -2)]);
        assert!(said.err.contains("2 records come again"), "{said:?}");
        assert_eq!(stage.committed().await, 1);

        // Forward only when it is meant.
        let said = seek(&["--to-end", "--json"]).await;
        assert_eq!(said.code, Some(64), "{said:?}");
        assert!(said.err.contains("2 records are skipped") && said.err.contains("--yes"), "{said:?}");
        assert_eq!(stage.committed().await, 1);
        let said = seek(&["--to-end", "--yes", "--topic", &stage.topic]).await;
        assert!(said.well().contains("2 skipped"), "{said:?}");
        assert_eq!(stage.committed().await, 3);
        seek(&["--to-time", "1h"]).await.well();
        assert_eq!(stage.committed().await, 0);

        // It all comes again, and changes nothing.
        let consumer = stage.start("pharmacy").await;
        eventually("all committed", async || (stage.committed().await == 3).then_some(())).await;
        assert!((consumer.metric("consumer_duplicates").await - 3.0).abs() < 0.1);
        assert_eq!(stage.number("SELECT count(*) FROM pharmacy_orders").await, 3);
    });
}

#[test]
fn a_seek_says_what_it_does_not_understand() {
    on_stage(1, async |stage| {
        for (arguments, why) in [
            (&["seek"][..], "--to-time"),
            (&["seek", "--to-end", "--to-beginning"], "cannot be used with"),
            (&["seek", "--to-end", "--topic", "other"], "does not consume other"),
            (&["seek", "--to-end", "--partition", "7"], "no partition 7"),
            (&["seek", "--to-time", "tomorrow"], "15m"),
        ] {
            let said = stage.operate("pharmacy", arguments).await;
            assert!(said.code == Some(64) && said.err.contains(why), "{why}: {said:?}");
        }
        // Nobody has been there yet.
        let said = stage.operate("messages", &["seek", "--to-end", "--yes", "--json"]).await;
        assert_eq!(said.objects()[0]["from"], Value::Null, "{said:?}");
    });
}

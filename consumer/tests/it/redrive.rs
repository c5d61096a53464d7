//! Dead letters all the way: a record fails, an operator looks, mends, redrives or discards, and the group goes on.

use serde_json::{Value, json};

use crate::{
    records::{Record, confirmed, created},
    stage::{Said, Stage, on_stage},
};

/// Refused by the test's own constraint, until it is dropped.
fn too_dear(order: &str) -> Record {
    let mut body = created(order);
    body["totalAmount"] = json!("1000000");
    Record { partition: Some(0), ..Record::of(&body) }
}

/// What follows it.
fn next(order: &str, version: i64) -> Record {
    Record { partition: Some(0), ..Record::of(&confirmed(order, version)) }
}

async fn prepare(stage: &Stage) {
    stage.migrate().await;
    stage.create_topic(&stage.dlq()).await;
    stage.create_topic(&stage.redrive()).await;
    stage.run("ALTER TABLE pharmacy_orders ADD CONSTRAINT cheap CHECK (total_amount < 1000)").await;
}

async fn dlq(stage: &Stage, arguments: &[&str]) -> Said {
    stage.operate("pharmacy", &[&["dlq"], arguments, &["--json"]].concat()).await
}

fn outcome(said: &Said) -> Value {
    said.objects()[0]["outcome"].clone()
}

#[test]
fn what_is_mended_is_redriven_applied_and_what_waited_behind_it_follows() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        let consumer = stage.start("pharmacy").await;
        stage.produce([too_dear("a"), next("a", 2), Record::of(&created("b"))]).await;
        stage.until_number("SELECT count(*) FROM parked_records", 1).await;
        stage.until_number("SELECT count(*) FROM dead_letters WHERE dlq_offset IS NOT NULL", 1).await;
        let letters = dlq(&stage, &["list"]).await.objects();
        assert_eq!(letters.len(), 1);
        assert_eq!((&letters[0]["reason"], &letters[0]["parked"]), (&json!("database_refused"), &json!(1)));
        let name = letters[0]["letter"].as_str().unwrap();
        let shown = dlq(&stage, &["show", name]).await.objects().remove(0);
        assert!(shown["value"].as_str().unwrap().contains("1000000"), "{shown}");
        assert!(shown["foundAt"].as_str().unwrap().starts_with(&stage.dlq()), "{shown}");

        // Too early.
        let said = dlq(&stage, &["redrive", name]).await;
        assert_eq!((said.code, outcome(&said)), (Some(65), json!("failed again")), "{said:?}");
        let letters = dlq(&stage, &["list"]).await.objects();
        assert_eq!((&letters[0]["state"], &letters[0]["redrives"]), (&json!("open"), &json!(1)));
        assert_eq!(stage.number("SELECT count(*) FROM pharmacy_orders WHERE order_id = 'a'").await, 0);
        assert_eq!(stage.number("SELECT count(*) FROM parked_records").await, 1);

        // Its copy is that of the redriven record by now, and has to serve as well.
        stage.until_number("SELECT count(*) FROM dead_letters WHERE dlq_offset IS NOT NULL", 1).await;
        stage.run("ALTER TABLE pharmacy_orders DROP CONSTRAINT cheap").await;
        let said = dlq(&stage, &["redrive", "--reason", "database_refused"]).await;
        said.well();
        assert_eq!(outcome(&said), "applied");
        stage.until_number("SELECT count(*) FROM parked_records", 0).await;
        stage.until_number("SELECT count(*) FROM pharmacy_orders WHERE order_id = 'a'", 1).await;
        let version = "SELECT version FROM aggregate_versions WHERE aggregate_id = 'a'";
        stage.until_number(version, 2).await;
        assert_eq!(dlq(&stage, &["list"]).await.objects(), [] as [Value; 0]);
        let settled = dlq(&stage, &["list", "--all-states"]).await.objects();
        assert_eq!((&settled[0]["state"], &settled[0]["redrives"]), (&json!("applied"), &json!(2)));
        drop(consumer);
    });
}

#[test]
fn what_fails_each_time_is_left_out_in_the_end_and_a_discard_lets_the_others_go() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        let _consumer = stage.start("pharmacy").await;
        stage.produce([too_dear("a"), next("a", 2), next("a", 3)]).await;
        stage.until_number("SELECT count(*) FROM parked_records", 2).await;
        for _ in 0..2 {
            let said = dlq(&stage, &["redrive", "--all", "--redrives-max", "2"]).await;
            assert_eq!((said.code, outcome(&said)), (Some(65), json!("failed again")), "{said:?}");
        }
        let said = dlq(&stage, &["redrive", "--all", "--redrives-max", "2"]).await;
        assert_eq!((said.code, outcome(&said)), (Some(65), json!("refused")), "{said:?}");

        let said = dlq(&stage, &["discard", "--key", "a", "--yes"]).await;
        said.well();
        assert_eq!(outcome(&said), "discarded");
        stage.until_number("SELECT count(*) FROM parked_records", 0).await;
        stage.until_number("SELECT version FROM aggregate_versions WHERE aggregate_id = 'a'", 3).await;
        let outcome = "SELECT outcome || ' ' || redrives FROM dead_letters";
        assert_eq!(stage.texts(outcome).await, ["discarded 3"]);
    });
}

#[test]
fn many_letters_are_redriven_in_one_go() {
    const LETTERS: usize = 250;
    on_stage(3, async |stage| {
        prepare(&stage).await;
        let _consumer = stage.start("pharmacy").await;
        stage.produce((0..LETTERS).map(|n| Record { partition: None, ..too_dear(&format!("o-{n}")) })).await;
        let count = i64::try_from(LETTERS).unwrap();
        stage.until_number("SELECT count(*) FROM dead_letters WHERE dlq_offset IS NOT NULL", count).await;
        stage.run("ALTER TABLE pharmacy_orders DROP CONSTRAINT cheap").await;
        let said = dlq(&stage, &["redrive", "--all", "--rate", "10000"]).await;
        said.well();
        assert_eq!(said.objects().len(), LETTERS);
        assert!(said.objects().iter().all(|object| object["outcome"] == "applied"), "{said:?}");
        assert_eq!(stage.number("SELECT count(*) FROM pharmacy_orders").await, count);
        assert_eq!(stage.number("SELECT count(*) FROM dead_letters WHERE redrives <> 1").await, 0);
    });
}

//! A record that cannot be used ends in the dead-letter topic, whole, and stops nobody.

use serde_json::{Value, json};

use crate::{
    records::{Record, confirmed, created, incompressible},
    stage::{eventually, on_stage},
};

fn with(mut body: Value, field: &str, value: Value) -> Value {
    body[field] = value;
    body
}

fn raw(key: Option<&[u8]>, value: Option<&[u8]>) -> Record {
    let headers =
        vec![("traceparent".to_owned(), b"00-ab-cd-01".to_vec()), ("binary".to_owned(), vec![0xff, 0])];
    Record { key: key.map(<[u8]>::to_vec), value: value.map(<[u8]>::to_vec), headers, partition: Some(0) }
}

/// Every kind of poison with its reason.
fn kinds() -> Vec<(&'static str, Record)> {
    let body = || created("poison");
    let of = |body: Value| Record { partition: Some(0), ..Record::of(&body) };
    let mut missing = body();
    missing.as_object_mut().unwrap().remove("customerId");
    let key = Some(&b"poison"[..]);
    vec![
        ("no_key", raw(None, Some(body().to_string().as_bytes()))),
        ("no_value", raw(key, None)),
        ("not_json", raw(key, Some(b"\xff\xfenot json"))),
        ("not_json", raw(key, Some(b""))),
        ("wrong_type", raw(key, Some(b"[1, 2]"))),
        ("unknown_type", of(with(body(), "eventType", json!("OrderEaten")))),
        ("missing_field", of(missing)),
        ("wrong_type", of(with(body(), "version", json!("one")))),
        ("unsupported_schema", of(with(body(), "schemaVersion", json!(2)))),
        ("nul_character", of(with(body(), "currency", json!("E\0R")))),
        ("bad_value", of(with(body(), "version", json!(u64::MAX)))),
        ("bad_value", of(with(body(), "totalAmount", json!("1".repeat(60))))),
        ("key_mismatch", raw(Some(b"other"), Some(body().to_string().as_bytes()))),
        // The test's own constraint refuses these two.
        ("database_refused", of(with(created("poison-1"), "totalAmount", json!("1000000")))),
        ("database_refused", of(with(created("poison-2"), "totalAmount", json!("1000001")))),
    ]
}

#[test]
fn every_kind_of_poison_is_dead_lettered_whole_and_the_others_flow_on() {
    on_stage(1, async |stage| {
        stage.create_topic(&stage.dlq()).await;
        let mut consumer = stage.start("pharmacy").await;
        sqlx::query("ALTER TABLE pharmacy_orders ADD CHECK (total_amount < 1000000)")
            .execute(&stage.pool)
            .await
            .unwrap();
        let kinds = kinds();
        // Each between two good ones, all at once, so that batches hold both.
        let good = |n: usize| Record { partition: Some(0), ..Record::of(&created(&format!("good-{n}"))) };
        let records =
            kinds.iter().enumerate().flat_map(|(n, (_, r))| [good(2 * n), r.clone(), good(2 * n + 1)]);
        stage.produce(records).await;

        let letters = stage.dead_letters(kinds.len()).await;
        for (n, (letter, (reason, record))) in letters.iter().zip(&kinds).enumerate() {
            assert_eq!(letter.header("dlq.reason"), *reason, "{record:?}");
            assert_eq!((&letter.key, &letter.value), (&record.key, &record.value), "{reason}");
            for header in &record.headers {
                assert!(letter.headers.contains(header), "{reason}: {header:?}");
            }
            assert!(!letter.header("dlq.error").is_empty());
            assert!(letter.header("dlq.attempts").parse::<u32>().unwrap() >= 1);
            assert_eq!(letter.header("dlq.topic"), stage.topic);
            assert_eq!(letter.header("dlq.partition"), "0");
            assert_eq!(letter.header("dlq.offset"), (3 * n + 1).to_string(), "{reason}");
            assert_eq!(letter.header("dlq.group"), stage.name);
            assert!(letter.header("dlq.at").starts_with("20"), "{}", letter.header("dlq.at"));
        }
        assert!(letters.last().unwrap().header("dlq.error").contains("23514"));
        stage
            .until_number("SELECT count(*) FROM pharmacy_orders", 2 * i64::try_from(kinds.len()).unwrap())
            .await;
        assert_eq!(
            stage.number("SELECT count(*) FROM pharmacy_orders WHERE order_id LIKE 'poison%'").await,
            0
        );
        let dead_lettered =
            consumer.metric("consumer_dead_lettered_total{reason=\"database_refused\"}").await;
        assert!((dead_lettered - 2.0).abs() < 0.1, "{dead_lettered}");

        // Settled means committed: nothing of it comes again.
        let total = i64::try_from(3 * kinds.len()).unwrap();
        eventually("all offsets committed", async || (stage.committed().await == total).then_some(())).await;
        assert!(consumer.terminate().await.success(), "{}", consumer.log());
        assert_eq!(stage.dead_letter_count().await, i64::try_from(kinds.len()).unwrap());
    });
}

/// As large as the broker takes: with our headers it is larger. It must not hold up its partition for ever.
#[test]
fn a_poison_that_is_too_large_with_its_headers_is_dead_lettered_without_its_value() {
    on_stage(1, async |stage| {
        stage.create_topic(&stage.dlq()).await;
        let _consumer = stage.start("pharmacy").await;
        let incompressible = incompressible(1_048_400);
        let mut poison = raw(Some(b"large"), Some(&incompressible));
        poison.headers.clear();
        stage.produce([poison, Record::of(&created("good"))]).await;
        let letters = stage.dead_letters(1).await;
        assert_eq!(letters[0].header("dlq.value_omitted"), incompressible.len().to_string());
        assert_eq!(letters[0].header("dlq.offset"), "0");
        assert_eq!((letters[0].key.as_deref(), &letters[0].value), (Some(&b"large"[..]), &None));
        stage.until_number("SELECT count(*) FROM pharmacy_orders", 1).await;
    });
}

/// More than a fetch takes, and more than a topic takes by default.
#[test]
fn values_of_five_megabytes_are_applied_or_dead_lettered_like_any_other() {
    on_stage(1, async |stage| {
        const BYTES: usize = 5_000_000;
        let large = "large-events";
        let topic = format!("{}-{large}", stage.name);
        for name in [topic.clone(), format!("{topic}-dlq")] {
            stage.create_topic_with(&name, &[("max.message.bytes", "10000000")]).await;
        }
        let consumer = stage.spawn(stage.command_on("pharmacy", &topic)).await;
        consumer.until_ready().await;
        let blank = " ".repeat(BYTES);
        let good = Record::of(&with(created("large"), "unknownField", json!(blank)));
        let bad = Record::of(&with(created("bad"), "currency", json!(blank)));
        stage.produce_to(&topic, [good, bad.clone(), Record::of(&created("after"))]).await;
        stage.until_number("SELECT count(*) FROM pharmacy_orders", 2).await;
        let letters = stage.dead_letters_of(&topic, 1).await;
        assert_eq!(letters[0].header("dlq.reason"), "bad_value");
        assert!(letters[0].value == bad.value, "its value is another");
    });
}

#[test]
fn without_a_dead_letter_topic_the_partition_waits_and_nothing_is_lost() {
    on_stage(2, async |stage| {
        let consumer = stage.start("pharmacy").await;
        let in_partition =
            |partition, body: &Value| Record { partition: Some(partition), ..Record::of(body) };
        let poison = Record { partition: Some(0), ..raw(Some(b"p"), Some(b"nonsense")) };
        stage.produce([poison, in_partition(1, &created("other-partition"))]).await;
        let detail = consumer.until_state("waiting_for_dead_letter_topic").await;
        assert!(detail.contains(&stage.dlq()) && detail.contains("create it"), "{detail}");
        assert!(consumer.metric("consumer_waiting_partitions{cause=\"dead_letter_topic\"}").await > 0.9);
        // The other partition goes on; this one does not move past its poison.
        stage.until_number("SELECT count(*) FROM pharmacy_orders", 1).await;
        stage.produce([in_partition(0, &confirmed("same-partition", 1))]).await;
        stage.produce([in_partition(1, &created("other-partition-2"))]).await;
        stage.until_number("SELECT count(*) FROM pharmacy_orders WHERE order_id LIKE 'other%'", 2).await;
        eventually("the healthy partition committed", async || (stage.committed().await == 2).then_some(()))
            .await;

        stage.create_topic(&stage.dlq()).await;
        assert_eq!(stage.dead_letters(1).await[0].header("dlq.reason"), "not_json");
        stage.until_number("SELECT count(*) FROM pharmacy_orders", 3).await;
        consumer.until_ready().await;
    });
}

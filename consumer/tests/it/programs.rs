//! Programs of other handlers than ours, which is what the crate is a library for.

use std::{fs, path::Path, process::Command};

use uuid::Uuid;

use crate::{
    records::{Record, confirmed, created},
    release::WAITING,
    stage::{Stage, eventually, on_stage},
};

/// A program of `examples/` or `tests/programs/`, with a stage's settings.
fn program(stage: &Stage, name: &str) -> Command {
    let program = Path::new(env!("CARGO_BIN_EXE_consumer")).parent().unwrap().join("examples").join(name);
    assert!(
        program.exists(),
        "{} is missing: cargo build --release -p consumer --examples",
        program.display()
    );
    stage.command_of(&program, name, &stage.topic)
}

#[test]
fn the_page_about_handlers_shows_the_example_as_it_is() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(folder.join("HANDLERS.md")).unwrap();
    let example = fs::read_to_string(folder.join("examples/loyalty.rs")).unwrap();
    assert!(
        page.contains(&format!("```rust\n{example}```")),
        "HANDLERS.md does not hold examples/loyalty.rs"
    );
}

#[test]
fn the_example_counts_each_order_once_and_can_be_rebuilt() {
    on_stage(2, async |stage| {
        let consumer = stage.spawn(program(&stage, "loyalty")).await;
        consumer.until_ready().await;
        let bodies: Vec<_> =
            (0..100).flat_map(|n| [created(&format!("o-{n}")), confirmed(&format!("o-{n}"), 2)]).collect();
        stage.produce(bodies.iter().chain(&bodies).map(Record::of)).await;
        eventually("all are seen", async || {
            (consumer.metric("consumer_duplicates_dropped_total").await > 199.0).then_some(())
        })
        .await;
        let points = "SELECT points FROM loyalty_points WHERE customer_id = 'c-1'";
        assert_eq!(stage.number(points).await, 100);
        stage.run("UPDATE loyalty_points SET points = 7").await;
        let mut rebuild = program(&stage, "loyalty");
        rebuild.arg("rebuild");
        let output = tokio::task::spawn_blocking(move || rebuild.output().unwrap()).await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(stage.number(points).await, 100);
    });
}

/// What is counted twice shows, unlike what is written twice.
#[test]
fn a_swap_that_waits_for_a_reader_counts_nothing_twice_of_what_comes_meanwhile() {
    on_stage(1, async |stage| {
        let consumer = stage.spawn(program(&stage, "loyalty")).await;
        consumer.until_ready().await;
        let orders = |from: i64, to: i64| (from..to).map(|n| Record::of(&created(&format!("o-{n}"))));
        let points = "SELECT points FROM loyalty_points WHERE customer_id = 'c-1'";
        stage.produce(orders(0, 100)).await;
        stage.until_number(points, 100).await;
        let mut reader = stage.pool.begin().await.unwrap();
        sqlx::query("SELECT FROM loyalty_points").execute(&mut *reader).await.unwrap();
        let mut rebuild = program(&stage, "loyalty");
        rebuild.arg("rebuild");
        let rebuilding = tokio::task::spawn_blocking(move || rebuild.output().unwrap());
        let swapping = "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'
                        AND relation = 'loyalty_points'::regclass";
        stage.until_number(swapping, 1).await;
        stage.produce(orders(100, 150)).await;
        // The live consumer's batch and the rebuild's.
        stage.until_number(WAITING, 2).await;
        reader.commit().await.unwrap();
        let output = rebuilding.await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        eventually("all committed", async || (stage.committed().await == 150).then_some(())).await;
        assert_eq!(stage.number(points).await, 150);
        assert_eq!(stage.number("SELECT count(*) FROM inbox").await, 150);
    });
}

#[test]
fn an_event_at_which_the_handler_panics_is_dead_lettered_and_the_others_flow_on() {
    on_stage(1, async |stage| {
        stage.create_topic(&stage.dlq()).await;
        let consumer = stage.spawn(program(&stage, "panicky")).await;
        consumer.until_ready().await;
        let words = ["one", "apply-1", "two", "parse-2", "transient-3", "three", "apply-4", "four"];
        let record = |word: &&str| Record {
            key: Some(word.as_bytes().to_vec()),
            value: Some(Uuid::now_v7().as_bytes().to_vec()),
            ..Record::default()
        };
        stage.produce(words.iter().map(record)).await;
        let letters = stage.dead_letters(4).await;
        let said: Vec<_> = letters
            .iter()
            .map(|letter| {
                let key = String::from_utf8(letter.key.clone().unwrap()).unwrap();
                (key, letter.header("dlq.reason"), letter.header("dlq.attempts"))
            })
            .collect();
        let expected = [
            ("apply-1", "handler_panicked", "1"),
            ("parse-2", "handler_panicked", "1"),
            // The first attempt and three more.
            ("transient-3", "retries_exhausted", "4"),
            ("apply-4", "handler_panicked", "1"),
        ];
        assert_eq!(said, expected.map(|(key, reason, n)| (key.to_owned(), reason.to_owned(), n.to_owned())));
        assert!(letters[0].header("dlq.error").contains("cannot stand apply-1"));
        assert!(letters[2].header("dlq.error").contains("the weather"));
        stage.until_number("SELECT count(*) FROM words", 4).await;
        assert_eq!(
            stage.texts("SELECT text FROM words ORDER BY text").await,
            ["four", "one", "three", "two"]
        );
        consumer.until_ready().await;
    });
}

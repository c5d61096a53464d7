//! A projection is made anew beside the live one and takes its place, while consumers and readers go on.

use std::{
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rdkafka::{Offset, TopicPartitionList, admin::AdminOptions};
use serde_json::{Value, json};

use crate::{
    records::{Record, confirmed, created},
    stage::{Stage, eventually, on_stage},
};

async fn output(mut command: Command) -> Output {
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

fn rebuild(stage: &Stage) -> Command {
    let mut command = stage.command("pharmacy");
    command.arg("rebuild");
    command
}

async fn rebuilt(stage: &Stage) -> String {
    let output = output(rebuild(stage)).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

/// The projection without the times at which rows were written.
async fn projection(stage: &Stage) -> Vec<String> {
    let orders = "SELECT concat_ws(' ', order_id, status, version, customer_id, currency, total_amount, items, occurred_on)
                  FROM pharmacy_orders ORDER BY 1";
    let tasks =
        "SELECT concat_ws(' ', event_id, order_id, version, kind, state) FROM pharmacy_tasks ORDER BY 1";
    [stage.texts(orders).await, stage.texts(tasks).await].concat()
}

/// The schemas that are not there without a rebuild.
const LEFT_BEHIND: &str = "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'rebuild%'";

/// What is published, without a relay.
async fn log_what_is_published(stage: &Stage) {
    stage
        .run(
            "CREATE TABLE told (id uuid);
             CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN INSERT INTO public.told VALUES (NEW.id); RETURN NULL; END';
             CREATE TRIGGER tell AFTER INSERT ON outbox FOR EACH ROW EXECUTE FUNCTION tell()",
        )
        .await;
}

#[test]
fn under_load_the_new_projection_is_the_fold_of_the_topic_and_no_reader_sees_a_half() {
    on_stage(3, async |stage| {
        const BEFORE: i64 = 3000;
        let consumer = stage.start("pharmacy").await;
        log_what_is_published(&stage).await;
        let both = |n: i64| [created(&format!("o-{n}")), confirmed(&format!("o-{n}"), 2)];
        stage.produce((0..BEFORE).flat_map(both).map(|b| Record::of(&b))).await;
        let orders = "SELECT count(*) FROM pharmacy_orders WHERE version = 2";
        stage.until_number(orders, BEFORE).await;
        // Somebody has spoilt it, which a rebuild mends; and somebody may read it.
        stage.run("UPDATE pharmacy_orders SET status = 'eaten' WHERE order_id < 'o-2'").await;
        stage.run("DELETE FROM pharmacy_tasks WHERE order_id < 'o-2'").await;
        stage.run("CREATE INDEX by_customer ON pharmacy_orders (customer_id)").await;
        stage
            .run("GRANT SELECT ON pharmacy_orders TO PUBLIC; GRANT SELECT (kind) ON pharmacy_tasks TO PUBLIC")
            .await;

        let stop = Arc::new(AtomicBool::new(false));
        let (loaded, stopped) = (stage.clone(), stop.clone());
        let load = tokio::spawn(async move {
            let mut next = BEFORE;
            while !stopped.load(Ordering::SeqCst) {
                loaded.produce((next..next + 20).flat_map(both).map(|b| Record::of(&b))).await;
                next += 20;
            }
            next
        });
        let (read, stopped) = (stage.clone(), stop.clone());
        let reader = tokio::spawn(async move {
            let mut before = 0;
            while !stopped.load(Ordering::SeqCst) {
                let now = read.number("SELECT count(*) FROM pharmacy_orders").await;
                assert!(now >= before, "a reader saw {now} orders after {before}");
                before = now;
                // Each order has a task for each version, but for those that were spoilt.
                let halves =
                    "SELECT count(*) FROM pharmacy_orders AS o WHERE order_id >= 'o-2' AND version <> (
                                  SELECT count(*) FROM pharmacy_tasks AS t WHERE t.order_id = o.order_id)";
                assert_eq!(read.number(halves).await, 0);
            }
        });
        let said = rebuilt(&stage).await;
        assert!(said.contains("swapped; the live consumers had waited"), "{said}");
        stop.store(true, Ordering::SeqCst);
        let (total, read) = (load.await.unwrap(), reader.await);
        read.unwrap();
        stage.until_number(orders, total).await;
        assert_eq!(stage.number("SELECT count(*) FROM pharmacy_orders WHERE status <> 'confirmed'").await, 0);
        assert_eq!(stage.number("SELECT count(*) FROM pharmacy_tasks").await, 2 * total);
        assert_eq!(stage.number("SELECT count(*) FROM inbox").await, 2 * total);
        assert_eq!(stage.number("SELECT sum(version)::bigint FROM aggregate_versions").await, 2 * total);
        // What follows is published once for each event, whoever of the two applied it first.
        stage.until_number("SELECT count(*) FROM told", 2 * total).await;
        assert_eq!(stage.number("SELECT count(*) FROM inbox WHERE follow_ups_due").await, 0);
        eventually("all committed", async || (stage.committed().await == 2 * total).then_some(())).await;
        assert!(!consumer.log().contains("ERROR"), "{}", consumer.log());

        // It is the same to whoever uses it, and nothing is left behind.
        let may = "SELECT has_table_privilege('public', 'pharmacy_orders', 'SELECT')
                      AND has_column_privilege('public', 'pharmacy_tasks', 'kind', 'SELECT')
                      AND NOT has_column_privilege('public', 'pharmacy_tasks', 'state', 'SELECT')";
        assert_eq!(stage.texts(&format!("SELECT ({may})::text")).await, ["true"]);
        let indexes =
            "SELECT indexname::text FROM pg_indexes WHERE tablename IN ('pharmacy_orders', 'pharmacy_tasks')
                       AND schemaname = 'public' ORDER BY 1";
        assert_eq!(
            stage.texts(indexes).await,
            ["by_customer", "pharmacy_orders_pkey", "pharmacy_tasks_order_id", "pharmacy_tasks_pkey"]
        );
        assert_eq!(stage.number(LEFT_BEHIND).await, 0);
        let before = projection(&stage).await;
        rebuilt(&stage).await;
        assert_eq!(projection(&stage).await, before);
    });
}

#[test]
fn a_rebuild_that_is_killed_changes_nothing_and_the_next_one_clears_up() {
    on_stage(1, async |stage| {
        const ORDERS: i64 = 8000;
        let _consumer = stage.start("pharmacy").await;
        stage.produce((0..ORDERS).map(|n| Record::of(&created(&format!("o-{n}"))))).await;
        stage.until_number("SELECT count(*) FROM pharmacy_orders", ORDERS).await;
        let before = projection(&stage).await;
        let mut command = rebuild(&stage);
        // So slow that it is under way all the time.
        command.env("CONSUMER_CONSUMER__BATCH_RECORDS_MAX", "1");
        let mut child = command.stderr(std::process::Stdio::null()).spawn().unwrap();
        let schema = "SELECT nspname::text FROM pg_namespace WHERE nspname LIKE 'rebuild%'";
        let schema = eventually("it has begun", async || stage.texts(schema).await.pop()).await;
        eventually("it has done something", async || {
            let count = format!("SELECT count(*) FROM {schema}.pharmacy_orders");
            // Not before the table is there.
            let found: Result<i64, _> =
                sqlx::query_scalar(sqlx::AssertSqlSafe(count)).fetch_one(&stage.pool).await;
            found.ok().filter(|count| *count > 100)
        })
        .await;
        // One at a time.
        let second = output(rebuild(&stage)).await;
        assert_eq!(second.status.code(), Some(69));
        assert!(String::from_utf8_lossy(&second.stderr).contains("another rebuild"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(projection(&stage).await, before);
        stage.produce([Record::of(&created("later"))]).await;
        stage.until_number("SELECT count(*) FROM pharmacy_orders", ORDERS + 1).await;
        eventually("Postgres has noticed", async || {
            let done = output(rebuild(&stage)).await;
            done.status.success().then_some(())
        })
        .await;
        assert_eq!(stage.number(LEFT_BEHIND).await, 0);
        assert_eq!(projection(&stage).await.len(), before.len() + 2);
    });
}

#[test]
fn what_was_discarded_stays_so_what_is_parked_stays_and_new_failures_stop_the_swap() {
    on_stage(1, async |stage| {
        stage.create_topic(&stage.dlq()).await;
        let consumer = stage.start("pharmacy").await;
        let of = |field: &str, value: Value| {
            let mut body = created("o-1");
            body["version"] = json!(2);
            body[field] = value;
            Record::of(&body)
        };
        let wrong = of("eventType", json!("OrderEaten"));
        stage.produce([Record::of(&created("o-1")), wrong, Record::of(&confirmed("o-1", 3))]).await;
        stage.until_number("SELECT count(*) FROM parked_records", 1).await;
        stage.until_number("SELECT count(*) FROM dead_letters WHERE dlq_offset IS NOT NULL", 1).await;
        rebuilt(&stage).await;
        // The same letter, at the same place, and no second one.
        assert_eq!(stage.number("SELECT count(*) FROM dead_letters WHERE dlq_offset = 0").await, 1);
        assert_eq!(stage.number("SELECT count(*) FROM parked_records").await, 1);
        assert_eq!(stage.dead_letter_count().await, 1);
        assert_eq!(stage.number("SELECT version FROM pharmacy_orders").await, 1);

        // Something that went well before is refused now.
        let before = projection(&stage).await;
        stage
            .run("ALTER TABLE pharmacy_orders ADD CONSTRAINT cheap CHECK (total_amount < 1) NOT VALID")
            .await;
        let refused = output(rebuild(&stage)).await;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(65), "{said}");
        assert!(said.contains("1 records fail") && said.contains("database_refused"), "{said}");
        assert_eq!(projection(&stage).await, before);
        assert_eq!(stage.number(LEFT_BEHIND).await, 0);
        stage.run("ALTER TABLE pharmacy_orders DROP CONSTRAINT cheap").await;

        // A view would stay with the tables that are replaced.
        stage.run("CREATE VIEW dear AS SELECT * FROM pharmacy_orders").await;
        let refused = output(rebuild(&stage)).await;
        assert_eq!(refused.status.code(), Some(69));
        assert!(String::from_utf8_lossy(&refused.stderr).contains("the view dear"));

        // So would a column's own numbers.
        stage.run("DROP VIEW dear; ALTER TABLE pharmacy_tasks ADD COLUMN number bigserial").await;
        let refused = output(rebuild(&stage)).await;
        assert_eq!(refused.status.code(), Some(69));
        assert!(String::from_utf8_lossy(&refused.stderr).contains("the sequence pharmacy_tasks_number_seq"));

        stage.run("ALTER TABLE pharmacy_tasks DROP COLUMN number; UPDATE dead_letters SET settled_at = now(), outcome = 'discarded'").await;
        rebuilt(&stage).await;
        assert_eq!(stage.number("SELECT version FROM pharmacy_orders").await, 3);
        assert_eq!(stage.texts("SELECT outcome FROM dead_letters").await, ["discarded"]);
        assert_eq!(stage.dead_letter_count().await, 1);
        assert!(!consumer.log().contains("ERROR"), "{}", consumer.log());
    });
}

#[test]
fn a_topic_whose_beginning_is_gone_is_rebuilt_only_if_that_is_said() {
    on_stage(1, async |stage| {
        let _consumer = stage.start("pharmacy").await;
        stage.produce((0..3).map(|n| Record::of(&created(&format!("o-{n}"))))).await;
        stage.until_number("SELECT count(*) FROM pharmacy_orders", 3).await;
        let mut gone = TopicPartitionList::new();
        gone.add_partition_offset(&stage.topic, 0, Offset::Offset(1)).unwrap();
        stage.admin().delete_records(&gone, &AdminOptions::new()).await.unwrap();
        let refused = output(rebuild(&stage)).await;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(65), "{said}");
        assert!(said.contains("the first 1 records") && said.contains("--accept-missing"), "{said}");
        assert_eq!(stage.number("SELECT count(*) FROM pharmacy_orders").await, 3);
        let mut command = rebuild(&stage);
        command.arg("--accept-missing");
        assert!(output(command).await.status.success());
        assert_eq!(stage.number("SELECT count(*) FROM pharmacy_orders").await, 2);
    });
}

#[test]
fn what_has_effects_elsewhere_cannot_be_rebuilt() {
    on_stage(1, async |stage| {
        let mut command = stage.command("messages");
        command.arg("rebuild");
        let refused = output(command).await;
        assert_eq!(refused.status.code(), Some(64));
        assert!(String::from_utf8_lossy(&refused.stderr).contains("cannot be rebuilt"));
    });
}

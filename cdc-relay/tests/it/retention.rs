//! Retention: what is in Kafka and confirmed leaves the outbox, and nothing else ever does.

use std::collections::BTreeMap;

use rdkafka::{Message as _, message::OwnedMessage};
use sqlx::{Connection as _, Executor as _, PgConnection, Row as _};

use crate::{
    database::{Database, eventually},
    load::Load,
    relay::{Relay, init},
    stack::Stack,
    topics::{Topic, assert_complete_and_ordered, headers},
};

const KILLS: usize = 10;
const DELETE: [(&str, &str); 2] =
    [("CDC_RELAY_RETENTION__MODE", "delete"), ("CDC_RELAY_RETENTION__OLDER_THAN_SECONDS", "0")];
const DROP: [(&str, &str); 2] =
    [("CDC_RELAY_RETENTION__MODE", "drop-partitions"), ("CDC_RELAY_RETENTION__OLDER_THAN_SECONDS", "0")];
const EXACTLY_ONCE: (&str, &str) = ("CDC_RELAY_KAFKA__DELIVERY", "exactly-once");

/// An outbox that tells the age of its rows, and whose rows may be deleted by the relay's role. Of each that is, the
/// server writes down how far the slot was confirmed then.
fn with_age(mut database: Database) -> Database {
    let (name, slot) = (database.name.clone(), database.slot.clone());
    for sql in [
        "ALTER TABLE outbox ADD created_at timestamptz DEFAULT now()",
        &format!("GRANT SELECT, DELETE ON outbox TO {name}"),
        "CREATE TABLE gone (n int, confirmed pg_lsn)",
        &format!(
            "CREATE FUNCTION note() RETURNS trigger SECURITY DEFINER LANGUAGE plpgsql AS $$ BEGIN \
             INSERT INTO gone SELECT (OLD.payload ->> 'n')::int, confirmed_flush_lsn FROM pg_replication_slots \
             WHERE slot_name = '{slot}'; RETURN OLD; END $$"
        ),
        "CREATE TRIGGER note BEFORE DELETE ON outbox FOR EACH ROW EXECUTE FUNCTION note()",
    ] {
        database.run(sql);
    }
    init(&database);
    database
}

/// An outbox with a partition for each of some years, the last of which is not over.
fn partitioned(mut database: Database, years: std::ops::Range<usize>) -> Database {
    let name = database.name.clone();
    for sql in [
        "DROP TABLE outbox",
        "CREATE TABLE outbox (id uuid, aggregatetype text NOT NULL, aggregateid text NOT NULL, type text NOT NULL, \
         payload jsonb, created_at timestamptz DEFAULT now()) PARTITION BY RANGE (created_at)",
        "CREATE TABLE outbox_open PARTITION OF outbox FOR VALUES FROM ('2026-01-01') TO (MAXVALUE)",
        "ALTER PUBLICATION cdc_relay SET (publish_via_partition_root = true)",
        "ALTER PUBLICATION cdc_relay ADD TABLE outbox",
        &format!("ALTER TABLE outbox_open OWNER TO {name}; ALTER TABLE outbox OWNER TO {name}"),
    ] {
        database.run(sql);
    }
    for year in years {
        database.run(&format!(
            "CREATE TABLE outbox_{year} PARTITION OF outbox FOR VALUES FROM ('{year}-01-01') TO ('{}-01-01'); \
             ALTER TABLE outbox_{year} OWNER TO {name}",
            year + 1
        ));
    }
    init(&database);
    database
}

/// Rows of a year, as [`Database::insert`] has them.
fn insert_of(database: &mut Database, year: usize, kind: &str, first: usize, count: usize) {
    database.run(&format!(
        "INSERT INTO outbox SELECT gen_random_uuid(), '{kind}', 'a' || n % 10, 'Counted', json_build_object('n', n), \
         '{year}-06-01' FROM generate_series({first}, {}) n",
        first + count - 1
    ));
}

fn tables(database: &mut Database) -> i64 {
    database.number("SELECT count(*) FROM pg_class WHERE relname ~ '^outbox_[0-9]+$'")
}

fn lsn(text: &str) -> u64 {
    let (high, low) = text.split_once('/').unwrap();
    u64::from_str_radix(high, 16).unwrap() << 32 | u64::from_str_radix(low, 16).unwrap()
}

/// Where each counted row was committed, by the records' headers.
fn commits(messages: &[OwnedMessage]) -> BTreeMap<i64, u64> {
    let commit = |message: &OwnedMessage| {
        let body: serde_json::Value = serde_json::from_slice(message.payload().unwrap()).unwrap();
        let at = headers(message).into_iter().find(|(name, _)| name == "lsn").unwrap().1.unwrap();
        (body["n"].as_i64().unwrap(), lsn(&at))
    };
    messages.iter().map(commit).collect()
}

/// The relay's thread waits for the slot to confirm.
fn waits_for_the_slot(database: &mut Database) {
    let sql = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE usename = '{}' AND query LIKE '%confirmed_flush_lsn >= %'",
        database.name
    );
    eventually("it waits for the slot", || (database.number(&sql) > 0).then_some(()));
}

#[test]
fn rows_leave_once_they_are_confirmed_and_the_table_stays_small_while_the_relay_is_killed() {
    for delivery in [&[][..], &[EXACTLY_ONCE]] {
        let (mut database, topic) = (with_age(Database::new()), Topic::new(3, &[]));
        let load = Load::start(&database, &topic.kind, 0);
        let environment = [&DELETE, delivery].concat();
        for _ in 0..KILLS {
            let relay = Relay::start(&database, &environment);
            eventually("rows are deleted", || {
                relay.metric("cdc_relay_retention_deleted_rows_total").filter(|count| *count > 0.0)
            });
            relay.kill();
        }
        let count = load.stop();
        let relay = Relay::start(&database, &environment);
        eventually("the table is empty", || {
            (database.number("SELECT count(*) FROM outbox") == 0).then_some(())
        });
        let messages = topic.read(count);
        assert_complete_and_ordered(&messages, count);
        let commits = commits(&messages);
        let gone: Vec<(i32, String)> = database
            .rows("SELECT n, confirmed::text FROM gone")
            .iter()
            .map(|row| (row.get(0), row.get(1)))
            .collect();
        assert_eq!(gone.len(), count);
        for (n, confirmed) in gone {
            assert!(commits[&i64::from(n)] < lsn(&confirmed), "{n} was deleted at {confirmed}");
        }
        relay.stop();
    }
}

#[test]
fn nothing_leaves_that_is_young_or_not_confirmed() {
    let stack = Stack::start("young", &[]);
    let mut database = with_age(Database::on(&stack.servers));
    let topic = Topic::on(&stack.servers, 1, &[]);
    let relay = Relay::start(&database, &DELETE);
    stack.stop("kafka-1");
    database.insert(&topic.kind, 0, 100);
    waits_for_the_slot(&mut database);
    assert_eq!(database.number("SELECT count(*) FROM outbox"), 100);
    stack.start_again("kafka-1");
    eventually("the table is empty", || (database.number("SELECT count(*) FROM outbox") == 0).then_some(()));
    relay.stop();

    // Fifty are old enough, fifty are not.
    database.insert(&topic.kind, 100, 100);
    database
        .run("UPDATE outbox SET created_at = now() - interval '1 hour' WHERE (payload ->> 'n')::int < 150");
    let environment = [DELETE[0], ("CDC_RELAY_RETENTION__OLDER_THAN_SECONDS", "600")];
    let relay = Relay::start(&database, &environment);
    eventually("the old ones leave", || {
        relay.metric("cdc_relay_retention_deleted_rows_total").filter(|count| *count >= 50.0)
    });
    assert_eq!(database.number("SELECT min((payload ->> 'n')::int)::int8 FROM outbox"), 150);
    assert_eq!(database.number("SELECT count(*) FROM outbox"), 50);
    relay.stop();
}

#[test]
fn what_an_open_transaction_keeps_is_told() {
    let (mut database, topic) = (with_age(Database::new()), Topic::new(1, &[]));
    let relay = Relay::start(&database, &DELETE);
    let mut open = database.runtime.block_on(PgConnection::connect_with(&database.options)).unwrap();
    database.runtime.block_on(open.execute("BEGIN; SELECT pg_current_xact_id()")).unwrap();
    database.insert(&topic.kind, 0, 1);
    database.run("UPDATE outbox SET created_at = now() - interval '1 hour'");
    topic.read(1);
    let overdue = || relay.metric("cdc_relay_retention_overdue_seconds");
    eventually("it is told", || overdue().filter(|seconds| *seconds >= 3600.0));
    assert_eq!(database.number("SELECT count(*) FROM outbox"), 1);
    assert_eq!(relay.metric("cdc_relay_retention_failures_total"), Some(0.0));
    database.runtime.block_on(open.close()).unwrap();
    eventually("it has left", || overdue().filter(|seconds| *seconds == 0.0));
    assert_eq!(database.number("SELECT count(*) FROM outbox"), 0);
    relay.stop();
}

#[test]
fn a_partition_that_is_over_is_dropped_once_it_is_confirmed_whoever_detached_it() {
    let stack = Stack::start("over", &[]);
    let mut database = partitioned(Database::on(&stack.servers), 2000..2000);
    let topic = Topic::on(&stack.servers, 1, &[]);
    let name = database.name.clone();
    let relay = Relay::start(&database, &DROP);
    stack.stop("kafka-1");
    // At once: what is over when the relay looks waits for Kafka, and before that it does not look again.
    database.run("BEGIN");
    for year in 2000..2000 + KILLS {
        database.run(&format!(
            "CREATE TABLE outbox_{year} PARTITION OF outbox FOR VALUES FROM ('{year}-01-01') TO ('{}-01-01'); \
             ALTER TABLE outbox_{year} OWNER TO {name}",
            year + 1
        ));
        insert_of(&mut database, year, &topic.kind, (year - 2000) * 5, 5);
    }
    database.run("COMMIT");
    eventually("they are detached", || {
        let sql = "SELECT count(*) FROM pg_class WHERE relname ~ '^outbox_[0-9]+$' AND NOT relispartition";
        (database.number(sql) == 10).then_some(())
    });
    waits_for_the_slot(&mut database);
    relay.kill();
    assert_eq!(database.number("SELECT count(*) FROM outbox_2000"), 5);
    stack.start_again("kafka-1");
    let relay = Relay::start(&database, &DROP);
    eventually("they are dropped", || (tables(&mut database) == 0).then_some(()));
    assert_complete_and_ordered(&topic.read(50), 50);
    assert_eq!(relay.metric("cdc_relay_retention_dropped_partitions_total"), Some(10.0));
    // What is not over stays.
    database
        .run(&format!("INSERT INTO outbox VALUES (gen_random_uuid(), '{}', 'a', 'T', '{{}}')", topic.kind));
    relay.stop();
}

#[test]
fn partitions_come_and_go_under_load_while_the_relay_is_killed() {
    let (mut database, topic) = (partitioned(Database::new(), 2000..2001), Topic::new(1, &[]));
    let name = database.name.clone();
    // Into the partition that is not over.
    let busy = Topic::new(3, &[]);
    let load = Load::start(&database, &busy.kind, 0);
    let mut relay = Relay::start(&database, &DROP);
    for i in 0..KILLS {
        // Rows of the past come into a partition that is over as soon as it is there.
        let year = 2001 + i;
        database.run(&format!(
            "BEGIN; CREATE TABLE outbox_{year} PARTITION OF outbox FOR VALUES FROM ('{year}-01-01') TO ('{}-01-01'); \
             ALTER TABLE outbox_{year} OWNER TO {name}",
            year + 1
        ));
        insert_of(&mut database, year, &topic.kind, i * 200, 200);
        database.run("COMMIT");
        relay.kill();
        relay = Relay::start(&database, &DROP);
    }
    eventually("they are dropped", || (tables(&mut database) == 0).then_some(()));
    let count = load.stop();
    assert_complete_and_ordered(&topic.read(KILLS * 200), KILLS * 200);
    assert_complete_and_ordered(&busy.read(count), count);
    assert_eq!(database.number("SELECT count(*) FROM outbox"), i64::try_from(count).unwrap());
    relay.stop();
}

#[test]
fn what_keeps_it_from_cleaning_is_said_and_stops_nothing() {
    let mut database = Database::new();
    let topic = Topic::new(1, &[]);
    init(&database);
    let name = database.name.clone();
    let mut inserted = 0;
    let mut says = |database: &mut Database, environment: &[(&str, &str)], what: &str| {
        let relay = Relay::start(database, environment);
        eventually(what, || relay.log().contains(what).then_some(()));
        eventually("it is counted", || {
            relay.metric("cdc_relay_retention_failures_total").filter(|count| *count > 0.0)
        });
        database.insert(&topic.kind, inserted, 1);
        inserted += 1;
        topic.read(inserted);
        relay.stop();
    };
    says(&mut database, &DROP, "PARTITION BY RANGE");
    says(&mut database, &DELETE, "mend retention.column");
    database.run("ALTER TABLE outbox ADD created_at timestamptz DEFAULT now()");
    says(&mut database, &DELETE, &format!("GRANT SELECT, DELETE ON \"public\".\"outbox\" TO \"{name}\""));

    // A publication that tells everybody of deletes is mended first.
    database.run("ALTER PUBLICATION cdc_relay SET (publish = 'insert, delete')");
    let mut relay = Relay::spawn(&database, &DELETE);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(relay.log().contains("SET (publish = 'insert')"), "{}", relay.log());
}

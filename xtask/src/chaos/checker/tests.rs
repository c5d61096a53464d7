//! The checker on real servers: what a load wrote is published as a faithful relay would, from what `pgoutput` says, and
//! then with one mistake of each kind.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use rdkafka::{
    message::{Header, OwnedHeaders},
    producer::{FutureProducer, FutureRecord, Producer},
};
use serde_json::value::RawValue;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;

use super::{Checker, content, lsn::Lsn};
use crate::{
    chaos::{load::Load, targets::Targets, verdict::Verdict},
    topics::{self, Topic},
};

const LIMIT: Duration = Duration::from_secs(120);
/// Long enough to look twice.
const SOON: Duration = Duration::from_secs(3);

/// Two databases and a topic of its own.
struct Place {
    targets: Targets,
    admin: PgConnection,
    orders: PgConnection,
    consumers: PgConnection,
    topic: String,
    names: [String; 2],
    producer: FutureProducer,
}

/// A record, and where it goes.
#[derive(Debug, Clone)]
struct Record {
    /// None: where its key says.
    partition: Option<i32>,
    key: String,
    value: Option<Vec<u8>>,
    headers: content::Headers,
}

fn environment(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} says where the server is; run `cargo xtask test`"))
}

async fn run(connection: &mut PgConnection, sql: impl Into<String>) {
    sqlx::raw_sql(AssertSqlSafe(sql.into())).execute(connection).await.unwrap();
}

impl Place {
    async fn new() -> Self {
        let url = environment("TEST_POSTGRES_URL");
        let number = Uuid::now_v7().simple().to_string();
        let names = ["orders", "consumers"].map(|name| format!("chaos_{name}_{number}"));
        let mut admin = PgConnection::connect(&url).await.unwrap();
        for name in &names {
            run(&mut admin, format!("CREATE DATABASE {name}")).await;
        }
        let base = url.rsplit_once('/').unwrap().0;
        let [postgres_url, consumers_url] = [0, 1].map(|n| format!("{base}/{}", names[n]));
        let mut orders = PgConnection::connect(&postgres_url).await.unwrap();
        let mut consumers = PgConnection::connect(&consumers_url).await.unwrap();
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        run(&mut orders, std::fs::read_to_string(root.join("postgres/init.sql")).unwrap()).await;
        let migrations = std::fs::read_dir(root.join("consumer/migrations")).unwrap();
        let mut migrations: Vec<_> = migrations.map(|entry| entry.unwrap().path()).collect();
        migrations.sort();
        for path in migrations {
            run(&mut consumers, std::fs::read_to_string(path).unwrap()).await;
        }
        // What is published goes to a topic of our own, on brokers that others use as well.
        let aggregate_type = format!("chaos-{number}");
        let topic = format!("{aggregate_type}-events");
        run(
            &mut orders,
            format!(
                "CREATE FUNCTION ours() RETURNS trigger LANGUAGE plpgsql AS \
                 $$ BEGIN NEW.topic := '{topic}'; RETURN NEW; END $$; \
                 CREATE TRIGGER ours BEFORE INSERT ON public.outbox FOR EACH ROW EXECUTE FUNCTION ours()"
            ),
        )
        .await;
        let slot = format!("SELECT pg_create_logical_replication_slot('{}', 'pgoutput')", names[0]);
        run(&mut orders, slot).await;
        let brokers = environment("TEST_KAFKA_BROKERS");
        let ours = Topic { name: topic.clone(), partitions: 3, settings: [].into() };
        topics::create(&brokers, vec![ours], 1).await.unwrap();
        let mut config = topics::client(&brokers);
        let producer = config.set("partitioner", "murmur2_random").set("enable.idempotence", "true");
        let producer = producer.create().unwrap();
        let order_api_url = "http://127.0.0.1:1".to_owned();
        let topics = vec![topic.clone()];
        let targets = Targets { postgres_url, order_api_url, consumers_url, aggregate_type, brokers, topics };
        Self { targets, admin, orders, consumers, topic, names, producer }
    }

    /// The records of what was committed since the last time.
    async fn records(&mut self) -> Vec<Record> {
        let changes: Vec<(Vec<u8>,)> = sqlx::query_as(
            "SELECT data FROM pg_logical_slot_get_binary_changes($1, NULL, NULL, \
             'proto_version', '1', 'publication_names', 'cdc_relay', 'messages', 'true')",
        )
        .bind(&self.names[0])
        .fetch_all(&mut self.orders)
        .await
        .unwrap();
        let (mut lsn, mut seq) = (Lsn(0), 0);
        let mut records = Vec::new();
        for (change,) in changes {
            match change[0] {
                b'B' => (lsn, seq) = (Lsn(u64::from_be_bytes(change[1..9].try_into().unwrap())), 0),
                b'I' => {
                    records.push(record(&columns(&change[6..]), lsn, seq));
                    seq += 1;
                }
                b'M' => {
                    if let Some(content) = message(&change) {
                        records.push(posted(content, lsn, seq));
                        seq += 1;
                    }
                }
                _ => {}
            }
        }
        records
    }

    /// A transaction of two rows of one key between two of others.
    async fn four_rows(&mut self) -> Vec<Record> {
        let keys = ["a", "same", "same", "b"];
        let values = keys.map(|key| format!("(gen_random_uuid(), 'chaos', '{key}', 'T', '{{}}')"));
        let sql = "INSERT INTO public.outbox (id, aggregatetype, aggregateid, type, payload) VALUES ";
        run(&mut self.orders, format!("{sql} {}", values.join(","))).await;
        let records = self.records().await;
        assert_eq!(records.len(), 4);
        records
    }

    async fn publish(&self, records: &[Record]) {
        self.publish_by(&self.producer, records).await;
    }

    async fn publish_by(&self, producer: &FutureProducer, records: &[Record]) {
        for Record { partition, key, value, headers } in records {
            let mut record = FutureRecord::to(&self.topic).key(key);
            record.payload = value.as_deref();
            record.partition = *partition;
            let empty = OwnedHeaders::new();
            let headers = headers
                .iter()
                .fold(empty, |all, (key, value)| all.insert(Header { key, value: value.as_deref() }));
            // One after the other, so that the order is ours.
            producer.send(record.headers(headers), LIMIT).await.unwrap();
        }
    }

    async fn end(mut self, checker: Checker) {
        checker.close().await.unwrap();
        run(&mut self.admin, format!("SELECT pg_drop_replication_slot('{}')", self.names[0])).await;
        for name in &self.names {
            run(&mut self.admin, format!("DROP DATABASE {name} WITH (FORCE)")).await;
        }
    }
}

/// The columns of a `TupleData` message
/// (<https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>).
fn columns(mut tuple: &[u8]) -> Vec<Option<Vec<u8>>> {
    let mut take = |count: usize| {
        let (head, tail) = tuple.split_at(count);
        tuple = tail;
        head
    };
    let count = u16::from_be_bytes(take(2).try_into().unwrap());
    let column = |_| {
        (take(1) == b"t").then(|| {
            let length = u32::from_be_bytes(take(4).try_into().unwrap());
            take(usize::try_from(length).unwrap()).to_vec()
        })
    };
    (0..count).map(column).collect()
}

fn record(columns: &[Option<Vec<u8>>], lsn: Lsn, seq: u32) -> Record {
    let text = |n: usize| columns[n].clone().map(|bytes| String::from_utf8(bytes).unwrap());
    let own = text(5).map(|json| content::own_headers(&json).unwrap());
    let (lsn, seq) = (Some(lsn.to_string()), Some(seq.to_string()));
    let ours = [("id", text(0)), ("type", text(3)), ("aggregatetype", text(1)), ("lsn", lsn), ("seq", seq)];
    let ours = ours.into_iter().chain([("traceparent", text(6))].into_iter().filter(|(_, v)| v.is_some()));
    let headers = ours.map(|(name, value)| (name.to_owned(), value.map(String::into_bytes)));
    let headers = headers.chain(own.unwrap_or_default()).collect();
    Record { partition: None, key: text(2).unwrap(), value: columns[4].clone(), headers }
}

/// What a message of the outbox says; None of any other.
fn message(change: &[u8]) -> Option<&[u8]> {
    // Whether it is transactional, and its LSN.
    let rest = change[10..].strip_prefix(b"outbox\0")?;
    Some(&rest[4..])
}

/// Its columns, and of those the record.
fn posted(content: &[u8], lsn: Lsn, seq: u32) -> Record {
    let members: BTreeMap<String, &RawValue> = serde_json::from_slice(content).unwrap();
    let names = ["id", "aggregatetype", "aggregateid", "type", "payload", "headers", "traceparent"];
    let columns = names.map(|name| {
        let raw = members[name].get();
        let text = || serde_json::from_str::<String>(raw).unwrap_or_else(|_| raw.to_owned());
        (raw != "null").then(|| text().into_bytes())
    });
    record(&columns, lsn, seq)
}

impl Record {
    fn header(&mut self, name: &str) -> &mut Option<Vec<u8>> {
        &mut self.headers.iter_mut().find(|(known, _)| known == name).unwrap().1
    }

    fn id(&mut self) -> String {
        String::from_utf8(self.header("id").clone().unwrap()).unwrap()
    }
}

async fn verdict(checker: &mut Checker, limit: Duration) -> Verdict {
    checker.verdict(Instant::now() + limit).await.unwrap()
}

#[tokio::test]
async fn a_load_that_is_published_faithfully_has_no_violation_and_each_mistake_is_found() {
    let mut place = Place::new().await;
    let mut checker = Checker::create(&place.targets).await.unwrap();
    let load = Load::start(&place.targets, 11).unwrap();
    let since = Instant::now();
    while checker.read().await.unwrap().committed < 600 {
        assert!(since.elapsed() < LIMIT, "the load writes nothing");
        checker.collect().await.unwrap();
    }
    let report = load.stop().await.unwrap();
    assert!(report.committed > 0 && report.rolled_back > 0 && report.broken == 0, "{report:?}");
    let records = place.records().await;
    place.publish(&records).await;
    let found = verdict(&mut checker, LIMIT).await;
    let count = records.len() as u64;
    assert_eq!(found, Verdict { committed: count, published: count, ..Verdict::default() });
    mistakes(&mut place, &mut checker).await;
    place.end(checker).await;
}

#[tokio::test]
async fn what_was_aborted_was_not_published_and_what_the_slot_repeats_was_committed_once() {
    let mut place = Place::new().await;
    let mut checker = Checker::create(&place.targets).await.unwrap();
    let mut config = topics::client(&place.targets.brokers);
    config.set("partitioner", "murmur2_random").set("transactional.id", &place.topic);
    let producer: FutureProducer = config.create().unwrap();
    producer.init_transactions(LIMIT).unwrap();
    let records = place.four_rows().await;
    producer.begin_transaction().unwrap();
    place.publish_by(&producer, &records).await;
    producer.abort_transaction(LIMIT).unwrap();
    // A crash of Postgres can make the slot forget what it was let go of.
    let lines = checker.page(&mut place.orders).await.unwrap();
    checker.collect().await.unwrap();
    checker.take(&lines).await.unwrap();
    let found = verdict(&mut checker, SOON).await;
    assert_eq!((found.committed, found.published, found.missing), (4, 0, 4), "{found:?}");
    producer.begin_transaction().unwrap();
    place.publish_by(&producer, &records).await;
    let counts = checker.read().await.unwrap();
    assert_eq!((counts.committed, counts.published), (4, 0), "before the commit");
    producer.commit_transaction(LIMIT).unwrap();
    let found = verdict(&mut checker, LIMIT).await;
    assert_eq!(found, Verdict { published: 4, ..Verdict::default() });
    place.end(checker).await;
}

/// Each mistake in a transaction of its own.
async fn mistakes(place: &mut Place, checker: &mut Checker) {
    type Plant = fn(&mut Vec<Record>) -> String;
    let plants: [(&str, Plant); 8] = [
        ("missing", |records| records.remove(2).id()),
        ("duplicate", |records| {
            records.push(records[1].clone());
            records[1].id()
        }),
        ("out of order in its key", |records| {
            records.swap(1, 2);
            records[2].id()
        }),
        ("foreign", |records| {
            let mut stranger = records[0].clone();
            let id = Uuid::now_v7().to_string();
            *stranger.header("id") = Some(id.clone().into_bytes());
            records.push(stranger);
            id
        }),
        ("the value is not the row's", |records| {
            records[3].value = Some(b"{ }".to_vec());
            records[3].id()
        }),
        ("a header is not the row's", |records| {
            *records[3].header("type") = Some(b"U".to_vec());
            records[3].id()
        }),
        ("the header lsn", |records| {
            *records[0].header("lsn") = Some(b"0/1".to_vec());
            records[0].id()
        }),
        ("its partition is", |records| {
            let key = murmur2(&records[3].key);
            records[3].partition = Some((key + 1) % 3);
            records[3].id()
        }),
    ];
    for (named, plant) in plants {
        let mut records = place.four_rows().await;
        let id = plant(&mut records);
        place.publish(&records).await;
        let found = verdict(checker, SOON).await;
        assert!(found.violations(true) > 0, "{named}: {found:?}");
        assert!(found.examples.iter().any(|e| e.contains(named) && e.contains(&id)), "{named}: {found:?}");
        let count = records.len() as u64;
        assert_eq!((found.committed, found.published, found.tables_wrong), (4, count, 0), "{named}");
    }
}

fn murmur2(key: &str) -> i32 {
    i32::try_from(super::murmur2::positive(key.as_bytes()) % 3).unwrap()
}

#[tokio::test]
async fn the_consumers_tables_are_held_against_the_events() {
    let mut place = Place::new().await;
    let mut checker = Checker::create(&place.targets).await.unwrap();
    for name in ["OrderCreated", "OrderUpdated", "OrderConfirmed"] {
        let path = format!("{}/../contracts/events/{name}.example.json", env!("CARGO_MANIFEST_DIR"));
        sqlx::query(
            "INSERT INTO public.outbox (id, aggregatetype, aggregateid, type, payload) \
             SELECT (event->>'eventId')::uuid, 'order', event->>'aggregateId', event->>'eventType', event \
             FROM CAST($1 AS jsonb) AS event",
        )
        .bind(std::fs::read_to_string(path).unwrap())
        .execute(&mut place.orders)
        .await
        .unwrap();
    }
    let records = place.records().await;
    place.publish(&records).await;
    let found = verdict(&mut checker, SOON).await;
    assert_eq!((found.violations(true), found.tables_wrong), (9, 9), "three orders, six tasks: {found:?}");
    run(&mut place.consumers, APPLIED).await;
    let found = verdict(&mut checker, LIMIT).await;
    assert_eq!(found, Verdict::default());
    for (change, told) in [
        ("UPDATE order_views SET total_amount = 16.50", "total_amount is 16.50, not 16.49"),
        ("UPDATE pharmacy_orders SET items = items - 1", "items is"),
        ("UPDATE fulfillment_orders SET total_quantity = 4", "total_quantity is 4, not 3"),
        ("UPDATE pharmacy_tasks SET kind = 'plan' WHERE version = 2", "kind is plan, not check_changes"),
        (
            "INSERT INTO fulfillment_tasks VALUES (gen_random_uuid(), 'o', 1, 'plan')",
            "of which no event tells",
        ),
    ] {
        let before = verdict(&mut checker, SOON).await.tables_wrong;
        run(&mut place.consumers, change).await;
        let found = verdict(&mut checker, SOON).await;
        assert_eq!(found.tables_wrong, before + 1, "{change}: {found:?}");
        assert!(found.examples.iter().any(|example| example.contains(told)), "{change}: {found:?}");
    }
    let error = Checker::create(&place.targets).await.unwrap_err().to_string();
    assert!(error.contains("order_views has 1 row before anything was written"), "{error}");
    place.end(checker).await;
}

/// What the consumers make of the golden examples.
const APPLIED: &str = r#"
    CREATE TEMPORARY TABLE event AS SELECT * FROM (VALUES
        ('01936d2e-7c01-7a4b-8e55-9f0c1d2e3a41'::uuid, 1, 'check_stock', 'plan'),
        ('01936d2e-7c02-7a4b-8e55-9f0c1d2e3a42'::uuid, 2, 'check_changes', 'replan'),
        ('01936d2e-7c03-7a4b-8e55-9f0c1d2e3a43'::uuid, 3, 'prepare', 'dispatch')
    ) AS event (id, version, pharmacy, fulfillment);
    INSERT INTO pharmacy_tasks (event_id, order_id, version, kind)
    SELECT id, '01936d2e-7bff-7c31-b0aa-5d6e7f809101', version, pharmacy FROM event;
    INSERT INTO fulfillment_tasks (event_id, order_id, version, kind)
    SELECT id, '01936d2e-7bff-7c31-b0aa-5d6e7f809101', version, fulfillment FROM event;
    INSERT INTO order_views (order_id, status, version, customer_id, restaurant_id, currency, total_amount, items, notes,
                             payment_id, created_at, updated_at)
    VALUES ('01936d2e-7bff-7c31-b0aa-5d6e7f809101', 'confirmed', 3, 'customer-1', 'restaurant-1', 'EUR', 16.49,
            '[{"name": "Paracetamol 500 mg", "price": "6.25", "quantity": 2, "menuItemId": "paracetamol-500"},
              {"name": "Vitamin C, 20 tablets", "price": "3.99", "quantity": 1, "menuItemId": "vitamin-c"}]',
            'Ring twice', 'payment-1', '2026-11-21T12:00:00.123456Z', '2026-11-21T12:00:10.123456Z');
    INSERT INTO pharmacy_orders (order_id, status, version, customer_id, currency, total_amount, items, occurred_on)
    SELECT order_id, status, version, customer_id, currency, total_amount, items, updated_at FROM order_views;
    INSERT INTO fulfillment_orders (order_id, status, version, customer_id, restaurant_id, total_quantity, occurred_on)
    SELECT order_id, status, version, customer_id, restaurant_id, 3, updated_at FROM order_views;
"#;

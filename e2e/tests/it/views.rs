//! What Postgres, Kafka and the consumers hold.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    message::{Headers as _, OwnedMessage},
};
use sqlx::{Connection as _, Executor as _, PgConnection, Row as _};
use tokio::runtime::Runtime;

use crate::stack::{Stack, eventually};

/// A connection to one of the stack's databases, made anew for each question because the server may be killed.
pub(crate) struct Database {
    runtime: Runtime,
    url: String,
}

impl Database {
    pub(crate) fn of(stack: &Stack, key: &str) -> Self {
        Self::at(&stack.url(key))
    }

    pub(crate) fn at(url: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { runtime, url: url.to_owned() }
    }

    pub(crate) fn try_texts(&self, sql: &str) -> Result<Vec<String>, sqlx::Error> {
        self.runtime.block_on(async {
            let mut connection = PgConnection::connect(&self.url).await?;
            let rows = connection.fetch_all(sqlx::AssertSqlSafe(sql.to_owned())).await?;
            rows.iter().map(|row| row.try_get(0)).collect()
        })
    }

    /// The first column, as text.
    pub(crate) fn texts(&self, sql: &str) -> Vec<String> {
        self.try_texts(sql).unwrap_or_else(|e| panic!("{sql}: {e}"))
    }

    pub(crate) fn text(&self, sql: &str) -> String {
        self.texts(sql).remove(0)
    }

    pub(crate) fn number(&self, sql: &str) -> i64 {
        self.text(&format!("SELECT ({sql})::text")).parse().unwrap()
    }

    /// How many rows the table has.
    pub(crate) fn count(&self, table: &str) -> usize {
        usize::try_from(self.number(&format!("SELECT count(*) FROM {table}"))).unwrap()
    }
}

/// Everything in `order-events`.
pub(crate) fn order_events(stack: &Stack) -> Vec<OwnedMessage> {
    records(stack, "order-events")
}

/// Everything in a topic of six partitions: partition by partition, in order, up to where the topic ends now.
pub(crate) fn records(stack: &Stack, topic: &str) -> Vec<OwnedMessage> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", stack.url("kafka"))
        .set("group.id", "none")
        .set("isolation.level", "read_committed")
        .create()
        .unwrap();
    let (mut list, mut expected) = (TopicPartitionList::new(), 0_usize);
    for partition in 0..6 {
        let (low, high) = consumer.fetch_watermarks(topic, partition, Duration::from_secs(30)).unwrap();
        expected += usize::try_from(high - low).unwrap();
        list.add_partition_offset(topic, partition, Offset::Beginning).unwrap();
    }
    consumer.assign(&list).unwrap();
    let mut messages = Vec::new();
    eventually("the topic is read", || {
        while let Some(message) = consumer.poll(Duration::from_millis(200)) {
            messages.push(message.unwrap().detach());
        }
        (messages.len() >= expected).then_some(())
    });
    messages.sort_by_key(|m| (m.partition(), m.offset()));
    messages
}

pub(crate) fn header(message: &OwnedMessage, name: &str) -> Option<String> {
    let value = message.headers()?.iter().find(|h| h.key == name)?.value?;
    Some(String::from_utf8(value.to_vec()).unwrap())
}

/// What the campaign of kills has to hold, and the count of it.
pub(crate) struct Count {
    pub(crate) orders: usize,
    pub(crate) records: usize,
    pub(crate) repeated: usize,
}

/// Waits until the consumers have caught up, then asserts that each order of the database has its events in Kafka,
/// first occurrences in version order, and is in each consumer's tables exactly once, with one task.
pub(crate) fn assert_nothing_lost(stack: &Stack) -> Count {
    let (orders, consumers) = (Database::of(stack, "postgres"), Database::of(stack, "consumer_postgres"));
    let ids: BTreeSet<String> = orders.texts("SELECT order_id FROM orders").into_iter().collect();
    for (table, tasks) in [("pharmacy_orders", "pharmacy_tasks"), ("fulfillment_orders", "fulfillment_tasks")]
    {
        eventually(&format!("{table} holds all {} orders", ids.len()), || {
            (consumers.count(table) >= ids.len()).then_some(())
        });
        let held: BTreeSet<String> =
            consumers.texts(&format!("SELECT order_id FROM {table}")).into_iter().collect();
        assert!(
            held == ids,
            "{table} differs from the orders: {:?}",
            held.symmetric_difference(&ids).take(5).collect::<Vec<_>>()
        );
        let odd = consumers.texts(&format!(
            "SELECT order_id || ' has ' || count(*) FROM {tasks} GROUP BY order_id HAVING count(*) <> 1"
        ));
        assert!(odd.is_empty(), "orders without exactly one task in {tasks}: {odd:?}");
        assert_eq!(consumers.count(tasks), ids.len());
    }
    let events = order_events(stack);
    let (mut versions, mut seen, mut repeated): (BTreeMap<String, i64>, BTreeSet<String>, usize) =
        Default::default();
    for event in &events {
        let key = String::from_utf8(event.key().unwrap().to_vec()).unwrap();
        let body: serde_json::Value = serde_json::from_slice(event.payload().unwrap()).unwrap();
        assert_eq!(body["aggregateId"], key.as_str());
        if !seen.insert(header(event, "id").unwrap()) {
            repeated += 1;
            continue;
        }
        let version = body["version"].as_i64().unwrap();
        let before = versions.insert(key.clone(), version).unwrap_or(0);
        assert_eq!(version, before + 1, "the events of order {key} are out of order");
    }
    let published: BTreeSet<String> = versions.into_keys().collect();
    assert!(
        published == ids,
        "order-events differs from the orders: {:?}",
        published.symmetric_difference(&ids).take(5).collect::<Vec<_>>()
    );
    Count { orders: ids.len(), records: events.len(), repeated }
}

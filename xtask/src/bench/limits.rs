//! What bounds a relay, and what it replaces: a producer that has all records at hand, and a publisher that polls the table.
//!
//! Both run in this process, so their processor time is this process's, the looks at the topic included.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use rdkafka::{
    ClientConfig,
    error::{KafkaError, RDKafkaErrorCode},
    message::{Header, OwnedHeaders},
    producer::{BaseRecord, DefaultProducerContext, Producer as _, ThreadedProducer},
};
use sqlx::{AssertSqlSafe, PgConnection, Row as _, postgres::PgRow};

use super::{
    contents::PARTITIONS,
    servers::{Servers, connect, execute},
    workload::Shape,
};
use crate::{
    failure::{Explain, Result},
    kafka,
    topics::{self, Topic},
};

/// How many rows a poll takes.
const POLL_ROWS: u32 = 1000;
/// How long the producer may take to be rid of what it has.
const FLUSH_LIMIT: Duration = Duration::from_secs(120);
/// Between two tries where the producer is full.
const FULL_PAUSE: Duration = Duration::from_millis(1);
/// The table that is polled, a copy of the outbox: what is published is deleted from it.
const POLLED: &str = "polled";

/// One of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Limit {
    /// librdkafka with the relay's settings, from memory.
    Producer,
    /// `SELECT … FOR UPDATE SKIP LOCKED`, publish, delete.
    Polling,
}

/// A row as the relay would publish it.
struct Row {
    id: String,
    kind: String,
    event_type: String,
    key: String,
    payload: Vec<u8>,
}

impl Limit {
    pub(super) const fn arm_name(self) -> &'static str {
        match self {
            Self::Producer => "producer alone",
            Self::Polling => "polling",
        }
    }

    /// Makes the topic, and what it needs beside it.
    pub(super) async fn init(self, servers: &Servers, shape: Shape, number: usize) -> Result<Work> {
        let topic = format!("bench-{number}");
        let new = Topic { name: topic.clone(), partitions: PARTITIONS, settings: BTreeMap::new() };
        topics::create(&servers.kafka, vec![new], kafka::replication(1)).await?;
        let mut connection = connect(&servers.url).await?;
        let backend: i32 = sqlx::query_scalar("SELECT pg_backend_pid()")
            .fetch_one(&mut connection)
            .await
            .explain(|| "ask for the backend".to_owned())?;
        // As the relay sends it.
        let payload = if shape.bytea { "payload" } else { "convert_to(payload::text, 'UTF8')" };
        let columns = format!("SELECT id::text, aggregatetype, type, aggregateid, {payload} FROM");
        let rows = match self {
            Self::Producer => rows(&mut connection, format!("{columns} outbox ORDER BY ctid")).await?,
            Self::Polling => {
                // Not in the log, which the others read.
                for sql in [
                    format!("DROP TABLE IF EXISTS {POLLED}"),
                    format!(
                        "CREATE UNLOGGED TABLE {POLLED} AS SELECT row_number() OVER (ORDER BY ctid) AS seq, * FROM outbox"
                    ),
                    format!("ALTER TABLE {POLLED} ADD PRIMARY KEY (seq)"),
                    format!("ANALYZE {POLLED}"),
                ] {
                    execute(&mut connection, sql).await?;
                }
                Vec::new()
            }
        };
        let producer = Arc::new(producer(&servers.kafka)?);
        let poll = format!(
            "WITH gone AS (DELETE FROM {POLLED} WHERE seq IN (SELECT seq FROM {POLLED} ORDER BY seq LIMIT {POLL_ROWS} \
             FOR UPDATE SKIP LOCKED) RETURNING *) {columns} gone ORDER BY seq"
        );
        let backend = u32::try_from(backend).ok();
        Ok(Work { limit: self, topic, backend, connection, poll, rows, producer })
    }
}

/// One that is ready.
pub(super) struct Work {
    limit: Limit,
    pub(super) topic: String,
    /// The server's process that works for it.
    pub(super) backend: Option<u32>,
    connection: PgConnection,
    /// Takes the next rows out of the table.
    poll: String,
    rows: Vec<Row>,
    producer: Arc<ThreadedProducer<DefaultProducerContext>>,
}

impl Work {
    /// Publishes everything.
    pub(super) async fn run(mut self) -> Result<()> {
        match self.limit {
            Limit::Producer => {
                let rows = std::mem::take(&mut self.rows);
                self.publish(rows).await
            }
            Limit::Polling => {
                while self.poll().await? {}
                execute(&mut self.connection, format!("DROP TABLE {POLLED}")).await
            }
        }
    }

    /// One transaction. False where there was nothing.
    async fn poll(&mut self) -> Result<bool> {
        execute(&mut self.connection, "BEGIN".to_owned()).await?;
        let rows = rows(&mut self.connection, self.poll.clone()).await?;
        let is_empty = rows.is_empty();
        self.publish(rows).await?;
        execute(&mut self.connection, "COMMIT".to_owned()).await?;
        Ok(!is_empty)
    }

    /// Sends them and waits until Kafka has them.
    async fn publish(&self, rows: Vec<Row>) -> Result<()> {
        let (producer, topic) = (Arc::clone(&self.producer), self.topic.clone());
        let sent = tokio::task::spawn_blocking(move || {
            rows.iter().try_for_each(|row| send(&producer, &topic, row))?;
            producer.flush(FLUSH_LIMIT).explain(|| "flush the producer".to_owned())
        });
        sent.await.explain(|| "run the producer".to_owned())?
    }
}

async fn rows(connection: &mut PgConnection, sql: String) -> Result<Vec<Row>> {
    let row = |row: PgRow| {
        let text = |column: usize| row.try_get::<String, _>(column);
        let (id, kind, event_type, key) = (text(0)?, text(1)?, text(2)?, text(3)?);
        Ok::<_, sqlx::Error>(Row { id, kind, event_type, key, payload: row.try_get(4)? })
    };
    let found = sqlx::query(AssertSqlSafe(sql)).fetch_all(connection).await;
    let found = found.explain(|| "read the rows".to_owned())?;
    found.into_iter().map(row).collect::<std::result::Result<_, _>>().explain(|| "read a row".to_owned())
}

/// With the settings that the relay has at its defaults.
fn producer(bootstrap: &str) -> Result<ThreadedProducer<DefaultProducerContext>> {
    let mut config: ClientConfig = topics::client(bootstrap);
    config.set("acks", "all").set("enable.idempotence", "true").set("partitioner", "murmur2_random");
    config.set("linger.ms", "1");
    config.create().explain(|| "make a producer".to_owned())
}

fn send(producer: &ThreadedProducer<DefaultProducerContext>, topic: &str, row: &Row) -> Result<()> {
    let header = |key, value| Header { key, value: Some(value) };
    loop {
        let headers = OwnedHeaders::new_with_capacity(5)
            .insert(header("id", row.id.as_str()))
            .insert(header("type", &row.event_type))
            .insert(header("aggregatetype", &row.kind))
            .insert(header("lsn", "0/1234567"))
            .insert(header("seq", "0"));
        let record = BaseRecord::to(topic).key(&row.key).payload(&row.payload).headers(headers);
        match producer.send(record) {
            Ok(()) => return Ok(()),
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), _)) => {
                std::thread::sleep(FULL_PAUSE);
            }
            Err((error, _)) => return Err(error).explain(|| "send a record".to_owned()),
        }
    }
}

//! `cargo xtask bench consumer`: the consumer over a topic that holds the events already, beside the fastest SQL we know for
//! the same rows and a confluent-kafka consumer that does nothing; and how long the first event of a new topic takes.

mod applying;
mod events;
mod first;
mod python;
mod report;
mod running;
mod sql;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde::Deserialize;
use sqlx::{Connection, PgConnection};

use self::{
    events::{Events, Producer},
    first::First,
    report::{Report, Run, Runs, Setting},
    sql::Rows,
};
use super::{
    document::{Document, version},
    servers::{Servers, execute},
    usage::Usage,
};
use crate::{
    cli,
    endpoints::database,
    failure::{Explain, Failure, Result},
    kafka,
    layout::Layout,
    postgres,
    progress::Progress,
    services,
    topics::{self, Topic},
};

/// What all arms read.
const TOPIC: &str = "bench-events";

/// Installs what it needs beside the stack, once; the interpreter.
pub(super) fn install(progress: &Progress) -> Result<PathBuf> {
    python::install(&Layout::open(None)?, progress)
}

/// Runs the scenario; its servers are gone when it returns.
pub(super) async fn consumer(
    args: &cli::ConsumerBench,
    document: &mut Document,
    progress: &Progress,
) -> Result<()> {
    let python = install(progress)?;
    if !args.setup.no_build {
        services::build(&Layout::open(None)?, progress)?;
    }
    let binary = services::binary("consumer")?;
    document.version(version(&binary)?);
    let batch_records = args.batch_records.map_or_else(|| default_batch_records(&binary), Ok)?;
    document.busy();
    // An offset is committed after the rows are on the disk: without it, no event is safe.
    let mut settings = vec![("fsync".to_owned(), "on".to_owned())];
    settings.extend(args.setup.postgres_set.iter().cloned());
    let (servers, mut stack) = Servers::start(args.setup.postgres, &settings, progress).await?;
    let events = Events { count: args.events, partitions: args.partitions };
    let bench = Bench { args, servers: &servers, binary, events, batch_records };
    let result = tokio::select! {
        result = bench.measure(&python) => result,
        () = stack.interrupted() => Err(Failure::new("interrupted")),
    };
    document.version(format!("PostgreSQL {}", servers.postgres_version));
    document.version(format!("Kafka {}", servers.kafka_version));
    servers.stop(stack, result.is_err()).await;
    let (runs, first) = result?;
    let setting = Setting {
        handler: args.handler.name(),
        confluent_kafka: python::PACKAGE,
        postgres_settings: settings.iter().map(|(name, value)| format!("{name}={value}")).collect(),
        events: events.count,
        orders: events.orders(),
        partitions: events.partitions,
        batch_records,
    };
    document.sections.push(Report::new(setting, runs, first)?.section()?);
    Ok(())
}

/// What the consumer itself says that it takes to a batch.
fn default_batch_records(binary: &Path) -> Result<u64> {
    #[derive(Deserialize)]
    struct Example {
        consumer: Section,
    }
    #[derive(Deserialize)]
    struct Section {
        batch_records_max: u64,
    }
    let what = || format!("run {} config example", binary.display());
    let output =
        Command::new(binary).args(["config", "example"]).stdin(Stdio::null()).output().explain(what)?;
    let text = String::from_utf8_lossy(&output.stdout);
    toml::from_str::<Example>(&text).map(|example| example.consumer.batch_records_max).explain(what)
}

/// What all arms share.
struct Bench<'a> {
    args: &'a cli::ConsumerBench,
    servers: &'a Servers,
    /// The consumer's.
    binary: PathBuf,
    events: Events,
    /// The most events of one transaction, or of one call of confluent-kafka.
    batch_records: u64,
}

impl Bench<'_> {
    async fn measure(&self, python: &Path) -> Result<(Runs, First)> {
        self.create_topic(TOPIC).await?;
        let step = self.servers.progress.step(format!("writing {} events", self.events.count));
        let (kafka, events) = (self.servers.kafka.clone(), self.events);
        let writing = tokio::task::spawn_blocking(move || {
            Producer::new(&kafka)?.write(TOPIC, events.partitions, events.all())
        });
        writing.await.explain(|| "write the events".to_owned())??;
        // A broker that has just started is slow; the first one to read would pay.
        python::read(self, python, "warm-up").await?;
        step.done(&format!("{} events are in the topic, and have been read once", self.events.count));
        let mut runs = Runs::default();
        for round in 1..=self.args.rounds {
            self.round(round, python, &mut runs).await?;
        }
        Ok((runs, first::measure(self).await?))
    }

    /// Every arm once.
    async fn round(&self, round: u32, python: &Path, runs: &mut Runs) -> Result<()> {
        let group = format!("consumer-{round}");
        let (applied, written) = (format!("consumer_{round}"), format!("sql_{round}"));
        self.create_database(&applied).await?;
        runs.consumer.push(self.told("consumer", round, applying::apply(self, &group, &applied)).await?);
        let step = self.servers.progress.step("reading the rows");
        let rows = Rows::read(self, &applied).await?;
        // So that nothing of it is vacuumed meanwhile.
        self.drop_database(&applied).await?;
        drop(step);
        self.create_database(&written).await?;
        runs.sql.push(self.told("sql", round, sql::write(self, rows, &written)).await?);
        self.drop_database(&written).await?;
        let group = format!("confluent-kafka-{round}");
        runs.confluent_kafka
            .push(self.told("confluent-kafka", round, python::read(self, python, &group)).await?);
        Ok(())
    }

    async fn told(&self, arm: &str, round: u32, run: impl Future<Output = Result<Run>>) -> Result<Run> {
        let what = format!("{arm}, round {round} of {}", self.args.rounds);
        let step = self.servers.progress.step(&what);
        let run = run.await?;
        step.done(&format!("{what}: {:.1}k events/s", run.events_per_second / 1e3));
        Ok(run)
    }

    /// A topic with its dead-letter topic.
    async fn create_topic(&self, topic: &str) -> Result<()> {
        let partitions = i32::try_from(self.events.partitions).unwrap_or(i32::MAX);
        let new = |name: String| Topic { name, partitions, settings: BTreeMap::new() };
        let topics = vec![new(topic.to_owned()), new(format!("{topic}-dlq"))];
        topics::create(&self.servers.kafka, topics, kafka::replication(1)).await.map(drop)
    }

    /// A database with the consumer's tables. What was written before is on the disk.
    async fn create_database(&self, name: &str) -> Result<()> {
        let mut connection = self.connect("postgres", "postgres").await?;
        execute(&mut connection, format!("CREATE DATABASE {name} OWNER consumer")).await?;
        let url = vec![("CONSUMER_POSTGRES__URL", self.url("consumer", name))];
        let consumer = services::binary("consumer")?;
        services::once(&self.servers.layout, "consumer-migrate", &consumer, &["migrate"], url).await?;
        execute(&mut connection, "CHECKPOINT".to_owned()).await
    }

    async fn drop_database(&self, name: &str) -> Result<()> {
        let mut connection = self.connect("postgres", "postgres").await?;
        execute(&mut connection, format!("DROP DATABASE {name} WITH (FORCE)")).await
    }

    /// By the Unix socket, for every arm: over TCP, the SQL arm would wait for the network (see [`sql`]).
    fn url(&self, role: &str, name: &str) -> String {
        let folder = postgres::sockets(&self.servers.layout);
        format!("{}?host={}", database(self.servers.postgres_port, role, name), folder.display())
    }

    async fn connect(&self, role: &str, name: &str) -> Result<PgConnection> {
        PgConnection::connect(&self.url(role, name))
            .await
            .explain(|| format!("connect to the database {name}"))
    }

    /// Of all processes that serve connections to a database, this question's aside.
    async fn backends_cpu_seconds(&self, name: &str) -> Result<f64> {
        let mut connection = self.connect("postgres", "postgres").await?;
        let pids: Vec<i32> = sqlx::query_scalar("SELECT pid FROM pg_stat_activity WHERE datname = $1")
            .bind(name)
            .fetch_all(&mut connection)
            .await
            .explain(|| "ask for the backends".to_owned())?;
        let usages = pids.into_iter().filter_map(|pid| Usage::of(u32::try_from(pid).ok()?));
        Ok(usages.map(|usage| usage.cpu_seconds).sum())
    }

    fn broker_cpu_seconds(&self) -> f64 {
        Usage::of(self.servers.broker).unwrap_or_default().cpu_seconds
    }
}

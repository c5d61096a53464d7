//! One measurement: a reader drains a copy of the slot, and what that took.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rustix::process::Signal;
use serde::Serialize;
use sqlx::PgConnection;
use tokio::process::{Child, Command};

use super::{
    servers::{Servers, execute},
    usage::{self, Usage},
    workload::{BASE_SLOT, Written},
};
use crate::{
    ending,
    failure::{Explain, Failure, Result},
    identity, kafka, logs, ports, prerequisites,
    spec::open_log,
    topics::{self, Topic},
};

/// How long one measurement may take.
const LIMIT: Duration = Duration::from_secs(900);
/// How often the processes are looked at: what they used after the last look is not counted.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// How often the relay is asked how much Kafka has acknowledged.
const ASK_INTERVAL: Duration = Duration::from_millis(20);
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a reader that is done may take to end.
const END_LIMIT: Duration = Duration::from_secs(30);
/// How many partitions the relay's topic has.
pub(super) const PARTITIONS: i32 = 3;

/// Who reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Arm {
    /// `pg_recvlogical` with pgoutput, to /dev/null.
    Recvlogical,
    /// The relay's session and decoding, to nowhere.
    Session(PathBuf),
    /// The whole relay, to Kafka.
    Relay(PathBuf),
}

/// What one run took.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Run {
    /// From the start of the process until all is read; for the whole relay until Kafka has acknowledged all.
    pub(super) seconds: f64,
    pub(super) rows_per_second: f64,
    pub(super) cpu_seconds: Cpu,
    pub(super) peak_rss_bytes: u64,
    /// Of the whole relay, by thread.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) threads_cpu_seconds: BTreeMap<String, f64>,
}

/// Processor time of each side.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Cpu {
    pub(super) reader: f64,
    pub(super) walsender: f64,
    /// Zero where Kafka has no part.
    pub(super) broker: f64,
}

/// `pg_recvlogical` of the system.
pub(super) fn recvlogical() -> Result<PathBuf> {
    prerequisites::on_path("pg_recvlogical").ok_or_else(|| {
        Failure::new("no `pg_recvlogical` on the PATH: it is what everything is measured by")
            .hint("on Debian or Ubuntu: apt-get install postgresql-client")
    })
}

impl Arm {
    /// Runs it on a new copy of the base slot, which is gone afterwards.
    pub(super) async fn run(&self, servers: &Servers, written: &Written, number: usize) -> Result<Run> {
        let slot = format!("bench_{number}");
        let mut connection = servers.connect().await?;
        let copy = format!("SELECT pg_copy_logical_replication_slot('{BASE_SLOT}', '{slot}')");
        execute(&mut connection, copy).await?;
        let mut trial = Trial { servers, written, connection, slot, number };
        let mut run = match self {
            Self::Recvlogical => trial.until_it_ends(trial.recvlogical()?).await,
            Self::Session(binary) => trial.until_it_ends(trial.session(binary)?).await,
            Self::Relay(binary) => trial.relay(binary).await,
        }?;
        trial.drop_slot().await?;
        #[expect(clippy::cast_precision_loss, reason = "no count of rows comes near 2^52")]
        let rows = written.shape.rows as f64;
        run.rows_per_second = rows / run.seconds;
        Ok(run)
    }
}

/// A run under way.
struct Trial<'a> {
    servers: &'a Servers,
    written: &'a Written,
    connection: PgConnection,
    slot: String,
    number: usize,
}

impl Trial<'_> {
    fn log(&self) -> PathBuf {
        self.servers.layout.log(&format!("reader-{}", self.number))
    }

    fn command(&self, program: &Path) -> Result<Command> {
        let log: File = open_log(&self.log())?;
        let errors = log.try_clone().explain(|| "write a log".to_owned())?;
        let mut command = Command::new(program);
        let (key, value) = self.servers.layout.mark();
        command.stdin(Stdio::null()).stdout(log).stderr(errors).env(key, value).kill_on_drop(true);
        command.current_dir(&self.servers.layout.dir);
        Ok(command)
    }

    fn recvlogical(&self) -> Result<Command> {
        let mut command = self.command(&recvlogical()?)?;
        command.args(["--start", "--no-loop", "--file=/dev/null", "--fsync-interval=0"]);
        command.args(["--option=proto_version=1", "--option=publication_names=cdc_relay"]);
        command.arg(format!("--dbname={}", self.servers.url)).arg(format!("--slot={}", self.slot));
        command.arg(format!("--endpos={}", self.written.end_lsn));
        Ok(command)
    }

    fn session(&self, binary: &Path) -> Result<Command> {
        let mut command = self.command(binary)?;
        relay_env(&mut command, self.servers, &self.slot);
        command.args(["probe", "--json", "--until", &self.written.end_lsn]);
        Ok(command)
    }

    fn failed(&self, why: String) -> Failure {
        logs::with_tail(Failure::new(why), &self.log())
    }

    /// Runs a reader that ends by itself.
    async fn until_it_ends(&mut self, mut command: Command) -> Result<Run> {
        let since = Instant::now();
        let mut child = command.spawn().explain(|| "start a reader".to_owned())?;
        let mut watch = Watch::new(&child);
        loop {
            if let Some(status) = child.try_wait().explain(|| "wait for a reader".to_owned())? {
                let seconds = since.elapsed().as_secs_f64();
                if !status.success() {
                    return Err(self.failed(format!("the reader ended: {}", ending::describe(status))));
                }
                return Ok(watch.run(seconds));
            }
            watch.look(&mut self.connection, &self.slot).await?;
            if since.elapsed() > LIMIT {
                return Err(self.failed(format!("a reader took longer than {} s", LIMIT.as_secs())));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// Runs the whole relay until Kafka has acknowledged every row, and counts what is in the topic.
    async fn relay(&mut self, binary: &Path) -> Result<Run> {
        let topic = format!("bench-{}", self.number);
        let new = Topic { name: topic.clone(), partitions: PARTITIONS, settings: BTreeMap::new() };
        topics::create(&self.servers.kafka, vec![new], kafka::replication(1)).await?;
        let listen = ports::free()?.to_string();
        let command = |word: &str| -> Result<Command> {
            let mut command = self.command(binary)?;
            relay_env(&mut command, self.servers, &self.slot);
            command.arg(word).env("CDC_RELAY_HTTP__LISTEN", &listen).env("CDC_RELAY_ROUTE__TOPIC", &topic);
            Ok(command)
        };
        let status = command("init")?.status().await.explain(|| "start cdc-relay init".to_owned())?;
        if !status.success() {
            return Err(self.failed(format!("cdc-relay init: {}", ending::describe(status))));
        }
        let broker_before = Usage::of(self.servers.broker).unwrap_or_default();
        let mut command = command("run")?;
        let since = Instant::now();
        let mut child = command.spawn().explain(|| "start the relay".to_owned())?;
        let mut watch = Watch::new(&child);
        let mut asked = since;
        loop {
            if asked.elapsed() >= ASK_INTERVAL {
                if acknowledged(&listen).await >= self.written.shape.rows {
                    break;
                }
                asked = Instant::now();
            }
            if let Some(status) = child.try_wait().explain(|| "wait for the relay".to_owned())? {
                return Err(self.failed(format!("the relay ended: {}", ending::describe(status))));
            }
            if since.elapsed() > LIMIT {
                return Err(self.failed(format!("the relay took longer than {} s", LIMIT.as_secs())));
            }
            watch.look(&mut self.connection, &self.slot).await?;
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        let seconds = since.elapsed().as_secs_f64();
        watch.look(&mut self.connection, &self.slot).await?;
        let mut run = watch.run(seconds);
        run.threads_cpu_seconds = child.id().map(usage::threads).unwrap_or_default();
        let broker = Usage::of(self.servers.broker).unwrap_or_default();
        run.cpu_seconds.broker = broker.cpu_seconds - broker_before.cpu_seconds;
        self.end(&mut child).await?;
        self.count(&topic).await?;
        Ok(run)
    }

    async fn end(&self, child: &mut Child) -> Result<()> {
        if let Some(pid) = child.id() {
            identity::send(pid, Signal::TERM);
        }
        match tokio::time::timeout(END_LIMIT, child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(self.failed(format!("the relay's end: {}", ending::describe(status)))),
            Ok(Err(error)) => Err(self.failed(format!("the relay's end: {error}"))),
            Err(_) => Err(self.failed(format!("the relay did not end within {} s", END_LIMIT.as_secs()))),
        }
    }

    /// Every row must be in the topic, once: nothing failed that would excuse a repetition.
    async fn count(&self, topic: &str) -> Result<()> {
        let (kafka, topic) = (self.servers.kafka.clone(), topic.to_owned());
        let count = tokio::task::spawn_blocking(move || records(&kafka, &topic));
        let count = count.await.explain(|| "count the records".to_owned())??;
        let rows = self.written.shape.rows;
        if count == rows {
            return Ok(());
        }
        Err(self.failed(format!("{rows} rows were written, and the topic has {count} records")))
    }

    /// The walsender may need a moment to notice that its reader has gone.
    async fn drop_slot(&mut self) -> Result<()> {
        let until = Instant::now() + END_LIMIT;
        while walsender(&mut self.connection, &self.slot).await?.is_some() {
            if Instant::now() > until {
                return Err(Failure::new(format!("the slot {} stays in use", self.slot)));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        execute(&mut self.connection, format!("SELECT pg_drop_replication_slot('{}')", self.slot)).await
    }
}

/// The relay at its defaults, but for where things are.
pub(super) fn relay_env(command: &mut Command, servers: &Servers, slot: &str) {
    command.env("CDC_RELAY_POSTGRES__URL", &servers.url).env("CDC_RELAY_POSTGRES__SLOT", slot);
    command.env("CDC_RELAY_KAFKA__BROKERS", &servers.kafka);
}

/// The last look at a reader and its walsender.
struct Watch {
    pid: Option<u32>,
    walsender_pid: Option<u32>,
    reader: Usage,
    walsender: Usage,
}

impl Watch {
    fn new(child: &Child) -> Self {
        Self { pid: child.id(), walsender_pid: None, reader: Usage::default(), walsender: Usage::default() }
    }

    async fn look(&mut self, connection: &mut PgConnection, slot: &str) -> Result<()> {
        if self.walsender_pid.is_none() {
            self.walsender_pid = walsender(connection, slot).await?;
        }
        if let Some(usage) = self.pid.and_then(Usage::of) {
            // A process that is ending has no memory any more.
            let peak = usage.peak_rss_bytes.max(self.reader.peak_rss_bytes);
            self.reader = Usage { peak_rss_bytes: peak, ..usage };
        }
        if let Some(usage) = self.walsender_pid.and_then(Usage::of) {
            self.walsender = usage;
        }
        Ok(())
    }

    fn run(&self, seconds: f64) -> Run {
        let cpu_seconds =
            Cpu { reader: self.reader.cpu_seconds, walsender: self.walsender.cpu_seconds, broker: 0.0 };
        Run { seconds, cpu_seconds, peak_rss_bytes: self.reader.peak_rss_bytes, ..Run::default() }
    }
}

/// The process that serves a slot.
pub(super) async fn walsender(connection: &mut PgConnection, slot: &str) -> Result<Option<u32>> {
    let pid: Option<i32> =
        sqlx::query_scalar("SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1")
            .bind(slot)
            .fetch_one(connection)
            .await
            .explain(|| format!("look at the slot {slot}"))?;
    Ok(pid.and_then(|pid| u32::try_from(pid).ok()))
}

/// How many records Kafka has acknowledged; none before the relay answers.
async fn acknowledged(listen: &str) -> u64 {
    let url = format!("http://{listen}/metrics");
    let asked = tokio::task::spawn_blocking(move || {
        let agent = ureq::Agent::config_builder().timeout_global(Some(ASK_TIMEOUT)).build().new_agent();
        let text = agent.get(&url).call().ok()?.body_mut().read_to_string().ok()?;
        let name = "cdc_relay_records_acknowledged_total ";
        text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
    });
    asked.await.ok().flatten().unwrap_or(0)
}

/// How many records a topic has: the idempotent producer leaves nothing else in it.
fn records(bootstrap: &str, topic: &str) -> Result<u64> {
    let consumer: BaseConsumer<topics::Quiet> = topics::client(bootstrap)
        .create_with_context(topics::Quiet)
        .explain(|| "make a Kafka client".to_owned())?;
    let mut count = 0;
    for partition in 0..PARTITIONS {
        let (low, high) = consumer
            .fetch_watermarks(topic, partition, END_LIMIT)
            .explain(|| format!("ask for the records of {topic}"))?;
        count += u64::try_from(high - low).unwrap_or(0);
    }
    Ok(count)
}

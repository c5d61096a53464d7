//! One measurement: a reader drains a copy of the slot, and what that took.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::Serialize;
use sqlx::PgConnection;
use tokio::process::{Child, Command};

use super::{
    contents::Contents,
    relay::{END_LIMIT, Relay, Running, reader_log, relay_env},
    servers::{Servers, execute},
    usage::{self, Usage},
    workload::{BASE_SLOT, Written},
};
use crate::{
    cli::Delivery,
    ending,
    failure::{Explain, Failure, Result},
    logs, prerequisites,
};

/// How long one measurement may take.
const LIMIT: Duration = Duration::from_secs(900);
/// How often the processes are looked at: what they used after the last look is not counted.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// How often the relay is asked how much Kafka has acknowledged.
const ASK_INTERVAL: Duration = Duration::from_millis(20);

/// Who reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Arm {
    /// `pg_recvlogical` with pgoutput, to /dev/null.
    Recvlogical,
    /// The relay's session and decoding, to nowhere.
    Session(PathBuf),
    /// The whole relay, to Kafka.
    Relay(Relay),
}

/// What one run took.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Run {
    /// From the start of the process until all is read; for the whole relay until Kafka has acknowledged all
    /// and, exactly once, committed it.
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
        let mut connection = servers.connect().await?;
        let slot = copy_slot(&mut connection, number).await?;
        let mut trial = Trial { servers, written, connection, slot, number };
        let mut run = match self {
            Self::Recvlogical => trial.until_it_ends(trial.recvlogical()?).await,
            Self::Session(binary) => trial.until_it_ends(trial.session(binary)?).await,
            Self::Relay(relay) => trial.relay(relay).await,
        }?;
        drop_slot(&mut trial.connection, &trial.slot).await?;
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
        reader_log(self.servers, self.number)
    }

    fn recvlogical(&self) -> Result<Command> {
        let mut command = self.servers.command(&recvlogical()?, &self.log())?;
        command.args(["--start", "--no-loop", "--file=/dev/null", "--fsync-interval=0"]);
        command.args(["--option=proto_version=1", "--option=publication_names=cdc_relay"]);
        command.arg(format!("--dbname={}", self.servers.url)).arg(format!("--slot={}", self.slot));
        command.arg(format!("--endpos={}", self.written.end_lsn));
        Ok(command)
    }

    fn session(&self, binary: &Path) -> Result<Command> {
        let mut command = self.servers.command(binary, &self.log())?;
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

    /// Runs the whole relay until Kafka has every row for good, and counts what is in the topic.
    async fn relay(&mut self, relay: &Relay) -> Result<Run> {
        let ready = relay.init(self.servers, &self.slot, self.number).await?;
        let contents = Contents::of(&self.servers.kafka, &ready.topic)?;
        let broker_before = Usage::of(self.servers.broker).unwrap_or_default();
        let since = Instant::now();
        let mut running = ready.run()?;
        let mut watch = Watch::new(&running.child);
        let mut asked = since;
        loop {
            if asked.elapsed() >= ASK_INTERVAL {
                if self.has_all(&running, relay.delivery, &contents).await? {
                    break;
                }
                asked = Instant::now();
            }
            running.look()?;
            if since.elapsed() > LIMIT {
                return Err(self.failed(format!("the relay took longer than {} s", LIMIT.as_secs())));
            }
            watch.look(&mut self.connection, &self.slot).await?;
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        let seconds = since.elapsed().as_secs_f64();
        watch.look(&mut self.connection, &self.slot).await?;
        let mut run = watch.run(seconds);
        run.threads_cpu_seconds = running.child.id().map(usage::threads).unwrap_or_default();
        let broker = Usage::of(self.servers.broker).unwrap_or_default();
        run.cpu_seconds.broker = broker.cpu_seconds - broker_before.cpu_seconds;
        running.end().await?;
        self.count(relay.delivery, contents).await?;
        Ok(run)
    }

    /// Whether every row is in Kafka for good: acknowledged and, exactly once, committed.
    async fn has_all(&self, running: &Running, delivery: Delivery, contents: &Contents) -> Result<bool> {
        if running.acknowledged().await < self.written.shape.rows {
            return Ok(false);
        }
        let contents = contents.clone();
        match delivery {
            Delivery::AtLeastOnce => Ok(true),
            Delivery::ExactlyOnce => waiting(move || contents.is_committed()).await,
        }
    }

    /// Every row must be in the topic, once: nothing failed that would excuse a repetition.
    async fn count(&self, delivery: Delivery, contents: Contents) -> Result<()> {
        let count = waiting(move || match delivery {
            // The idempotent producer leaves nothing else in the topic.
            Delivery::AtLeastOnce => contents.offsets(),
            Delivery::ExactlyOnce => contents.committed_records(),
        });
        let (rows, count) = (self.written.shape.rows, count.await?);
        if count == rows {
            return Ok(());
        }
        Err(self.failed(format!("{rows} rows were written, and the topic has {count} records")))
    }
}

/// Asks Kafka, off the loop.
async fn waiting<T: Send + 'static>(ask: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(ask).await.explain(|| "look at the topic".to_owned())?
}

/// A slot of measurement `number` that begins where the base slot does: no checkpoint knows its name.
pub(super) async fn copy_slot(connection: &mut PgConnection, number: usize) -> Result<String> {
    let slot = format!("bench_{number}");
    let copy = format!("SELECT pg_copy_logical_replication_slot('{BASE_SLOT}', '{slot}')");
    execute(connection, copy).await?;
    Ok(slot)
}

/// The walsender may need a moment to notice that its reader has gone.
pub(super) async fn drop_slot(connection: &mut PgConnection, slot: &str) -> Result<()> {
    let until = Instant::now() + END_LIMIT;
    while walsender(connection, slot).await?.is_some() {
        if Instant::now() > until {
            return Err(Failure::new(format!("the slot {slot} stays in use")));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    execute(connection, format!("SELECT pg_drop_replication_slot('{slot}')")).await
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

//! One measurement: a reader drains a copy of the slot, and what that took.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use serde::Serialize;
use sqlx::PgConnection;
use tokio::process::{Child, Command};

use super::{
    contents::{Contents, Loss},
    course::Course,
    limits::Limit,
    publisher::{END_LIMIT, Publisher, Running},
    relay::{reader_log, relay_env},
    servers::{Servers, execute},
    usage::{self, Usage},
    workload::{BASE_SLOT, Written},
};
use crate::{
    cli::Delivery,
    ending,
    failure::{Explain, Failure, Result},
    logs, prerequisites, topics,
};

/// How long one measurement may take.
const LIMIT: Duration = Duration::from_secs(900);
/// When no record has come for so long, none will: what is missing then is lost.
const QUIET_LIMIT: Duration = Duration::from_secs(60);
/// How often the processes are looked at: what they used after the last look is not counted.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// How often Kafka is asked how many records there are: of every publisher, at the same place.
const ASK_INTERVAL: Duration = Duration::from_millis(20);

/// Who reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Arm {
    /// `pg_recvlogical` with pgoutput, to /dev/null.
    Recvlogical,
    /// The relay's session and decoding, to nowhere.
    Session(PathBuf),
    /// Whoever brings all of it to Kafka.
    Publisher(Publisher),
    /// What bounds them, and what they replace.
    Limit(Limit),
}

/// What one run took.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Run {
    /// From the start of the process until all is read; of a publisher until all is in Kafka and, exactly once, committed.
    pub(super) seconds: f64,
    /// Of a publisher: from its start until something is in Kafka.
    pub(super) first_record_seconds: Option<f64>,
    /// Of a publisher from its first record on.
    pub(super) rows_per_second: f64,
    /// Of a publisher, in the second half.
    pub(super) warm_rows_per_second: Option<f64>,
    /// Of a publisher: what its topic has.
    pub(super) loss: Option<Loss>,
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

impl Cpu {
    pub(super) fn total(self) -> f64 {
        self.reader + self.walsender + self.broker
    }
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
        let mut draining = Draining { servers, written, connection, slot, number };
        let mut run = match self {
            Self::Recvlogical => draining.until_it_ends(draining.recvlogical()?).await,
            Self::Session(binary) => draining.until_it_ends(draining.session(binary)?).await,
            Self::Publisher(publisher) => draining.publisher(publisher).await,
            Self::Limit(limit) => draining.limit(*limit).await,
        }?;
        drop_slot(&mut draining.connection, &draining.slot).await?;
        if run.rows_per_second <= 0.0 {
            #[expect(clippy::cast_precision_loss, reason = "no count of rows comes near 2^52")]
            let rows = written.shape.rows as f64;
            run.rows_per_second = rows / run.seconds;
        }
        Ok(run)
    }
}

/// A run under way.
struct Draining<'a> {
    servers: &'a Servers,
    written: &'a Written,
    connection: PgConnection,
    slot: String,
    number: usize,
}

impl Draining<'_> {
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

    /// Runs a publisher until Kafka has every row for good, and compares the topic with the outbox.
    async fn publisher(&mut self, publisher: &Publisher) -> Result<Run> {
        let mut ready = publisher.init(self.servers, &self.slot, self.number).await?;
        let contents = Contents::of(&self.servers.kafka, &ready.topic)?;
        let broker = self.broker_seconds();
        let since = Instant::now();
        let mut running = ready.run()?;
        let mut watch = Watch::new(&running.child);
        let mut course = Course::default();
        while !self.has_all(&mut course, since, &contents).await?
            || !self.is_done(&running, publisher.delivery(), &contents).await?
        {
            if course.quiet(since.elapsed()) > QUIET_LIMIT {
                break;
            }
            let asked = Instant::now();
            while asked.elapsed() < ASK_INTERVAL {
                running.look()?;
                watch.look(&mut self.connection, &self.slot).await?;
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
        }
        let mut run = watch.run(since.elapsed().as_secs_f64());
        run.threads_cpu_seconds = running.child.id().map(usage::threads).unwrap_or_default();
        run.cpu_seconds.broker = self.broker_seconds() - broker;
        running.end().await?;
        self.finish(run, &course, contents, &ready.topic).await
    }

    /// The same of what runs in this process.
    async fn limit(&mut self, limit: Limit) -> Result<Run> {
        let work = limit.init(self.servers, self.written.shape, self.number).await?;
        let topic = work.topic.clone();
        let contents = Contents::of(&self.servers.kafka, &work.topic)?;
        let (broker, own) = (self.broker_seconds(), Usage::of(std::process::id()).unwrap_or_default());
        let backend = work.backend;
        let of_backend = || backend.and_then(Usage::of).unwrap_or_default().cpu_seconds;
        let backend_before = of_backend();
        let (since, mut course) = (Instant::now(), Course::default());
        let working = tokio::spawn(work.run());
        let mut backend_seconds = 0.0;
        while !self.has_all(&mut course, since, &contents).await? {
            if working.is_finished() || course.quiet(since.elapsed()) > QUIET_LIMIT {
                break;
            }
            backend_seconds = (of_backend() - backend_before).max(backend_seconds);
            tokio::time::sleep(ASK_INTERVAL).await;
        }
        let seconds = since.elapsed().as_secs_f64();
        working.await.explain(|| "publish the rows".to_owned())??;
        let reader = Usage::of(std::process::id()).unwrap_or_default().cpu_seconds - own.cpu_seconds;
        let walsender = if limit == Limit::Polling { backend_seconds } else { 0.0 };
        let cpu_seconds = Cpu { reader, walsender, broker: self.broker_seconds() - broker };
        let run = Run { seconds, cpu_seconds, ..Run::default() };
        self.finish(run, &course, contents, &topic).await
    }

    fn broker_seconds(&self) -> f64 {
        Usage::of(self.servers.broker).unwrap_or_default().cpu_seconds
    }

    /// Looks how many records there are; whether they are as many as rows.
    async fn has_all(&self, course: &mut Course, since: Instant, contents: &Contents) -> Result<bool> {
        let all = self.written.shape.rows;
        let contents = contents.clone();
        let there = waiting(move || contents.offsets()).await?;
        course.look(since.elapsed(), there.min(all), all);
        if there < all && since.elapsed() > LIMIT {
            return Err(self.failed(format!("the publisher took longer than {} s", LIMIT.as_secs())));
        }
        Ok(there >= all)
    }

    /// Compares the topic with the outbox, and removes it.
    async fn finish(&self, run: Run, course: &Course, contents: Contents, topic: &str) -> Result<Run> {
        let outbox = Arc::clone(&self.written.outbox);
        let run = Run {
            first_record_seconds: course.first().map(|at| at.as_secs_f64()),
            rows_per_second: course.rate().unwrap_or_default(),
            warm_rows_per_second: course.warm_rate(),
            loss: Some(waiting(move || contents.compare(&outbox)).await?),
            ..run
        };
        topics::delete(&self.servers.kafka, topic).await?;
        Ok(run)
    }

    /// Whether what is in Kafka is there for good: exactly once, that is all of it and committed.
    async fn is_done(&self, running: &Running, delivery: Delivery, contents: &Contents) -> Result<bool> {
        match delivery {
            Delivery::AtLeastOnce => Ok(true),
            // The ends of transactions take offsets, too.
            Delivery::ExactlyOnce if running.acknowledged().await < self.written.shape.rows => Ok(false),
            Delivery::ExactlyOnce => {
                let contents = contents.clone();
                waiting(move || contents.is_committed()).await
            }
        }
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

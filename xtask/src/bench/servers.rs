//! The servers of a bench: Postgres and one broker, alone in a folder that is gone afterwards.

use std::{fs, path::Path, process::Stdio, time::Duration};

use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::process::Command;

use crate::{
    cli::{self, Place, Ports, Up},
    endpoints,
    failure::{Explain, Failure, Result},
    layout::Layout,
    maven, postgres, prerequisites,
    progress::Progress,
    spec::open_log,
    supervise::Stack,
    test,
};

/// Folders of benches under `.stack/` begin with it.
const PREFIX: &str = "bench-";
/// How long one statement that is not a workload may take.
const STATEMENT_LIMIT: Duration = Duration::from_secs(60);
/// The database that the workloads are written to.
pub(super) const DATABASE: &str = "bench";

/// Set for every bench, before what the user sets.
pub(super) const SETTINGS: [(&str, &str); 5] = [
    // Nothing here outlives the machine; the disk is not what is measured.
    ("fsync", "off"),
    ("max_replication_slots", "64"),
    ("max_wal_senders", "64"),
    // No checkpoint begins by itself in the middle of a measurement.
    ("max_wal_size", "16GB"),
    ("checkpoint_timeout", "1h"),
];

/// What is running.
pub(super) struct Servers {
    pub(super) layout: Layout,
    pub(super) progress: Progress,
    /// The database of the workloads, as the superuser.
    pub(super) url: String,
    pub(super) kafka: String,
    pub(super) postgres_port: u16,
    pub(super) broker: u32,
    pub(super) postgres_version: String,
    pub(super) kafka_version: String,
}

impl Servers {
    /// Starts them on free ports.
    pub(super) async fn start(
        version: cli::Postgres,
        settings: &[(String, String)],
        progress: &Progress,
    ) -> Result<(Self, Stack)> {
        Self::start_with(version, settings, true, progress).await
    }

    /// The same with all services of the order system.
    pub(super) async fn start_whole(
        version: cli::Postgres,
        settings: &[(String, String)],
        progress: &Progress,
    ) -> Result<(Self, Stack)> {
        Self::start_with(version, settings, false, progress).await
    }

    async fn start_with(
        version: cli::Postgres,
        settings: &[(String, String)],
        infra_only: bool,
        progress: &Progress,
    ) -> Result<(Self, Stack)> {
        let home = Layout::open(None)?;
        test::sweep(&home, PREFIX, progress).await;
        prerequisites::disk(&home.dir)?;
        prerequisites::java()?;
        let kafka_version = crate::kafka::version(&maven::kafka(&home, progress)?);
        let postgres_version = postgres::install(&home, progress, version)?.version;
        let layout = Layout::open(Some(&home.dir.join(format!("{PREFIX}{}", std::process::id()))))?;
        let stack = Stack::start(&up(&layout, version, settings, infra_only), &layout, progress).await?;
        let state = stack.state();
        let of = |name: &str| {
            let entry = state.processes.iter().find(|entry| entry.name == name);
            let found = entry.and_then(|entry| Some((entry.identity.as_ref()?.pid, entry.port)));
            found.ok_or_else(|| Failure::new(format!("{name} does not run")))
        };
        let ((_, port), (broker, _)) = (of("postgres")?, of("kafka-1")?);
        let servers = Self {
            url: endpoints::database(port, "postgres", DATABASE),
            kafka: state.endpoints.kafka.clone(),
            postgres_port: port,
            layout,
            progress: progress.clone(),
            broker,
            postgres_version,
            kafka_version,
        };
        Ok((servers, stack))
    }

    /// Stops them; their folder goes too, unless its logs are of use.
    pub(super) async fn stop(self, mut stack: Stack, keep_logs: bool) {
        stack.stop().await;
        drop(stack);
        if keep_logs {
            self.progress.line(&format!("the logs are in {}", self.layout.logs().display()));
        } else {
            let _ = fs::remove_dir_all(&self.layout.dir);
        }
    }

    /// Makes the database of the workloads.
    pub(super) async fn create_database(&self, maintenance: &str) -> Result<()> {
        execute(&mut connect(maintenance).await?, format!("CREATE DATABASE {DATABASE}")).await
    }

    /// A process of the bench, whose output goes to a log.
    pub(super) fn command(&self, program: &Path, log: &Path) -> Result<Command> {
        let log = open_log(log)?;
        let errors = log.try_clone().explain(|| "write a log".to_owned())?;
        let mut command = Command::new(program);
        let (key, value) = self.layout.mark();
        command.stdin(Stdio::null()).stdout(log).stderr(errors).env(key, value).kill_on_drop(true);
        command.current_dir(&self.layout.dir);
        Ok(command)
    }

    /// A connection to the database of the workloads.
    pub(super) async fn connect(&self) -> Result<PgConnection> {
        connect(&self.url).await
    }
}

fn up(layout: &Layout, postgres: cli::Postgres, settings: &[(String, String)], infra_only: bool) -> Up {
    let own = SETTINGS.map(|(name, value)| (name.to_owned(), value.to_owned()));
    Up {
        place: Place { dir: Some(layout.dir.clone()) },
        postgres,
        postgres_set: own.into_iter().chain(settings.iter().cloned()).collect(),
        // What a measurement has left is gone before the next one needs the room.
        kafka_set: vec![("log.segment.delete.delay.ms".to_owned(), "1000".to_owned())],
        brokers: 1,
        scale: Vec::new(),
        ports: Ports::Auto,
        detach: false,
        infra_only,
        json: false,
        fresh: false,
        no_build: true,
        background: false,
    }
}

pub(super) async fn connect(url: &str) -> Result<PgConnection> {
    PgConnection::connect(url).await.explain(|| "connect to the bench's Postgres".to_owned())
}

/// Runs statements, with a limit.
pub(super) async fn execute(connection: &mut PgConnection, sql: String) -> Result<()> {
    let what = sql.clone();
    let done = tokio::time::timeout(STATEMENT_LIMIT, sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection));
    match done.await {
        Ok(result) => result.map(drop).explain(|| format!("run {what}")),
        Err(_) => Err(Failure::new(format!("{what} took longer than {} s", STATEMENT_LIMIT.as_secs()))),
    }
}

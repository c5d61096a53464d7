//! What is needed to run one process of the stack, and how to know that it is ready.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rustix::process::Signal;
use sqlx::{Connection, PgConnection};
use tokio::process::{Child, Command};

use crate::{
    failure::{Explain, Result},
    layout::User,
    topics::{self, Quiet},
};

/// One attempt at a server may take this long.
const ATTEMPT: Duration = Duration::from_secs(2);
const LOOK_INTERVAL: Duration = Duration::from_millis(25);

/// A log that is longer than this when its process starts becomes `NAME.log.1`. Bytes.
const LOG_BYTES_AT_START: u64 = 16 << 20;

/// The order in which processes start, layer by layer; they stop in the reverse order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Layer {
    Postgres,
    Kafka,
    Api,
    Relay,
    Consumer,
}

/// One process.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    /// Unique in the stack: `postgres`, `kafka-1`, `order-api`, `pharmacy-2`.
    pub name: String,
    /// What `restart` and `logs` also know it by: the name without the number.
    pub service: String,
    pub layer: Layer,
    pub program: PathBuf,
    pub args: Vec<OsString>,
    pub env: Vec<(String, String)>,
    /// Working folder.
    pub cwd: PathBuf,
    pub user: Option<User>,
    pub log: PathBuf,
    pub port: u16,
    pub probe: Probe,
    /// How long it may take to stop when asked to, before it is killed.
    pub grace: Duration,
}

/// How to ask a process whether it is ready.
#[derive(Debug, Clone)]
pub(crate) enum Probe {
    /// Answers a query.
    Postgres { url: String },
    /// Is registered with the cluster.
    Kafka { port: u16 },
    /// Answers 2xx.
    Http { url: String },
}

impl Layer {
    /// What asks a process of this layer to stop: for Postgres it is the fast shutdown.
    pub(crate) fn stop_signal(self) -> Signal {
        if self == Self::Postgres { Signal::INT } else { Signal::TERM }
    }
}

impl Spec {
    /// Starts the process in a process group of its own (Ctrl-C is for the supervisor), its output appended to
    /// its log.
    pub(crate) fn spawn(&self, mark: (&str, String)) -> Result<Child> {
        let log = open_log(&self.log)?;
        let errors = log.try_clone().explain(|| format!("write {}", self.log.display()))?;
        let mut command = Command::new(&self.program);
        command.args(&self.args).current_dir(&self.cwd).env(mark.0, mark.1);
        command.envs(self.env.iter().map(|(key, value)| (key, value)));
        command.stdin(Stdio::null()).stdout(log).stderr(errors).process_group(0);
        if let Some(user) = self.user {
            command.uid(user.uid).gid(user.gid);
        }
        command.spawn().explain(|| format!("start {} ({})", self.name, self.program.display()))
    }

    /// Returns when the process answers.
    pub(crate) async fn ready(&self) {
        while !self.probe.attempt().await {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}

impl Probe {
    /// Asks once.
    pub(crate) async fn attempt(&self) -> bool {
        let probe = self.clone();
        match probe {
            Self::Postgres { url } => {
                let ask = async {
                    let mut connection = PgConnection::connect(&url).await?;
                    sqlx::raw_sql("SELECT 1").execute(&mut connection).await?;
                    connection.close().await
                };
                matches!(tokio::time::timeout(ATTEMPT, ask).await, Ok(Ok(())))
            }
            Self::Kafka { port } => {
                tokio::task::spawn_blocking(move || broker_answers(port)).await.unwrap_or(false)
            }
            Self::Http { url } => tokio::task::spawn_blocking(move || http_ok(&url)).await.unwrap_or(false),
        }
    }
}

fn broker_answers(port: u16) -> bool {
    let client = topics::client(&format!("127.0.0.1:{port}"));
    let Ok(consumer) = client.create_with_context::<Quiet, BaseConsumer<Quiet>>(Quiet) else { return false };
    let Ok(metadata) = consumer.fetch_metadata(None, ATTEMPT) else { return false };
    metadata.brokers().iter().any(|broker| broker.port() == i32::from(port))
}

fn http_ok(url: &str) -> bool {
    let agent = ureq::Agent::config_builder().timeout_global(Some(ATTEMPT)).build().new_agent();
    agent.get(url).call().is_ok()
}

/// Opens a log to append to it; a long one is put aside first.
pub(crate) fn open_log(path: &Path) -> Result<File> {
    if fs::metadata(path).is_ok_and(|meta| meta.len() > LOG_BYTES_AT_START) {
        let aside = path.with_extension("log.1");
        fs::rename(path, &aside).explain(|| format!("rename {}", path.display()))?;
    }
    OpenOptions::new().create(true).append(true).open(path).explain(|| format!("write {}", path.display()))
}

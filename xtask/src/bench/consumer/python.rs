//! The arm `confluent-kafka`: a Python consumer that reads the same records and does nothing with them.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use serde::Deserialize;

use super::{Bench, report::Run};
use crate::{
    failure::{Explain, Failure, Result},
    layout::Layout,
    prerequisites,
    progress::Progress,
};

/// What is installed, into an environment of its own.
pub(super) const PACKAGE: &str = "confluent-kafka==2.16.1";
const SCRIPT: &str = include_str!("idle_consumer.py");
/// How long one run may take.
const LIMIT: Duration = Duration::from_secs(900);

/// The interpreter that has the package; installed the first time.
pub(super) fn install(layout: &Layout, progress: &Progress) -> Result<PathBuf> {
    let folder = layout.downloads.join(PACKAGE.replace("==", "-"));
    let python = folder.join("bin/python");
    if run(Command::new(&python).args(["-c", "import confluent_kafka"])).is_ok() {
        return Ok(python);
    }
    let system = prerequisites::on_path("python3").ok_or_else(|| {
        Failure::new("no `python3` on the PATH: the consumer is measured by confluent-kafka, among others")
            .hint("on Debian or Ubuntu: apt-get install python3 python3-venv")
    })?;
    let step = progress.step(format!("installing {PACKAGE}"));
    run(Command::new(system).args(["-m", "venv", "--clear"]).arg(&folder)).map_err(|error| {
        Failure::new(format!("cannot make a Python environment in {}: {error}", folder.display()))
            .hint("on Debian or Ubuntu: apt-get install python3-venv")
    })?;
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE];
    run(Command::new(&python).args(pip)).map_err(|error| {
        Failure::new(format!("cannot install {PACKAGE}: {error}"))
            .hint("pip needs PyPI, or a mirror of it in PIP_INDEX_URL; run the bench again when it is there")
    })?;
    step.done(&format!("{PACKAGE} in {}", folder.display()));
    Ok(python)
}

/// Runs a command to its end; the error is what it said.
fn run(command: &mut Command) -> std::result::Result<(), String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(String::from_utf8_lossy(&said).trim().to_owned())
}

/// What the script prints.
#[derive(Debug, Deserialize)]
struct Said {
    seconds: f64,
    cpu_seconds: f64,
    peak_rss_bytes: u64,
}

/// Reads the whole topic.
pub(super) async fn read(bench: &Bench<'_>, python: &Path, group: &str) -> Result<Run> {
    let broker = bench.broker_cpu_seconds();
    let (key, value) = bench.servers.layout.mark();
    let mut command = tokio::process::Command::new(python);
    command.args(["-c", SCRIPT, &bench.servers.kafka, super::TOPIC, group]);
    command.args([bench.events.count.to_string(), bench.batch_records.to_string()]);
    command.env(key, value).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(LIMIT, command.output());
    let output = output.await.explain(|| "wait for confluent-kafka".to_owned())?;
    let output = output.explain(|| format!("start {}", python.display()))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let said: Option<Said> = serde_json::from_str(&said).ok().filter(|_| output.status.success());
    let said = said.ok_or_else(|| {
        let why = String::from_utf8_lossy(&output.stderr);
        Failure::new(format!("confluent-kafka did not read the records: {}", why.trim()))
    })?;
    Ok(Run {
        cpu_seconds: said.cpu_seconds,
        broker_cpu_seconds: bench.broker_cpu_seconds() - broker,
        peak_rss_bytes: said.peak_rss_bytes,
        ..Run::of(bench.events.count, said.seconds)
    })
}

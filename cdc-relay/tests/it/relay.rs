//! The relay as a process.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use crate::database::{Database, eventually};

/// The relay as it is delivered.
pub(crate) const RELAY: &str = env!("CARGO_BIN_EXE_cdc-relay");

/// A command with the configuration that a test's relay has, and nothing else.
pub(crate) fn command(database: &Database) -> Command {
    command_of(Path::new(RELAY), database)
}

fn command_of(program: &Path, database: &Database) -> Command {
    let mut command = Command::new(program);
    command
        .env("CDC_RELAY_POSTGRES__URL", database.url())
        .env("CDC_RELAY_POSTGRES__SLOT", &database.slot)
        .env("CDC_RELAY_KAFKA__BROKERS", &database.servers.kafka);
    command
}

/// Runs `cdc-relay init`.
pub(crate) fn init(database: &Database) -> Output {
    let output = command(database).arg("init").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

pub(crate) struct Relay {
    pub(crate) child: Child,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Relay {
    /// Starts `cdc-relay run` with further environment, and does not wait.
    pub(crate) fn spawn(database: &Database, environment: &[(&str, &str)]) -> Self {
        Self::spawn_of(Path::new(RELAY), database, environment)
    }

    /// The same of another build.
    pub(crate) fn spawn_of(program: &Path, database: &Database, environment: &[(&str, &str)]) -> Self {
        let mut child = command_of(program, database)
            .arg("run")
            .env("CDC_RELAY_HTTP__LISTEN", "127.0.0.1:0")
            .envs(environment.iter().copied())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (lines, kept) = (BufReader::new(child.stderr.take().unwrap()).lines(), Arc::clone(&log));
        let reader = std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let mut log = kept.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
            }
        });
        Self { child, log, reader: Some(reader) }
    }

    /// Where it serves, by its own word; nothing before it has its port.
    pub(crate) fn url(&self) -> Option<String> {
        let log = self.log();
        let address = log.split_once("address=")?.1.split_whitespace().next()?;
        Some(format!("http://{}", address.replace("0.0.0.0", "127.0.0.1")))
    }

    /// Starts it and waits until it streams.
    pub(crate) fn start(database: &Database, environment: &[(&str, &str)]) -> Self {
        let mut relay = Self::spawn(database, environment);
        relay.wait_for_state("streaming");
        relay
    }

    pub(crate) fn wait_for_state(&mut self, state: &str) {
        let said = format!("\"state\":\"{state}\"");
        eventually(&format!("the relay is {state}; its log: {}", self.log()), || {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "the relay ended by itself: {ended:?}\n{}", self.log());
            self.get("/health/ready").filter(|body| body.contains(&said)).map(drop)
        });
    }

    /// The body of `/health/ready`.
    pub(crate) fn health(&self) -> String {
        self.get("/health/ready").unwrap_or_default()
    }

    pub(crate) fn is_streaming(&self) -> bool {
        self.metric("cdc_relay_streaming") == Some(1.0)
    }

    fn get(&self, path: &str) -> Option<String> {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        agent.get(format!("{}{path}", self.url()?)).call().ok()?.body_mut().read_to_string().ok()
    }

    /// A metric without labels.
    pub(crate) fn metric(&self, name: &str) -> Option<f64> {
        let body = self.get("/metrics")?;
        body.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }

    /// A metric of several labels, by one of them, such as `state="streaming"`.
    pub(crate) fn labelled(&self, name: &str, label: &str) -> Option<f64> {
        self.metrics()?.lines().find_map(|line| {
            let (labels, value) = line.strip_prefix(name)?.strip_prefix('{')?.split_once("} ")?;
            labels.split(',').any(|l| l == label).then(|| value.parse().ok())?
        })
    }

    /// All metrics as text.
    pub(crate) fn metrics(&self) -> Option<String> {
        self.get("/metrics")
    }

    /// Status code and body of `/health/ready`.
    pub(crate) fn readiness(&self) -> Option<(u16, String)> {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut answer = agent.get(format!("{}/health/ready", self.url()?)).call().ok()?;
        Some((answer.status().as_u16(), answer.body_mut().read_to_string().ok()?))
    }

    /// A counter with labels, added up.
    pub(crate) fn sum(&self, name: &str) -> Option<u64> {
        let body = self.get("/metrics")?;
        body.lines()
            .filter_map(|l| l.strip_prefix(name)?.split_once("} "))
            .map(|(_, n)| n.parse::<u64>().ok())
            .sum()
    }

    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// `VmHWM`: the most memory the process has had.
    pub(crate) fn peak_memory_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// kill -9
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits until it ends by itself.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let status = eventually("the relay ends", || self.child.try_wait().unwrap());
        // Its log is whole once its end has been read.
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        status
    }

    /// SIGTERM, and waits for a clean end.
    pub(crate) fn stop(mut self) {
        self.signal(rustix::process::Signal::TERM);
        let status = self.wait();
        assert_eq!(status.code(), Some(0), "{}", self.log());
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the relay's log\n{}---", self.log());
        }
    }
}

//! The binary itself: its command line, its exit codes, its signals.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use crate::stage::{Client, Stage, order, wait_for};

pub(crate) fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_order-api"));
    command.env_clear();
    command
}

fn ends(command: &mut Command) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code(), String::from_utf8([stdout, stderr].concat()).unwrap())
}

#[test]
fn the_configuration_is_shown_and_checked() {
    let (code, example) = ends(binary().args(["config", "example"]));
    assert_eq!((code, example.as_str()), (Some(0), order_api::config::EXAMPLE));
    let path = std::env::temp_dir().join(format!("order-api-{}.toml", std::process::id()));
    std::fs::write(&path, &example).unwrap();
    let with_file = || {
        let mut command = binary();
        command.arg("--check-config").arg("--config").arg(&path);
        command
    };
    assert_eq!(ends(&mut with_file()).0, Some(0));
    for (variable, value, named) in [
        ("ORDER_API_HTTP__BODY_LIMIT_BYTES", "1", "http.body_limit_bytes"),
        ("ORDER_API_HTTP__PORT", "80", "port"),
        ("ORDER_API_AUTH__REQUIRED", "maybe", "required"),
        ("ORDER_API_MESSAGES__TOPICS", "notifications, not/this", "messages.topics"),
        ("ORDER_API_POSTGRES__MAX_CONNECTIONS", "many", "max_connections"),
    ] {
        let (code, told) = ends(with_file().env(variable, value));
        assert_eq!(code, Some(64), "{told}");
        assert!(told.contains(named), "{told}");
    }
    assert_eq!(ends(with_file().env("ORDER_API_MESSAGES__TOPICS", "notifications, prices")).0, Some(0));
    std::fs::remove_file(&path).unwrap();
    assert_eq!(ends(binary().args(["--check-config", "--config", "/none"])).0, Some(64));
}

/// The binary, running, and what it has logged.
pub(crate) struct Process {
    child: Child,
    pub(crate) client: Client,
    log: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
}

/// The binary on the stage's database, with its log in JSON.
pub(crate) fn on(stage: &Stage, listen: &str) -> Command {
    let mut command = binary();
    let url = format!("postgres://order_api@{}/{}", stage.postgres(), stage.database);
    command.args(["--listen", listen]).env("ORDER_API_POSTGRES__URL", url);
    command.env("ORDER_API_POSTGRES__PASSWORD", "order_api").env("ORDER_API_LOG__FORMAT", "json");
    command
}

impl Process {
    /// Starts it and waits until it is ready.
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut address = None;
        while address.is_none() {
            let line = lines.next().expect("a line that tells the address").unwrap();
            let told: serde_json::Value = serde_json::from_str(&line).expect(&line);
            address = told["address"].as_str().map(|address| address.parse().unwrap());
            log.lock().unwrap().push(line);
        }
        let kept = log.clone();
        let reader = std::thread::spawn(move || {
            for line in lines {
                kept.lock().unwrap().push(line.unwrap());
            }
        });
        let client = Client::new(address.unwrap());
        wait_for("the process to be ready", || client.get("/health/ready").status == 200);
        Self { child, client, log, reader: Some(reader) }
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// Asks it to stop; its exit code and its whole log.
    pub(crate) fn stop(mut self) -> (Option<i32>, Vec<String>) {
        let kill = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(kill.success());
        self.reader.take().unwrap().join().unwrap();
        (self.child.wait().unwrap().code(), self.log())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn sigterm_ends_it_cleanly_and_a_taken_address_does_not_start_it() {
    let stage = Stage::new();
    let process = Process::start(&mut on(&stage, "127.0.0.1:0"));
    assert_eq!(process.client.post(&order()).status, 201);

    let (code, told) = ends(&mut on(&stage, &process.client.address.to_string()));
    assert_eq!(code, Some(69), "{told}");
    assert!(told.contains("http.listen"), "{told}");

    let (code, log) = process.stop();
    assert_eq!(code, Some(0), "{log:?}");
    assert!(!log.concat().contains("order_api\":\"order_api"), "no password in the log");
    assert_eq!(stage.count("orders"), 1);
}

#[test]
fn what_others_can_reach_does_not_start_without_tokens_unless_it_is_said() {
    let check = |change: fn(&mut Command) -> &mut Command| {
        let mut command = binary();
        command.arg("--check-config").args(["--listen", "0.0.0.0:8080"]);
        ends(change(&mut command))
    };
    let (code, told) = check(|c| c);
    assert_eq!(code, Some(64), "{told}");
    for part in ["0.0.0.0:8080", "order-api token new", "auth.tokens_path", "auth.required = \"never\""] {
        assert!(told.contains(part), "{told}");
    }
    assert_eq!(check(|c| c.env("ORDER_API_AUTH__REQUIRED", "never")).0, Some(0));
    let (code, told) = check(|c| c.env("ORDER_API_AUTH__TOKENS_PATH", "/none"));
    assert_eq!(code, Some(64));
    assert!(told.contains("auth.tokens_path /none"), "{told}");
    // Not only the check refuses it.
    let (code, _) = ends(binary().args(["--listen", "0.0.0.0:0"]));
    assert_eq!(code, Some(64));
}

//! The supervisor with real servers: what it keeps running is killed, and then the supervisor itself.

#![expect(clippy::unwrap_used, reason = "a test may fail by a panic, in its helpers too")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use sqlx::{Connection, PgConnection};

const LIMIT: Duration = Duration::from_secs(60);

/// A stack of its own, stopped at the end of the test however it ends.
struct Stack {
    dir: PathBuf,
    /// The program to run it with.
    xtask: PathBuf,
}

impl Stack {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("xtask-it-{name}-{}", std::process::id()));
        Self { dir, xtask: env!("CARGO_BIN_EXE_xtask").into() }
    }

    fn xtask(&self, args: &[&str]) -> Output {
        let mut command = Command::new(&self.xtask);
        command.arg(args[0]).arg("--dir").arg(&self.dir).args(&args[1..]);
        command.output().expect("xtask starts")
    }

    fn up(&self) -> Output {
        self.xtask(&[
            "up",
            "--infra-only",
            "--detach",
            "--json",
            "--ports",
            "auto",
            "--postgres-set",
            "fsync=off",
        ])
    }

    fn endpoints(&self) -> Value {
        let text =
            fs::read(self.dir.join("endpoints.json")).expect("endpoints.json is there while a stack runs");
        serde_json::from_slice(&text).expect("endpoints.json is whole at any time")
    }

    fn process(&self, name: &str) -> (u32, String) {
        let endpoints = self.endpoints();
        let process = endpoints["processes"].as_array().unwrap().iter().find(|p| p["name"] == name).unwrap();
        (process["pid"].as_u64().unwrap().try_into().unwrap(), process["state"].as_str().unwrap().to_owned())
    }

    /// Kills a process and returns when another stands in its place, ready.
    fn kill_and_wait(&self, name: &str) {
        let (pid, _) = self.process(name);
        kill(pid);
        let since = Instant::now();
        while self.process(name).0 == pid || self.process(name).1 != "ready" {
            assert!(since.elapsed() < LIMIT, "{name} was not started again: {}", self.endpoints());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn pids(&self) -> Vec<u32> {
        let endpoints = self.endpoints();
        let processes = endpoints["processes"].as_array().unwrap();
        processes.iter().map(|process| process["pid"].as_u64().unwrap().try_into().unwrap()).collect()
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        self.xtask(&["down"]);
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
    kill_process(pid, Signal::KILL).expect("the process is there");
}

fn ok(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// Every process whose environment, working folder or command names the folder of the stack.
fn inhabitants(dir: &Path) -> Vec<String> {
    let name = dir.to_str().unwrap();
    let about = |pid: &str| {
        let mut text = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        text.extend(fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default());
        let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        format!("{} {}", String::from_utf8_lossy(&text), cwd.display())
    };
    let pids = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    pids.filter(|pid| pid.parse::<u32>().is_ok_and(|pid| pid != std::process::id() && runs(pid)))
        .filter(|pid| about(pid).contains(name))
        .collect()
}

fn count(url: &str, sql: &'static str) -> i64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut connection = PgConnection::connect(url).await.expect("Postgres answers");
        sqlx::query_scalar(sql).fetch_one(&mut connection).await.expect(sql)
    })
}

/// The sets of features with which a build of these packages compiles each dependency: one for what runs, maybe
/// another for what runs at build time.
fn dependencies(selection: &[&str]) -> BTreeMap<String, BTreeSet<String>> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["tree", "--locked", "--prefix", "none", "--format", "{p} [{f}]"])
        .args(selection)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap())
        .output()
        .expect("cargo starts");
    let ours = |line: &str| line.contains(" (/");
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in ok(&output).lines().filter(|line| !ours(line)) {
        let Some((package, features)) = line.trim_end_matches(" (*)").split_once(" [") else { continue };
        let package = package.trim_end_matches(" (proc-macro)");
        found.entry(package.to_owned()).or_default().insert(features.to_owned());
    }
    found
}

#[test]
fn what_is_built_first_is_not_compiled_again_for_the_services_or_the_tests() {
    let first = dependencies(&["-p", "xtask", "-e", "normal,build"]);
    let services =
        ["-p", "xtask", "-p", "order-api", "-p", "cdc-relay", "-p", "consumer", "-e", "normal,build"];
    let services = dependencies(&services);
    let all = dependencies(&["--workspace", "-e", "normal,build,dev"]);
    for (earlier, later) in [(&first, &services), (&services, &all)] {
        for (package, features) in earlier {
            assert_eq!(later.get(package), Some(features), "{package}: ask for the same in xtask/Cargo.toml");
        }
    }
}

#[test]
fn what_dies_is_started_again_and_a_killed_supervisor_leaves_nothing_after_down() {
    let stack = Stack::new("kills");
    let told: Value = serde_json::from_str(&ok(&stack.up())).expect("--json prints JSON and nothing else");
    assert_eq!(told["postgres"], stack.endpoints()["postgres"]);
    assert!(told.get("order_api").is_none(), "--infra-only has no services");
    let url = told["postgres_superuser"].as_str().unwrap();

    let second = stack.up();
    assert!(!second.status.success());
    let text = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(text.contains("already") && text.contains("cargo xtask down"), "{text}");

    for name in ["postgres", "kafka-1", "postgres"] {
        stack.kill_and_wait(name);
    }
    assert_eq!(count(url, "SELECT count(*) FROM pg_database WHERE datname IN ('orders', 'consumers')"), 2);
    let status: Value = serde_json::from_str(&ok(&stack.xtask(&["status", "--json"]))).unwrap();
    let row = status.as_array().unwrap().iter().find(|row| row["process"] == "postgres").unwrap();
    assert_eq!((row["health"].as_str(), row["restarts"].as_u64()), (Some("ready"), Some(2)));

    let (supervisor, pids) = (stack.endpoints()["supervisor"].as_u64().unwrap(), stack.pids());
    kill(supervisor.try_into().unwrap());
    assert!(pids.iter().all(|pid| runs(*pid)), "the servers outlive their supervisor");
    ok(&stack.xtask(&["down"]));
    assert!(pids.iter().all(|pid| !runs(*pid)), "down stops them all the same");
    assert_eq!(inhabitants(&stack.dir), Vec::<String>::new());
    assert!(!stack.dir.join("endpoints.json").exists());
}

#[test]
fn up_clears_away_what_a_killed_supervisor_left_and_keeps_the_data() {
    let stack = Stack::new("again");
    let told: Value = serde_json::from_str(&ok(&stack.up())).unwrap();
    let url = told["postgres_superuser"].as_str().unwrap().to_owned();
    assert_eq!(count(&url, "SELECT count(*) FROM pg_create_physical_replication_slot('kept')"), 1);
    let before = stack.pids();
    kill(told["supervisor"].as_u64().unwrap().try_into().unwrap());

    let told: Value = serde_json::from_str(&ok(&stack.up())).unwrap();
    assert!(before.iter().all(|pid| !runs(*pid)), "the former servers are gone");
    let url = told["postgres_superuser"].as_str().unwrap();
    assert_eq!(count(url, "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'kept'"), 1);

    ok(&stack.xtask(&["stop", "kafka"]));
    assert!(stack.endpoints()["processes"][1]["pid"].is_null(), "a stopped process has no id");
    ok(&stack.xtask(&["start", "kafka"]));
    assert_eq!(stack.process("kafka-1").1, "ready");
    ok(&stack.xtask(&["down"]));
    assert_eq!(inhabitants(&stack.dir), Vec::<String>::new());
}

/// A copy of the built binaries, with an order-api that halts as soon as a file says so.
fn halting(stack: &mut Stack) -> PathBuf {
    let built = Path::new(env!("CARGO_BIN_EXE_xtask")).parent().unwrap();
    let copy = stack.dir.join("target/release");
    fs::create_dir_all(&copy).unwrap();
    for name in ["cdc-relay", "consumer"] {
        let real = built.join(name);
        assert!(real.is_file(), "{} is missing: run `cargo xtask test`, which builds it", real.display());
        std::os::unix::fs::symlink(real, copy.join(name)).unwrap();
    }
    fs::copy(built.join("xtask"), copy.join("xtask")).unwrap();
    let (real, halt, script) = (built.join("order-api"), stack.dir.join("halt"), copy.join("order-api"));
    let text =
        format!("#!/bin/sh\n[ -e '{}' ] && exit 65\nexec '{}' \"$@\"\n", halt.display(), real.display());
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    stack.xtask = copy.join("xtask");
    halt
}

#[test]
fn a_service_that_halts_is_left_down_and_one_that_dies_is_not() {
    let mut stack = Stack::new("halts");
    let halt = halting(&mut stack);
    let scale = ["--scale", "pharmacy=2", "--ports", "auto", "--postgres-set", "fsync=off"];
    let told = stack.xtask(&[&["up", "--detach", "--json", "--no-build"], &scale[..]].concat());
    let told: Value = serde_json::from_str(&ok(&told)).unwrap();
    let names: Vec<_> = told["consumers"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(names, ["acks", "fulfillment", "messages", "order-view", "pharmacy", "pharmacy-2"]);
    stack.kill_and_wait("pharmacy-2");
    stack.kill_and_wait("cdc-relay");
    stack.kill_and_wait("consumers-relay");
    stack.kill_and_wait("order-api");

    fs::write(&halt, "").unwrap();
    kill(stack.process("order-api").0);
    let row = || {
        let endpoints = stack.endpoints();
        endpoints["processes"].as_array().unwrap().iter().find(|p| p["name"] == "order-api").unwrap().clone()
    };
    let since = Instant::now();
    while row()["state"] != "down" {
        assert!(since.elapsed() < LIMIT, "{}", row());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(row()["pid"].is_null());
    let log = fs::read_to_string(stack.dir.join("logs/supervisor.log")).unwrap();
    assert!(log.contains("!! order-api") && log.contains("exit code 65"), "{log}");
    let start = stack.xtask(&["start", "order-api"]);
    assert!(!start.status.success(), "it halts again");

    fs::remove_file(&halt).unwrap();
    ok(&stack.xtask(&["start", "order-api"]));
    assert_eq!(row()["state"], "ready");
    ok(&stack.xtask(&["down"]));
    assert_eq!(inhabitants(&stack.dir), Vec::<String>::new());
}

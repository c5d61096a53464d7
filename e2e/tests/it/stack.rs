//! A stack of a test's own, in a folder and on ports of its own.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Waits for a condition, and says what it was if it never comes true.
pub(crate) fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(180);
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited for 180 s in vain: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Prints a line that is seen although the test passes: cargo keeps back only what the print macros print.
pub(crate) fn tell(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// One stack at a time: each is a machine's worth of processes.
static ALONE: Mutex<()> = Mutex::new(());

/// Nobody else's stack runs as long as this is held.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) struct Stack {
    dir: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The project's own command, as `cargo xtask` would run it.
pub(crate) fn xtask() -> Command {
    let mut command = Command::new(program("xtask"));
    command.current_dir(repository());
    command
}

/// A program of this build.
pub(crate) fn program(name: &str) -> PathBuf {
    // This test's binary is target/release/deps/…, and what it starts is two folders up.
    let binary = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join(name);
    assert!(binary.exists(), "{} is missing: run the tests by `cargo xtask test`", binary.display());
    binary
}

impl Stack {
    pub(crate) fn start(name: &str, options: &[&str]) -> Self {
        let alone = alone();
        let dir = repository().join(".stack").join(format!("e2e-{name}-{}", std::process::id()));
        let stack = Self { dir, _alone: alone };
        let mut up = xtask();
        up.args(["up", "--detach", "--no-build", "--ports", "auto", "--dir"]).arg(&stack.dir).args(options);
        let output = up.output().unwrap();
        assert!(
            output.status.success(),
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        stack
    }

    /// endpoints.json as it is now.
    pub(crate) fn endpoints(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.dir.join("endpoints.json")).unwrap()).unwrap()
    }

    pub(crate) fn url(&self, key: &str) -> String {
        self.endpoints()[key].as_str().unwrap_or_else(|| panic!("endpoints.json has no {key}")).to_owned()
    }

    pub(crate) fn pid(&self, process: &str) -> Option<Pid> {
        let endpoints = self.endpoints();
        let found = endpoints["processes"].as_array()?.iter().find(|p| p["name"] == process)?;
        Pid::from_raw(i32::try_from(found["pid"].as_i64()?).ok()?)
    }

    pub(crate) fn signal(&self, process: &str, signal: Signal) {
        let pid = self.pid(process).unwrap_or_else(|| panic!("{process} does not run"));
        kill_process(pid, signal).unwrap();
    }

    /// kill -9, and waits until the supervisor has started it again.
    pub(crate) fn kill(&self, process: &str) {
        let before = self.pid(process).unwrap_or_else(|| panic!("{process} does not run"));
        kill_process(before, Signal::KILL).unwrap();
        eventually(&format!("{process} is started again"), || self.pid(process).filter(|now| *now != before));
    }

    /// Runs `cargo xtask down` and says what of the stack is left.
    pub(crate) fn down(&self) -> Vec<String> {
        let pids: Vec<_> = self.endpoints()["processes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| p["pid"].as_i64().unwrap())
            .collect();
        let output = xtask().args(["down", "--dir"]).arg(&self.dir).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        pids.into_iter()
            .filter(|pid| Path::new(&format!("/proc/{pid}")).exists())
            .map(|pid| pid.to_string())
            .collect()
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        let _ = xtask().args(["down", "--dir"]).arg(&self.dir).output();
        if std::thread::panicking() {
            eprintln!("the stack's logs are in {}", self.dir.join("logs").display());
        } else {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// Posts orders; a failed request is told as None, and may have been carried out.
#[derive(Debug, Clone)]
pub(crate) struct Api {
    agent: ureq::Agent,
    url: String,
}

impl Api {
    pub(crate) fn of(stack: &Stack) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(20)))
            .http_status_as_error(false);
        Self { agent: config.build().into(), url: format!("{}/api/orders", stack.url("order_api")) }
    }

    /// Posts one order; its id when the answer is 201.
    pub(crate) fn post(&self, customer: &str) -> Option<String> {
        let body = serde_json::json!({
            "customerId": customer, "restaurantId": "r1",
            "items": [{"menuItemId": "m1", "name": "Aspirin", "price": "3.10", "quantity": 2}, {"menuItemId": "m2", "name": "Tea", "price": 0.1, "quantity": 3}],
        });
        let mut answer = self.agent.post(&self.url).send_json(body).ok()?;
        if answer.status() != 201 {
            return None;
        }
        let order: Value = answer.body_mut().read_json().ok()?;
        Some(order["orderId"].as_str().unwrap_or_else(|| panic!("no orderId in {order}")).to_owned())
    }
}

//! Servers of a test's own, in a folder and on ports of their own, for settings that would disturb other tests.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use crate::database::{Servers, unique};

pub(crate) struct Stack {
    dir: PathBuf,
    pub(crate) servers: Servers,
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// A fresh folder under `.stack/`, where `cargo xtask test` keeps things too.
pub(crate) fn folder(name: &str) -> PathBuf {
    let dir = repository().join(".stack").join(format!("relay-{name}-{}", unique()));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// A program that `cargo xtask test` builds beside this package's.
pub(crate) fn program(name: &str) -> PathBuf {
    // This test's binary is target/release/deps/…, and what it starts is two folders up.
    let program = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join(name);
    assert!(program.exists(), "{} is missing: run the tests by `cargo xtask test`", program.display());
    program
}

/// The project's own command, as `cargo xtask` would run it.
fn xtask() -> Command {
    let mut command = Command::new(program("xtask"));
    command.current_dir(repository());
    command
}

impl Stack {
    /// Starts Postgres and Kafka. `options` are those of `cargo xtask up`.
    pub(crate) fn start(name: &str, options: &[&str]) -> Self {
        Self::start_in(folder(name), options)
    }

    /// The same in a folder that has been made by [`folder`].
    pub(crate) fn start_in(dir: PathBuf, options: &[&str]) -> Self {
        let empty = Servers { postgres: String::new(), kafka: String::new() };
        let mut stack = Self { dir, servers: empty };
        let mut up = xtask();
        up.args(["up", "--infra-only", "--detach", "--no-build", "--ports", "auto", "--dir"]).arg(&stack.dir);
        let output = up.args(["--postgres-set", "fsync=off"]).args(options).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let endpoints = stack.endpoints();
        let url = |key: &str| endpoints[key].as_str().unwrap().to_owned();
        stack.servers = Servers { postgres: url("postgres_superuser"), kafka: url("kafka") };
        stack
    }

    /// endpoints.json as it is now.
    fn endpoints(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.dir.join("endpoints.json")).unwrap()).unwrap()
    }

    /// Stops a process as an operator would (Postgres by a fast shutdown) and leaves it down.
    pub(crate) fn stop(&self, process: &str) {
        self.tell("stop", process);
    }

    pub(crate) fn start_again(&self, process: &str) {
        self.tell("start", process);
    }

    fn tell(&self, order: &str, process: &str) {
        let output = xtask().arg(order).arg("--dir").arg(&self.dir).arg(process).output().unwrap();
        assert!(output.status.success(), "{order} {process}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// A process's log so far.
    pub(crate) fn log(&self, process: &str) -> String {
        std::fs::read_to_string(self.dir.join("logs").join(format!("{process}.log"))).unwrap()
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        let _ = xtask().args(["down", "--dir"]).arg(&self.dir).output();
        if std::thread::panicking() {
            eprintln!("the servers' logs are in {}", self.dir.join("logs").display());
        } else {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

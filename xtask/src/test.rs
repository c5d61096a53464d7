//! `cargo xtask test`: Postgres and Kafka on free ports, `cargo test` against them, one count at the end.

use std::{
    fs,
    io::{self, Write},
    process::Stdio,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    time::timeout,
};

use crate::{
    cli::{self, Place, Ports, Up},
    down, ending,
    failure::{Explain, Failure, Result},
    layout::Layout,
    maven, postgres, prerequisites,
    progress::Progress,
    services, state,
    supervise::Stack,
};

/// How long the tests may take to end when told to.
const GRACE: Duration = Duration::from_secs(5);

/// In the environment of the tests and all that they start: the process id of the `cargo xtask test`.
const MARK: &str = "XTASK_TEST";

/// Folders of test runs under `.stack/` begin with it.
const PREFIX: &str = "test-";

/// How many tests run at a time in one binary: more than a small machine has cores, because they mostly wait for their
/// servers.
const TEST_THREADS: &str = "5";
const THREADS: &str = "RUST_TEST_THREADS";

/// How many tests passed and failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Count {
    passed: u64,
    failed: u64,
}

/// Runs the tests; the servers are gone when it returns.
pub(crate) async fn test(args: &cli::Test) -> Result<()> {
    let progress = Progress::new(None);
    let home = Layout::open(None)?;
    sweep(&home, PREFIX, &progress).await;
    prerequisites::disk(&home.dir)?;
    prerequisites::java()?;
    maven::kafka(&home, &progress)?;
    postgres::install(&home, &progress, args.postgres)?;
    compile(args, &home, &progress)?;
    let layout = Layout::open(Some(&home.dir.join(format!("{PREFIX}{}", std::process::id()))))?;
    let mut stack = Stack::start(&servers(&layout, args.postgres), &layout, &progress).await?;
    let result = run(args, &home, &mut stack).await;
    // Stacks that tests started and could not stop, because they were interrupted or crashed.
    down::stop_all_with(MARK, &std::process::id().to_string()).await;
    stack.stop().await;
    drop(stack);
    match &result {
        Ok((_, true)) => {
            let _ = fs::remove_dir_all(&layout.dir);
        }
        _ => progress.line(&format!("the servers' logs are in {}", layout.logs().display())),
    }
    let (count, ok) = result?;
    let _ = writeln!(io::stdout(), "{} passed, {} failed", count.passed, count.failed);
    if ok { Ok(()) } else { Err(Failure::new("the tests failed")) }
}

/// Compiles what will run: the tests, and the binaries from which end-to-end tests start the whole system (for a
/// package's own tests cargo builds its binaries anyway, for others they are named).
fn compile(args: &cli::Test, home: &Layout, progress: &Progress) -> Result<()> {
    if names_a_package(&args.args) {
        services::build(home, progress)?;
    }
    // The relay with deliberate faults, which cargo builds only where it is asked for.
    let mut faulty = services::cargo(home)?;
    faulty.args(["build", "--release", "--bin", "cdc-relay-faulty", "--features", "cdc-relay/faults"]);
    // With this package, so that no dependency is compiled again (see its manifest).
    faulty.args(["-p", "cdc-relay", "-p", "xtask"]);
    let status = faulty.stdin(Stdio::null()).status().explain(|| "start cargo".to_owned())?;
    if !status.success() {
        return Err(Failure::new("the relay with deliberate faults does not compile"));
    }
    let before: Vec<&String> = args.args.iter().take_while(|arg| *arg != "--").collect();
    let mut cargo = services::cargo(home)?;
    cargo.args(["test", "--release", "--no-run"]);
    if !names_a_package(&args.args) {
        cargo.arg("--workspace");
    }
    progress.line("  compiling the tests (the first time takes minutes)");
    let status = cargo.args(before).stdin(Stdio::null()).status().explain(|| "start cargo".to_owned())?;
    if status.success() { Ok(()) } else { Err(Failure::new("the tests do not compile")) }
}

/// Postgres and one broker on free ports. Nothing here outlives the machine, so nothing is synced to the disk;
/// a killed process loses nothing by that.
fn servers(layout: &Layout, postgres: cli::Postgres) -> Up {
    let setting = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    Up {
        place: Place { dir: Some(layout.dir.clone()) },
        postgres,
        postgres_set: vec![setting("fsync", "off"), setting("max_connections", "300")],
        kafka_set: Vec::new(),
        brokers: 1,
        scale: Vec::new(),
        ports: Ports::Auto,
        detach: false,
        infra_only: true,
        json: false,
        fresh: false,
        no_build: true,
        background: false,
    }
}

/// Clears away what runs left that were killed: stacks in folders that begin with `prefix`.
pub(crate) async fn sweep(home: &Layout, prefix: &str, progress: &Progress) {
    let entries = fs::read_dir(&home.dir).into_iter().flatten().filter_map(io::Result::ok);
    for entry in entries {
        let ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix));
        let Some(layout) = ours.then(|| Layout::open(Some(&entry.path())).ok()).flatten() else { continue };
        if let Ok(Some(_lock)) = state::lock(&layout) {
            down::clear(&layout, progress).await;
            let _ = fs::remove_dir_all(&layout.run);
            let _ = fs::remove_dir_all(&layout.dir);
        }
    }
}

/// Returns the count, and whether cargo was content.
async fn run(args: &cli::Test, home: &Layout, stack: &mut Stack) -> Result<(Count, bool)> {
    let endpoints = stack.endpoints();
    let mut cargo = Command::from(services::cargo(home)?);
    cargo.args(["test", "--release", "--no-fail-fast"]);
    if !names_a_package(&args.args) {
        cargo.arg("--workspace");
    }
    cargo.args(&args.args);
    cargo.env("TEST_POSTGRES_URL", &endpoints.postgres_superuser).env("TEST_KAFKA_BROKERS", &endpoints.kafka);
    cargo.env(cli::POSTGRES, args.postgres.name());
    cargo.env(cli::NO_BUILD, "true").env(MARK, std::process::id().to_string());
    if std::env::var_os(THREADS).is_none() {
        cargo.env(THREADS, TEST_THREADS);
    }
    // A group of its own, so that all of it can be ended, whatever the tests have started.
    cargo.stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0).kill_on_drop(true);
    let mut child = cargo.spawn().explain(|| "start cargo".to_owned())?;
    let mut count = Count::default();
    let finished = tokio::select! {
        () = read(&mut child, &mut count) => true,
        () = stack.interrupted() => false,
    };
    if !finished {
        end(&mut child).await;
        return Err(Failure::new("interrupted"));
    }
    let status = child.wait().await.explain(|| "wait for cargo".to_owned())?;
    if !status.success() {
        eprintln!("cargo test: {}", ending::describe(status));
        // A test binary that crashed tells no result.
        count.failed = count.failed.max(1);
    }
    Ok((count, status.success()))
}

/// Passes the tests' output on and counts.
async fn read(child: &mut Child, count: &mut Count) {
    let Some(out) = child.stdout.take() else { return };
    let mut lines = BufReader::new(out).split(b'\n');
    while let Ok(Some(line)) = lines.next_segment().await {
        let mut stdout = io::stdout().lock();
        let _ = stdout.write_all(&line).and_then(|()| stdout.write_all(b"\n"));
        count.add(&String::from_utf8_lossy(&line));
    }
}

async fn end(child: &mut Child) {
    let group = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    let signal = |signal| group.map(|group| kill_process_group(group, signal));
    signal(Signal::TERM);
    let _ = timeout(GRACE, child.wait()).await;
    // Not cargo alone: a test binary may have survived it.
    signal(Signal::KILL);
    let _ = child.wait().await;
}

fn names_a_package(args: &[String]) -> bool {
    let before = args.iter().take_while(|arg| *arg != "--");
    before.into_iter().any(|arg| {
        arg == "-p"
            || arg == "--workspace"
            || arg == "--package"
            || arg.starts_with("-p")
            || arg.starts_with("--package=")
    })
}

impl Count {
    /// `test result: ok. 12 passed; 0 failed; 0 ignored; …`
    fn add(&mut self, line: &str) {
        let Some(rest) = line.trim_start().strip_prefix("test result: ") else { return };
        let number = |word: &str| {
            rest.split([';', '.'])
                .filter_map(|part| part.trim().strip_suffix(word))
                .find_map(|n| n.trim().parse().ok())
        };
        self.passed += number(" passed").unwrap_or(0u64);
        self.failed += number(" failed").unwrap_or(0u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_results_of_all_binaries_are_added_up() {
        let mut count = Count::default();
        for line in [
            "running 3 tests",
            "test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "test a ... ok",
            "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 1 filtered out; finished in 1.20s",
        ] {
            count.add(line);
        }
        assert_eq!(count, Count { passed: 15, failed: 2 });
    }

    #[test]
    fn a_named_package_replaces_the_workspace() {
        let args = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert!(names_a_package(&args("-p relay-core")));
        assert!(names_a_package(&args("--package=e2e -- --nocapture")));
        assert!(!names_a_package(&args("--test it")));
        assert!(!names_a_package(&args("name -- -p")));
    }
}

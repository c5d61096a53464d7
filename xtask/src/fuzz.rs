//! `cargo xtask fuzz`: the fuzz targets of the relay's core under libFuzzer, built by the stable compiler.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::ValueEnum;
use tokio::process::Command;

use crate::{
    cli::{self, Target},
    ending,
    failure::{Explain, Failure, Result},
    layout::Layout,
    prerequisites, services,
};

/// The fuzz package, in the repository.
const PACKAGE: &str = "cdc-relay/core/fuzz";
/// What `cargo fuzz` gives the compiler too, without a sanitizer, which would need a nightly one: edges and
/// comparisons are counted for libFuzzer, and nothing is lost between codegen units.
const RUSTFLAGS: &str = "--cfg fuzzing -C codegen-units=1 -C passes=sancov-module \
     -C llvm-args=-sanitizer-coverage-level=4 -C llvm-args=-sanitizer-coverage-inline-8bit-counters \
     -C llvm-args=-sanitizer-coverage-pc-table -C llvm-args=-sanitizer-coverage-trace-compares";
/// No input is longer: a session of some hundred messages.
const INPUT_LIMIT_BYTES: usize = 16 * 1024;
/// One allocation of more is a finding: a thousand times the input.
const ALLOCATION_LIMIT_MIB: usize = 16;
/// A process of more is a finding; libFuzzer itself takes most of it for its corpus.
const MEMORY_LIMIT_MIB: usize = 1024;
/// An input that takes longer is a finding.
const INPUT_TIMEOUT_S: usize = 5;

/// Fuzzes, or runs one input, or grows the corpus.
pub(crate) async fn fuzz(args: &cli::Fuzz) -> Result<()> {
    let home = Layout::open(None)?;
    let package = home.root.join(PACKAGE);
    let folder = build(&home, &package).await?;
    let named = args.target.map(|target| vec![target]);
    for target in named.unwrap_or_else(|| Target::value_variants().to_vec()) {
        let name = name(target);
        let corpus = package.join("corpus").join(&name);
        let mut run = Command::new(folder.join(&name));
        run.arg(format!("-max_len={INPUT_LIMIT_BYTES}"))
            .arg(format!("-malloc_limit_mb={ALLOCATION_LIMIT_MIB}"))
            .arg(format!("-rss_limit_mb={MEMORY_LIMIT_MIB}"))
            .arg(format!("-timeout={INPUT_TIMEOUT_S}"));
        // What crashes, beside what is built.
        let artifacts = folder.join("artifacts").join(&name);
        // What is found while fuzzing, which is not what is committed.
        let found = folder.join("found").join(&name);
        for folder in [&artifacts, &found] {
            fs::create_dir_all(folder).explain(|| format!("create {}", folder.display()))?;
        }
        run.arg(format!("-artifact_prefix={}/", artifacts.display()));
        if let Some(input) = &args.input {
            run.arg(input);
        } else if let Some(more) = &args.merge {
            // By what is reached, not how often: a corpus that a person can keep.
            run.args(["-merge=1", "-use_counters=0"]).arg(&corpus).arg(more);
        } else {
            run.arg(format!("-max_total_time={}", args.seconds)).args(["-print_final_stats=1"]);
            run.arg(&found).arg(&corpus);
        }
        let status = run.status().await.explain(|| format!("start the fuzz target {name}"))?;
        if !status.success() {
            let what = format!("the fuzz target {name}: {}", ending::describe(status));
            return Err(Failure::new(what).hint(format!(
                "the input is in {}; to run it again: cargo xtask fuzz {name} --input FILE",
                artifacts.display()
            )));
        }
    }
    Ok(())
}

fn name(target: Target) -> String {
    target.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// Builds the targets, in a folder of their own because everything is compiled otherwise than usual. Returns where
/// they are.
async fn build(home: &Layout, package: &Path) -> Result<PathBuf> {
    let host = host().await?;
    let mut cargo = Command::from(services::cargo(home)?);
    cargo.args(["build", "--release", "--quiet", "--locked", "--bins", "--manifest-path"]);
    cargo.arg(package.join("Cargo.toml"));
    let target = services::target()?.join("fuzz");
    // With the target named, the flags are not for build scripts.
    cargo.args(["--target", &host]).env("RUSTFLAGS", RUSTFLAGS).env("CARGO_TARGET_DIR", &target);
    let status = cargo.status().await.explain(|| "start cargo".to_owned())?;
    if !status.success() {
        return Err(Failure::new(format!("the fuzz targets do not compile: {}", ending::describe(status)))
            .hint("libFuzzer comes from the registry and needs a C++ compiler: apt-get install g++"));
    }
    Ok(target.join(host).join("release"))
}

/// The triple of the compiler's own platform.
async fn host() -> Result<String> {
    let cargo = prerequisites::cargo()?;
    let out = Command::new(cargo).arg("-vV").output().await.explain(|| "start cargo".to_owned())?;
    let text = String::from_utf8_lossy(&out.stdout);
    let host = text.lines().find_map(|line| line.strip_prefix("host: ")).map(str::to_owned);
    host.ok_or_else(|| Failure::new("cargo -vV does not tell its host"))
}

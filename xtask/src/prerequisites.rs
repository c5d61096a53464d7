//! What has to be there before anything starts, each with what to do when it is not.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::failure::{Explain, Failure, Result};

/// The one line that installs everything but Rust on Debian and Ubuntu.
const INSTALL: &str =
    "on Debian or Ubuntu: apt-get install openjdk-17-jdk-headless maven build-essential perl";

/// Kafka 4 needs it.
const JAVA_AT_LEAST: u32 = 17;

/// Where Linux distributions put further ones.
const JVM_FOLDER: &str = "/usr/lib/jvm";

/// Free space below which nothing is started: Postgres and Kafka fail half-way on a full disk. MiB.
const DISK_AT_LEAST_MIB: u64 = 1024;

/// The `java` to run Kafka with: `JAVA_HOME`'s, else the one on the PATH; 17 or later.
pub(crate) fn java() -> Result<PathBuf> {
    let java = match std::env::var_os("JAVA_HOME").filter(|home| !home.is_empty()) {
        Some(home) => PathBuf::from(home).join("bin/java"),
        None => on_path("java").ok_or_else(|| {
            Failure::new("no `java` on the PATH: Kafka needs Java 17 or later").hint(INSTALL)
        })?,
    };
    let text = java_says(&java).map_err(|failure| failure.hint(INSTALL))?;
    match java_major(&text) {
        Some(major) if major >= JAVA_AT_LEAST => Ok(java),
        Some(major) => {
            Err(Failure::new(format!("{} is Java {major}; Kafka needs 17 or later", java.display()))
                .hint(format!("point JAVA_HOME at a newer one; {INSTALL}")))
        }
        None => {
            Err(Failure::new(format!("{} -version says no version:\n{text}", java.display())).hint(INSTALL))
        }
    }
}

/// The newest `java` of `JAVA_HOME`, the PATH and the system's folder, if it is of this version or later.
pub(crate) fn java_at_least(wanted: u32) -> Result<PathBuf> {
    let home = std::env::var_os("JAVA_HOME").map(PathBuf::from).map(|home| home.join("bin/java"));
    let others = fs::read_dir(JVM_FOLDER).into_iter().flatten().flatten();
    let found = home.into_iter().chain(on_path("java")).chain(others.map(|e| e.path().join("bin/java")));
    let versions = found.filter_map(|java| Some((java_version(&java).ok()?, java)));
    let newest = versions.max_by_key(|(major, _)| *major).filter(|(major, _)| *major >= wanted);
    newest.map(|(_, java)| java).ok_or_else(|| {
        let what = format!("no Java {wanted} or later: JAVA_HOME, the PATH and {JVM_FOLDER} were looked at");
        Failure::new(what).hint("install one, and point JAVA_HOME at it")
    })
}

/// Its major version.
pub(crate) fn java_version(java: &Path) -> Result<u32> {
    java_major(&java_says(java)?)
        .ok_or_else(|| Failure::new(format!("{} -version says no version", java.display())))
}

/// What it says of its version.
fn java_says(java: &Path) -> Result<String> {
    let output = Command::new(java).arg("-version").stdin(Stdio::null()).output();
    let output = output.explain(|| format!("run {} (JAVA_HOME decides, then the PATH)", java.display()))?;
    // On standard error.
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// `openjdk version "17.0.15" …` is 17; the old form `1.8.0_402` is 8.
fn java_major(text: &str) -> Option<u32> {
    let version = text.lines().find_map(|line| line.split_once("version \"")).map(|(_, rest)| rest)?;
    let mut numbers = version.split(|c: char| !c.is_ascii_digit());
    match numbers.next()?.parse().ok()? {
        1 => numbers.next()?.parse().ok(),
        major => Some(major),
    }
}

/// Maven is there.
pub(crate) fn maven() -> Result<()> {
    match on_path("mvn") {
        Some(_) => Ok(()),
        None => Err(Failure::new("no `mvn` on the PATH: Maven fetches Kafka and Postgres").hint(INSTALL)),
    }
}

/// Cargo, the one that runs us or the one on the PATH.
pub(crate) fn cargo() -> Result<PathBuf> {
    if let Some(cargo) = std::env::var_os("CARGO").map(PathBuf::from).filter(|cargo| cargo.is_file()) {
        return Ok(cargo);
    }
    on_path("cargo").ok_or_else(|| Failure::new("no `cargo` on the PATH").hint("see https://rustup.rs"))
}

/// The disk with the stack's data is not nearly full.
pub(crate) fn disk(dir: &Path) -> Result<()> {
    let stat = rustix::fs::statvfs(dir).explain(|| format!("ask for the free space of {}", dir.display()))?;
    let free_mib = stat.f_bavail.saturating_mul(stat.f_frsize) >> 20;
    if free_mib >= DISK_AT_LEAST_MIB {
        return Ok(());
    }
    Err(Failure::new(format!("only {free_mib} MiB free for {}", dir.display())).hint(format!(
        "make room for at least {DISK_AT_LEAST_MIB} MiB, give --dir a folder on another disk, or wipe the data with \
         --fresh"
    )))
}

/// The first executable of this name on the PATH.
pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| executable(file))
}

fn executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_java_is_understood_old_and_new() {
        assert_eq!(java_major("openjdk version \"17.0.15\" 2025-04-15\nOpenJDK"), Some(17));
        assert_eq!(java_major("Picked up JAVA_TOOL_OPTIONS: x\nopenjdk version \"25\" 2025-09-16"), Some(25));
        assert_eq!(java_major("java version \"1.8.0_402\""), Some(8));
        assert_eq!(java_major("openjdk version \"26-ea\" 2026-03-17"), Some(26));
        assert_eq!(java_major("command not found"), None);
    }
}

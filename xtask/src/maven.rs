//! Kafka, Postgres and, for the benches, Debezium Server from the Java registry, by the repository's `pom.xml`, unpacked under `.stack/downloads`.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::fs::{FlockOperation, flock};

use crate::{
    failure::{Explain, Failure, Result},
    layout::{Layout, fnv1a},
    prerequisites,
    progress::{Progress, Step},
};

/// How much of Maven's output goes into an error.
const TAIL_LINES: usize = 15;

/// The folder of Kafka's jars.
pub(crate) fn kafka(layout: &Layout, progress: &Progress) -> Result<PathBuf> {
    fetch(layout, progress, "Kafka", "kafka", |from, to| {
        fs::rename(from, to).explain(|| format!("move the jars to {}", to.display()))
    })
}

/// The folder of a Postgres installation (`bin/`, `lib/`, `share/`) of this major version.
pub(crate) fn postgres(layout: &Layout, progress: &Progress, major: u32) -> Result<PathBuf> {
    fetch(layout, progress, &format!("Postgres {major}"), &format!("postgres-{major}"), |from, to| {
        unpack(&only(from, "jar")?, to)
    })
}

/// The folder of Debezium Server: its `lib/`, and the jar that runs it.
pub(crate) fn debezium(layout: &Layout, progress: &Progress) -> Result<PathBuf> {
    let folder = fetch(layout, progress, "Debezium Server (780 MB)", "debezium", |from, to| {
        let archive = only(from, "gz")?;
        let file = File::open(&archive).explain(|| format!("open {}", archive.display()))?;
        untar(flate2::read::GzDecoder::new(file), to)
    })?;
    Ok(folder.join("debezium-server"))
}

/// The file of that kind that Maven has resolved.
fn only(folder: &Path, extension: &str) -> Result<PathBuf> {
    fs::read_dir(folder)
        .explain(|| format!("read {}", folder.display()))?
        .filter_map(std::result::Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|found| found == extension))
        .ok_or_else(|| Failure::new(format!("Maven resolved no .{extension}")))
}

/// Resolves a profile of the pom once; its result is kept until the pom changes.
fn fetch(
    layout: &Layout,
    progress: &Progress,
    what: &str,
    profile: &str,
    finish: impl Fn(&Path, &Path) -> Result<()>,
) -> Result<PathBuf> {
    let pom = layout.root.join("pom.xml");
    let text = fs::read(&pom).explain(|| format!("read {}", pom.display()))?;
    let done = layout.downloads.join(format!("{profile}-{:016x}", fnv1a(&text)));
    if done.is_dir() {
        return Ok(done);
    }
    // Two stacks that start at once download once.
    let lock = layout.downloads.join("lock");
    let lock = File::create(&lock).explain(|| format!("create {}", lock.display()))?;
    flock(&lock, FlockOperation::LockExclusive).explain(|| "lock the downloads".to_owned())?;
    if done.is_dir() {
        return Ok(done);
    }
    let step = progress.step(format!("fetching {what} with Maven"));
    let temporary = layout.downloads.join(format!("{profile}.part"));
    let jars = temporary.join("jars");
    remove(&temporary)?;
    fs::create_dir_all(&jars).explain(|| format!("create {}", jars.display()))?;
    let files = resolve(&pom, profile, &jars, &step)?;
    step.detail("unpacking");
    finish(&jars, &temporary.join("tree"))?;
    fs::rename(temporary.join("tree"), &done).explain(|| format!("move it to {}", done.display()))?;
    remove(&temporary)?;
    step.done(&format!("{what} fetched, {files} files downloaded"));
    Ok(done)
}

/// Runs Maven and returns how many files it downloaded (those in its own cache are not).
fn resolve(pom: &Path, profile: &str, to: &Path, step: &Step) -> Result<usize> {
    prerequisites::maven()?;
    let said = to.with_extension("err");
    let errors = File::create(&said).explain(|| format!("create {}", said.display()))?;
    let mut maven = Command::new("mvn")
        .args(["--batch-mode", "-Dstyle.color=never"])
        .arg("--file")
        .arg(pom)
        .args(["--activate-profiles", profile, "dependency:copy-dependencies", "-DincludeScope=runtime"])
        .arg(format!("-Dpostgres.platform={}", platform()?))
        .arg(format!("-DoutputDirectory={}", to.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .explain(|| "start mvn".to_owned())?;
    let mut files = 0;
    let mut tail: Vec<String> = Vec::new();
    if let Some(out) = maven.stdout.take() {
        for line in BufReader::new(out).lines().map_while(std::result::Result::ok) {
            if line.contains("Downloaded from") {
                files += 1;
                step.detail(format!("{files} files"));
            } else if line.contains("ERROR") && tail.len() < TAIL_LINES {
                tail.push(line);
            }
        }
    }
    let status = maven.wait().explain(|| "wait for mvn".to_owned())?;
    if !status.success() {
        tail.extend(
            fs::read_to_string(&said).unwrap_or_default().lines().take(TAIL_LINES).map(str::to_owned),
        );
        return Err(Failure::new(format!(
            "Maven could not resolve {profile} ({status})\n{}",
            tail.join("\n")
        ))
        .hint("is the network there? behind a proxy or a mirror, Maven wants it in ~/.m2/settings.xml"));
    }
    Ok(files)
}

/// The name of this platform in the artifacts of Postgres.
fn platform() -> Result<&'static str> {
    match (std::env::consts::OS, std::env::consts::ARCH) {
        ("linux", "x86_64") => Ok("linux-amd64"),
        ("linux", "aarch64") => Ok("linux-arm64v8"),
        ("macos", "x86_64") => Ok("darwin-amd64"),
        ("macos", "aarch64") => Ok("darwin-arm64v8"),
        (os, arch) => {
            Err(Failure::new(format!("there is no Postgres for {os} on {arch} in the Java registry"))
                .hint("install Postgres 15 or later and say --postgres system"))
        }
    }
}

/// A jar (zip) that holds a `.txz` (a tar, compressed by xz).
fn unpack(jar: &Path, to: &Path) -> Result<()> {
    let open = || File::open(jar).explain(|| format!("open {}", jar.display()));
    let mut zip = zip::ZipArchive::new(open()?).explain(|| format!("read {}", jar.display()))?;
    for index in 0..zip.len() {
        let entry = zip.by_index(index).explain(|| format!("read {}", jar.display()))?;
        let is_archive = entry.name().is_ok_and(|name| name.ends_with(".txz"));
        if !is_archive {
            continue;
        }
        return untar(lzma_rust2::XzReader::new(entry, true), to);
    }
    Err(Failure::new(format!("{} holds no .txz", jar.display())))
}

fn untar(archive: impl Read, to: &Path) -> Result<()> {
    fs::create_dir_all(to).explain(|| format!("create {}", to.display()))?;
    let mut archive = tar::Archive::new(archive);
    archive.set_preserve_permissions(true);
    archive.unpack(to).explain(|| format!("unpack into {}", to.display()))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::new(format!("cannot remove {}: {error}", path.display())))
        }
        _ => Ok(()),
    }
}

//! Printing, following and quoting the processes' logs.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    cli,
    failure::{Failure, Result},
    layout::Layout,
    state,
};

/// How many lines of a log go into an error.
const TAIL_LINES: usize = 20;
/// How far from the end of a log lines are looked for. Bytes.
const TAIL_BYTES: u64 = 1 << 20;
/// A log that grows beyond this while its process runs becomes `NAME.log.1`. Bytes.
const LOG_BYTES_MAX: u64 = 64 << 20;
/// How often the lengths of the logs are looked at.
const LENGTH_INTERVAL: Duration = Duration::from_secs(10);
/// How often a log is looked at for more.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(100);

/// The same failure with the end of a log.
pub(crate) fn with_tail(failure: Failure, log: &Path) -> Failure {
    let lines = tail(log, TAIL_LINES);
    let quoted: Vec<String> = lines.iter().map(|line| format!("  | {line}")).collect();
    failure.hint(format!("the end of {}:\n{}", log.display(), quoted.join("\n")))
}

/// The last lines of a log.
pub(crate) fn tail(log: &Path, lines: usize) -> Vec<String> {
    let Ok(mut file) = File::open(log) else { return Vec::new() };
    let length = file.metadata().map_or(0, |meta| meta.len());
    let from = length.saturating_sub(TAIL_BYTES);
    let mut bytes = Vec::new();
    if file.seek(SeekFrom::Start(from)).is_err() || file.take(TAIL_BYTES).read_to_end(&mut bytes).is_err() {
        return Vec::new();
    }
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].iter().map(|&line| line.to_owned()).collect()
}

/// Empties logs that have grown too long, after putting a copy aside. The processes hold them open for appending,
/// so they go on at the beginning; what they write between the copy and the cut is lost.
pub(crate) async fn keep_bounded(logs: Vec<PathBuf>) {
    loop {
        tokio::time::sleep(LENGTH_INTERVAL).await;
        for log in logs.iter().filter(|log| fs::metadata(log).is_ok_and(|meta| meta.len() > LOG_BYTES_MAX)) {
            let log = log.clone();
            // Out of the supervisor's way. If it fails, the next round tries again.
            let _ = tokio::task::spawn_blocking(move || cut(&log)).await;
        }
    }
}

fn cut(log: &Path) -> io::Result<()> {
    fs::copy(log, log.with_extension("log.1"))?;
    OpenOptions::new().write(true).open(log)?.set_len(0)
}

/// `cargo xtask logs`.
pub(crate) async fn print(args: &cli::Logs) -> Result<()> {
    let layout = Layout::open(args.place.dir.as_deref())?;
    let logs = choose(&layout, args.service.as_deref())?;
    let width = logs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let prefixed = logs.len() > 1;
    let mut followers = tokio::task::JoinSet::new();
    for (name, path) in logs {
        let prefix = if prefixed { format!("{name:width$} | ") } else { String::new() };
        let from = fs::metadata(&path).map_or(0, |meta| meta.len());
        for line in tail(&path, args.lines) {
            if writeln!(io::stdout(), "{prefix}{line}").is_err() {
                return Ok(()); // `| head`
            }
        }
        if args.follow {
            followers.spawn(follow(path, from, prefix));
        }
    }
    followers.join_next().await;
    Ok(())
}

/// The logs of a service, of one process, or of all: of the stack that runs or ran last.
fn choose(layout: &Layout, service: Option<&str>) -> Result<Vec<(String, PathBuf)>> {
    let known: Vec<(String, String, PathBuf)> = match state::read(layout) {
        Some(state) => {
            state.processes.into_iter().map(|entry| (entry.name, entry.service, entry.log)).collect()
        }
        None => found(&layout.logs()),
    };
    let names: Vec<String> = known.iter().map(|(name, ..)| name.clone()).collect();
    let wanted = |(name, of, _): &(String, String, PathBuf)| {
        service.is_none_or(|service| service == name || service == of)
    };
    let logs: Vec<_> = known.into_iter().filter(wanted).map(|(name, _, path)| (name, path)).collect();
    match (logs.is_empty(), service) {
        (false, _) => Ok(logs),
        (true, Some(service)) if !names.is_empty() => {
            Err(Failure::new(format!("no process {service:?}"))
                .hint(format!("there are {}", names.join(", "))))
        }
        _ => Err(Failure::new(format!("no logs in {}", layout.logs().display())).hint("cargo xtask up")),
    }
}

fn found(folder: &Path) -> Vec<(String, String, PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(io::Result::ok);
    let mut logs: Vec<_> = entries
        .filter_map(|entry| {
            let path = entry.path();
            let name = path.file_name()?.to_str()?.strip_suffix(".log")?.to_owned();
            Some((name.clone(), name, path))
        })
        .collect();
    logs.sort();
    logs
}

/// Prints what is added to a log from byte `from` on, until nobody reads it any more.
pub(crate) async fn follow(path: PathBuf, mut from: u64, prefix: String) {
    let mut part = Vec::new();
    loop {
        if let Some(lines) = added(&path, &mut from, &mut part) {
            for line in lines {
                if writeln!(io::stdout(), "{prefix}{line}").is_err() {
                    return;
                }
            }
        }
        tokio::time::sleep(FOLLOW_INTERVAL).await;
    }
}

/// The whole lines that came after byte `from`; an unfinished one waits in `part`.
fn added(path: &Path, from: &mut u64, part: &mut Vec<u8>) -> Option<Vec<String>> {
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    if length < *from {
        *from = 0; // It was put aside or emptied.
        part.clear();
    }
    if length == *from {
        return None;
    }
    file.seek(SeekFrom::Start(*from)).ok()?;
    let read = file.take(TAIL_BYTES).read_to_end(part).ok()?;
    *from += read as u64;
    // A line without an end is cut rather than collected for ever.
    let end = match part.iter().rposition(|byte| *byte == b'\n') {
        Some(end) => end + 1,
        None if part.len() as u64 >= TAIL_BYTES => part.len(),
        None => return None,
    };
    let whole: Vec<u8> = part.drain(..end).collect();
    Some(String::from_utf8_lossy(&whole).lines().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_followed_whole_and_a_shortened_log_from_its_beginning() {
        let path = std::env::temp_dir().join(format!("xtask-follow-{}.log", std::process::id()));
        let (mut from, mut part) = (0, Vec::new());
        fs::write(&path, "one\ntw").unwrap();
        assert_eq!(added(&path, &mut from, &mut part), Some(vec!["one".to_owned()]));
        assert_eq!(added(&path, &mut from, &mut part), None);
        fs::write(&path, "one\ntwo\nthree\n").unwrap();
        assert_eq!(added(&path, &mut from, &mut part), Some(vec!["two".to_owned(), "three".to_owned()]));
        fs::write(&path, "new\n").unwrap();
        assert_eq!(added(&path, &mut from, &mut part), Some(vec!["new".to_owned()]));
        assert_eq!(tail(&path, 5), ["new"]);
        fs::write(&path, "a\nb\nc\n").unwrap();
        assert_eq!(tail(&path, 2), ["b", "c"]);
        let mut writer = OpenOptions::new().append(true).open(&path).unwrap();
        cut(&path).unwrap();
        writer.write_all(b"d\n").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"d\n");
        assert_eq!(fs::read(path.with_extension("log.1")).unwrap(), b"a\nb\nc\n");
        fs::remove_file(path.with_extension("log.1")).unwrap();
        fs::remove_file(&path).unwrap();
    }
}

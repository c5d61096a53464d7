//! What a process uses, as Linux tells it in /proc.

use std::{collections::BTreeMap, fs};

/// Ticks of the clock in which Linux counts processor time, a second: 100 on every architecture that we run on.
const TICKS_PER_SECOND: f64 = 100.0;

/// What a process has used so far.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Usage {
    /// In steps of 10 ms.
    pub(super) cpu_seconds: f64,
    /// The most memory that it had at once.
    pub(super) peak_rss_bytes: u64,
    /// The memory that it has.
    pub(super) rss_bytes: u64,
}

impl Usage {
    /// Of a process that runs, threads that have ended included.
    pub(super) fn of(pid: u32) -> Option<Self> {
        let cpu_seconds = cpu_seconds(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        // Missing at the very end of a process.
        let bytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
        };
        let [peak_rss_bytes, rss_bytes] = ["VmHWM:", "VmRSS:"].map(|name| bytes(name).unwrap_or(0));
        Some(Self { cpu_seconds, peak_rss_bytes, rss_bytes })
    }
}

/// Processor time by the name of the thread, for the threads that are running.
pub(super) fn threads(pid: u32) -> BTreeMap<String, f64> {
    let mut threads = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let read = |name: &str| fs::read_to_string(entry.path().join(name)).ok();
        let (Some(name), Some(stat)) = (read("comm"), read("stat")) else { continue };
        *threads.entry(name.trim().to_owned()).or_insert(0.0) += cpu_seconds(&stat).unwrap_or(0.0);
    }
    threads
}

/// Fields 14 and 15 of `/proc/PID/stat`: user and system time
/// (<https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html>). The name before them may hold anything.
fn cpu_seconds(stat: &str) -> Option<f64> {
    let mut fields = stat.rsplit_once(") ")?.1.split_ascii_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u32>().ok();
    Some((f64::from(ticks()?) + f64::from(ticks()?)) / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_is_found_behind_any_name() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194560 100 0 0 0 150 25 9 9 20 0 1 0 5 6 7";
        assert_eq!(cpu_seconds(stat), Some(1.75));
        assert_eq!(cpu_seconds("7 (x"), None);
    }

    #[test]
    fn this_process_uses_memory() {
        let own = Usage::of(std::process::id()).unwrap();
        assert!(own.peak_rss_bytes >= own.rss_bytes && own.rss_bytes > 1 << 20, "{own:?}");
        assert_eq!(Usage::of(u32::MAX), None);
    }
}

//! Which process a process id means: an id alone may have been given to somebody else since.

use std::{fs, path::Path, time::Duration};

use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

/// A process: its id, and when it started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub pid: u32,
    /// Opaque; differs between two processes that had the same id one after the other, also across reboots.
    pub started: String,
}

/// How often a process that is not our child is looked at while waiting for its end (`wait` is for children).
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

impl Identity {
    /// The process that has this id now, unless there is none or it is dead already (a zombie).
    pub(crate) fn of(pid: u32) -> Option<Self> {
        Some(Self { pid, started: started(pid)? })
    }

    /// Whether this very process still runs.
    pub(crate) fn alive(&self) -> bool {
        started(self.pid).is_some_and(|now| now == self.started)
    }

    /// Sends a signal to this very process; false if it is gone or not ours to signal.
    pub(crate) fn signal(&self, signal: Signal) -> bool {
        self.alive() && send(self.pid, signal)
    }

    /// Waits for its end; false if it still runs after `limit`.
    pub(crate) async fn ended_within(&self, limit: Duration) -> bool {
        let gone = async {
            while self.alive() {
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
        };
        tokio::time::timeout(limit, gone).await.is_ok()
    }
}

/// Sends a signal to whatever has this id: only for a child that we have not waited for yet.
pub(crate) fn send(pid: u32, signal: Signal) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| kill_process(pid, signal).is_ok())
}

fn started(pid: u32) -> Option<String> {
    if Path::new("/proc/self/stat").exists() {
        let ticks = start_ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        return Some(format!("{}/{ticks}", boot.trim()));
    }
    // No /proc (macOS): the start time to the second.
    let id = pid.to_string();
    let ps = std::process::Command::new("ps").args(["-o", "stat=,lstart=", "-p", &id]).output().ok()?;
    let text = String::from_utf8_lossy(&ps.stdout).trim().to_owned();
    let (state, start) = text.split_once(' ')?;
    (!state.starts_with('Z')).then(|| start.trim().to_owned())
}

/// Field 22 of `/proc/PID/stat`, or nothing for a dead process. The name in field 2 may hold spaces and brackets.
fn start_ticks(stat: &str) -> Option<u64> {
    let after_name = stat.rsplit_once(')')?.1;
    let mut fields = after_name.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "42 (a (b) c) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 987654 1 2 3";

    #[test]
    fn the_start_time_is_found_behind_a_name_with_brackets() {
        assert_eq!(start_ticks(STAT), Some(987_654));
        assert_eq!(start_ticks(&STAT.replace(" S ", " Z ")), None);
        assert_eq!(start_ticks("nonsense"), None);
    }

    #[test]
    fn a_recycled_id_is_another_process() {
        let me = Identity::of(std::process::id()).unwrap();
        assert!(me.alive());
        let earlier = Identity { pid: me.pid, started: "another-boot/1".to_owned() };
        assert!(!earlier.alive());
        assert!(!earlier.signal(Signal::KILL), "this would have killed the test");
    }

    #[test]
    fn a_child_that_died_is_not_alive_even_before_it_is_waited_for() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let identity = Identity::of(child.id()).unwrap();
        assert!(identity.alive() && identity.signal(Signal::KILL));
        child.wait().unwrap();
        assert!(!identity.alive());
        assert!(!identity.signal(Signal::KILL));
    }
}

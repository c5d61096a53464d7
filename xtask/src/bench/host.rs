//! The machine, for whoever compares.

use std::fs;

use serde::Serialize;

/// Above this load per processor before a measurement, somebody else is using the machine.
const QUIET_LOAD: f64 = 0.5;

/// What it is, as far as the system tells.
#[derive(Debug, Serialize)]
pub(super) struct Host {
    processor: String,
    processors: usize,
    memory_mib: u64,
    kernel: String,
    /// How the kernel paces TCP, on loopback too.
    congestion_control: String,
}

impl Host {
    pub(super) fn look() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let value = |text: &str, key: &str| {
            let line = text.lines().find(|line| line.starts_with(key))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let unknown = || "unknown".to_owned();
        let memory = value(&read("/proc/meminfo"), "MemTotal");
        let kib = memory.and_then(|text| text.strip_suffix(" kB")?.parse::<u64>().ok());
        Self {
            processor: value(&read("/proc/cpuinfo"), "model name").unwrap_or_else(unknown),
            processors: processors(),
            memory_mib: kib.unwrap_or(0) / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            congestion_control: read("/proc/sys/net/ipv4/tcp_congestion_control").trim().to_owned(),
        }
    }

    /// In one line.
    pub(super) fn line(&self) -> String {
        let Self { processor, processors, memory_mib, kernel, congestion_control } = self;
        format!("{processors} × {processor}, {memory_mib} MiB, kernel {kernel}, TCP by {congestion_control}")
    }
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The load of the last minute.
pub(super) fn load() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split_ascii_whitespace().next()?.parse().ok()
}

/// A warning, where the machine is not ours alone.
pub(super) fn busy() -> Option<String> {
    let load = load()?;
    #[expect(clippy::cast_precision_loss, reason = "a handful of processors")]
    let limit = QUIET_LOAD * processors() as f64;
    (load > limit).then(|| {
        format!(
            "the load was {load:.1} before anything was measured: others use this machine, rates are too low"
        )
    })
}

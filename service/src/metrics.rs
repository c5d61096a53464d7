//! The metrics every service has, and the text a scraper reads.

use std::time::Instant;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

/// The content type of [`render`]'s answer: the `OpenMetrics` text format, which Prometheus scrapes.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A registry whose metrics all begin with `prefix` (`cdc_relay`, `order_api`, `consumer`), holding the
/// process's own: resident memory, CPU seconds, uptime.
pub fn registry(prefix: &str) -> Registry {
    let mut registry = Registry::with_prefix(prefix);
    registry.register_collector(Box::new(Process { started: Instant::now() }));
    registry
}

/// The registry as text.
pub fn render(registry: &Registry) -> String {
    let mut out = String::new();
    // Writing into a String cannot fail; a metric that cannot encode itself would be a bug of the library.
    if text::encode(&mut out, registry).is_err() {
        out.clear();
    }
    out
}

#[derive(Debug)]
struct Process {
    started: Instant,
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let uptime = ConstGauge::new(self.started.elapsed().as_secs_f64());
        let e = encoder.encode_descriptor(
            "process_uptime_seconds",
            "Time since the start.",
            None,
            uptime.metric_type(),
        )?;
        uptime.encode(e)?;
        if let Some(bytes) = resident_bytes() {
            let m = ConstGauge::new(i64::try_from(bytes).unwrap_or(i64::MAX));
            let e = encoder.encode_descriptor(
                "process_resident_memory_bytes",
                "Resident memory.",
                None,
                m.metric_type(),
            )?;
            m.encode(e)?;
        }
        if let Some(seconds) = cpu_seconds() {
            let m = ConstCounter::new(seconds);
            let e = encoder.encode_descriptor(
                "process_cpu_seconds",
                "CPU time, user and system.",
                None,
                m.metric_type(),
            )?;
            m.encode(e)?;
        }
        Ok(())
    }
}

/// `VmRSS` of proc(5), in bytes; nothing where there is no /proc.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib: u64 =
        status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}

/// utime + stime of proc(5), in seconds. `USER_HZ` is 100 on every Linux that runs this.
fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let after_name = stat.rsplit_once(')')?.1;
    let mut fields = after_name.split_whitespace().skip(11);
    let ticks: u32 = fields.next()?.parse::<u32>().ok()?.checked_add(fields.next()?.parse().ok()?)?;
    Some(f64::from(ticks) / 100.0)
}

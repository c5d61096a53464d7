//! One transaction of a million rows: how much memory it takes, and how long its first and its last event take.

use serde::Serialize;

use super::{
    Bench,
    arm::Run,
    contents::Loss,
    drain::every,
    drained::{or_dash, sum},
    numbers::Spread,
    plot::{Bar, Chart},
    relay::arm_name,
    section::{Section, head},
    trial::nothing,
    workload::{self, Shape, scaled},
};
use crate::{cli::Delivery, failure::Result};

const ROWS: u64 = 1_000_000;

/// One arm, over all rounds.
#[derive(Debug, Serialize)]
struct Measured {
    arm: &'static str,
    runs: Vec<Run>,
}

/// Every arm in every round.
pub(super) async fn bigtx(bench: &Bench<'_>) -> Result<Section> {
    let rows = scaled(ROWS, bench.factor);
    let written = workload::write(bench.servers, "bigtx", Shape::of(rows, rows)).await?;
    bench.warm_up(&written).await?;
    let arms = bench.arms.of(None);
    let (runs, failures) = every(bench, "bigtx", bench.rounds, &arms, &written).await?;
    workload::forget(bench.servers).await?;
    let measured: Vec<Measured> = arms
        .iter()
        .zip(runs)
        .filter(|(_, runs)| !runs.is_empty())
        .map(|((arm, _), runs)| Measured { arm, runs })
        .collect();
    let title = format!("one transaction of {rows} rows, {} MiB of log", written.wal_bytes >> 20);
    let mut section = Section::of("bigtx", title, &measured)?;
    section.failures = failures;
    section.notes.push(format!(
        "seconds from the start of the process until the first and the last row are in Kafka (of those without Kafka: until all is \
         read); medians of {} rounds, and the extremes",
        bench.rounds
    ));
    section.table = head(["ARM", "FIRST", "LAST", "FROM TO", "PEAK MIB", "CPU", "LOST", "TWICE"]);
    let mut bars = Vec::new();
    for Measured { arm, runs } in &measured {
        let spread = |of: &dyn Fn(&Run) -> Option<f64>| Spread::of(runs.iter().filter_map(of));
        let last = spread(&|run| Some(run.seconds)).ok_or_else(nothing)?;
        let cpu = spread(&|run| Some(run.cpu_seconds.reader)).ok_or_else(nothing)?;
        let peak = runs.iter().map(|run| run.peak_rss_bytes).max().unwrap_or(0) >> 20;
        // Of transactions, the first record is seen long before it is committed.
        let is_committed_late = *arm == arm_name(Delivery::ExactlyOnce, false);
        let first = spread(&|run| run.first_record_seconds.filter(|_| !is_committed_late));
        let losses: Vec<_> = runs.iter().filter_map(|run| run.loss).collect();
        let lost = sum(&losses, Loss::lost);
        section.table.push(vec![
            (*arm).to_owned(),
            first.map_or_else(|| "-".to_owned(), |it| format!("{:.1}", it.median)),
            format!("{:.1}", last.median),
            format!("{:.1} to {:.1}", last.min, last.max),
            peak.to_string(),
            format!("{:.1}", cpu.median),
            or_dash(lost),
            or_dash(sum(&losses, |loss| loss.duplicates)),
        ]);
        if let Some(lost @ 1..) = lost {
            section.failures.push(format!("{arm}: {lost} rows are missing, out of order or nobody's"));
        }
        #[expect(clippy::cast_precision_loss, reason = "no process has 2^52 MiB")]
        let mib = peak as f64;
        bars.push(Bar {
            name: (*arm).to_owned(),
            parts: vec![mib],
            spread: None,
            label: format!("{peak} MiB"),
        });
    }
    section.charts.push(Chart { title: "Peak memory of the reader".into(), bars });
    Ok(section)
}

//! Whether the relay has become dearer: its processor time and its allocations per row, against what is written down.
//!
//! Processor time is a ratio to what a relay is made of, measured in the same run: `pg_recvlogical` over the same log and a bare
//! producer of the same records. Against the first alone it is another number on another machine, because that one is nearly all
//! system calls and the relay is not. The round with the lowest ratio counts: a dearer relay is dearer in every round, and a busy
//! machine is not as busy in all of them. So where that round is above the limit, as many again are asked before it is believed. A
//! number of allocations is one on any machine.

use std::{fs, path::PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    Bench,
    arm::Arm,
    contents::Loss,
    limits::Limit,
    numbers::middle_half,
    publisher::Publisher,
    relay::{Relay, reader_log},
    section::{Section, head},
    trial::nothing,
    workload::{self, Shape},
};
use crate::{
    cli::Delivery,
    failure::{Explain, Failure, Result},
};

const ROWS: u64 = 200_000;
/// Above the written ratio by so many times the noise, it is none.
const NOISES: f64 = 2.0;
/// What noise is believed: nothing has none, and what is beyond it would excuse everything.
const NOISE: std::ops::RangeInclusive<f64> = 0.05..=0.2;
/// Allocations are counted, not timed: what reads of a socket happen to bring together makes this much of a difference.
const ALLOCATIONS_NOISE: f64 = 0.1;
/// Where it is written down.
const FILE: &str = "xtask/bench-baseline.json";

/// What one row costs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Cost {
    /// The relay's processor time to that of `pg_recvlogical` and of the producer, together: of the round where it is lowest.
    cpu_ratio: f64,
    /// How far the middle half of the rounds' ratios is apart, in proportion to their median.
    cpu_ratio_noise: f64,
    /// Of Rust and of C.
    allocations_per_row: f64,
}

/// Measures, and compares; or writes it down.
pub(super) async fn gate(bench: &Bench<'_>, update: bool) -> Result<Section> {
    let rows = ROWS;
    let written = workload::write(bench.servers, "gate", Shape::of(rows, 1)).await?;
    bench.warm_up(&written).await?;
    let relay = Arm::Publisher(Publisher::Relay(Relay {
        binary: bench.arms.relay.clone(),
        delivery: Delivery::AtLeastOnce,
        count_allocations: false,
    }));
    let file = bench.servers.layout.root.join(FILE);
    let read = || -> Result<Cost> {
        let text = fs::read_to_string(&file).explain(|| format!("read {}", file.display()))?;
        serde_json::from_str(&text).explain(|| format!("read {}", file.display()))
    };
    let believed = if update { f64::INFINITY } else { limits(read()?).0 };
    let mut ratios = Vec::new();
    while asks_again(&ratios, bench.rounds as usize, believed) {
        let ratio = round(bench, &written, &relay, ratios.len() + 1).await?;
        ratios.push(ratio);
    }
    let allocations = allocations(bench, &written).await?;
    workload::forget(bench.servers).await?;
    let cpu_ratio = ratios.iter().copied().reduce(f64::min).ok_or_else(nothing)?;
    let cpu_ratio_noise = middle_half(&ratios).ok_or_else(nothing)?;
    #[expect(clippy::cast_precision_loss, reason = "no count comes near 2^52")]
    let allocations_per_row = allocations as f64 / rows as f64;
    let found = Cost { cpu_ratio, cpu_ratio_noise, allocations_per_row };
    if update {
        let text = serde_json::to_string_pretty(&found).explain(|| format!("write {FILE}"))?;
        fs::write(&file, text + "\n").explain(|| format!("write {}", file.display()))?;
    }
    let before = read()?;
    let title = format!("what a row costs, of {rows} single-row transactions, and what {FILE} says");
    let mut section = Section::of("gate", title, &found)?;
    section.table = head(["COST", "WRITTEN DOWN", "NOW", "LIMIT"]);
    let (cpu, counted) = limits(before);
    for (name, before, now, limit) in [
        ("CPU, to reading + writing", before.cpu_ratio, found.cpu_ratio, cpu),
        ("allocations a row", before.allocations_per_row, found.allocations_per_row, counted),
    ] {
        section.table.push(vec![
            name.to_owned(),
            format!("{before:.2}"),
            format!("{now:.2}"),
            format!("{limit:.2}"),
        ]);
        if now > limit {
            section.failures.push(format!(
                "{name}: {now:.2}, and {before:.2} is written down. If it is worth that, `cargo xtask bench gate --update` writes \
                 down the new cost"
            ));
        }
    }
    Ok(section)
}

/// The relay's processor time in one round, to that of the two that are compared with it.
async fn round(bench: &Bench<'_>, written: &workload::Written, relay: &Arm, round: usize) -> Result<f64> {
    let what = format!("gate, round {round}");
    let step = bench.servers.progress.step(&what);
    let mut seconds = [0.0; 3];
    for (arm, seconds) in
        [&Arm::Recvlogical, &Arm::Limit(Limit::Producer), relay].into_iter().zip(&mut seconds)
    {
        let run = arm.run(bench.servers, written, bench.number()).await?;
        if let Some(lost) = run.loss.map(Loss::lost).filter(|lost| *lost > 0) {
            return Err(Failure::new(format!("{lost} rows are lost, disordered or made up")));
        }
        *seconds = run.cpu_seconds.reader;
    }
    let [reading, writing, relay] = seconds;
    let ratio = relay / (reading + writing);
    step.done(&format!(
        "{what}: {relay:.2} CPU s, pg_recvlogical {reading:.2}, the producer alone {writing:.2}: {ratio:.2}",
    ));
    Ok(ratio)
}

/// Whether one more round is needed: as many as `wanted`, and up to twice as many while none is within the limit.
fn asks_again(ratios: &[f64], wanted: usize, limit: f64) -> bool {
    let over = ratios.iter().all(|ratio| *ratio > limit);
    ratios.len() < if over { 2 * wanted } else { wanted }
}

/// What the ratio and the allocations may be at most: beyond that it is no noise.
fn limits(before: Cost) -> (f64, f64) {
    let noise = before.cpu_ratio_noise.clamp(*NOISE.start(), *NOISE.end());
    (before.cpu_ratio * (1.0 + NOISES * noise), before.allocations_per_row * (1.0 + ALLOCATIONS_NOISE))
}

/// How many allocations the relay needs for all rows, its start included.
async fn allocations(bench: &Bench<'_>, written: &workload::Written) -> Result<u64> {
    let number = bench.number();
    let relay =
        Relay { binary: bench.arms.relay.clone(), delivery: Delivery::AtLeastOnce, count_allocations: true };
    Arm::Publisher(Publisher::Relay(relay)).run(bench.servers, written, number).await?;
    let log: PathBuf = reader_log(bench.servers, number);
    let text = fs::read_to_string(&log).explain(|| format!("read {}", log.display()))?;
    requests(&text).ok_or_else(|| Failure::new(format!("jemalloc's statistics are not in {}", log.display())))
}

/// The requests that jemalloc counts, of both kinds, in the last of its reports
/// (<https://jemalloc.net/jemalloc.3.html>, `stats.arenas.<i>.small.nrequests`).
fn requests(log: &str) -> Option<u64> {
    let begin = log.rfind("{\"jemalloc\"").or_else(|| log[..log.rfind("\"jemalloc\"")?].rfind('{'))?;
    let report: Value = serde_json::Deserializer::from_str(&log[begin..]).into_iter().next()?.ok()?;
    let merged = &report["jemalloc"]["stats.arenas"]["merged"];
    Some(merged["small"]["nrequests"].as_u64()? + merged["large"]["nrequests"].as_u64()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_let_through_and_more_is_not() {
        let cost =
            |cpu_ratio, cpu_ratio_noise| Cost { cpu_ratio, cpu_ratio_noise, allocations_per_row: 10.0 };
        let (cpu, allocations) = limits(cost(2.0, 0.1));
        assert!((cpu - 2.4).abs() < 1e-9 && (allocations - 11.0).abs() < 1e-9);
        assert!((limits(cost(2.0, 0.0)).0 - 2.2).abs() < 1e-9, "nothing is without noise");
        assert!((limits(cost(2.0, 0.9)).0 - 2.8).abs() < 1e-9, "noise excuses only so much");
    }

    #[test]
    fn rounds_above_the_limit_are_not_believed_before_twice_as_many_are() {
        assert!(asks_again(&[], 2, 1.0) && asks_again(&[0.5], 2, 1.0));
        assert!(!asks_again(&[0.5, 2.0], 2, 1.0), "one within the limit is enough");
        assert!(asks_again(&[2.0, 2.0], 2, 1.0) && asks_again(&[2.0, 2.0, 1.5], 2, 1.0));
        assert!(!asks_again(&[2.0, 2.0, 0.5], 2, 1.0));
        assert!(!asks_again(&[2.0; 4], 2, 1.0), "it is dearer");
    }

    #[test]
    fn the_last_report_counts() {
        let report = |n: u64| {
            format!(
                "line\n{{\n\t\"jemalloc\": {{\"stats.arenas\": {{\"merged\": {{\"small\": {{\"nrequests\": {n}}}, \
                 \"large\": {{\"nrequests\": 2}}}}}}}}}}\n"
            )
        };
        assert_eq!(requests(&(report(5) + &report(40))), Some(42));
        assert_eq!(requests("no report"), None);
    }
}

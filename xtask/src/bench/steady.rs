//! How late whoever reads committed records sees a row, at steady rates that wait for nobody; and the highest rate that lasts.
//!
//! Each row has its time, however late the one before it was; what it took is counted from that time. So a stop of
//! anything counts against all rows that it holds up.

use std::time::Instant;

use serde::Serialize;

use super::{
    Bench,
    contents::Loss,
    numbers::{Percentiles, Spread, per_mille},
    plot::{Bar, Chart},
    publisher::Publisher,
    section::{Section, head},
    trial::{Trial, failure, nothing},
    usage::Usage,
    workload::scaled,
};
use crate::failure::Result;

/// Rows per second before those that count, and how many: who has just started is slow.
const WARM_UP: (u32, u64) = (4_000, 20_000);
/// How long each rate lasts.
const SECONDS: u32 = 10;
/// How long a rate lasts that is only tried, whatever part of the rows is asked for.
const TRY_SECONDS: u32 = 8;
/// A rate lasts if 99 of 100 rows are seen within so many microseconds, and the last rows no later than those before them.
const LASTS_US: u32 = 1_000_000;
/// So much later, in microseconds, is no later.
const GROWTH_US: u32 = 200_000;
/// The first rate that is tried.
const TRIED_FIRST: u32 = 8_000;
/// No rate beyond it is tried.
const TRIED_LAST: u32 = 128_000;
/// So close the highest rate is looked for.
const PRECISION: u32 = 2_000;

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Latency {
    rows_per_second: u32,
    /// From when a row was due to be committed until a consumer had it.
    #[serde(flatten)]
    took: Percentiles,
    /// Of one processor, by the publisher and by the broker.
    cpu_percent: f64,
    broker_cpu_percent: f64,
    /// The medians of the first half, and of the last tenth.
    first_half_us: u32,
    last_tenth_us: u32,
    /// How much later than it was due the last row was written.
    writer_late_us: u128,
}

/// The highest rate that lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Highest {
    rows_per_second: u32,
    /// At that rate; None where none lasts.
    took: Option<Percentiles>,
    /// Whether it was the writer that did not keep up at the next one.
    is_the_writers: bool,
}

/// One publisher at all rates.
#[derive(Debug, Clone, Serialize)]
struct Round {
    arm: &'static str,
    latencies: Vec<Latency>,
    /// Where it was looked for.
    highest: Option<Highest>,
    loss: Loss,
}

/// Every publisher at every rate, in every round; the highest rate in the first.
pub(super) async fn steady(bench: &Bench<'_>, rates: &[u32], highest: bool) -> Result<Section> {
    let mut rounds = Vec::new();
    for round in 1..=bench.rounds {
        for (arm, publisher) in bench.arms.publishers() {
            let what = format!("steady, round {round} of {}, {arm}", bench.rounds);
            let step = bench.servers.progress.step(&what);
            let tell = |detail| step.detail(detail);
            rounds.push(one(bench, (arm, publisher), rates, highest && round == 1, &tell).await?);
            step.done(&what);
        }
    }
    section(bench, rates, &rounds)
}

async fn one(
    bench: &Bench<'_>,
    (arm, publisher): (&'static str, &Publisher),
    rates: &[u32],
    highest: bool,
    tell: &dyn Fn(String),
) -> Result<Round> {
    let mut trial = Trial::start(bench.servers, publisher, bench.number()).await?;
    let (rate, rows) = WARM_UP;
    at(&mut trial, rate, scaled(rows, bench.times)).await?;
    let mut latencies = Vec::new();
    for &rate in rates {
        tell(format!("{rate} rows/s"));
        latencies.push(at(&mut trial, rate, scaled(u64::from(rate * SECONDS), bench.times)).await?);
    }
    let highest = if highest { Some(find_highest(&mut trial, tell).await?) } else { None };
    Ok(Round { arm, latencies, highest, loss: trial.end().await? })
}

/// So many rows at a rate; waits until all of them are seen.
async fn at(trial: &mut Trial<'_>, rate: u32, rows: u64) -> Result<Latency> {
    let usage = |trial: &Trial<'_>| {
        let of = |pid: u32| Usage::of(pid).unwrap_or_default().cpu_seconds;
        (trial.running.child.id().map_or(0.0, of), of(trial.servers.broker))
    };
    let (before, since) = (usage(trial), Instant::now());
    let mut load = trial.load(rate, rows).await?;
    trial.until_seen(load.to + 1).await?;
    let writer_late_us = load.written().await?.as_micros();
    let (after, seconds) = (usage(trial), since.elapsed().as_secs_f64());
    let median = |rows| {
        let mut took = trial.took(&load, rows);
        took.sort_unstable();
        per_mille(&took, 500)
    };
    let (half, tenth) = (load.from.midpoint(load.to), load.to - (load.to - load.from) / 10);
    let (first_half_us, last_tenth_us) = (median(load.from..=half), median(tenth..=load.to));
    let mut took = trial.took(&load, load.from..=load.to);
    took.sort_unstable();
    Ok(Latency {
        rows_per_second: rate,
        took: Percentiles::of(&took),
        cpu_percent: (after.0 - before.0) * 100.0 / seconds,
        broker_cpu_percent: (after.1 - before.1) * 100.0 / seconds,
        first_half_us,
        last_tenth_us,
        writer_late_us,
    })
}

impl Highest {
    fn cell(self) -> String {
        let writers = if self.is_the_writers { " (writer)" } else { "" };
        let p99 = self.took.map(|took| format!(", P99 {:.1}", f64::from(took.p99_us) / 1e3));
        format!("{}{}{writers}", self.rows_per_second, p99.unwrap_or_default())
    }
}

impl Latency {
    fn lasts(&self) -> bool {
        self.took.p99_us <= LASTS_US && self.last_tenth_us <= self.first_half_us + GROWTH_US
    }
}

/// Doubles until a rate does not last, then halves the difference.
async fn find_highest(trial: &mut Trial<'_>, tell: &dyn Fn(String)) -> Result<Highest> {
    let (mut lasts, mut fails, mut is_the_writers, mut took) = (0, None, false, None);
    while let Some(rate) = next_rate(lasts, fails) {
        tell(format!("does {rate} rows/s last?"));
        let latency = at(trial, rate, u64::from(rate * TRY_SECONDS)).await?;
        if latency.lasts() {
            (lasts, took) = (rate, Some(latency.took));
        } else {
            fails = Some(rate);
            is_the_writers = latency.writer_late_us > u128::from(latency.last_tenth_us / 2);
        }
    }
    Ok(Highest { rows_per_second: lasts, took, is_the_writers })
}

/// What to try, of what lasted and what did not; None once it is known well enough.
fn next_rate(lasts: u32, fails: Option<u32>) -> Option<u32> {
    match fails {
        None if lasts == 0 => Some(TRIED_FIRST),
        None => Some(lasts * 2).filter(|rate| *rate <= TRIED_LAST),
        Some(fails) => (fails - lasts > PRECISION).then_some(u32::midpoint(lasts, fails)),
    }
}

fn section(bench: &Bench<'_>, rates: &[u32], rounds: &[Round]) -> Result<Section> {
    let title = format!(
        "rows at steady rates, each its own transaction: {} s of each rate, and who waits for nobody",
        f64::from(SECONDS) * bench.times
    );
    let mut section = Section::of("steady", title, &rounds)?;
    section.notes.push(format!(
        "milliseconds from when a row was due to be committed until one outside consumer of committed records had it; medians of {} \
         rounds, P99 with the extremes. MAX: of all rounds. CPU in percent of one processor. HIGHEST: the rate in rows/s and its P99, \
         to {PRECISION}, that {TRY_SECONDS} s of it do not make later and later (one try; \"writer\": beyond it the writer was late itself); \
         writer, Postgres, publisher, Kafka and consumer share the machine",
        bench.rounds
    ));
    section.table = head([
        "ARM", "ROWS/S", "P50", "P95", "P99", "FROM TO", "P99.9", "MAX", "CPU %", "BROKER %", "HIGHEST",
        "LOST", "TWICE",
    ]);
    for &rate in rates {
        let mut bars = Vec::new();
        for (arm, _) in bench.arms.publishers() {
            let own: Vec<&Round> = rounds.iter().filter(|round| round.arm == arm).collect();
            let spread = |of: &dyn Fn(&Latency) -> f64| {
                let all = own.iter().flat_map(|round| &round.latencies);
                Spread::of(all.filter(|it| it.rows_per_second == rate).map(of)).ok_or_else(nothing)
            };
            let ms = |of: fn(&Latency) -> u32| spread(&|latency| f64::from(of(latency)) / 1e3);
            let median = |of| ms(of).map(|spread| format!("{:.1}", spread.median));
            let p99 = ms(|it| it.took.p99_us)?;
            let highest = own.iter().find_map(|round| round.highest);
            let sum = |of: fn(Loss) -> u64| own.iter().map(|round| of(round.loss)).sum::<u64>().to_string();
            section.table.push(vec![
                arm.to_owned(),
                rate.to_string(),
                median(|it| it.took.p50_us)?,
                median(|it| it.took.p95_us)?,
                format!("{:.1}", p99.median),
                format!("{:.1} to {:.1}", p99.min, p99.max),
                median(|it| it.took.p999_us)?,
                format!("{:.1}", ms(|it| it.took.max_us)?.max),
                format!("{:.1}", spread(&|it| it.cpu_percent)?.median),
                format!("{:.1}", spread(&|it| it.broker_cpu_percent)?.median),
                highest.map_or_else(|| "-".to_owned(), Highest::cell),
                sum(Loss::lost),
                sum(|loss| loss.duplicates),
            ]);
            let label = format!("{:.1} ms", p99.median);
            bars.push(Bar { name: arm.to_owned(), parts: vec![p99.median], spread: Some(p99), label });
        }
        section.charts.push(Chart { title: format!("P99 at {rate} rows a second, in milliseconds"), bars });
    }
    section.failures = rounds.iter().filter_map(|round| failure(round.arm, round.loss)).collect();
    Ok(section)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_rate_is_between_one_that_lasts_and_one_that_does_not() {
        let find = |limit: u32| {
            let (mut lasts, mut fails) = (0, None);
            while let Some(rate) = next_rate(lasts, fails) {
                if rate <= limit { lasts = rate } else { fails = Some(rate) }
            }
            lasts
        };
        for limit in [500, 3_000, 8_000, 45_000, 100_000] {
            let found = find(limit);
            assert!(found <= limit && limit - found <= PRECISION, "{limit}: {found}");
        }
        assert_eq!(find(u32::MAX), TRIED_LAST);
    }
}

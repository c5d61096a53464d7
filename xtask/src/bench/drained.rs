//! What the drain of a workload says.

use serde::Serialize;

use super::{
    arm::Run,
    contents::Loss,
    numbers::{SPREAD_LIMIT, Spread},
    plot::{Bar, Chart},
    relay::arm_name,
    section::{Section, head},
    workload::Shape,
};
use crate::{cli::Delivery, failure::Result};

/// A workload and its arms.
#[derive(Debug, Serialize)]
pub(super) struct Drained {
    pub(super) workload: &'static str,
    pub(super) rows: u64,
    pub(super) rows_per_transaction: u64,
    pub(super) wal_bytes: i64,
    /// The relay's rows per second exactly once, to those at least once in the same round; where both ran.
    pub(super) exactly_once_ratio: Option<Spread>,
    pub(super) arms: Vec<Measured>,
}

/// An arm, over all rounds.
#[derive(Debug, Serialize)]
pub(super) struct Measured {
    pub(super) arm: &'static str,
    pub(super) rows_per_second: Spread,
    /// Of a row, on average, as it is sent.
    pub(super) payload_bytes: f64,
    /// Of the second half, of those that bring it to Kafka.
    pub(super) warm_rows_per_second: Option<Spread>,
    /// To `pg_recvlogical` in the same round: of the time from the start of the process until the last row.
    pub(super) ratio: Spread,
    /// Of the rounds: what is lost or in disorder, and what there is twice.
    /// None where nothing was published.
    pub(super) lost: Option<u64>,
    pub(super) duplicates: Option<u64>,
    /// Of a million rows; medians.
    pub(super) cpu_seconds_per_million: PerMillion,
    /// The largest of all rounds.
    pub(super) peak_rss_bytes: u64,
    pub(super) runs: Vec<Run>,
}

/// Processor seconds per million rows.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct PerMillion {
    reader: f64,
    walsender: f64,
    broker: f64,
    /// Of the three together.
    total: f64,
}

/// Of all runs that published; None where none did.
pub(super) fn sum(losses: &[Loss], of: impl Fn(Loss) -> u64) -> Option<u64> {
    (!losses.is_empty()).then(|| losses.iter().copied().map(of).sum())
}

pub(super) fn or_dash(count: Option<u64>) -> String {
    count.map_or_else(|| "-".to_owned(), |count| count.to_string())
}

/// What exactly-once delivery does to the rows per second: in each round, what is left of them.
pub(super) fn exactly_once_ratio(arms: &[Measured]) -> Option<Spread> {
    let runs = |delivery| {
        let arm = arms.iter().find(|measured| measured.arm == arm_name(delivery, false))?;
        Some(&arm.runs)
    };
    let (before, after) = (runs(Delivery::AtLeastOnce)?, runs(Delivery::ExactlyOnce)?);
    Spread::of(before.iter().zip(after).map(|(before, after)| after.rows_per_second / before.rows_per_second))
}

impl Measured {
    /// None without runs.
    pub(super) fn of(arm: &'static str, shape: Shape, runs: Vec<Run>, baseline: &[Run]) -> Option<Self> {
        #[expect(clippy::cast_precision_loss, reason = "no count of rows comes near 2^52")]
        let millions = shape.rows as f64 / 1e6;
        let median = |of: fn(&Run) -> f64| {
            Spread::of(runs.iter().map(of)).map_or(0.0, |spread| spread.median / millions)
        };
        let ratios = runs.iter().zip(baseline).map(|(run, base)| base.seconds / run.seconds);
        let losses: Vec<_> = runs.iter().filter_map(|run| run.loss).collect();
        Some(Self {
            arm,
            rows_per_second: Spread::of(runs.iter().map(|run| run.rows_per_second))?,
            payload_bytes: f64::from(shape.payload_bytes),
            warm_rows_per_second: Spread::of(runs.iter().filter_map(|run| run.warm_rows_per_second)),
            ratio: Spread::of(ratios)?,
            lost: sum(&losses, Loss::lost),
            duplicates: sum(&losses, |loss| loss.duplicates),
            cpu_seconds_per_million: PerMillion {
                reader: median(|run| run.cpu_seconds.reader),
                walsender: median(|run| run.cpu_seconds.walsender),
                broker: median(|run| run.cpu_seconds.broker),
                total: median(|run| run.cpu_seconds.total()),
            },
            peak_rss_bytes: runs.iter().map(|run| run.peak_rss_bytes).max()?,
            runs,
        })
    }

    fn cells(&self) -> Vec<String> {
        let cpu = self.cpu_seconds_per_million;
        let seconds = |n: f64| if n > 0.0 { format!("{n:.2}") } else { "-".to_owned() };
        let thousands = |n: f64| format!("{:.1}k", n / 1e3);
        vec![
            self.arm.to_owned(),
            thousands(self.rows_per_second.median),
            format!("{} to {}", thousands(self.rows_per_second.min), thousands(self.rows_per_second.max)),
            self.warm_rows_per_second.map_or_else(|| "-".to_owned(), |warm| thousands(warm.median)),
            format!("{:.1}", self.rows_per_second.median * self.payload_bytes / 1e6),
            format!("{:.2}", self.ratio.median),
            format!("{:.2} to {:.2}", self.ratio.min, self.ratio.max),
            seconds(cpu.reader),
            seconds(cpu.walsender),
            seconds(cpu.broker),
            seconds(cpu.total),
            // Of what runs in the bench's own process it is not told.
            if self.peak_rss_bytes > 0 { (self.peak_rss_bytes >> 20).to_string() } else { "-".to_owned() },
            match self.lost {
                Some(lost @ 1..) => format!("FAILED: {lost}"),
                lost => or_dash(lost),
            },
            or_dash(self.duplicates),
        ]
    }

    fn has_lost(&self) -> Option<u64> {
        self.lost.filter(|lost| *lost > 0)
    }
}

impl Drained {
    /// As a section of the report.
    pub(super) fn section(&self, rounds: u32) -> Result<Section> {
        let Self { workload, rows, rows_per_transaction, wal_bytes, arms, .. } = self;
        let title =
            format!("{rows} rows, {rows_per_transaction} to a transaction, {} MiB of log", wal_bytes >> 20);
        let mut section = Section::of(format!("drain {workload}"), title, self)?;
        section.notes.push(format!(
            "{rounds} rounds, interleaved: medians, and the extremes. Rates to Kafka from the first record on, WARM of the second half. RATIO: to \
             pg_recvlogical, both from the start of the process until the last row. CPU in seconds per million rows, TOTAL of the three"
        ));
        section.table = head([
            "ARM",
            "ROWS/S",
            "FROM TO",
            "WARM",
            "MB/S",
            "RATIO",
            "FROM TO",
            "READER",
            "WALSENDER",
            "BROKER",
            "TOTAL",
            "PEAK MIB",
            "LOST",
            "TWICE",
        ]);
        section.table.extend(arms.iter().map(Measured::cells));
        section.findings.extend(self.exactly_once());
        section.findings.extend(self.aims());
        section.charts = self.charts();
        for arm in arms {
            if let Some(lost) = arm.has_lost() {
                let what = format!("{}: {lost} rows are missing, out of order or nobody's", arm.arm);
                section.failures.push(what);
            }
            let spread = arm.ratio.relative();
            if spread > SPREAD_LIMIT {
                section.warnings.push(format!(
                    "{}: the ratio spreads by {:.0} % of its median, so it says little; try again on a quiet machine, with more --rounds or more --rows-factor",
                    arm.arm,
                    spread * 100.0
                ));
            }
        }
        Ok(section)
    }

    fn exactly_once(&self) -> Option<String> {
        let Spread { median, min, max } = self.exactly_once_ratio?;
        Some(format!("exactly once, {median:.2} ({min:.2} to {max:.2}) of the rows per second at least once"))
    }

    fn arm(&self, name: &str) -> Option<&Measured> {
        self.arms.iter().find(|arm| arm.arm == name)
    }

    /// The relay beside Debezium Server when that is tuned and warm.
    fn aims(&self) -> Option<String> {
        let (relay, tuned) = (self.arm("relay")?, self.arm("debezium, tuned")?);
        if relay.has_lost().or(tuned.has_lost()).is_some() {
            return None;
        }
        let (cpu, others) = (relay.cpu_seconds_per_million, tuned.cpu_seconds_per_million);
        let warm = |arm: &Measured| arm.warm_rows_per_second.map(|warm| warm.median);
        #[expect(clippy::cast_precision_loss, reason = "no process has 2^52 bytes")]
        let memory = tuned.peak_rss_bytes as f64 / relay.peak_rss_bytes as f64;
        Some(format!(
            "the relay to Debezium tuned: {:.2} of its rows per second when warm; 1/{:.1} of its CPU (1/{:.1} with walsender and broker) \
             and 1/{memory:.0} of its memory, with the start of the JVM and at its default heap",
            relay.rows_per_second.median / warm(tuned)?,
            others.reader / cpu.reader,
            others.total / cpu.total
        ))
    }

    fn charts(&self) -> Vec<Chart> {
        let rate = |arm: &Measured| Bar {
            name: arm.arm.to_owned(),
            parts: vec![arm.rows_per_second.median],
            spread: Some(arm.rows_per_second),
            label: match arm.has_lost() {
                Some(lost) => format!("FAILED: {lost} lost"),
                None => format!("{:.1}k", arm.rows_per_second.median / 1e3),
            },
        };
        let cpu = |arm: &Measured| {
            let PerMillion { reader, walsender, broker, .. } = arm.cpu_seconds_per_million;
            let label = format!("{reader:.1} + {walsender:.1} + {broker:.1}");
            Bar { name: arm.arm.to_owned(), parts: vec![reader, walsender, broker], spread: None, label }
        };
        #[expect(clippy::cast_precision_loss, reason = "no process has 2^52 bytes")]
        let memory = |arm: &Measured| {
            let mib = arm.peak_rss_bytes as f64 / f64::from(1 << 20);
            Bar { name: arm.arm.to_owned(), parts: vec![mib], spread: None, label: format!("{mib:.0} MiB") }
        };
        let chart = |title: &str, bar: &dyn Fn(&Measured) -> Bar| Chart {
            title: title.to_owned(),
            bars: self.arms.iter().map(bar).collect(),
        };
        vec![
            chart("Rows a second: median, and from the slowest to the fastest round", &rate),
            chart("CPU seconds a million rows: reader, walsender, broker", &cpu),
            chart("Peak memory of the reader", &memory),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Workload;

    fn run(seconds: f64) -> Run {
        Run { seconds, rows_per_second: 1000.0 / seconds, ..Run::default() }
    }

    #[test]
    fn a_ratio_is_to_the_same_round_and_a_wide_one_is_doubted() {
        let (baseline, shape) = ([run(2.0), run(4.0)], Workload::Single.shape(0.001));
        let of = |arm, runs| Measured::of(arm, shape, runs, &baseline).unwrap();
        let measured = of("relay", vec![run(1.0), run(1.0)]);
        assert!((measured.ratio.min - 2.0).abs() < 1e-9 && (measured.ratio.max - 4.0).abs() < 1e-9);
        let mut twice = of("relay, exactly-once", vec![run(2.0), run(4.0)]);
        twice.lost = Some(3);
        let arms = vec![measured, twice];
        let drained = Drained {
            workload: "single",
            rows: 1000,
            rows_per_transaction: 1,
            wal_bytes: 1,
            exactly_once_ratio: exactly_once_ratio(&arms),
            arms,
        };
        let section = drained.section(2).unwrap();
        assert_eq!((section.warnings.len(), section.failures.len()), (1, 1));
        let text = section.text();
        assert!(text.contains("exactly once, 0.38 (0.25 to 0.50)") && text.contains("RATIO"), "{text}");
    }
}

//! What a drain bench says: as JSON, and as aligned text.

use serde::Serialize;

use super::{
    arm::Run,
    host::Host,
    idle::Round,
    numbers::{SPREAD_LIMIT, Spread},
    relay::arm_name,
    steady,
};
use crate::cli::Delivery;

/// All of it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) host: Host,
    pub(super) versions: Versions,
    /// Of Postgres, beside the local stack's.
    pub(super) postgres_settings: Vec<String>,
    pub(super) rounds: u32,
    pub(super) workloads: Vec<Drained>,
    /// The rounds of the idle workload, where it ran.
    pub(super) idle: Vec<Round>,
    /// The rounds of the steady workload, where it ran: each has all the relays.
    pub(super) steady: Vec<Vec<steady::Round>>,
    pub(super) warnings: Vec<String>,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct Versions {
    pub(super) relay: String,
    pub(super) pg_recvlogical: String,
    pub(super) postgres: String,
    pub(super) kafka: String,
}

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
    /// To `pg_recvlogical` in the same round.
    pub(super) ratio: Spread,
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
}

/// What exactly-once delivery does to the rows per second: in each round, what is left of them.
pub(super) fn exactly_once_ratio(arms: &[Measured]) -> Option<Spread> {
    let runs = |delivery| {
        let arm = arms.iter().find(|measured| measured.arm == arm_name(delivery, false))?;
        Some(&arm.runs)
    };
    let (before, after) = (runs(Delivery::AtLeastOnce)?, runs(Delivery::ExactlyOnce)?);
    Spread::of(before.iter().zip(after).map(|(before, after)| before.seconds / after.seconds))
}

impl Measured {
    /// None without runs.
    pub(super) fn of(arm: &'static str, rows: u64, runs: Vec<Run>, baseline: &[Run]) -> Option<Self> {
        #[expect(clippy::cast_precision_loss, reason = "no count of rows comes near 2^52")]
        let millions = rows as f64 / 1e6;
        let median = |of: fn(&Run) -> f64| {
            Spread::of(runs.iter().map(of)).map_or(0.0, |spread| spread.median / millions)
        };
        let ratios = runs.iter().zip(baseline).map(|(run, base)| base.seconds / run.seconds);
        Some(Self {
            arm,
            rows_per_second: Spread::of(runs.iter().map(|run| run.rows_per_second))?,
            ratio: Spread::of(ratios)?,
            cpu_seconds_per_million: PerMillion {
                reader: median(|run| run.cpu_seconds.reader),
                walsender: median(|run| run.cpu_seconds.walsender),
                broker: median(|run| run.cpu_seconds.broker),
            },
            peak_rss_bytes: runs.iter().map(|run| run.peak_rss_bytes).max()?,
            runs,
        })
    }

    fn cells(&self, workload: &'static str) -> Vec<String> {
        let cpu = self.cpu_seconds_per_million;
        let seconds = |n: f64| if n > 0.0 { format!("{n:.2}") } else { "-".to_owned() };
        let thousands = |n: f64| format!("{:.1}k", n / 1e3);
        vec![
            workload.to_owned(),
            self.arm.to_owned(),
            thousands(self.rows_per_second.median),
            format!("{} to {}", thousands(self.rows_per_second.min), thousands(self.rows_per_second.max)),
            format!("{:.2}", self.ratio.median),
            format!("{:.2} to {:.2}", self.ratio.min, self.ratio.max),
            seconds(cpu.reader),
            seconds(cpu.walsender),
            seconds(cpu.broker),
            format!("{}", self.peak_rss_bytes >> 20),
        ]
    }
}

impl Drained {
    /// For a person.
    fn exactly_once(&self) -> Option<String> {
        let Spread { median, min, max } = self.exactly_once_ratio?;
        Some(format!(
            "{}: exactly once, {median:.2} ({min:.2} to {max:.2}) of the rows per second at least once",
            self.workload
        ))
    }
}

impl Report {
    /// What the numbers cannot say, from the numbers.
    pub(super) fn doubt(&mut self) {
        for drained in &self.workloads {
            for measured in &drained.arms {
                let spread = measured.ratio.relative();
                if spread > SPREAD_LIMIT {
                    self.warnings.push(format!(
                        "{} of {}: the ratio spreads by {:.0} % of its median, so it says little; try again on a quiet \
                         machine, with more --rounds or more --rows-factor",
                        measured.arm,
                        drained.workload,
                        spread * 100.0
                    ));
                }
            }
        }
    }

    /// For a person.
    pub(super) fn text(&self) -> String {
        let Versions { relay, pg_recvlogical, postgres, kafka } = &self.versions;
        let mut lines = vec![
            format!("{relay} on PostgreSQL {postgres} and Kafka {kafka}, measured by {pg_recvlogical}"),
            self.host.line(),
            format!("TCP on loopback, one broker; Postgres with {}", self.postgres_settings.join(", ")),
        ];
        if !self.workloads.is_empty() {
            lines.push(format!(
                "{} rounds, interleaved: medians, and the extremes; CPU in seconds per million rows",
                self.rounds
            ));
            lines.push(String::new());
            lines.push(self.table());
            lines.extend(self.workloads.iter().filter_map(Drained::exactly_once));
        }
        for (number, Round { paced, eager }) in (1..).zip(&self.idle) {
            lines.push(format!(
                "idle, round {number}, {} rows: commit to decoded p50 {} µs and p99 {} µs paced, {} µs and {} µs without \
                 pacing",
                paced.count, paced.p50, paced.p99, eager.p50, eager.p99
            ));
        }
        for (number, round) in (1..).zip(&self.steady) {
            lines.extend(round.iter().map(|relay| relay.line(number)));
        }
        lines.extend(self.warnings.iter().map(|warning| format!("warning: {warning}")));
        lines.join("\n")
    }

    fn table(&self) -> String {
        let head = [
            "WORKLOAD",
            "ARM",
            "ROWS/S",
            "FROM TO",
            "RATIO",
            "FROM TO",
            "READER",
            "WALSENDER",
            "BROKER",
            "PEAK MIB",
        ];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for drained in &self.workloads {
            rows.extend(drained.arms.iter().map(|measured| measured.cells(drained.workload)));
        }
        table(&rows)
    }
}

/// Aligned columns; the first row is the head.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(seconds: f64) -> Run {
        Run { seconds, rows_per_second: 1000.0 / seconds, ..Run::default() }
    }

    #[test]
    fn a_ratio_is_to_the_same_round_and_a_wide_one_is_doubted() {
        let baseline = [run(2.0), run(4.0)];
        let measured = Measured::of("relay", 1000, vec![run(1.0), run(1.0)], &baseline).unwrap();
        assert!((measured.ratio.min - 2.0).abs() < 1e-9 && (measured.ratio.max - 4.0).abs() < 1e-9);
        let twice = Measured::of("relay, exactly-once", 1000, vec![run(2.0), run(4.0)], &baseline).unwrap();
        let arms = vec![measured, twice];
        let mut report = Report {
            host: Host::look(),
            versions: Versions {
                relay: String::new(),
                pg_recvlogical: String::new(),
                postgres: String::new(),
                kafka: String::new(),
            },
            postgres_settings: Vec::new(),
            rounds: 2,
            workloads: vec![Drained {
                workload: "single",
                rows: 1000,
                rows_per_transaction: 1,
                wal_bytes: 1,
                exactly_once_ratio: exactly_once_ratio(&arms),
                arms,
            }],
            idle: Vec::new(),
            steady: Vec::new(),
            warnings: Vec::new(),
        };
        report.doubt();
        assert_eq!(report.warnings.len(), 1);
        assert!(report.text().contains("exactly once, 0.38 (0.25 to 0.50)"), "{}", report.text());
        assert!(report.text().contains("RATIO"), "{}", report.text());
    }
}

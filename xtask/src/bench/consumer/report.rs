//! What the consumer's bench says: as JSON, and as aligned text.

use serde::Serialize;

use super::first::First;
use crate::{
    bench::{
        numbers::{SPREAD_LIMIT, Spread},
        plot::{Bar, Chart},
        section::{Section, head},
    },
    failure::{Failure, Result},
};

/// What one run of an arm took.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Run {
    /// From the first event to the last; what comes before the first transaction, or the assignment, is not in it.
    pub(super) seconds: f64,
    pub(super) events_per_second: f64,
    /// Zero where there are no transactions.
    pub(super) events_per_transaction: f64,
    /// Of what does the work: the consumer, this process, or Python; from the start of the process, but for this one.
    pub(super) cpu_seconds: f64,
    /// Of the backends that serve it.
    pub(super) postgres_cpu_seconds: f64,
    pub(super) broker_cpu_seconds: f64,
    /// Zero of this process, which holds all rows.
    pub(super) peak_rss_bytes: u64,
}

impl Run {
    /// So many events in so many seconds, and nothing else yet.
    pub(super) fn of(events: u64, seconds: f64) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "no count of events comes near 2^52")]
        let events_per_second = events as f64 / seconds;
        Self { seconds, events_per_second, ..Self::default() }
    }
}

/// The runs of each arm, round by round.
#[derive(Debug, Default, Serialize)]
pub(super) struct Runs {
    pub(super) consumer: Vec<Run>,
    pub(super) sql: Vec<Run>,
    pub(super) confluent_kafka: Vec<Run>,
}

/// What was measured, on what.
#[derive(Debug, Serialize)]
pub(super) struct Setting {
    pub(super) handler: String,
    pub(super) confluent_kafka: &'static str,
    /// Of Postgres, beside the local stack's.
    pub(super) postgres_settings: Vec<String>,
    pub(super) events: u64,
    pub(super) orders: u64,
    pub(super) partitions: u32,
    /// The most events of one transaction.
    pub(super) batch_records: u64,
}

/// All of it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    setting: Setting,
    runs: Runs,
    /// The consumer's events a second to those of another arm in the same round.
    ratio_to_sql: Spread,
    ratio_to_confluent_kafka: Spread,
    first_event_seconds: First,
}

impl Report {
    pub(super) fn new(setting: Setting, runs: Runs, first: First) -> Result<Self> {
        let ratio = |other: &[Run]| {
            let pairs = runs.consumer.iter().zip(other);
            Spread::of(pairs.map(|(consumer, other)| consumer.events_per_second / other.events_per_second))
                .ok_or_else(|| Failure::new("nothing was measured"))
        };
        let (sql, confluent_kafka) = (ratio(&runs.sql)?, ratio(&runs.confluent_kafka)?);
        Ok(Self {
            setting,
            runs,
            ratio_to_sql: sql,
            ratio_to_confluent_kafka: confluent_kafka,
            first_event_seconds: first,
        })
    }

    /// With a warning for each ratio that says little.
    pub(super) fn section(&self) -> Result<Section> {
        let Setting { handler, confluent_kafka, events, orders, partitions, batch_records, .. } =
            &self.setting;
        let title = format!("{handler} applies {events} events of {orders} orders that are in the topic");
        let mut section = Section::of("consumer", title, self)?;
        section.notes.push(format!(
            "{partitions} partitions, at most {batch_records} events to a transaction, {} rounds interleaved: medians, and the extremes; Postgres with {}; CPU in seconds per million events: of the process, its Postgres backends, the broker",
            self.runs.consumer.len(),
            self.setting.postgres_settings.join(", ")
        ));
        section.notes.push(format!(
            "sql copies the rows that the consumer left, each once, whereas the consumer writes an order by each event; both by Postgres's Unix socket; {confluent_kafka} reads and does nothing"
        ));
        section.table =
            head(["ARM", "EVENTS/S", "FROM TO", "EVENTS/TX", "CPU", "POSTGRES", "BROKER", "PEAK MIB"]);
        let Runs { consumer, sql, confluent_kafka } = &self.runs;
        let mut bars = Vec::new();
        for (arm, runs) in [("consumer", consumer), ("sql", sql), ("confluent-kafka", confluent_kafka)] {
            section.table.extend(cells(arm, runs, *events));
            if let Some(rate) = Spread::of(runs.iter().map(|run| run.events_per_second)) {
                let label = format!("{:.1}k", rate.median / 1e3);
                bars.push(Bar { name: arm.to_owned(), parts: vec![rate.median], spread: Some(rate), label });
            }
        }
        section.charts.push(Chart { title: "Events a second".into(), bars });
        for (arm, ratio) in [("sql", self.ratio_to_sql), ("confluent-kafka", self.ratio_to_confluent_kafka)] {
            let Spread { median, min, max } = ratio;
            section
                .findings
                .push(format!("ratio of the consumer to {arm}: {median:.2} ({min:.2} to {max:.2})"));
            if ratio.relative() > SPREAD_LIMIT {
                section.warnings.push(format!(
                    "the ratio to {arm} spreads by {:.0} % of its median, so it says little; try again on a quiet machine, with more --rounds or more --events",
                    ratio.relative() * 100.0
                ));
            }
        }
        let First { tries, waiting, starting } = &self.first_event_seconds;
        for (what, seconds) in [
            ("a group that waits on the empty topic, from the write", waiting),
            ("a group that starts after it was written, from the start", starting),
        ] {
            section.findings.push(format!(
                "first event of a new topic, {what}: {:.3} s, at most {:.3} s, of {tries} tries",
                seconds.median, seconds.max
            ));
        }
        Ok(section)
    }
}

fn cells(arm: &str, runs: &[Run], events: u64) -> Option<Vec<String>> {
    #[expect(clippy::cast_precision_loss, reason = "no count of events comes near 2^52")]
    let millions = events as f64 / 1e6;
    let median = |of: fn(&Run) -> f64| Spread::of(runs.iter().map(of)).map_or(0.0, |spread| spread.median);
    let some = |n: f64, decimals: usize| if n > 0.0 { format!("{n:.decimals$}") } else { "-".to_owned() };
    let rate = Spread::of(runs.iter().map(|run| run.events_per_second / 1e3))?;
    let peak = runs.iter().map(|run| run.peak_rss_bytes).max()? >> 20;
    Some(vec![
        arm.to_owned(),
        format!("{:.1}k", rate.median),
        format!("{:.1}k to {:.1}k", rate.min, rate.max),
        some(median(|run| run.events_per_transaction), 0),
        some(median(|run| run.cpu_seconds) / millions, 2),
        some(median(|run| run.postgres_cpu_seconds) / millions, 2),
        some(median(|run| run.broker_cpu_seconds) / millions, 2),
        if peak > 0 { peak.to_string() } else { "-".to_owned() },
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_to_the_same_round_and_a_wide_one_is_doubted() {
        let runs = |seconds: [f64; 2]| seconds.map(|seconds| Run::of(1000, seconds)).to_vec();
        let runs =
            Runs { consumer: runs([2.0, 8.0]), sql: runs([1.0, 4.0]), confluent_kafka: runs([0.2, 1.6]) };
        let setting = Setting {
            handler: String::new(),
            confluent_kafka: "",
            postgres_settings: Vec::new(),
            events: 1000,
            orders: 250,
            partitions: 6,
            batch_records: 500,
        };
        let spread = Spread { median: 0.1, min: 0.1, max: 0.1 };
        let first = First { tries: 1, waiting: spread, starting: spread };
        let report = Report::new(setting, runs, first).unwrap();
        assert!((report.ratio_to_sql.min - 0.5).abs() < 1e-9 && (report.ratio_to_sql.max - 0.5).abs() < 1e-9);
        assert!((report.ratio_to_confluent_kafka.max - 0.2).abs() < 1e-9);
        let section = report.section().unwrap();
        assert_eq!(section.warnings.len(), 1, "{:?}", section.warnings);
        let text = section.text();
        assert!(text.contains("ratio of the consumer to sql: 0.50 (0.50 to 0.50)"), "{text}");
    }
}

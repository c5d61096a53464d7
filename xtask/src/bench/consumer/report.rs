//! What the consumer's bench says: as JSON, and as aligned text.

use serde::Serialize;

use super::first::First;
use crate::{
    bench::{
        host::Host,
        numbers::{SPREAD_LIMIT, Spread},
        report::table,
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
    pub(super) host: Host,
    pub(super) consumer: String,
    pub(super) handler: String,
    pub(super) confluent_kafka: &'static str,
    pub(super) postgres: String,
    pub(super) kafka: String,
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
    warnings: Vec<String>,
}

impl Report {
    /// With a warning for each ratio that says little.
    pub(super) fn new(setting: Setting, runs: Runs, first: First, mut warnings: Vec<String>) -> Result<Self> {
        let ratio = |other: &[Run]| {
            let pairs = runs.consumer.iter().zip(other);
            Spread::of(pairs.map(|(consumer, other)| consumer.events_per_second / other.events_per_second))
                .ok_or_else(|| Failure::new("nothing was measured"))
        };
        let (sql, confluent_kafka) = (ratio(&runs.sql)?, ratio(&runs.confluent_kafka)?);
        for (arm, ratio) in [("sql", sql), ("confluent-kafka", confluent_kafka)] {
            if ratio.relative() > SPREAD_LIMIT {
                warnings.push(format!(
                    "the ratio to {arm} spreads by {:.0} % of its median, so it says little; try again on a quiet \
                     machine, with more --rounds or more --events",
                    ratio.relative() * 100.0
                ));
            }
        }
        Ok(Self {
            setting,
            runs,
            ratio_to_sql: sql,
            ratio_to_confluent_kafka: confluent_kafka,
            first_event_seconds: first,
            warnings,
        })
    }

    /// For a person.
    pub(super) fn text(&self) -> String {
        let Setting { host, consumer, handler, confluent_kafka, postgres, kafka, .. } = &self.setting;
        let Setting { events, orders, partitions, batch_records, .. } = &self.setting;
        let First { tries, waiting, starting } = &self.first_event_seconds;
        let ratio = |s: &Spread| format!("{:.2} ({:.2} to {:.2})", s.median, s.min, s.max);
        let mut lines = vec![
            format!(
                "{consumer} with {handler} on PostgreSQL {postgres} and Kafka {kafka}, beside SQL and {confluent_kafka}"
            ),
            host.line(),
            format!(
                "{events} events of {orders} orders in {partitions} partitions, at most {batch_records} to a transaction, {} \
                 rounds interleaved; one broker; Postgres with {}",
                self.runs.consumer.len(),
                self.setting.postgres_settings.join(", ")
            ),
            "medians, and the extremes; CPU in seconds per million events: of the process, its Postgres backends, the broker"
                .to_owned(),
            "sql copies the rows that the consumer left, each once, whereas the consumer writes an order by each event; both by \
             Postgres's Unix socket"
                .to_owned(),
            String::new(),
            self.table(),
            String::new(),
            format!("ratio of the consumer to sql: {}", ratio(&self.ratio_to_sql)),
            format!("ratio of the consumer to confluent-kafka: {}", ratio(&self.ratio_to_confluent_kafka)),
        ];
        for (what, seconds) in [
            ("a group that waits on the empty topic, from the write", waiting),
            ("a group that starts after it was written, from the start", starting),
        ] {
            lines.push(format!(
                "first event of a new topic, {what}: {:.3} s, at most {:.3} s, of {tries} tries",
                seconds.median, seconds.max
            ));
        }
        lines.extend(self.warnings.iter().map(|warning| format!("warning: {warning}")));
        lines.join("\n")
    }

    fn table(&self) -> String {
        let head = ["ARM", "EVENTS/S", "FROM TO", "EVENTS/TX", "CPU", "POSTGRES", "BROKER", "PEAK MIB"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        let Runs { consumer, sql, confluent_kafka } = &self.runs;
        for (arm, runs) in [("consumer", consumer), ("sql", sql), ("confluent-kafka", confluent_kafka)] {
            rows.extend(cells(arm, runs, self.setting.events));
        }
        table(&rows)
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
            host: Host::look(),
            consumer: String::new(),
            handler: String::new(),
            confluent_kafka: "",
            postgres: String::new(),
            kafka: String::new(),
            postgres_settings: Vec::new(),
            events: 1000,
            orders: 250,
            partitions: 6,
            batch_records: 500,
        };
        let spread = Spread { median: 0.1, min: 0.1, max: 0.1 };
        let first = First { tries: 1, waiting: spread, starting: spread };
        let report = Report::new(setting, runs, first, Vec::new()).unwrap();
        assert!((report.ratio_to_sql.min - 0.5).abs() < 1e-9 && (report.ratio_to_sql.max - 0.5).abs() < 1e-9);
        assert!((report.ratio_to_confluent_kafka.max - 0.2).abs() < 1e-9);
        assert_eq!(report.warnings.len(), 1, "{:?}", report.warnings);
        let text = report.text();
        assert!(text.contains("ratio of the consumer to sql: 0.50 (0.50 to 0.50)"), "{text}");
    }
}

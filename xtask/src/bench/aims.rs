//! What the relay is to come to, beside what a run of everything found.

use serde::Serialize;
use serde_json::Value;

use super::{
    numbers::Spread,
    section::{Section, head},
};

const MIB: f64 = 1_048_576.0;

/// One of them.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Aim {
    what: String,
    here: String,
    /// None: it is told beside one, and nothing is asked of it.
    is_met: Option<bool>,
}

impl Aim {
    fn of(what: &str, here: String, is_met: bool) -> Self {
        Self { what: what.to_owned(), here, is_met: Some(is_met) }
    }

    /// Of a number that is to be at least so large.
    fn at_least(what: &str, here: f64, least: f64) -> Self {
        Self::of(what, format!("{here:.2}"), here >= least)
    }

    /// Of something that is to be at most a part of another's.
    fn part(what: &str, ours: f64, others: f64, part: f64) -> Self {
        Self::of(what, format!("1/{:.1}", others / ours), ours * part <= others)
    }
}

/// As a section; None where not all of it was measured.
pub(super) fn section(sections: &[Section]) -> Option<Section> {
    let aims = aims(sections)?;
    let title = "what the relay at its defaults is to come to, as far as this run says".to_owned();
    let mut section = Section::of("aims", title, &aims).ok()?;
    section.table = head(["AIM", "HERE", ""]);
    section.table.extend(aims.into_iter().map(|Aim { what, here, is_met }| {
        let met = match is_met {
            Some(true) => "met",
            Some(false) => "missed",
            None => "",
        };
        vec![what, here, met.to_owned()]
    }));
    Some(section)
}

fn aims(sections: &[Section]) -> Option<Vec<Aim>> {
    let numbers = |name: &str| Some(&sections.iter().find(|section| section.name == name)?.numbers);
    let mut aims = Vec::new();
    for (workload, warm, what) in [
        ("drain single", 4.0, "single-row transactions"),
        ("drain thousand", 5.0, "1,000 rows to a transaction"),
    ] {
        let arms = numbers(workload)?.get("arms")?;
        let number = |arm: &str, path: &str| find(arms, arm)?.pointer(path)?.as_f64();
        let ours = |path: &str| number("relay", path);
        let tuned = |path: &str| number("debezium, tuned", path);
        let (rate, theirs) = (ours("/rows_per_second/median")?, tuned("/warm_rows_per_second/median")?);
        aims.push(Aim::at_least(
            &format!("{warm} times the rows a second of warm tuned Debezium, {what}"),
            rate / theirs,
            warm,
        ));
        if workload == "drain single" {
            let what = format!("1.8 times pg_recvlogical, {what}");
            aims.push(Aim::at_least(&what, ours("/ratio/median")?, 1.8));
        }
        let (cpu, total) = ("/cpu_seconds_per_million/reader", "/cpu_seconds_per_million/total");
        let name = format!("a tenth of the CPU of tuned Debezium's process, {what}");
        aims.push(Aim::part(&name, ours(cpu)?, tuned(cpu)?, 10.0));
        let beside = Aim::part("  with walsender and broker", ours(total)?, tuned(total)?, 1.0);
        aims.push(Aim { is_met: None, ..beside });
        let (memory, others) = (ours("/peak_rss_bytes")?, tuned("/peak_rss_bytes")?);
        let here = format!("1/{:.1}, {:.0} MiB", others / memory, memory / MIB);
        let name = format!("a thirtieth of its memory at its default heap, 64 MiB, {what}");
        aims.push(Aim::of(&name, here, memory * 30.0 <= others && memory <= 64.0 * MIB));
    }
    let steady = numbers("steady")?;
    for rate in [500, 2_000] {
        let ours = p99(steady, "relay", rate)?;
        for (other, whose, part) in
            [("debezium, tuned", "tuned Debezium's", 5.0), ("debezium", "its defaults'", 100.0)]
        {
            let what = format!("P99 at {rate} rows/s at most 1/{part} of {whose}");
            aims.push(Aim::part(&what, ours, p99(steady, other, rate)?, part));
        }
    }
    let idle = find(numbers("idle")?, "relay")?.get("cpu_percent")?.as_f64()?;
    aims.push(Aim::of("idle below 0.2 % of a processor", format!("{idle:.2} %"), idle < 0.2));
    let failures: usize = sections.iter().map(|section| section.failures.len()).sum();
    aims.push(Aim::of("nothing lost, by anybody", format!("{failures} failures"), failures == 0));
    Some(aims)
}

/// The first of several that is of an arm.
fn find<'a>(all: &'a Value, arm: &str) -> Option<&'a Value> {
    all.as_array()?.iter().find(|one| one["arm"] == arm)
}

/// The median of all rounds, in microseconds.
fn p99(rounds: &Value, arm: &str, rate: u64) -> Option<f64> {
    let own = rounds.as_array()?.iter().filter(|round| round["arm"] == arm);
    let latencies = own.filter_map(|round| round["latencies"].as_array()).flatten();
    let at_rate = latencies.filter(|latency| latency["rows_per_second"] == rate);
    Some(Spread::of(at_rate.filter_map(|latency| latency["p99_us"].as_f64()))?.median)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sections() -> Vec<Section> {
        let arm = |arm: &str, rate: f64, cpu: f64, memory: u64| {
            json!({"arm": arm, "rows_per_second": {"median": rate}, "warm_rows_per_second": {"median": rate},
                   "ratio": {"median": 1.9}, "cpu_seconds_per_million": {"reader": cpu, "total": cpu + 50.0},
                   "peak_rss_bytes": memory << 20})
        };
        let arms = json!({"arms": [arm("relay", 40.0, 5.0, 40), arm("debezium, tuned", 10.0, 60.0, 1300)]});
        let round = |arm: &str, p99: u32| {
            json!({"arm": arm, "latencies": [{"rows_per_second": 500, "p99_us": p99},
                                             {"rows_per_second": 2000, "p99_us": 2 * p99}]})
        };
        let steady = json!([
            round("relay", 5),
            round("debezium", 499),
            round("debezium, tuned", 25),
            round("relay", 5)
        ]);
        let idle = json!([{"arm": "relay", "cpu_percent": 0.1}]);
        [("drain single", arms.clone()), ("drain thousand", arms), ("steady", steady), ("idle", idle)]
            .map(|(name, numbers)| Section { name: name.to_owned(), numbers, ..Section::default() })
            .into()
    }

    #[test]
    fn each_aim_is_held_against_the_run() {
        let aims = aims(&sections()).unwrap();
        let missed: Vec<&str> =
            aims.iter().filter(|aim| aim.is_met == Some(false)).map(|aim| aim.what.as_str()).collect();
        assert_eq!(
            missed,
            [
                "5 times the rows a second of warm tuned Debezium, 1,000 rows to a transaction",
                "P99 at 500 rows/s at most 1/100 of its defaults'",
                "P99 at 2000 rows/s at most 1/100 of its defaults'",
            ]
        );
        assert!(aims.iter().any(|aim| aim.here == "1/2.0" && aim.is_met.is_none()), "{aims:?}");
        let mut lossy = sections();
        lossy[0].failures.push("relay: 1 rows are missing".to_owned());
        assert_eq!(super::aims(&lossy).unwrap().last().unwrap().is_met, Some(false));
        assert!(section(&sections()[1..]).is_none(), "not all of it was measured");
    }
}

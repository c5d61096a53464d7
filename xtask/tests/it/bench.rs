//! The bench, in its shortest form: that it runs and what it tells, not how fast anything is.

use std::{path::Path, process::Command};

use serde_json::Value;

use crate::ok;

#[test]
fn a_short_bench_drains_the_same_rows_by_every_reader_and_tells_what_that_took() {
    let xtask = Path::new(env!("CARGO_BIN_EXE_xtask"));
    let relay = xtask.with_file_name("cdc-relay");
    assert!(relay.is_file(), "{} is missing: run `cargo xtask test`, which builds it", relay.display());
    let short = ["--rows-factor", "0.005", "--rounds", "1", "--json", "--no-build"];
    let workloads = ["--workload", "single", "--workload", "bytea", "--workload", "idle"];
    let output = Command::new(xtask).args(["bench", "drain"]).args(short).args(workloads).output();
    let report: Value =
        serde_json::from_str(&ok(&output.unwrap())).expect("--json prints JSON and nothing else");

    let drained = report["workloads"].as_array().unwrap();
    let names: Vec<_> = drained.iter().map(|workload| workload["workload"].as_str().unwrap()).collect();
    assert_eq!(names, ["single", "bytea"]);
    assert_eq!(drained[0]["rows"], 1_500);
    for workload in drained {
        let arms = workload["arms"].as_array().unwrap();
        let names: Vec<_> = arms.iter().map(|arm| arm["arm"].as_str().unwrap()).collect();
        assert_eq!(names, ["pg_recvlogical", "session", "relay"]);
        for arm in arms {
            assert!(arm["rows_per_second"]["median"].as_f64().unwrap() > 0.0, "{arm}");
            assert!(arm["peak_rss_bytes"].as_u64().unwrap() > 0, "{arm}");
        }
    }
    let round = &report["idle"][0];
    assert_eq!((&round["paced"]["count"], &round["eager"]["count"]), (&5.into(), &5.into()));
}

#[test]
fn a_short_bench_of_the_api_tells_both_arms_and_their_ratio() {
    let xtask = Path::new(env!("CARGO_BIN_EXE_xtask"));
    let short = ["--seconds", "1", "--rounds", "1", "--connections", "4", "--json", "--no-build"];
    let output = Command::new(xtask).args(["bench", "api"]).args(short).output();
    let report: Value =
        serde_json::from_str(&ok(&output.unwrap())).expect("--json prints JSON and nothing else");
    for arm in ["api", "pgbench_runs"] {
        let run = &report[arm][0];
        assert!(run["orders"].as_u64().unwrap() > 0, "{arm}: {run}");
        assert!(run["p99_us"].as_u64().unwrap() >= run["p50_us"].as_u64().unwrap(), "{arm}: {run}");
    }
    assert!(report["ratio"]["median"].as_f64().unwrap() > 0.0);
    // One statement an order; what readiness asks comes on top.
    assert!(report["api"][0]["transactions_per_order"].as_f64().unwrap() < 1.5, "{report}");
}

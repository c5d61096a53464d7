//! A short campaign of kills: every kind of fault once, and the checker finds nothing.

use serde_json::Value;

use crate::stack::{self, tell};

/// Every kind of fault comes once in the first eighteen.
const FAULTS: u64 = 20;

/// The least that the relay takes, in bytes: the load's larger transactions of Postgres are more than one of Kafka's.
const SPLIT: (&str, &str) = ("CDC_RELAY_TRANSACTIONS__BYTES", "16384");

/// Runs a campaign in a folder that is gone afterwards; what it printed.
fn campaign(delivery: &str, seed: u64) -> Value {
    let _alone = stack::alone();
    let dir = stack::repository().join(".stack").join(format!("e2e-chaos-{delivery}-{}", std::process::id()));
    let mut chaos = stack::xtask();
    chaos.args(["chaos", "--no-build", "--json", "--delivery", delivery, "--dir"]).arg(&dir);
    chaos.args(["--seed", &seed.to_string(), "--kills", &FAULTS.to_string()]);
    chaos.env(SPLIT.0, SPLIT.1);
    let output = chaos.output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "logs and evidence are in {}\n{told}", dir.display());
    let _ = std::fs::remove_dir_all(&dir);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {told}"))
}

/// What any campaign must come to. That the checker sees what it looks for, its own tests show.
fn nothing_is_wrong(summary: &Value) {
    assert_eq!(summary["faults"], FAULTS);
    assert!(summary["by_fault"].as_object().unwrap().len() >= 18, "{summary}");
    assert!(summary["committed"].as_u64().unwrap() > 1000, "the load wrote next to nothing: {summary}");
    for violation in
        ["missing", "late", "out_of_order_in_key", "out_of_commit_order", "foreign", "wrong", "tables_wrong"]
    {
        assert_eq!(summary[violation], 0, "{summary}");
    }
    assert_eq!(summary["violations"], serde_json::json!([]));
}

#[test]
fn twenty_faults_in_exactly_once_mode_repeat_nothing_either() {
    let summary = campaign("exactly-once", 2);
    nothing_is_wrong(&summary);
    assert_eq!(summary["duplicates"], 0, "{summary}");
    assert_eq!(summary["published"], summary["committed"]);
    tell(&format!("{FAULTS} faults, {} rows committed, each published once", summary["committed"]));
}

#[test]
fn twenty_faults_lose_nothing_and_keep_the_order() {
    let summary = campaign("at-least-once", 1);
    nothing_is_wrong(&summary);
    tell(&format!(
        "{FAULTS} faults, {} rows committed: 0 lost, 0 out of order, {} repeated",
        summary["committed"], summary["duplicates"]
    ));
}

//! The checker of the campaign has teeth: relays with a deliberate fault each, and what they do wrong is found.

use std::process::Output;

use serde_json::Value;

use crate::stack::{self, tell};

/// A fault is found in one of so many rounds, as a rule in the first.
const ROUNDS_MAX: usize = 5;
/// Of each round.
const FAULTS: usize = 6;

/// A relay with a fault, and a campaign in which it shows.
struct Faulty {
    /// As `CDC_RELAY_FAULT` names it.
    fault: &'static str,
    delivery: &'static str,
    /// What the campaign does.
    only: &'static str,
    /// Of the relay.
    settings: &'static [(&'static str, &'static str)],
}

/// What is only enqueued is confirmed.
const CONFIRM_ON_ENQUEUE: Faulty = Faulty {
    fault: "confirm-on-enqueue",
    delivery: "at-least-once",
    only: "relay-kill,broker-pause,broker-kill",
    settings: &[],
};

/// The checkpoint covers what is not committed.
const CHECKPOINT_OUTSIDE: Faulty =
    Faulty { fault: "checkpoint-outside", delivery: "exactly-once", ..CONFIRM_ON_ENQUEUE };

/// What commits where the checkpoint ends is passed over: it counts one byte too many.
const RESUME_BEHIND: Faulty = Faulty {
    fault: "resume-behind",
    delivery: "exactly-once",
    only: "relay-kill,postgres-cut",
    // Kafka's transactions end as often as they may, and for being full: between any two of Postgres'.
    settings: &[("CDC_RELAY_TRANSACTIONS__BYTES", "16384"), ("CDC_RELAY_TRANSACTIONS__MILLISECONDS", "500")],
};

#[test]
fn what_each_faulty_relay_loses_is_missing() {
    let _alone = stack::alone();
    for faulty in [&CONFIRM_ON_ENQUEUE, &CHECKPOINT_OUTSIDE, &RESUME_BEHIND] {
        is_found(faulty);
    }
}

/// Goes on with a campaign, round by round, until the fault is found.
fn is_found(faulty: &Faulty) {
    let dir = stack::repository().join(".stack").join(format!("e2e-{}-{}", faulty.fault, std::process::id()));
    for rounds in 1..=ROUNDS_MAX {
        let output = campaign(faulty, rounds * FAULTS, &dir);
        let told = String::from_utf8_lossy(&output.stderr);
        let summary: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}; logs are in {}\n{told}", dir.display()));
        let missing = summary["missing"].as_u64().unwrap();
        if missing > 0 {
            assert!(
                !output.status.success(),
                "{missing} missing, and the campaign ends as if nothing were: {told}"
            );
            assert_ne!(summary["violations"], serde_json::json!([]));
            tell(&format!("{}: {missing} missing in round {rounds}", faulty.fault));
            let _ = std::fs::remove_dir_all(&dir);
            return;
        }
        assert_eq!(summary["faults"], rounds * FAULTS, "{told}");
    }
    panic!("{} was not found in {ROUNDS_MAX} rounds; logs are in {}", faulty.fault, dir.display());
}

fn campaign(faulty: &Faulty, kills: usize, dir: &std::path::Path) -> Output {
    let mut chaos = stack::xtask();
    let relay = stack::program("cdc-relay-faulty");
    chaos.args(["chaos", "--no-build", "--json", "--seed", "1", "--kills", &kills.to_string()]);
    chaos.args(["--delivery", faulty.delivery, "--only", faulty.only]);
    chaos.arg("--relay").arg(relay).arg("--dir").arg(dir);
    chaos.env("CDC_RELAY_FAULT", faulty.fault).envs(faulty.settings.iter().copied());
    chaos.output().unwrap()
}

//! A publisher is killed while rows come: how long until somebody sees a row that was due after that, and what comes twice.

use std::time::Duration;

use serde::Serialize;

use super::{
    Bench,
    contents::Loss,
    numbers::Spread,
    plot::{Bar, Chart},
    publisher::Publisher,
    section::{Section, head},
    trial::{Trial, failure, nothing},
    workload::scaled,
};
use crate::failure::Result;

const RATE: u32 = 500;
/// How many rows come after the kill; those before it are a second's.
const ROWS: u64 = 5_000;
/// How long rows have come before the kill.
const BEFORE: Duration = Duration::from_secs(2);

/// What one kill did.
#[derive(Debug, Clone, Copy, Serialize)]
struct Round {
    arm: &'static str,
    /// From the kill, after which it is started again at once, until a row is seen that was due after the kill.
    seconds: f64,
    /// Of the start that was not disturbed: from the process until row 0 is seen.
    first_start_seconds: f64,
    loss: Loss,
}

/// Every publisher, killed once in every round.
pub(super) async fn restart(bench: &Bench<'_>) -> Result<Section> {
    let mut rounds = Vec::new();
    for round in 1..=bench.rounds {
        for (arm, publisher) in bench.arms.publishers() {
            let what = format!("restart, round {round} of {}, {arm}", bench.rounds);
            let step = bench.servers.progress.step(&what);
            let one = one(bench, arm, publisher).await?;
            step.done(&format!("{what}: {:.2} s", one.seconds));
            rounds.push(one);
        }
    }
    let title = format!("kill -9 while {RATE} rows a second come, and started again at once");
    let mut section = Section::of("restart", title, &rounds)?;
    section.notes.push(format!(
        "seconds from the kill until one outside consumer sees a row that was due after it; TWICE: records that were there already, a \
         kill. Medians of {} rounds, and the extremes",
        bench.rounds
    ));
    section.table = head(["ARM", "SECONDS", "FROM TO", "FIRST START", "LOST", "TWICE", "FROM TO"]);
    let mut bars = Vec::new();
    for (arm, _) in bench.arms.publishers() {
        let own: Vec<&Round> = rounds.iter().filter(|round| round.arm == arm).collect();
        let spread =
            |of: &dyn Fn(&Round) -> f64| Spread::of(own.iter().map(|round| of(round))).ok_or_else(nothing);
        let (took, start) = (spread(&|it| it.seconds)?, spread(&|it| it.first_start_seconds)?);
        #[expect(clippy::cast_precision_loss, reason = "no count of rows comes near 2^52")]
        let twice = spread(&|it| it.loss.duplicates as f64)?;
        let lost: u64 = own.iter().map(|round| round.loss.lost()).sum();
        section.table.push(vec![
            arm.to_owned(),
            format!("{:.2}", took.median),
            format!("{:.2} to {:.2}", took.min, took.max),
            format!("{:.2}", start.median),
            lost.to_string(),
            format!("{:.0}", twice.median),
            format!("{:.0} to {:.0}", twice.min, twice.max),
        ]);
        let label = format!("{:.2} s", took.median);
        bars.push(Bar { name: arm.to_owned(), parts: vec![took.median], spread: Some(took), label });
    }
    section.charts.push(Chart { title: "Seconds from kill -9 to the first row after it".into(), bars });
    section.failures = rounds.iter().filter_map(|round| failure(round.arm, round.loss)).collect();
    Ok(section)
}

async fn one(bench: &Bench<'_>, arm: &'static str, publisher: &Publisher) -> Result<Round> {
    let mut trial = Trial::start(bench.servers, publisher, bench.number()).await?;
    let first_start_seconds = trial.first_start.as_secs_f64();
    let rows = u64::from(RATE) * BEFORE.as_secs() + scaled(ROWS, bench.times).max(u64::from(RATE));
    let mut load = trial.load(RATE, rows).await?;
    tokio::time::sleep_until((load.due(load.from) + BEFORE).into()).await;
    let killed = trial.kill().await?;
    trial.until_seen(load.to + 1).await?;
    load.written().await?;
    let after = (load.from..=load.to).filter(|row| load.due(*row) > killed);
    let seen = after.filter_map(|row| trial.observer.first(row)).min().ok_or_else(nothing)?;
    let loss = trial.end().await?;
    Ok(Round { arm, seconds: (seen - killed).as_secs_f64(), first_start_seconds, loss })
}

//! How fast the log of a slot is drained, by everybody over the same log.

use std::collections::BTreeMap;

use super::{
    Bench,
    arm::{Arm, Run},
    drained::{Drained, Measured, exactly_once_ratio},
    limits::Limit,
    publisher::Publisher,
    section::Section,
    workload::{self, Workload, Written},
};
use crate::failure::Result;

/// One workload.
pub(super) async fn drain(bench: &Bench<'_>, workload: Workload) -> Result<Section> {
    let shape = workload.shape(bench.factor);
    let written = workload::write(bench.servers, workload.name(), shape).await?;
    bench.warm_up(&written).await?;
    // Once is enough to see what another size does.
    let rounds = if matches!(workload, Workload::Small | Workload::Large) { 1 } else { bench.rounds };
    let arms = bench.arms.of(Some(workload));
    let (runs, failures) = every(bench, workload.name(), rounds, &arms, &written).await?;
    workload::forget(bench.servers).await?;
    let baseline = runs[0].clone();
    let measured: Vec<Measured> = arms
        .iter()
        .zip(runs)
        .filter_map(|((name, _), runs)| Measured::of(name, shape, runs, &baseline))
        .collect();
    let drained = Drained {
        workload: workload.name(),
        rows: shape.rows,
        rows_per_transaction: shape.rows_per_transaction,
        wal_bytes: written.wal_bytes,
        exactly_once_ratio: exactly_once_ratio(&measured),
        arms: measured,
    };
    let mut section = drained.section(rounds)?;
    section.failures.extend(failures);
    Ok(section)
}

/// Every arm in every round, one after the other: the runs of each arm, and which could not be carried out. Such an arm has no
/// runs, and takes nothing from the others.
pub(super) async fn every(
    bench: &Bench<'_>,
    name: &str,
    rounds: u32,
    arms: &[(&'static str, Arm)],
    written: &Written,
) -> Result<(Vec<Vec<Run>>, Vec<String>)> {
    let mut runs: Vec<Vec<Run>> = vec![Vec::new(); arms.len()];
    let mut failed = BTreeMap::new();
    for round in 1..=rounds {
        for ((arm_name, arm), runs) in arms.iter().zip(&mut runs) {
            // It takes minutes, and takes them every time.
            let once = *arm == Arm::Limit(Limit::Polling) && round > 1;
            if once || failed.contains_key(arm_name) {
                continue;
            }
            let what = format!("{name}, round {round} of {rounds}, {arm_name}");
            let step = bench.servers.progress.step(&what);
            match arm.run(bench.servers, written, bench.number()).await {
                Ok(run) => {
                    step.done(&format!("{what}: {:.1}k rows/s", run.rows_per_second / 1e3));
                    runs.push(run);
                }
                // Nothing can be said without what everybody is measured by.
                Err(failure) if *arm == Arm::Recvlogical => return Err(failure),
                Err(failure) => {
                    step.done(&format!("{what}: FAILED"));
                    runs.clear();
                    failed.insert(*arm_name, format!("{arm_name}: {failure}"));
                }
            }
        }
    }
    Ok((runs, failed.into_values().collect()))
}

impl Bench<'_> {
    /// A broker that has just started is slow; the first one to use it would pay.
    pub(super) async fn warm_up(&self, written: &Written) -> Result<()> {
        if self.is_warm.replace(true) {
            return Ok(());
        }
        let step = self.servers.progress.step("warming up");
        for (_, publisher) in self.arms.publishers().filter(|(_, it)| matches!(it, Publisher::Relay(_))) {
            Arm::Publisher(publisher.clone()).run(self.servers, written, self.number()).await?;
        }
        step.done("warmed up");
        Ok(())
    }
}

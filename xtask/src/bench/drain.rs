//! How fast the log of a slot is drained, by everybody over the same log.

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

/// Workload by workload.
pub(super) async fn drain(bench: &Bench<'_>, workloads: &[Workload]) -> Result<Vec<Section>> {
    let mut sections = Vec::new();
    for &workload in workloads {
        let shape = workload.shape(bench.factor);
        let written = workload::write(bench.servers, workload.name(), shape).await?;
        bench.warm_up(&written).await?;
        // Once is enough to see what another size does.
        let rounds = if matches!(workload, Workload::Small | Workload::Large) { 1 } else { bench.rounds };
        let arms = bench.arms.of(Some(workload));
        let runs = every(bench, workload.name(), rounds, &arms, &written).await?;
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
        sections.push(drained.section(rounds)?);
    }
    Ok(sections)
}

/// Every arm in every round, one after the other; the runs of each arm.
pub(super) async fn every(
    bench: &Bench<'_>,
    name: &str,
    rounds: u32,
    arms: &[(&'static str, Arm)],
    written: &Written,
) -> Result<Vec<Vec<Run>>> {
    let mut runs: Vec<Vec<Run>> = vec![Vec::new(); arms.len()];
    for round in 1..=rounds {
        for ((arm_name, arm), runs) in arms.iter().zip(&mut runs) {
            // It takes minutes, and takes them every time.
            if *arm == Arm::Limit(Limit::Polling) && round > 1 {
                continue;
            }
            let what = format!("{name}, round {round} of {rounds}, {arm_name}");
            let step = bench.servers.progress.step(&what);
            let run = arm.run(bench.servers, written, bench.number()).await?;
            step.done(&format!("{what}: {:.1}k rows/s", run.rows_per_second / 1e3));
            runs.push(run);
        }
    }
    Ok(runs)
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

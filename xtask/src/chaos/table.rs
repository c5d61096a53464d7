//! What a campaign prints: a line for each round, and the table by fault at its end.

use std::{collections::BTreeMap, fmt::Write as _};

use serde::Serialize;

use super::{
    journal::{Journal, Round},
    plan::Fault,
};
use crate::cli::Delivery;

/// What a campaign came to.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    seed: u64,
    delivery: String,
    rounds: usize,
    faults: usize,
    /// Of the rounds, without the starts of the servers.
    seconds: u64,
    committed: u64,
    published: u64,
    missing: u64,
    late: u64,
    duplicates: u64,
    out_of_order_in_key: u64,
    out_of_commit_order: u64,
    foreign: u64,
    wrong: u64,
    tables_wrong: u64,
    by_fault: BTreeMap<String, ByFault>,
    violations: Vec<String>,
}

/// What is known of one fault.
#[derive(Debug, Clone, Default, Serialize)]
struct ByFault {
    times: usize,
    /// Of its rounds' duplicates, in equal parts among the faults that reach the relay.
    duplicates: f64,
    /// How many of its rounds had a violation.
    rounds_with_violations: usize,
}

impl Summary {
    pub(super) fn of(journal: &Journal, seed: u64, delivery: Delivery) -> Self {
        let rounds = &journal.rounds;
        let sum = |of: fn(&Round) -> u64| rounds.iter().map(of).sum();
        Self {
            seed,
            delivery: delivery.name(),
            rounds: rounds.len(),
            faults: journal.faults(),
            seconds: sum(|round| round.seconds),
            committed: sum(|round| round.verdict.committed),
            published: sum(|round| round.verdict.published),
            missing: sum(|round| round.verdict.missing),
            late: sum(|round| round.verdict.late),
            duplicates: sum(|round| round.verdict.duplicates),
            out_of_order_in_key: sum(|round| round.verdict.out_of_order_in_key),
            out_of_commit_order: sum(|round| round.verdict.out_of_commit_order),
            foreign: sum(|round| round.verdict.foreign),
            wrong: sum(|round| round.verdict.wrong),
            tables_wrong: sum(|round| round.verdict.tables_wrong),
            by_fault: by_fault(rounds).into_iter().map(|(fault, known)| (fault.name(), known)).collect(),
            violations: rounds.iter().flat_map(|round| round.violations.iter().cloned()).collect(),
        }
    }

    /// As text, the widest column first.
    pub(super) fn text(&self) -> String {
        let mut text = format!("{:<26}{:>6}{:>12}{:>12}\n", "fault", "times", "duplicates", "violations");
        for (fault, known) in &self.by_fault {
            // Nothing can fail in writing to memory.
            let _ = writeln!(
                text,
                "{fault:<26}{:>6}{:>12.1}{:>12}",
                known.times, known.duplicates, known.rounds_with_violations
            );
        }
        let _ = write!(
            text,
            "\n{} {}: {} faults in {} rounds, {} s\n\
             {} committed, {} published: {} missing, {} late, {} duplicates ({:.1} a fault),\n\
             {} out of order in their key, {} out of commit order, {} foreign, {} wrong, {} rows of tables wrong; {} violations",
            self.delivery,
            self.seed,
            self.faults,
            self.rounds,
            self.seconds,
            self.committed,
            self.published,
            self.missing,
            self.late,
            self.duplicates,
            ratio(self.duplicates, self.faults),
            self.out_of_order_in_key,
            self.out_of_commit_order,
            self.foreign,
            self.wrong,
            self.tables_wrong,
            self.violations.len()
        );
        text
    }
}

/// One line about a round.
pub(super) fn line(round: &Round, faults_before: usize, wanted: Option<usize>) -> String {
    let verdict = &round.verdict;
    let faults: Vec<String> = round.faults.iter().map(|struck| struck.planned.fault.name()).collect();
    let of = wanted.map(|wanted| format!("/{wanted}")).unwrap_or_default();
    let bad = match round.violations.len() {
        0 => String::new(),
        count => format!(", {count} VIOLATIONS"),
    };
    format!(
        "round {:>3}, faults {}{of}, {:>3} s: {} committed, {} missing, {} late, {} duplicates{bad} [{}]",
        round.number + 1,
        faults_before + round.faults.len(),
        round.seconds,
        verdict.committed,
        verdict.missing,
        verdict.late,
        verdict.duplicates,
        faults.join(" ")
    )
}

fn by_fault(rounds: &[Round]) -> BTreeMap<Fault, ByFault> {
    let mut all: BTreeMap<Fault, ByFault> = BTreeMap::new();
    for round in rounds {
        let reaching = round.faults.iter().filter(|struck| struck.planned.fault.reaches_the_relay()).count();
        let share = ratio(round.verdict.duplicates, reaching);
        for struck in &round.faults {
            let known = all.entry(struck.planned.fault).or_default();
            known.times += 1;
            if struck.planned.fault.reaches_the_relay() {
                known.duplicates += share;
            }
            known.rounds_with_violations += usize::from(!round.violations.is_empty());
        }
    }
    all
}

/// 0 of nothing.
#[expect(clippy::cast_precision_loss, reason = "no count of records comes near 2^52")]
fn ratio(count: u64, of: usize) -> f64 {
    if of == 0 { 0.0 } else { count as f64 / of as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::{journal::Struck, plan::Planned, verdict::Verdict};

    fn round(faults: &[Fault], duplicates: u64) -> Round {
        let planned = |fault: &Fault| Planned { fault: *fault, after_ms: 0, lasts_ms: 0, pick: 0 };
        let faults = faults.iter().map(|fault| Struck { planned: planned(fault), hit: String::new() });
        Round {
            number: 0,
            faults: faults.collect(),
            seconds: 1,
            verdict: Verdict { duplicates, ..Verdict::default() },
            violations: Vec::new(),
            notes: Vec::new(),
        }
    }

    #[test]
    fn duplicates_are_shared_by_the_faults_that_can_have_made_them() {
        let rounds = [
            round(&[Fault::RelayKill, Fault::KafkaCut, Fault::ConsumerKill], 10),
            round(&[Fault::RelayKill], 3),
            round(&[Fault::ConsumerKill], 0),
        ];
        let all = by_fault(&rounds);
        assert_eq!((all[&Fault::RelayKill].times, all[&Fault::ConsumerKill].times), (2, 2));
        assert!((all[&Fault::RelayKill].duplicates - 8.0).abs() < 1e-9);
        assert!(all[&Fault::ConsumerKill].duplicates.abs() < 1e-9);
    }
}

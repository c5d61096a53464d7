//! The file of what ran: one line of JSON for each round, so that a campaign can be stopped and go on another day.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    plan::{Deck, Planned},
    verdict::Verdict,
};
use crate::{
    cli::Delivery,
    failure::{Explain, Failure, Result},
};

/// A fault that was carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Struck {
    #[serde(flatten)]
    pub(super) planned: Planned,
    /// What it hit.
    pub(super) hit: String,
}

/// A round that came to its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Round {
    /// From 0.
    pub(super) number: u64,
    pub(super) faults: Vec<Struck>,
    pub(super) seconds: u64,
    pub(super) verdict: Verdict,
    /// What must not have happened: processes that ended by themselves, and what the checker found.
    pub(super) violations: Vec<String>,
    /// Brokers that ended by themselves.
    #[serde(default)]
    pub(super) notes: Vec<String>,
}

impl Round {
    /// Whether it had the faults that the seed makes of the deck.
    fn is_planned(&self, seed: u64, deck: &Deck) -> bool {
        let planned = deck.round(seed, self.number, self.faults.len());
        self.faults.iter().all(|struck| planned.contains(&struck.planned))
    }
}

/// The file of one campaign, and the rounds in it.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    pub(super) rounds: Vec<Round>,
}

impl Journal {
    /// Opens the campaign's file in `folder`; with `anew` what was in it is put aside (as `.1`).
    ///
    /// # Errors
    /// What ran is not what this seed makes of this deck: it was another campaign.
    pub(super) fn open(
        folder: &Path,
        delivery: Delivery,
        seed: u64,
        deck: &Deck,
        anew: bool,
    ) -> Result<Self> {
        let path = folder.join(format!("campaign-{}-{seed}.jsonl", delivery.name()));
        if anew && path.exists() {
            let aside = path.with_extension("jsonl.1");
            fs::rename(&path, &aside).explain(|| format!("rename {}", path.display()))?;
        }
        let mut rounds = Vec::new();
        let mut whole = 0;
        if path.exists() {
            let text = fs::read_to_string(&path).explain(|| format!("read {}", path.display()))?;
            (rounds, whole) = read(&text).map_err(|failure| {
                failure.hint(format!("{} is not of this version: remove it", path.display()))
            })?;
        }
        if let Some(round) = rounds.iter().find(|round| !round.is_planned(seed, deck)) {
            let what = format!("{} has other faults in round {}", path.display(), round.number + 1);
            return Err(Failure::new(what).hint(
                "give --only as that campaign had it, or another --seed; --replay puts the file aside",
            ));
        }
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.explain(|| format!("write {}", path.display()))?;
        // A line that was being written when the campaign was killed is a round that has not been.
        file.set_len(whole).explain(|| format!("cut {}", path.display()))?;
        Ok(Self { path, file, rounds })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// How many faults ran.
    pub(super) fn faults(&self) -> usize {
        self.rounds.iter().map(|round| round.faults.len()).sum()
    }

    /// How many violations there were.
    pub(super) fn violations(&self) -> usize {
        self.rounds.iter().map(|round| round.violations.len()).sum()
    }

    /// Adds a round.
    pub(super) fn add(&mut self, round: Round) -> Result<()> {
        let line = serde_json::to_string(&round).explain(|| "write a round".to_owned())? + "\n";
        let written = self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data());
        written.explain(|| format!("write {}", self.path.display()))?;
        self.rounds.push(round);
        Ok(())
    }
}

/// The rounds of a journal, and the length of its whole lines in bytes.
fn read(text: &str) -> Result<(Vec<Round>, u64)> {
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    let mut rounds: Vec<Round> = Vec::new();
    for (number, line) in (0..).zip(text[..whole].lines()) {
        let round: Round = serde_json::from_str(line).explain(|| format!("read round {number}"))?;
        if round.number != number {
            return Err(Failure::new(format!("round {number} is missing")));
        }
        rounds.push(round);
    }
    Ok((rounds, whole as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::plan::{self, Fault};

    fn round(number: u64) -> Round {
        let planned = Deck::of(&[]).round(7, number, plan::ROUND);
        let faults = planned.into_iter().map(|planned| Struck { planned, hit: "it".to_owned() }).collect();
        Round {
            number,
            faults,
            seconds: 3,
            verdict: Verdict::default(),
            violations: vec!["one".to_owned()],
            notes: Vec::new(),
        }
    }

    #[test]
    fn a_campaign_goes_on_behind_its_last_whole_round() {
        let folder = std::env::temp_dir().join(format!("xtask-journal-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let of =
            |only: &[Fault], anew| Journal::open(&folder, Delivery::AtLeastOnce, 7, &Deck::of(only), anew);
        let open = |anew| of(&[], anew).unwrap();
        let mut journal = open(false);
        journal.add(round(0)).unwrap();
        journal.add(round(1)).unwrap();
        // Killed in the middle of a line.
        journal.file.write_all(b"{\"number\":2,\"fau").unwrap();
        let mut journal = open(false);
        assert_eq!(journal.rounds, [round(0), round(1)]);
        assert_eq!((journal.faults(), journal.violations()), (12, 2));
        journal.add(round(2)).unwrap();
        assert_eq!(open(false).rounds.len(), 3);
        let others = of(&[Fault::RelayKill], false).unwrap_err();
        assert!(others.to_string().contains("other faults in round 1"), "{others}");
        assert_eq!(open(false).rounds.len(), 3);
        assert!(open(true).rounds.is_empty());
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_hole_is_an_error() {
        let line = |number| serde_json::to_string(&round(number)).unwrap() + "\n";
        assert!(read(&(line(0) + &line(2))).unwrap_err().to_string().contains("round 1 is missing"));
        assert!(read("{}\n").is_err());
    }
}

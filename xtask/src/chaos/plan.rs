//! What happens when, decided by the seed alone: which faults in which order, at which moments, for how long. Pure.

use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How long after the beginning of its round a fault begins at the latest.
const WINDOW_MS: u64 = 12_000;
/// How many faults one round has.
pub(super) const ROUND: usize = 6;

/// What can happen, by the name it has in the table and on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Fault {
    RelayKill,
    RelayPause,
    RelayTerm,
    BrokerKill,
    ControllerKill,
    BrokerPause,
    PostgresImmediate,
    PostgresCrash,
    WalsenderKill,
    ConsumerKill,
    ConsumersPostgresCrash,
    PostgresCut,
    PostgresDelay,
    PostgresHalfClose,
    KafkaCut,
    KafkaDelay,
    KafkaHalfClose,
    SlotQuota,
}

/// A fault, how often it is in a deck, and how long what it broke stays broken (a delay: how long each piece waits).
#[derive(Debug)]
struct Card {
    fault: Fault,
    copies: usize,
    from_ms: u64,
    to_ms: u64,
}

const fn card(fault: Fault, copies: usize, from_ms: u64, to_ms: u64) -> Card {
    Card { fault, copies, from_ms, to_ms }
}

/// Every fault once, and those that concern the relay most more often.
const CARDS: [Card; 18] = [
    card(Fault::RelayKill, 5, 0, 3000),
    // Up to twice the stage's `wal_sender_timeout`.
    card(Fault::RelayPause, 3, 500, 8000),
    card(Fault::RelayTerm, 2, 0, 2000),
    card(Fault::BrokerKill, 2, 200, 3000),
    card(Fault::ControllerKill, 2, 200, 3000),
    card(Fault::BrokerPause, 2, 500, 6000),
    card(Fault::PostgresImmediate, 1, 0, 2000),
    card(Fault::PostgresCrash, 1, 0, 2000),
    card(Fault::WalsenderKill, 1, 0, 0),
    card(Fault::ConsumerKill, 2, 0, 2000),
    card(Fault::ConsumersPostgresCrash, 1, 0, 2000),
    card(Fault::PostgresCut, 2, 0, 3000),
    card(Fault::PostgresDelay, 1, 20, 400),
    card(Fault::PostgresHalfClose, 1, 0, 0),
    card(Fault::KafkaCut, 2, 0, 3000),
    card(Fault::KafkaDelay, 1, 20, 400),
    card(Fault::KafkaHalfClose, 1, 0, 0),
    card(Fault::SlotQuota, 1, 0, 0),
];

/// One fault of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Planned {
    pub(super) fault: Fault,
    /// After the beginning of the round. Milliseconds. A slot's quota is filled before the load begins, when nobody writes.
    pub(super) after_ms: u64,
    /// How long what it broke stays broken; of a delay, how long each piece waits. Milliseconds.
    pub(super) lasts_ms: u64,
    /// Chooses among those that it may hit then.
    pub(super) pick: u32,
}

impl Fault {
    /// As in the table.
    pub(super) fn name(self) -> String {
        serde_json::to_value(self).ok().and_then(|name| Some(name.as_str()?.to_owned())).unwrap_or_default()
    }

    /// Whether the relay may have to publish again what Kafka has already.
    pub(super) fn reaches_the_relay(self) -> bool {
        !matches!(self, Self::ConsumerKill | Self::ConsumersPostgresCrash)
    }
}

impl Planned {
    pub(super) fn lasts(&self) -> Duration {
        Duration::from_millis(self.lasts_ms)
    }

    pub(super) fn after(&self) -> Duration {
        Duration::from_millis(self.after_ms)
    }
}

/// The cards that a campaign is played with.
#[derive(Debug)]
pub(super) struct Deck(Vec<&'static Card>);

impl Deck {
    /// Those of the faults that are named, or all if none is.
    pub(super) fn of(only: &[Fault]) -> Self {
        Self(CARDS.iter().filter(|card| only.is_empty() || only.contains(&card.fault)).collect())
    }

    /// The faults of round `number` (from 0), by the moments at which they begin; the same for the same seed. At most
    /// `count`.
    pub(super) fn round(&self, seed: u64, number: u64, count: usize) -> Vec<Planned> {
        let mut dice = Dice(seed ^ number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let first = number * ROUND as u64;
        let mut faults: Vec<Planned> = (first..first + count.min(ROUND) as u64)
            .map(|place| {
                let card = self.drawn(seed, place);
                Planned {
                    fault: card.fault,
                    after_ms: dice.below(WINDOW_MS),
                    lasts_ms: card.from_ms + dice.below(card.to_ms - card.from_ms + 1),
                    pick: u32::try_from(dice.below(1 << 32)).unwrap_or_default(),
                }
            })
            .collect();
        faults.sort_by_key(|planned| (planned.fault == Fault::SlotQuota, planned.after_ms));
        faults
    }

    /// The card at a place of the campaign. The deck is shuffled and played again and again; each time, every fault
    /// comes once before any comes again.
    fn drawn(&self, seed: u64, place: u64) -> &'static Card {
        let size = self.0.iter().map(|card| card.copies).sum::<usize>() as u64;
        let mut dice = Dice(seed.wrapping_add((place / size).wrapping_mul(0xd1b5_4a32_d192_ed03)));
        let mut once = self.0.clone();
        let mut again: Vec<&Card> =
            self.0.iter().flat_map(|card| std::iter::repeat_n(*card, card.copies - 1)).collect();
        dice.shuffle(&mut once);
        dice.shuffle(&mut again);
        once.append(&mut again);
        once[usize::try_from(place % size).unwrap_or_default()]
    }
}

/// `SplitMix64`: the same numbers for the same seed in every version of this tool.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to `bound` - 1; `bound` is far below 2^64, so that none is noticeably more likely.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn shuffle<T>(&mut self, all: &mut [T]) {
        for last in (1..all.len()).rev() {
            all.swap(last, usize::try_from(self.below(last as u64 + 1)).unwrap_or(last));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn round(seed: u64, number: u64, count: usize) -> Vec<Planned> {
        Deck::of(&[]).round(seed, number, count)
    }

    #[test]
    fn a_seed_says_it_all_and_another_says_something_else() {
        assert_eq!(round(7, 3, ROUND), round(7, 3, ROUND));
        assert_ne!(round(7, 3, ROUND), round(8, 3, ROUND));
        assert_ne!(round(7, 3, ROUND), round(7, 4, ROUND));
    }

    #[test]
    fn the_first_eighteen_faults_are_all_that_there_are() {
        for seed in 0..50 {
            let all: BTreeSet<Fault> =
                (0..3).flat_map(|number| round(seed, number, ROUND)).map(|planned| planned.fault).collect();
            assert_eq!(all.len(), CARDS.len(), "seed {seed}");
        }
    }

    #[test]
    fn a_round_goes_by_its_moments_and_the_quota_comes_last() {
        for number in 0..200 {
            let faults = round(1, number, ROUND);
            assert_eq!(faults.len(), ROUND);
            let others: Vec<_> = faults.iter().filter(|planned| planned.fault != Fault::SlotQuota).collect();
            assert!(others.is_sorted_by_key(|planned| planned.after_ms));
            let quota = faults.iter().position(|planned| planned.fault == Fault::SlotQuota);
            assert!(quota.is_none_or(|at| at >= others.len()), "{faults:?}");
            assert!(faults.iter().all(|planned| planned.after_ms < WINDOW_MS && planned.lasts_ms <= 8000));
        }
        assert_eq!(round(1, 0, 2).len(), 2);
    }

    #[test]
    fn only_some_of_them_are_played_as_often_as_among_the_others() {
        let only = Deck::of(&[Fault::KafkaCut, Fault::RelayKill, Fault::KafkaCut]);
        assert_eq!(
            only.0.iter().map(|card| (card.fault, card.copies)).collect::<Vec<_>>(),
            [(Fault::RelayKill, 5), (Fault::KafkaCut, 2)]
        );
        let places: Vec<Fault> = (0..7).map(|place| only.drawn(3, place).fault).collect();
        assert_eq!(places.iter().filter(|fault| **fault == Fault::RelayKill).count(), 5);
        assert_ne!(places[0], places[1]);
    }

    #[test]
    fn names_are_those_of_the_table() {
        for fault in Fault::value_variants() {
            assert_eq!(Fault::from_str(&fault.name(), false), Ok(*fault));
        }
    }
}

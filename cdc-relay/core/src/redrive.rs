//! Which dead letters a redrive takes, in which order, and which aggregates it frees.
//!
//! The letters of a parked aggregate are taken from the first open one on, without a gap, because its order is what
//! it was parked for; it is free once none is open. Any other letter stands alone.

mod letter;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
};

pub use letter::{Letter, NotAPlace, Options, Outcome, Place, State};

use crate::{Lsn, parking::Key, record::Identity};

/// The most letters that are held in memory to plan one redrive.
pub const INDEX_LIMIT: usize = 500_000;

/// More letters than [`INDEX_LIMIT`] would be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// A letter as the index keeps it: small, because there may be many.
#[derive(Debug, Clone)]
struct Entry {
    identity: Identity,
    /// Of the row's id; None where that is not known.
    row_hash: Option<u64>,
    /// Among the parked aggregates.
    chain: Option<u32>,
    is_wanted: bool,
    is_cut: bool,
    is_whole: bool,
    has_topic: bool,
    state: State,
    attempts: u32,
}

/// What a redrive has to know of the dead-letter topic: the letters that are wanted, and all open ones of parked
/// aggregates.
#[derive(Debug)]
pub struct Index {
    wanted: BTreeSet<Place>,
    parked: Vec<Key>,
    chains: HashMap<Key, u32>,
    entries: BTreeMap<Place, Entry>,
    /// Up to where the slot's stream is settled, once that is known.
    settled_to: Option<Lsn>,
}

impl Index {
    /// Knows of no letter yet.
    pub fn new(wanted: BTreeSet<Place>, parked: impl IntoIterator<Item = Key>) -> Self {
        let parked: Vec<Key> = parked.into_iter().collect();
        let chains = parked.iter().cloned().zip(0..).collect();
        Self { wanted, parked, chains, entries: BTreeMap::new(), settled_to: None }
    }

    /// The relay is at rest: the aggregates that are parked by now (those that were before stay known), and the LSN up to
    /// where everything is settled. A letter from beyond it is an earlier session's: its row, and perhaps others before
    /// it, will be read again.
    pub fn at_rest(&mut self, parked: impl IntoIterator<Item = Key>, settled_to: Lsn) {
        self.settled_to = Some(settled_to);
        for key in parked {
            if !self.chains.contains_key(&key) {
                let number = u32::try_from(self.parked.len()).unwrap_or(u32::MAX);
                self.chains.insert(key.clone(), number);
                self.parked.push(key);
            }
        }
    }

    /// Takes note of a letter. In a partition they come in order.
    ///
    /// # Errors
    /// [`INDEX_LIMIT`].
    pub fn letter(&mut self, place: Place, letter: &Letter) -> Result<(), Full> {
        let is_wanted = self.wanted.contains(&place);
        let chain = letter.aggregate.as_ref().and_then(|key| self.chains.get(key).copied());
        if !is_wanted && chain.is_none() {
            return Ok(());
        }
        if self.entries.len() >= INDEX_LIMIT {
            return Err(Full);
        }
        let hash = |id: &str| {
            let mut hasher = DefaultHasher::new();
            (id, &letter.aggregate).hash(&mut hasher);
            hasher.finish()
        };
        let entry = Entry {
            identity: letter.identity,
            row_hash: (!letter.row_id.is_empty()).then(|| hash(&letter.row_id)),
            chain,
            is_wanted,
            is_cut: letter.is_cut,
            is_whole: letter.is_whole,
            has_topic: letter.has_topic,
            state: State::Open,
            attempts: 0,
        };
        self.entries.insert(place, entry);
        Ok(())
    }

    /// Takes note of what became of a letter.
    pub fn mark(&mut self, place: Place, state: State) {
        if let Some(entry) = self.entries.get_mut(&place) {
            entry.state = state;
            entry.attempts += u32::from(state == State::Redriven);
            if !entry.is_wanted {
                self.entries.remove(&place);
            }
        }
    }

    /// What to do.
    pub fn plan(self, options: Options) -> Plan {
        let mut plan = Plan { options, settled_to: self.settled_to, ..Plan::default() };
        for place in &self.wanted {
            plan.outcomes.insert(*place, Outcome::NotFound);
        }
        let (mut chains, mut alone) = (vec![Vec::new(); self.parked.len()], Vec::new());
        let mut touched = vec![options.all; self.parked.len()];
        for group in groups(self.entries) {
            let chain = group.entry.chain.and_then(|c| usize::try_from(c).ok());
            if let Some(chain) = chain {
                touched[chain] |= group.entry.is_wanted;
            }
            match chain {
                Some(chain) if group.entry.state == State::Open => chains[chain].push(group),
                _ if group.entry.is_wanted => alone.push(group),
                _ => {}
            }
        }
        for group in alone {
            if let Some(step) = plan.take_alone(group) {
                plan.steps.push_back(step);
            }
        }
        for ((mut chain, key), is_touched) in chains.into_iter().zip(self.parked).zip(touched) {
            if is_touched {
                plan.left.insert(key.clone(), chain.len());
            }
            // Not by their places: Kafka may have refused a row after a later one had been dead-lettered.
            chain.sort_by_key(|group| group.entry.identity);
            let steps = plan.take_chain(chain, &key);
            plan.steps.extend(steps);
        }
        plan
    }
}

/// A letter with its copies: a row that came again after a crash was dead-lettered again.
#[derive(Debug, Clone)]
struct Group {
    /// The first.
    place: Place,
    copies: Vec<Place>,
    entry: Entry,
}

fn groups(entries: BTreeMap<Place, Entry>) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::with_capacity(entries.len());
    let mut firsts: HashMap<(Identity, u64), usize> = HashMap::new();
    for (place, entry) in entries {
        let first = entry.row_hash.and_then(|row| firsts.get(&(entry.identity, row)).copied());
        if let Some(group) = first.and_then(|first| groups.get_mut(first)) {
            group.copies.push(place);
            group.entry.is_wanted |= entry.is_wanted;
            group.entry.attempts = group.entry.attempts.max(entry.attempts);
            if group.entry.state == State::Open {
                group.entry.state = entry.state;
            }
            continue;
        }
        if let Some(row) = entry.row_hash {
            firsts.insert((entry.identity, row), groups.len());
        }
        groups.push(Group { place, copies: Vec::new(), entry });
    }
    groups
}

/// A letter to be published, or given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub place: Place,
    /// Further letters of the same row: they are settled with this one.
    pub copies: Vec<Place>,
    /// How often it will have been redriven.
    pub attempt: u32,
    /// Its aggregate, where that is parked.
    chain: Option<Key>,
}

impl Step {
    /// Every letter that is settled by it.
    pub fn places(&self) -> impl Iterator<Item = Place> {
        std::iter::once(self.place).chain(self.copies.iter().copied())
    }
}

/// What comes next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    Take(Step),
    /// One that must not be taken any more, because one before it was refused.
    Leave,
    End,
}

/// What a redrive does, and what came of it so far.
#[derive(Debug, Default)]
pub struct Plan {
    options: Options,
    settled_to: Option<Lsn>,
    steps: VecDeque<Step>,
    outcomes: BTreeMap<Place, Outcome>,
    /// Open letters of each parked aggregate that the redrive has to do with.
    left: BTreeMap<Key, usize>,
    /// Parked aggregates of which no more may be taken, and the letter that is why.
    blocked: BTreeMap<Key, Place>,
}

impl Plan {
    /// As far as it goes without a gap.
    fn take_chain(&mut self, chain: Vec<Group>, key: &Key) -> Vec<Step> {
        let (mut steps, mut gap) = (Vec::new(), None);
        for group in chain {
            if let Some(first) = gap {
                if group.entry.is_wanted {
                    self.note(&group, &Outcome::Behind(first));
                }
                continue;
            }
            if !group.entry.is_wanted {
                gap = Some(group.place);
                continue;
            }
            match self.flaw(&group.entry) {
                Some(flaw) => {
                    self.note(&group, &flaw);
                    gap = Some(group.place);
                }
                None => steps.push(self.step(group, Some(key.clone()))),
            }
        }
        steps
    }

    fn take_alone(&mut self, group: Group) -> Option<Step> {
        let flaw = match group.entry.state {
            State::Open => self.flaw(&group.entry),
            done if !self.options.again || self.options.discard => Some(Outcome::Already(done)),
            _ => self.flaw(&group.entry),
        };
        match flaw {
            Some(flaw) => {
                self.note(&group, &flaw);
                None
            }
            None => Some(self.step(group, None)),
        }
    }

    /// Why it cannot be published as it is.
    fn flaw(&self, entry: &Entry) -> Option<Outcome> {
        let Options { as_is, discard, has_topic, .. } = self.options;
        match entry {
            _ if self.settled_to.is_some_and(|lsn| entry.identity.commit_lsn >= lsn) => {
                Some(Outcome::Unsettled)
            }
            _ if discard => None,
            Entry { is_cut: true, .. } => Some(Outcome::Cut),
            Entry { is_whole: false, .. } if !as_is => Some(Outcome::NotWhole),
            Entry { has_topic: false, .. } if !has_topic => Some(Outcome::NoTopic),
            _ => None,
        }
    }

    fn step(&mut self, group: Group, chain: Option<Key>) -> Step {
        self.note(&group, &Outcome::NotTried("the redrive ended before it".into()));
        Step { place: group.place, copies: group.copies, attempt: group.entry.attempts + 1, chain }
    }

    fn note(&mut self, group: &Group, outcome: &Outcome) {
        for place in std::iter::once(&group.place).chain(&group.copies) {
            self.outcomes.insert(*place, outcome.clone());
        }
    }

    /// The letters that are still to be taken, in order.
    pub fn places(&self) -> Vec<Place> {
        self.steps.iter().map(|step| step.place).collect()
    }

    /// The next one.
    pub fn next_step(&mut self) -> Next {
        let Some(step) = self.steps.pop_front() else { return Next::End };
        let first = step.chain.as_ref().and_then(|key| self.blocked.get(key).copied());
        if let Some(first) = first {
            self.note_step(&step, &Outcome::Behind(first));
            return Next::Leave;
        }
        Next::Take(step)
    }

    /// The letter could not be published: it stays open, and so does all that is behind it in its aggregate.
    pub fn refused(&mut self, step: &Step, why: String) {
        self.note_step(step, &Outcome::Refused(why));
        if let Some(key) = &step.chain {
            self.blocked.entry(key.clone()).or_insert(step.place);
        }
    }

    /// It is durable that the letter is open no more.
    pub fn settled(&mut self, step: &Step) {
        let state = if self.options.discard { State::Discarded } else { State::Redriven };
        self.note_step(step, &Outcome::Done(state));
        if let Some(left) = step.chain.as_ref().and_then(|key| self.left.get_mut(key)) {
            *left = left.saturating_sub(1);
        }
    }

    /// Nothing more is to be taken.
    pub fn stop(&mut self, why: &str) {
        for step in std::mem::take(&mut self.steps) {
            self.note_step(&step, &Outcome::NotTried(why.to_owned()));
        }
    }

    fn note_step(&mut self, step: &Step, outcome: &Outcome) {
        for place in step.places() {
            self.outcomes.insert(place, outcome.clone());
        }
    }

    /// The parked aggregates that may be freed by now.
    pub fn free(&self) -> Vec<Key> {
        self.left.iter().filter(|(_, left)| **left == 0).map(|(key, _)| key.clone()).collect()
    }

    /// The parked aggregates that the redrive has to do with and that keep open letters, and how many each.
    pub fn still_parked(&self) -> impl Iterator<Item = (&Key, usize)> {
        self.left.iter().filter(|(_, left)| **left > 0).map(|(key, left)| (key, *left))
    }

    /// What came of each letter.
    pub fn outcomes(&self) -> &BTreeMap<Place, Outcome> {
        &self.outcomes
    }
}

#[cfg(test)]
#[path = "redrive_tests.rs"]
mod tests;

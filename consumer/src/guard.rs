//! The version guard: of each aggregate, events are applied in order, none twice and none that is older than what was
//! applied; what is missing is noticed. Pure: the versions come from the database and go back there.

use std::collections::BTreeMap;

/// What becomes of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is the next one.
    Apply,
    /// An event as new or newer was applied: it would undo what that has done.
    Stale,
    /// The one before it was not applied; this is the last one that was (0: none).
    Gap { after: i64 },
}

/// The newest version of each aggregate, as far as asked, and as this batch makes it.
#[derive(Debug, Default)]
pub(crate) struct Guard {
    // Sorted, so that two batches write the same rows in the same order.
    versions: BTreeMap<String, Version>,
}

#[derive(Debug, Clone, Copy)]
struct Version {
    newest: i64,
    moved: bool,
}

impl Guard {
    /// Starts from the versions that are stored.
    pub(crate) fn new(stored: impl IntoIterator<Item = (String, i64)>) -> Self {
        let versions = stored.into_iter().map(|(id, newest)| (id, Version { newest, moved: false }));
        Self { versions: versions.collect() }
    }

    /// Judges an aggregate's next event and takes note of it, unless it is stale. A gap is taken note of only if it is
    /// `accepted`: the event is then applied all the same.
    pub(crate) fn judge(&mut self, aggregate: &str, version: i64, accepted: bool) -> Verdict {
        let after = self.versions.get(aggregate).map_or(0, |v| v.newest);
        let verdict = if version <= after {
            return Verdict::Stale;
        } else if version == after + 1 {
            Verdict::Apply
        } else if accepted {
            Verdict::Gap { after }
        } else {
            return Verdict::Gap { after };
        };
        self.versions.insert(aggregate.to_owned(), Version { newest: version, moved: true });
        verdict
    }

    /// The versions to store.
    pub(crate) fn moved(&self) -> (Vec<&str>, Vec<i64>) {
        self.versions.iter().filter(|(_, v)| v.moved).map(|(id, v)| (id.as_str(), v.newest)).unzip()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_next_is_applied_the_old_ignored_and_a_gap_told() {
        let mut guard = Guard::new([("a".to_owned(), 3)]);
        assert_eq!(guard.judge("a", 3, false), Verdict::Stale);
        assert_eq!(guard.judge("a", 5, false), Verdict::Gap { after: 3 });
        assert_eq!(guard.moved(), (vec![], vec![]));
        assert_eq!(guard.judge("a", 4, false), Verdict::Apply);
        assert_eq!(guard.judge("b", 1, false), Verdict::Apply);
        assert_eq!(guard.judge("c", 7, true), Verdict::Gap { after: 0 });
        assert_eq!(guard.judge("c", 8, false), Verdict::Apply);
        assert_eq!(guard.moved(), (vec!["a", "b", "c"], vec![4, 1, 8]));
    }

    proptest! {
        /// Against the naive model: a list of what was applied.
        #[test]
        fn whatever_comes_an_aggregates_applied_versions_only_rise(
            events in prop::collection::vec((0..3_u8, 1..12_i64, any::<bool>()), 0..60),
        ) {
            let mut guard = Guard::default();
            let mut applied: HashMap<u8, Vec<i64>> = HashMap::new();
            for (aggregate, version, accepted) in events {
                let list = applied.entry(aggregate).or_default();
                let newest = list.last().copied().unwrap_or(0);
                let verdict = guard.judge(&aggregate.to_string(), version, accepted);
                let expected = if version <= newest {
                    Verdict::Stale
                } else if version == newest + 1 {
                    Verdict::Apply
                } else {
                    Verdict::Gap { after: newest }
                };
                prop_assert_eq!(verdict, expected);
                if verdict == Verdict::Apply || (accepted && verdict != Verdict::Stale) {
                    list.push(version);
                }
            }
            let (ids, versions) = guard.moved();
            let stored: HashMap<&str, i64> = ids.into_iter().zip(versions).collect();
            for (aggregate, list) in applied {
                prop_assert_eq!(stored.get(aggregate.to_string().as_str()), list.last());
                prop_assert!(list.is_sorted_by(|a, b| a < b));
            }
        }
    }
}

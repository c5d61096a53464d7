//! Rows that did not go the usual way: counted each, logged now and then.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use relay_core::{
    poison::{Kind, Policy},
    relay::Diversion,
};

use crate::admin::Metrics;

/// Between two lines of the log about the same kind.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// What was said of each kind: when, and how many there were since.
#[derive(Debug)]
pub(crate) struct Diversions {
    metrics: Metrics,
    said: BTreeMap<(Kind, Policy), (Instant, u64)>,
}

impl Diversions {
    pub(crate) fn new(metrics: Metrics) -> Self {
        Self { metrics, said: BTreeMap::new() }
    }

    pub(crate) fn tell(&mut self, diversion: &Diversion) {
        let Diversion { kind, policy, what } = diversion;
        self.metrics.diverted(*kind, *policy);
        let now = Instant::now();
        let unsaid = match self.said.get_mut(&(*kind, *policy)) {
            Some((last, unsaid)) if now < *last + LOG_INTERVAL => {
                *unsaid += 1;
                return;
            }
            Some((_, unsaid)) => *unsaid,
            None => 0,
        };
        self.said.insert((*kind, *policy), (now, 0));
        let did = match policy {
            Policy::Skip => "left out",
            Policy::DeadLetter => "dead-lettered",
            Policy::ParkKey | Policy::Halt => "parked",
        };
        tracing::warn!(kind = kind.name(), unsaid_before = unsaid, "{did}: {what}");
    }
}

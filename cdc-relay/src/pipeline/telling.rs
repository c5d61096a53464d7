//! What a session tells about itself: metrics, and whether it is ready.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;

use super::Session;
use crate::{admin::State, start::STATUS_INTERVAL};

/// What was told.
#[derive(Debug, Default)]
pub(super) struct Told {
    ignored: u64,
    passed_over: u64,
    acknowledged_bytes: u64,
    /// Whether the oldest record in flight had waited for too long.
    is_late: bool,
}

impl Session<'_> {
    /// Once a round of the loop.
    pub(super) fn tell(&mut self, draining: Option<Duration>) {
        let as_gauge = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let (metrics, progress) = (&self.shared.metrics, self.relay.progress());
        let add = |counter: &Counter, before: &mut u64, now: u64| {
            counter.inc_by(now - std::mem::replace(before, now));
        };
        metrics.in_flight_records.set(as_gauge(progress.in_flight_records()));
        metrics.in_flight_bytes.set(as_gauge(progress.in_flight_bytes()));
        let told = &mut self.told;
        add(&metrics.acknowledged_bytes, &mut told.acknowledged_bytes, progress.settled_bytes());
        add(&metrics.ignored_changes, &mut told.ignored, self.relay.ignored_changes());
        add(&metrics.passed_over, &mut told.passed_over, self.relay.passed_over());
        metrics.records.inc_by(self.producer.take_enqueued());
        metrics.confirmed_lsn.set_count(self.relay.confirmed().0);
        metrics.received_lsn.set_count(self.relay.received().0);
        if self.is_admitted {
            metrics.parked_aggregates.set_count(self.relay.parking().len() as u64);
            metrics.lag.set(self.relay.oldest_delivery().map(|oldest| oldest.committed_at_us));
        }
        if self.is_admitted && draining.is_none() {
            let is_full = progress.in_flight_bytes() >= self.shared.settings.in_flight_limit_bytes;
            let is_paused = is_full || self.pending.is_some() || self.pauses(None);
            metrics.enter(if is_paused { State::Paused } else { State::Streaming });
            self.tell_readiness();
        }
        for diversion in self.relay.take_diversions() {
            self.diversions.tell(&diversion);
        }
    }

    /// Counts the transactions of Postgres that are published now. Once for each and not for each record, and its time
    /// in Kafka by the clock of the round: under load that is what one record among hundreds costs.
    pub(super) fn tell_published(&mut self, now: Duration) {
        while let Some(delivery) = self.relay.take_delivery() {
            self.shared.metrics.published(delivery.committed_at_us, now.saturating_sub(delivery.begun));
        }
    }

    fn tell_readiness(&mut self) {
        let limit = self.shared.settings.unready_after;
        let is_late = self.relay.longest_wait(self.now()).is_some_and(|waited| waited >= limit);
        if std::mem::replace(&mut self.told.is_late, is_late) == is_late {
            return;
        }
        let health = &self.shared.health;
        if is_late {
            let seconds = limit.as_secs();
            let detail = format!(
                "the oldest record in flight has waited for Kafka for {seconds} s or longer (http.unready_after_seconds)"
            );
            tracing::warn!("not ready: {detail}");
            health.not_ready("stalled", detail);
        } else {
            tracing::info!("ready again: Kafka has acknowledged what had waited");
            health.ready("streaming");
        }
    }

    /// How long until the oldest record in flight will have waited for too long, if it has not yet.
    pub(super) fn until_late(&self) -> Duration {
        let waited = self.relay.longest_wait(self.now());
        let left = waited.and_then(|waited| self.shared.settings.unready_after.checked_sub(waited));
        left.filter(|left| !left.is_zero()).unwrap_or(STATUS_INTERVAL)
    }
}

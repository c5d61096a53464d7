//! A batch is settled when each record of it is applied, known already, parked behind a dead letter of its key, or
//! dead-lettered and that acknowledged.

use std::{
    collections::BTreeSet,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    slice,
};

use tokio::time::{Duration, Instant, sleep};

use crate::{
    config::Gap,
    decide::{Cause, Decision, Fault, Poison, decide},
    delivery::{Delivery, Place},
    dlq::Letter,
    handler::Handler,
    missing,
    parking::Failure,
    record::Event,
    run::{Abandoned, Worker},
    store::{Done, Entry, panicked},
};

/// A paused group looks this often whether it may go on.
const PAUSED: Duration = Duration::from_millis(500);

/// How the attempts to apply some events ended.
enum Attempted {
    /// So many dead letters are settled by it.
    Applied(u64),
    /// One of them is at fault: they are to be tried in smaller parts.
    Split,
    /// The one event is refused, after so many attempts.
    Refused(Poison, u32),
}

impl<H: Handler> Worker<H> {
    /// Settles records, in order; then lets go what was parked behind those that were redriven, and behind those that came
    /// again and went well this time.
    pub(crate) async fn settle(&self, records: &[Delivery<'_>]) -> Result<(), Abandoned> {
        let has_settled = self.settle_all(records).await?;
        let keys: BTreeSet<&[u8]> = records
            .iter()
            .filter(|record| has_settled || record.redrive() > 0)
            .filter_map(Delivery::key)
            .collect();
        for key in keys {
            self.release(key).await?;
        }
        Ok(())
    }

    /// Lets go what another has left parked without a reason, because it ended in the middle.
    pub(crate) async fn release_abandoned(&self) -> Result<(), Abandoned> {
        for key in self.patiently(|| self.shared.store.abandoned()).await? {
            self.release(&key).await?;
        }
        Ok(())
    }

    /// Settles what is parked under a key, as long as that changes anything.
    async fn release(&self, key: &[u8]) -> Result<(), Abandoned> {
        let at_once = self.shared.limits.batch_records_max;
        let mut before: Vec<(String, i32, i64)> = Vec::new();
        loop {
            let parked = self.patiently(|| self.shared.store.parked(key, at_once)).await?;
            let places = parked.iter().map(Delivery::place);
            let places: Vec<_> = places.map(|p| (p.topic.to_owned(), p.partition, p.offset)).collect();
            if places.is_empty() || places == before {
                return Ok(());
            }
            before = places;
            self.settle_all(&parked).await?;
        }
    }

    /// Whether a dead letter was settled by it.
    async fn settle_all(&self, records: &[Delivery<'_>]) -> Result<bool, Abandoned> {
        let (mut entries, mut failures, mut discarded) = (Vec::new(), Vec::new(), Vec::new());
        for record in records {
            if record.is_discarded() {
                discarded.push(record);
                continue;
            }
            match catch_unwind(AssertUnwindSafe(|| H::Event::parse(&record.record()))) {
                Ok(Ok(event)) => entries.push(Entry { event, record, settles: true }),
                Ok(Err(poison)) => failures.push(Failure { record, poison, attempts: 1 }),
                Err(panic) => {
                    failures.push(Failure { record, poison: panicked(&*panic), attempts: 1 });
                }
            }
        }
        // First, so that what comes behind them is parked and not applied.
        let mut letters = self.note(failures).await?;
        let settled = self.apply(&entries, &mut letters).await?;
        if !discarded.is_empty() {
            let settled = self.patiently(|| self.shared.store.discard(&discarded)).await?;
            self.shared.metrics.discarded(settled);
        }
        self.send(letters).await?;
        self.partition.wait_for(None);
        Ok(settled > 0)
    }

    /// Takes note of dead letters; gives back those to be sent.
    async fn note<'d, 'm>(&self, failures: Vec<Failure<'d, 'm>>) -> Result<Vec<Letter<'d, 'm>>, Abandoned> {
        if failures.is_empty() {
            return Ok(Vec::new());
        }
        let wanted = self.patiently(|| self.shared.store.note(&failures)).await?;
        let mut wanted = wanted.into_iter().peekable();
        let mut letters = Vec::new();
        for (index, failure) in failures.into_iter().enumerate() {
            if let Some((_, attempts)) = wanted.next_if(|(at, _)| *at == index) {
                letters.push(Letter::new(failure.record, failure.poison, attempts));
            }
        }
        Ok(letters)
    }

    /// Applies events in order. A dead letter is a verdict on one event, so a batch that fails because of one is halved
    /// until that is found; the others are applied. Gives back how many dead letters are settled by it.
    async fn apply<'d, 'm>(
        &self,
        entries: &[Entry<'d, 'm, H::Event>],
        letters: &mut Vec<Letter<'d, 'm>>,
    ) -> Result<u64, Abandoned> {
        // Parts still to do; the next one is the last.
        const { assert!(H::BATCH_MAX > 0) };
        let starts = (0..entries.len()).step_by(H::BATCH_MAX).rev();
        let part = |start: usize| start..start.saturating_add(H::BATCH_MAX).min(entries.len());
        let mut parts: Vec<Range<usize>> = starts.map(part).collect();
        let mut settled = 0;
        while let Some(part) = parts.pop() {
            match self.attempt(&entries[part.clone()]).await? {
                Attempted::Applied(letters) => settled += letters,
                Attempted::Split => {
                    let middle = part.start + part.len() / 2;
                    parts.push(middle..part.end);
                    parts.push(part.start..middle);
                }
                Attempted::Refused(poison, attempts) => {
                    let record = entries[part.start].record;
                    letters.extend(self.note(vec![Failure { record, poison, attempts }]).await?);
                }
            }
        }
        Ok(settled)
    }

    /// Tries to apply events in one transaction, as often as it takes, until it is done or they are refused.
    async fn attempt(&self, entries: &[Entry<'_, '_, H::Event>]) -> Result<Attempted, Abandoned> {
        let limits = &self.shared.limits;
        let (mut attempt, since) = (1, Instant::now());
        loop {
            let mut settled = 0;
            let outcome = match self.shared.store.apply(entries).await {
                Ok(done) => {
                    settled = done.settled;
                    self.count(entries, &done);
                    Ok(())
                }
                Err(fault) if entries.len() > 1 && fault.is_of_an_event() => return Ok(Attempted::Split),
                Err(Fault::Gap { aggregate, after, version }) => self
                    .close_gap(&entries[0], aggregate, after, version, since)
                    .await
                    .map(|letters| settled = letters),
                Err(fault) => Err(fault),
            };
            let jitter = fastrand::f64();
            match decide(outcome, attempt, limits.retries_max, limits.backoff, jitter) {
                Decision::Apply => {
                    self.partition.wait_for(None);
                    return Ok(Attempted::Applied(settled));
                }
                Decision::DeadLetter(poison) => {
                    self.partition.wait_for(None);
                    return Ok(Attempted::Refused(poison, attempt));
                }
                Decision::Retry { after, cause, error } => self.pause(after, cause, error, attempt).await?,
            }
            attempt = attempt.saturating_add(1);
        }
    }

    /// Does about a gap what is to be done about it, and applies the event if that closes it.
    async fn close_gap(
        &self,
        entry: &Entry<'_, '_, H::Event>,
        aggregate: String,
        after: i64,
        version: i64,
        since: Instant,
    ) -> Result<u64, Fault> {
        let gap = Fault::Gap { aggregate, after, version };
        let Fault::Gap { aggregate, .. } = &gap else { return Err(gap) };
        let waiting = |error: String| Fault::Around { cause: Cause::Gap, error };
        let url = match &self.shared.store.policy.gap {
            Gap::Wait(limit) if since.elapsed() < *limit => return Err(waiting(gap.to_string())),
            Gap::Accept | Gap::Wait(_) => return Err(gap),
            Gap::Fetch(url) => url,
        };
        let whole = entry.record.record();
        let missing = missing::fetch::<H::Event>(url, &whole, aggregate, after, version).await;
        let missing = missing.map_err(|error| waiting(format!("{gap}: {error}")))?;
        if missing.is_empty() {
            return Err(gap);
        }
        let record = entry.record;
        let missing: Vec<_> =
            missing.into_iter().map(|event| Entry { event, record, settles: false }).collect();
        let mut settled = 0;
        for entries in [missing.as_slice(), slice::from_ref(entry)] {
            let done = self.shared.store.apply(entries).await?;
            self.count(entries, &done);
            settled += done.settled;
        }
        Ok(settled)
    }

    fn count(&self, entries: &[Entry<'_, '_, H::Event>], done: &Done) {
        let metrics = &self.shared.metrics;
        metrics.done(done);
        let now_ms = chrono::Utc::now().timestamp_millis();
        for index in &done.applied {
            let Entry { event, record, .. } = &entries[*index];
            let latency_ms = record.written_ms().map(|ms| now_ms.saturating_sub(ms));
            metrics.applied(event.type_name(), latency_ms);
        }
    }

    /// Sends letters until each is acknowledged.
    async fn send(&self, mut letters: Vec<Letter<'_, '_>>) -> Result<(), Abandoned> {
        let shared = &self.shared;
        let mut attempt = 1;
        while !letters.is_empty() {
            for letter in letters.iter().filter(|letter| !letter.is_repeated()) {
                self.dead_lettered(&letter.poison, letter.record.place());
            }
            let Some(dead_letters) = &shared.dead_letters else {
                let places: Vec<_> = letters.iter().map(|letter| (letter.record, None)).collect();
                return self.patiently(|| shared.store.sent(&places)).await;
            };
            let (sent, unsent, fault) = tokio::select! {
                outcome = dead_letters.send(letters) => outcome,
                () = self.stop.requested() => return Err(Abandoned),
            };
            letters = unsent;
            if !sent.is_empty() {
                let places: Vec<_> = sent.iter().map(|(letter, at)| (letter.record, Some(*at))).collect();
                self.patiently(|| shared.store.sent(&places)).await?;
            }
            if let Some(Fault::Around { cause, error }) = fault {
                let after = shared.limits.backoff.after(attempt, fastrand::f64());
                self.pause(after, cause, error, attempt).await?;
            }
            attempt = attempt.saturating_add(1);
        }
        Ok(())
    }

    fn dead_lettered(&self, poison: &Poison, place: Place<'_>) {
        self.shared.metrics.dead_lettered(poison.reason);
        let (topic, partition, offset) = (place.topic, place.partition, place.offset);
        let reason = poison.reason.as_str();
        tracing::warn!(topic, partition, offset, reason, error = poison.error, "dead-lettered a record");
    }

    /// Does what cannot be a record's fault, as often as it takes.
    async fn patiently<T, F: Future<Output = Result<T, Fault>>>(
        &self,
        work: impl Fn() -> F,
    ) -> Result<T, Abandoned> {
        let mut attempt = 1;
        loop {
            let (cause, error) = match work().await {
                Ok(done) => {
                    return Ok(done);
                }
                Err(Fault::Around { cause, error }) => (cause, error),
                Err(fault) => (Cause::Database, fault.to_string()),
            };
            let after = self.shared.limits.backoff.after(attempt, fastrand::f64());
            self.pause(after, cause, error, attempt).await?;
            attempt = attempt.saturating_add(1);
        }
    }

    /// Waits out a failure that is no record's fault, visibly.
    async fn pause(
        &self,
        after: Duration,
        cause: Cause,
        error: String,
        attempt: u32,
    ) -> Result<(), Abandoned> {
        let after = if cause == Cause::Paused {
            PAUSED
        } else {
            self.shared.metrics.retried(cause);
            let (topic, partition) = (&self.partition.id.0, self.partition.id.1);
            let after_ms = after.as_millis();
            // The backoff bounds how often: once per partition and pause.
            tracing::warn!(topic, partition, attempt, after_ms, error, "waiting, then trying again");
            after
        };
        self.partition.wait_for(Some((cause, format!("attempt {attempt}: {error}"))));
        tokio::select! {
            () = sleep(after) => Ok(()),
            () = self.stop.requested() => Err(Abandoned),
        }
    }
}

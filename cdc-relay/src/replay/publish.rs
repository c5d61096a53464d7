//! A replay, as the pipeline carries it out: between two transactions of the stream a few records are handed to the
//! producer, and the stream goes on. Ended at any point, it leaves nothing to be mended: asked for again, it publishes again.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use relay_core::{Outgoing, Relay, progress::Ticket};

use super::{
    api::{Answer, Job, Replays, Report},
    finder::{Found, Hit},
    reader::{News, Reader},
};
use crate::{
    desk::{Failed, Hands, Progress},
    error::{Error, Kind},
    kafka::Offer,
};

/// The most records between two looks at the stream.
const RECORDS_PER_ROUND: usize = 256;
/// How long Kafka may acknowledge nothing of it before the session is begun anew without it: what it has on its way holds up
/// what is behind.
const STALL_LIMIT: Duration = Duration::from_secs(60);

/// One replay.
pub(crate) struct Replay {
    job: Job,
    reader: Reader,
    /// Whether it has told everything.
    is_read: bool,
    /// What it told last and was not looked at yet.
    found: VecDeque<Found>,
    /// The record that the producer could not take yet.
    pending: Option<(Ticket, Box<Hit>)>,
    /// Those that are on their way, in order.
    on_their_way: VecDeque<Ticket>,
    /// When one of them arrived last, or none was on its way.
    moved_at: Duration,
    /// Nobody waits for it any more.
    is_left: bool,
    /// Why no more is found.
    failure: Option<Error>,
    report: Report,
    counts: Arc<Replays>,
    answer: Option<Answer>,
}

impl Replay {
    pub(crate) fn start(job: Job, hands: &mut Hands<'_>) -> Result<Self, Error> {
        let shared = hands.shared;
        let reader = Reader::start(shared, job.order.clone())?;
        tracing::info!("replay: begins");
        shared.replays.published.store(0, Ordering::Relaxed);
        // What was mended since a topic was last asked about counts.
        hands.producer.forget_topics();
        Ok(Self {
            job,
            reader,
            is_read: false,
            found: VecDeque::new(),
            pending: None,
            on_their_way: VecDeque::new(),
            moved_at: hands.now,
            is_left: false,
            failure: None,
            report: Report::default(),
            counts: Arc::clone(&shared.replays),
            answer: None,
        })
    }

    /// Whether a record of it is begun that the producer has not taken: nothing behind it is settled before that.
    pub(crate) fn has_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// Goes on as far as it can without waiting, for a few records at most.
    ///
    /// # Errors
    /// The session's: the producer is of no more use.
    pub(crate) fn go_on(&mut self, hands: &mut Hands<'_>) -> Result<Progress, Error> {
        self.count(hands);
        if hands.now >= self.moved_at + STALL_LIMIT {
            let what =
                format!("Kafka has acknowledged no record of a replay for {} s", STALL_LIMIT.as_secs());
            return Err(Error::new(Kind::DeliveryFailed, what));
        }
        if !self.is_left && self.job.reply.is_closed() {
            tracing::info!(published = self.report.published, "replay: ends, because nobody waits for it");
            self.leave(hands.relay)?;
        }
        let mut progress = Progress::Waits;
        for _ in 0..RECORDS_PER_ROUND {
            if self.pending.is_some() {
                // Before anything else: with exactly-once delivery Kafka's transaction waits for it.
                if !self.offer(hands)? {
                    break;
                }
            } else if hands.hurry {
                self.give_up("the relay, or Postgres, is shutting down");
                return Ok(Progress::Over);
            } else if let Some(found) = self.found.pop_front() {
                if let Err(found) = self.take(found, hands) {
                    self.found.push_front(found);
                    break;
                }
            } else if self.is_read && self.on_their_way.is_empty() {
                self.end();
                return Ok(Progress::Over);
            } else {
                match self.reader.news().filter(|_| !self.is_read) {
                    Some(News::Found(found)) => self.found = found.into(),
                    Some(News::End) => self.is_read = true,
                    Some(News::Failed(e)) => (self.failure, self.is_read) = (Some(e), true),
                    None => break,
                }
            }
            progress = Progress::Moved;
        }
        Ok(progress)
    }

    /// Takes what was found, or gives it back where that has to wait.
    fn take(&mut self, found: Found, hands: &mut Hands<'_>) -> Result<(), Found> {
        match found {
            Found::Until(lsn) if hands.relay.confirmed() < lsn => return Err(found),
            Found::Until(_) | Found::LookedAt(_) => {}
            Found::NoRow(id) => self.report.no_row(id),
            Found::Record(hit) => {
                if let Some(why) = why_not(&hit, hands.relay) {
                    self.report.found += 1;
                    self.report.refuse(&hit.record, why);
                } else if may_begin(hands.relay) {
                    self.report.found += 1;
                    let ticket = hands.relay.begin_own(hit.record.record().cost_bytes(), hands.now);
                    self.pending = Some((ticket, hit));
                } else {
                    return Err(Found::Record(hit));
                }
            }
        }
        Ok(())
    }

    /// Offers what is pending to the producer; false where that cannot take it yet.
    fn offer(&mut self, hands: &mut Hands<'_>) -> Result<bool, Error> {
        let Some((ticket, hit)) = self.pending.take() else { return Ok(true) };
        let outgoing = Outgoing { ticket, record: hit.record.record(), is_dead_letter: false };
        match hands.producer.offer_replayed(&outgoing)? {
            Offer::Later => {
                self.pending = Some((ticket, hit));
                return Ok(false);
            }
            Offer::Taken => self.on_their_way.push_back(ticket),
            Offer::Refused(poison) => {
                hands.relay.handle_settled(ticket)?;
                self.report.refuse(&hit.record, poison.to_string());
            }
        }
        Ok(true)
    }

    /// Counts what has arrived.
    fn count(&mut self, hands: &Hands<'_>) {
        let delivered = hands.relay.delivered_ticket();
        let before = self.report.published;
        while self.on_their_way.pop_front_if(|ticket| ticket.0 < delivered).is_some() {
            self.report.published += 1;
        }
        if self.report.published > before || self.on_their_way.is_empty() {
            self.moved_at = hands.now;
        }
        hands.shared.metrics.replayed.inc_by(self.report.published - before);
        self.counts.published.store(self.report.published, Ordering::Relaxed);
    }

    fn end(&mut self) {
        if let Some(Error { kind, message, hint, .. }) = self.failure.take() {
            let hint = hint.map(|hint| format!(" ({hint})")).unwrap_or_default();
            return self.fail(&format!("{message}{hint}"), Some(kind));
        }
        let Report { found, published, .. } = self.report;
        tracing::info!(found, published, "replay: over");
        self.answer = Some(Ok(std::mem::take(&mut self.report)));
    }

    /// Finds no more. What is on its way arrives, or ends the session.
    ///
    /// # Errors
    /// None but a bug's.
    pub(crate) fn leave(&mut self, relay: &mut Relay) -> Result<(), Error> {
        (self.is_left, self.is_read) = (true, true);
        self.found.clear();
        match self.pending.take() {
            Some((ticket, _)) => Ok(relay.handle_settled(ticket)?),
            None => Ok(()),
        }
    }

    /// Ends it before its end.
    pub(crate) fn give_up(&mut self, why: &str) {
        self.fail(why, None);
    }

    fn fail(&mut self, why: &str, kind: Option<Kind>) {
        tracing::warn!("replay: given up: {why}");
        self.answer = Some(Err(Failed { why: why.to_owned(), done: self.report.published, kind }));
    }

    /// Tells whoever asked what came of it, once another may be asked for.
    pub(crate) fn answer(self) {
        if let Some(answer) = self.answer {
            // They may not wait any more.
            let _ = self.job.reply.send(answer);
        }
    }
}

/// Why it is not to be published.
fn why_not(hit: &Hit, relay: &Relay) -> Option<String> {
    if let Some(poison) = &hit.poison {
        return Some(poison.to_string());
    }
    // Earlier rows of it may be in no topic yet.
    let is_parked = hit.aggregate.as_ref().is_some_and(|key| relay.parking().is_parked(key));
    is_parked.then(|| "its aggregate is parked: `cdc-relay dlq redrive` publishes what waits".to_owned())
}

/// Whether a record may be handed over that is not of the stream. Between two transactions of Postgres: one that fits into
/// one of Kafka's is not to be split because of it.
fn may_begin(relay: &Relay) -> bool {
    relay.wants_input() && !relay.is_in_transaction() && !relay.passes_over()
}

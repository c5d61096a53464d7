//! A redrive, as the pipeline carries it out on its one producer.
//!
//! While the letters are looked up the relay streams. Then input pauses until everything that was read is settled, so
//! that no later row of a parked aggregate is on its way; the letters are published in chunks, each chunk's markers
//! after its acknowledgements; the aggregates that have none left are freed; and input goes on. Ended at any point, it
//! leaves what is not marked open, to be published by another redrive: twice at worst, and never behind a later one.

use std::{collections::VecDeque, time::Duration};

use relay_core::{
    Outgoing, Relay,
    parking::Key,
    progress::Ticket,
    redrive::{Next, Outcome, Place, Plan, Step},
};

use super::{
    api::{Answer, Job, Report},
    letter,
    reader::{News, Reader},
};
use crate::{
    desk::{Failed, Hands, Progress},
    error::{Error, Kind},
    kafka::Offer,
    owned_record::OwnedRecord,
    shared::Shared,
};

/// The most letters between two looks at their acknowledgements: so many are published twice at worst after a crash.
const CHUNK_LETTERS: usize = 500;
/// How long nothing may come of it before it is given up, so that input goes on.
const STALL_LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The dead-letter topic is being read.
    Reading,
    /// Input is paused; what is in flight is waited for.
    Resting,
    /// What came since is being read.
    Planning,
    Publishing,
    /// A chunk is on its way.
    Acknowledging,
    Marking,
    /// The chunk's markers are on their way.
    Marked,
    /// The markers of what was freed are on their way.
    Freed,
}

/// A record that is on its way to the producer, and what it is for.
struct Pending {
    ticket: Ticket,
    letter: OwnedRecord,
    /// None: a marker.
    step: Option<Step>,
}

/// One redrive.
pub(crate) struct Redrive {
    job: Job,
    reader: Reader,
    phase: Phase,
    plan: Plan,
    pending: Option<Pending>,
    /// Published, and not marked yet.
    chunk: Vec<Step>,
    markers: VecDeque<Place>,
    /// There are no more letters.
    is_last: bool,
    freed: Vec<Key>,
    /// What the reader has seen of the topic.
    seen: u64,
    answer: Option<Answer>,
    /// When something last came of it.
    moved_at: Duration,
}

impl Redrive {
    pub(crate) fn start(job: Job, shared: &Shared, relay: &Relay, now: Duration) -> Result<Self, Error> {
        let reader = Reader::start(shared, &job.order, relay.parking().keys().cloned().collect())?;
        tracing::info!(letters = job.order.letters.len(), "redrive: reading the dead-letter topic");
        Ok(Self {
            job,
            reader,
            phase: Phase::Reading,
            plan: Plan::default(),
            pending: None,
            chunk: Vec::new(),
            markers: VecDeque::new(),
            is_last: false,
            freed: Vec::new(),
            seen: 0,
            answer: None,
            moved_at: now,
        })
    }

    /// Whether no new transaction may be read.
    pub(crate) fn pauses_input(&self) -> bool {
        self.phase != Phase::Reading
    }

    /// Goes on as far as it can without waiting.
    ///
    /// # Errors
    /// The session's: the producer is of no more use.
    pub(crate) fn go_on(&mut self, hands: &mut Hands<'_>) -> Result<Progress, Error> {
        let mut progress = Progress::Waits;
        // A long topic, and a long transaction that is read to its end, are progress, too.
        let seen = self.reader.seen();
        if std::mem::replace(&mut self.seen, seen) != seen || hands.relay.is_in_transaction() {
            self.moved_at = hands.now;
        }
        loop {
            match self.step(hands) {
                Ok(Progress::Moved) => {
                    self.moved_at = hands.now;
                    progress = Progress::Moved;
                }
                Ok(Progress::Waits) if hands.now < self.moved_at + STALL_LIMIT => return Ok(progress),
                Ok(Progress::Waits) => {
                    let what = format!("nothing has come of it for {} s", STALL_LIMIT.as_secs());
                    self.leave(hands, &what)?;
                    self.give_up(&what);
                    return Ok(Progress::Over);
                }
                Ok(Progress::Over) => return Ok(Progress::Over),
                Err(Trouble::Session(e)) => return Err(e),
                Err(Trouble::Own(why)) => {
                    self.leave(hands, &why)?;
                    self.give_up(&why);
                    return Ok(Progress::Over);
                }
            }
        }
    }

    fn step(&mut self, hands: &mut Hands<'_>) -> Result<Progress, Trouble> {
        if self.pending.is_some() {
            return self.offer(hands);
        }
        let is_settled = hands.relay.is_settled();
        match self.phase {
            Phase::Reading | Phase::Resting if hands.hurry => return Err(Trouble::Own(HURRY.into())),
            Phase::Reading | Phase::Planning => return self.hear(hands),
            Phase::Resting if hands.relay.is_at_rest() => {
                // What was mended since a topic was last asked about counts.
                hands.producer.forget_topics();
                let settled_to = hands.relay.progress().confirmed();
                self.reader.at_rest(hands.relay.parking().keys().cloned().collect(), settled_to);
                self.phase = Phase::Planning;
            }
            Phase::Publishing => return self.publish(hands),
            // With exactly-once delivery, letters and markers are committed together.
            Phase::Acknowledging if is_settled || hands.relay.is_exactly_once() => {
                self.markers = self.chunk.iter().flat_map(Step::places).collect();
                self.phase = Phase::Marking;
            }
            Phase::Marking => self.mark_next(hands),
            Phase::Marked if is_settled => self.end_chunk(hands),
            Phase::Freed if is_settled => {
                self.end();
                return Ok(Progress::Over);
            }
            Phase::Resting | Phase::Acknowledging | Phase::Marked | Phase::Freed => {
                return Ok(Progress::Waits);
            }
        }
        Ok(Progress::Moved)
    }

    /// Takes the next letter, unless the chunk is full.
    fn publish(&mut self, hands: &mut Hands<'_>) -> Result<Progress, Trouble> {
        if hands.hurry {
            self.plan.stop(HURRY);
            self.is_last = true;
        }
        let is_full = self.chunk.len() >= CHUNK_LETTERS || !hands.relay.wants_input();
        // Kafka would end a transaction that waits for many letters that are far apart.
        let is_long = !self.chunk.is_empty() && hands.relay.is_held_long(hands.now);
        if self.is_last || is_full || is_long {
            self.phase = Phase::Acknowledging;
        } else if self.job.order.options.discard {
            match self.plan.next_step() {
                Next::Take(step) => self.chunk.push(step),
                Next::Leave => {}
                Next::End => self.is_last = true,
            }
        } else {
            return self.hear(hands);
        }
        Ok(Progress::Moved)
    }

    /// Takes what the reader tells.
    fn hear(&mut self, hands: &mut Hands<'_>) -> Result<Progress, Trouble> {
        match self.reader.news() {
            None => Ok(Progress::Waits),
            Some(News::Failed(e)) => Err(Trouble::Own(e.to_string())),
            Some(News::Read) => {
                self.phase = Phase::Resting;
                Ok(Progress::Moved)
            }
            Some(News::Planned(plan)) => {
                self.plan = plan;
                self.phase = Phase::Publishing;
                Ok(Progress::Moved)
            }
            Some(News::Letter(message)) => {
                // It is the next step's letter, which may be taken no more.
                if let Next::Take(step) = self.plan.next_step() {
                    let topic = self.job.order.topic.as_deref();
                    match message.and_then(|m| letter::redriven(&*m, topic, step.attempt)) {
                        Some(letter) => self.pend(hands, letter, Some(step)),
                        None => self.plan.refused(&step, "the letter is not in its topic any more".into()),
                    }
                }
                Ok(Progress::Moved)
            }
            Some(News::End) => {
                self.is_last = true;
                Ok(Progress::Moved)
            }
        }
    }

    fn mark_next(&mut self, hands: &mut Hands<'_>) {
        let Some(place) = self.markers.pop_front() else {
            hands.relay.set_hold(false);
            self.phase = Phase::Marked;
            return;
        };
        let topic = &hands.shared.settings.dead_letter_topic;
        let order = &self.job.order;
        let marker = letter::marker(topic, &order.source, place, order.options.discard);
        self.pend(hands, marker, None);
    }

    fn pend(&mut self, hands: &mut Hands<'_>, letter: OwnedRecord, step: Option<Step>) {
        hands.relay.set_hold(true);
        let ticket = hands.relay.begin_own(letter.record().cost_bytes(), hands.now);
        self.pending = Some(Pending { ticket, letter, step });
    }

    /// Offers what is pending to the producer.
    fn offer(&mut self, hands: &mut Hands<'_>) -> Result<Progress, Trouble> {
        let Some(Pending { ticket, letter, .. }) = &self.pending else { return Ok(Progress::Waits) };
        let outgoing = Outgoing { ticket: *ticket, record: letter.record(), is_dead_letter: false };
        let refused = match hands.producer.offer(&outgoing)? {
            Offer::Later => return Ok(Progress::Waits),
            Offer::Taken => None,
            Offer::Refused(poison) => Some(poison),
        };
        let Some(Pending { ticket, step, .. }) = self.pending.take() else { return Ok(Progress::Waits) };
        match (refused, step) {
            (None, step) => self.chunk.extend(step),
            (Some(poison), step) => {
                hands.relay.handle_settled(ticket).map_err(Error::from)?;
                let Some(step) = step else {
                    return Err(Trouble::Own(format!("the dead-letter topic takes no marker: {poison}")));
                };
                self.plan.refused(&step, poison.to_string());
            }
        }
        Ok(Progress::Moved)
    }

    /// The chunk and its markers are acknowledged.
    fn end_chunk(&mut self, hands: &mut Hands<'_>) {
        for step in self.chunk.drain(..) {
            self.plan.settled(&step);
            if !self.job.order.options.discard {
                hands.shared.metrics.redriven.inc();
            }
        }
        if !self.is_last {
            self.phase = Phase::Publishing;
            return;
        }
        for key in self.plan.free() {
            if hands.relay.free(&key, hands.now) {
                self.freed.push(key);
            }
        }
        self.phase = Phase::Freed;
    }

    /// Before it is given up.
    ///
    /// # Errors
    /// With exactly-once delivery, letters that are published and not marked must not be committed.
    fn leave(&mut self, hands: &mut Hands<'_>, why: &str) -> Result<(), Error> {
        hands.relay.set_hold(false);
        let is_published = !self.job.order.options.discard && !self.chunk.is_empty();
        if hands.relay.is_exactly_once() && is_published && self.phase != Phase::Marked {
            let what = format!("the redrive, and with it Kafka's transaction, is given up: {why}");
            return Err(Error::new(Kind::DeliveryFailed, what));
        }
        match self.pending.take() {
            Some(pending) => Ok(hands.relay.handle_settled(pending.ticket)?),
            None => Ok(()),
        }
    }

    fn end(&mut self) {
        let done = self.plan.outcomes().values().filter(|o| matches!(o, Outcome::Done(_))).count();
        let left = self.plan.outcomes().len() - done;
        tracing::info!(done, left, freed = self.freed.len(), "redrive: over");
        let report = Report::new(&self.plan, &self.freed);
        self.answer = Some(Ok(report));
    }

    /// Ends it before its end.
    pub(crate) fn give_up(&mut self, why: &str) {
        tracing::warn!("redrive: given up: {why}");
        let done = self.plan.outcomes().values().filter(|o| matches!(o, Outcome::Done(_))).count() as u64;
        self.answer = Some(Err(Failed { why: why.to_owned(), done, kind: None }));
    }

    /// Tells whoever asked what came of it, once another may be asked for.
    pub(crate) fn answer(self) {
        if let Some(answer) = self.answer {
            // They may not wait any more.
            let _ = self.job.reply.send(answer);
        }
    }
}

/// Why it ends early.
const HURRY: &str = "the relay, or Postgres, is shutting down";

/// What ends a redrive.
enum Trouble {
    /// Its session, too.
    Session(Error),
    /// Only itself.
    Own(String),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Session(error)
    }
}

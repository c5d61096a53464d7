//! The producer: records in, acknowledgements out.
//!
//! One thread polls librdkafka and collects the delivery reports; the pipeline takes them in batches. A record
//! is known by its ticket, a number that travels through librdkafka without an allocation. What would be refused
//! is found before it is enqueued, as far as it can be: a record that fails later costs the whole session.

mod client;
mod create;
mod door;
mod failure;
mod first;
mod history;
mod known;
mod letter;
mod partition;
mod poller;
mod refusal;
mod reports;
mod size;
mod survey;
mod tail;
mod topics;
mod transactions;
mod trust;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use rdkafka::{
    error::RDKafkaErrorCode,
    message::{Header, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, Producer as _, PurgeConfig},
};
use relay_core::{Outgoing, poison::Poison, progress::Ticket, record::Record};

pub(crate) use self::{
    client::check,
    create::{NewTopic, create_topics},
    history::{History, Patience},
    size::batch_bytes,
    survey::{Partition, Survey, Surveyed},
    tail::Tails,
    topics::is_compacted,
    transactions::{Done, Transactional},
};
use self::{
    client::{client_config, compresses, not_taken},
    first::{Firsts, Turn},
    known::Known,
    partition::Partitioner,
    poller::Poller,
    refusal::{Failed, is_broken, poison, refused},
    reports::{CHECKPOINT, Context, REPLAYED, opaque, ticket_of},
    topics::{Lookup, Topic},
    transactions::Coordinator,
};
use crate::{
    admin::Metrics,
    config::KafkaConfig,
    error::{Error, Kind},
    faults::{self, Fault},
    wait::Waker,
};

/// How long after a producer broke its reports may take to say why.
const CAUSE_GRACE: Duration = Duration::from_millis(300);
/// How long a broker may take to show that it lets us in after all.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a topic must be reported missing before that is believed: a broker may be a moment behind.
const MISSING_GRACE: Duration = Duration::from_secs(3);
/// How long what a broker refused about a topic is believed without asking again.
const REFUSAL_LASTS: Duration = Duration::from_secs(5);
/// librdkafka's default of `batch.size`, in bytes.
const BATCH_BYTES: usize = 1_000_000;
/// Below this many bytes, batches give way to single records.
const BATCH_LEAST_BYTES: usize = 2_000;

/// How much goes into one batch of records. Kafka refuses a batch that is larger than its topic's
/// `max.message.bytes`, although each record of it may fit, and librdkafka does not split it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Batch {
    /// As configured.
    #[default]
    Configured,
    UpToBytes(usize),
    /// One record: what is refused then is the record itself.
    Single,
}

impl Batch {
    /// The next smaller one, after Kafka refused one of this size.
    pub(crate) fn smaller(self, config: &KafkaConfig) -> Self {
        let configured = config.properties.get("batch.size").and_then(|v| v.expose().parse().ok());
        let bytes = match self {
            Self::Configured => configured.unwrap_or(BATCH_BYTES),
            Self::UpToBytes(bytes) => bytes,
            Self::Single => 0,
        };
        if bytes / 2 < BATCH_LEAST_BYTES { Self::Single } else { Self::UpToBytes(bytes / 2) }
    }
}

/// An entry to write; no value takes the entry away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) topic: String,
    pub(crate) key: String,
    pub(crate) value: Option<Vec<u8>>,
}

/// What became of a record that was handed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Offer {
    /// It was copied and is on its way.
    Taken,
    /// Nobody can tell yet whether its topic takes it, or another has to be acknowledged before.
    Later,
    /// Its topic would not take it.
    Refused(Poison),
}

/// An idempotent producer and the thread that polls it. Dropping it forgets what is in flight.
pub(crate) struct Producer {
    inner: Arc<BaseProducer<Context>>,
    config: KafkaConfig,
    batch: Batch,
    compresses: bool,
    poller: Poller,
    topics: HashMap<String, Known>,
    lookup: Lookup,
    /// None: with transactions, of which a failed one is not seen.
    firsts: Option<Firsts>,
    /// None: without transactions.
    coordinator: Option<(Coordinator, Transactional)>,
    /// Whether a transaction has been begun.
    in_transaction: bool,
    /// The topic that was asked about, and for which record.
    asked: Option<(String, Ticket)>,
    /// Since it was last asked.
    enqueued: u64,
}

impl Producer {
    /// Connects in the background; whether Kafka is there shows itself later.
    pub(crate) fn new(
        config: &KafkaConfig,
        batch: Batch,
        waker: Waker,
        metrics: Metrics,
        transactional: Option<Transactional>,
    ) -> Result<Self, Error> {
        let mut client = client_config(config);
        let for_lookup = client.clone();
        if let Some(Transactional { id, timeout }) = &transactional {
            client.set("transactional.id", id).set("transaction.timeout.ms", timeout.as_millis().to_string());
            // No gap can be committed, and the guarantee would hide why a transaction failed.
            client.set("enable.gapless.guarantee", "false");
        }
        match batch {
            Batch::Configured => {}
            Batch::UpToBytes(bytes) => drop(client.set("batch.size", bytes.to_string())),
            Batch::Single => drop(client.set("batch.num.messages", "1")),
        }
        let context = Context::new(waker, metrics);
        let inner: BaseProducer<Context> = client.create_with_context(context).map_err(|e| not_taken(&e))?;
        let inner = Arc::new(inner);
        let poller = Poller::start(Arc::clone(&inner))?;
        let lookup = Lookup::start(Arc::clone(&inner), for_lookup)?;
        let coordinator = match transactional {
            Some(own) => Some((Coordinator::start(Arc::clone(&inner), own.id.clone())?, own)),
            None => None,
        };
        Ok(Self {
            firsts: coordinator.is_none().then(|| Firsts::new(Partitioner::of(config), Instant::now())),
            coordinator,
            in_transaction: false,
            inner,
            config: config.clone(),
            batch,
            compresses: compresses(config),
            poller,
            topics: HashMap::new(),
            lookup,
            asked: None,
            enqueued: 0,
        })
    }

    /// Takes our transactional id for this producer alone; [`take_done`](Self::take_done) says when. Nothing may be
    /// handed over before.
    pub(crate) fn fence(&self) {
        if let Some((coordinator, _)) = &self.coordinator {
            coordinator.fence();
        }
    }

    /// Commits the transaction that is open, of which everything is acknowledged; [`take_done`](Self::take_done) says
    /// when. Nothing may be handed over before.
    pub(crate) fn commit(&self) {
        if let Some((coordinator, _)) = &self.coordinator {
            coordinator.commit();
            // It waits until there is no event left, of whatever kind.
            self.poller.sent();
        }
    }

    /// Ends a transaction that would be left open, so that whoever reads committed records need not wait until another
    /// relay, or Kafka, ends it. Takes two seconds at most; Kafka may be away, or have given our id to another.
    pub(crate) fn abort(mut self) {
        if self.in_transaction
            && let Some((coordinator, _)) = &mut self.coordinator
        {
            coordinator.abort();
        }
    }

    /// What the transactions' coordinator has carried out since the last call.
    ///
    /// # Errors
    /// The transaction failed, or is not ours any more: this producer is of no more use.
    pub(crate) fn take_done(&mut self) -> Result<Option<Done>, Error> {
        let Some((coordinator, _)) = &self.coordinator else { return Ok(None) };
        let done = coordinator.result().transpose()?;
        if done == Some(Done::Committed) {
            self.in_transaction = false;
        }
        if done.is_some() {
            self.inner.context().up();
        }
        Ok(done)
    }

    /// What is sent from now on belongs to a transaction, where there are any.
    fn begin(&mut self) -> Result<(), Error> {
        if let Some((_, own)) = &self.coordinator
            && !self.in_transaction
        {
            let not_begun = |e| transactions::failed(&e, &own.id);
            self.inner.begin_transaction().map_err(not_begun)?;
            self.in_transaction = true;
        }
        Ok(())
    }

    /// Hands a record over, which is copied if it is taken.
    ///
    /// # Errors
    /// This producer is of no more use.
    pub(crate) fn offer(&mut self, outgoing: &Outgoing<'_>) -> Result<Offer, Error> {
        self.offer_as(outgoing, opaque(outgoing.ticket))
    }

    /// The same of a record that is published once more: should Kafka refuse it later, that says nothing of any row.
    ///
    /// # Errors
    /// This producer is of no more use.
    pub(crate) fn offer_replayed(&mut self, outgoing: &Outgoing<'_>) -> Result<Offer, Error> {
        self.offer_as(outgoing, opaque(outgoing.ticket) | REPLAYED)
    }

    fn offer_as(&mut self, outgoing: &Outgoing<'_>, opaque: usize) -> Result<Offer, Error> {
        let record = &outgoing.record;
        let (topic, is_fresh) = match self.topics.get(record.topic) {
            Some(Known::Topic(topic, asked_for)) => (*topic, *asked_for == outgoing.ticket),
            _ => match self.find(record.topic, outgoing.ticket) {
                Ok(topic) => (topic, true),
                Err(Offer::Refused(poison)) if outgoing.is_dead_letter => {
                    return Err(letter::refused(record, &poison));
                }
                Err(instead) => return Ok(instead),
            },
        };
        if outgoing.is_dead_letter {
            return letter::enqueue(outgoing, topic.limit_bytes, |record| {
                self.enqueue(record, topic, opaque)
            });
        }
        match self.against(record, topic) {
            None => self.enqueue(record, topic, opaque),
            // Of a replay, each record would be one to ask for.
            Some(poison) if is_fresh || opaque & REPLAYED != 0 => Ok(Offer::Refused(poison)),
            // The topic may have been changed since it was asked about.
            Some(_) => {
                self.topics.remove(record.topic);
                self.find(record.topic, outgoing.ticket).map(|_| Offer::Later).or_else(Ok)
            }
        }
    }

    fn enqueue(&mut self, record: &Record<'_>, topic: Topic, opaque: usize) -> Result<Offer, Error> {
        let turn = self.firsts.as_mut().map_or(Turn::Go, |firsts| firsts.turn(record, topic.partitions));
        if turn == Turn::Wait {
            return Ok(Offer::Later);
        }
        self.begin()?;
        let mut headers = OwnedHeaders::new_with_capacity(record.headers.len());
        for (key, value) in record.headers.iter() {
            headers = headers.insert(Header { key, value });
        }
        let mut message = BaseRecord::<[u8], [u8], _>::with_opaque_to(record.topic, opaque)
            .timestamp(record.timestamp_ms)
            .headers(headers);
        (message.key, message.payload, message.partition) = (record.key, record.value, record.partition);
        match self.inner.send(message) {
            Ok(()) => {
                self.poller.sent();
                if faults::has(Fault::ConfirmOnEnqueue) {
                    self.inner.context().reports().acknowledged.push(ticket_of(opaque));
                }
                if let (Turn::First(partition), Some(firsts)) = (turn, &mut self.firsts) {
                    firsts.sent(record.topic, partition, opaque);
                }
                self.enqueued += 1;
                Ok(Offer::Taken)
            }
            Err((error, _)) => {
                let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
                if is_broken(code) {
                    return Err(self.why_it_failed());
                }
                poison(code, record.topic)
                    .map(Offer::Refused)
                    .ok_or_else(|| refused(&Failed { code, topic: record.topic.into(), identity: None }))
            }
        }
    }

    /// Writes one of the relay's own entries; the checkpoint's has no ticket.
    pub(crate) fn write(&mut self, entry: &Entry, ticket: Option<Ticket>) -> Result<(), Error> {
        self.begin()?;
        if ticket.is_none() && faults::has(Fault::CheckpointOutside) {
            return self.write_outside(entry);
        }
        let opaque = ticket.map_or(CHECKPOINT, opaque);
        let mut message = BaseRecord::<str, [u8], _>::with_opaque_to(&entry.topic, opaque).key(&entry.key);
        message.payload = entry.value.as_deref();
        self.inner.send(message).map_err(|(error, _)| {
            let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
            if is_broken(code) {
                return self.why_it_failed();
            }
            refused(&Failed { code, topic: entry.topic.clone(), identity: None })
        })?;
        self.poller.sent();
        Ok(())
    }

    /// Writes the checkpoint as nobody should: beside the transaction, and waits for it.
    fn write_outside(&self, entry: &Entry) -> Result<(), Error> {
        let other: BaseProducer = client_config(&self.config).create().map_err(|e| not_taken(&e))?;
        let mut message = BaseRecord::<str, [u8]>::to(&entry.topic).key(&entry.key);
        message.payload = entry.value.as_deref();
        let sent = other.send(message).map_err(|(e, _)| e).and_then(|()| other.flush(10 * PROBE_TIMEOUT));
        sent.map_err(|e| Error::new(Kind::DeliveryFailed, e.to_string()))?;
        self.inner.context().reports().checkpointed = true;
        Ok(())
    }

    /// How many records were enqueued since the last call.
    pub(crate) fn take_enqueued(&mut self) -> u64 {
        std::mem::take(&mut self.enqueued)
    }

    /// Whether nothing that was handed over still waits for its report.
    pub(crate) fn is_empty(&self) -> bool {
        self.inner.in_flight_count() == 0
    }

    /// Takes what Kafka has acknowledged since the last call; `into` is emptied and its capacity used again.
    /// Whether the checkpoint was among it.
    ///
    /// # Errors
    /// A record was not delivered: this producer is of no more use.
    pub(crate) fn take_reports(&mut self, into: &mut Vec<Ticket>) -> Result<bool, Error> {
        into.clear();
        let context = self.inner.context();
        let mut reports = context.reports();
        std::mem::swap(&mut reports.acknowledged, into);
        let checkpointed = std::mem::take(&mut reports.checkpointed);
        let failed = reports.failed.is_some() || reports.is_transaction_broken;
        drop(reports);
        if failed {
            return Err(self.why_it_failed());
        }
        if checkpointed || !into.is_empty() {
            context.up();
        }
        if let Some(firsts) = &mut self.firsts {
            firsts.acknowledged(into);
            firsts.look_at_the_clock(Instant::now());
        }
        self.look_whether_refused()?;
        Ok(checkpointed)
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        // Nothing more is to be sent while the poller ends.
        self.inner.purge(PurgeConfig::default().queue().inflight());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_shrink_to_single_records() {
        let mut config = KafkaConfig::default();
        let steps = |config: &KafkaConfig| {
            let mut batch = Batch::Configured;
            (0..100).find(|_| {
                batch = batch.smaller(config);
                batch == Batch::Single
            })
        };
        assert_eq!(Batch::Configured.smaller(&config), Batch::UpToBytes(500_000));
        assert_eq!(steps(&config), Some(8));
        config.properties.insert("batch.size".into(), service::Secret::new("3000"));
        assert_eq!(Batch::Configured.smaller(&config), Batch::Single);
        assert_eq!(Batch::Single.smaller(&config), Batch::Single);
    }
}

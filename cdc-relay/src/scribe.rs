//! Writes a checkpoint in the name of a command, where no session does.

use std::time::{Duration, Instant};

use crate::{
    admin::Metrics,
    config::Settings,
    error::{Error, Kind},
    kafka::{Batch, Done, Entry, Producer, Transactional},
    ledger::Owner,
    wait::{self, Wakeups},
};

/// How long Kafka may take to answer.
pub(crate) const KAFKA_TIMEOUT: Duration = Duration::from_secs(30);
/// Whether Kafka refuses us is looked at so often.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// A producer of a command's own.
pub(crate) struct Scribe<'a> {
    settings: &'a Settings,
    producer: Producer,
    wakeups: Wakeups,
    /// It has taken the transactional id, and writes in a transaction.
    has_fenced: bool,
}

impl<'a> Scribe<'a> {
    /// One that writes beside whoever else does.
    pub(crate) fn new(settings: &'a Settings) -> Result<Self, Error> {
        Self::start(settings, None)
    }

    /// One that has taken the owner's transactional id: what a relay had begun is over, committed or aborted, and that
    /// relay can write no more.
    ///
    /// # Errors
    /// Kafka refuses us the id, or does not answer in [`KAFKA_TIMEOUT`].
    pub(crate) fn fence(settings: &'a Settings, owner: &Owner) -> Result<Self, Error> {
        let own = Transactional { id: owner.transactional_id(), timeout: settings.transaction_timeout };
        let mut scribe = Self::start(settings, Some(own))?;
        scribe.producer.fence();
        scribe.wait(|producer, _| Ok(producer.take_done()? == Some(Done::Fenced)))?;
        Ok(scribe)
    }

    fn start(settings: &'a Settings, own: Option<Transactional>) -> Result<Self, Error> {
        let internal = |e| Error::new(Kind::Internal, format!("cannot make a pipe: {e}"));
        let (waker, wakeups) = wait::pair().map_err(internal)?;
        let has_fenced = own.is_some();
        let producer = Producer::new(&settings.kafka, Batch::default(), waker, Metrics::default(), own)?;
        Ok(Self { settings, producer, wakeups, has_fenced })
    }

    /// Writes a checkpoint and waits until Kafka has it for good.
    ///
    /// # Errors
    /// Kafka does not take it, or has given the id to a relay that was started meanwhile.
    pub(crate) fn write(mut self, entry: &Entry) -> Result<(), Error> {
        let written = self.producer.write(entry, None).and_then(|()| self.wait(|_, written| Ok(written)));
        let committed = written.and_then(|()| {
            if !self.has_fenced {
                return Ok(());
            }
            self.producer.commit();
            self.wait(|producer, _| Ok(producer.take_done()? == Some(Done::Committed)))
        });
        committed.map_err(|e| match e.kind {
            Kind::Fenced => e.hint("stop every relay of this slot, then run the command again"),
            _ => e,
        })
    }

    /// Waits until it is so, asking with whether a checkpoint was acknowledged.
    fn wait(
        &mut self,
        mut is_so: impl FnMut(&mut Producer, bool) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let (until, mut none) = (Instant::now() + KAFKA_TIMEOUT, Vec::new());
        loop {
            let written = self.producer.take_reports(&mut none)?;
            if is_so(&mut self.producer, written)? {
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(no_answer(self.settings));
            }
            self.wakeups.wait(left.min(LOOK_INTERVAL));
        }
    }
}

pub(crate) fn no_answer(settings: &Settings) -> Error {
    let what =
        format!("Kafka at {} has not answered in {} s", settings.kafka.brokers, KAFKA_TIMEOUT.as_secs());
    Error::new(Kind::DeliveryFailed, what)
        .hint("check kafka.brokers and kafka.properties, and whether Kafka runs")
}

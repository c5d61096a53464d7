//! Why the producer is of no more use.

use std::time::Instant;

use rdkafka::{
    error::RDKafkaErrorCode,
    producer::{Producer as _, PurgeConfig},
};

use super::{
    Batch, CAUSE_GRACE, PROBE_TIMEOUT, Producer,
    refusal::{Failed, batch_refused, is_consequence, refused},
    reports::NotAdded,
    transactions,
};
use crate::error::{Error, Kind};

impl Producer {
    /// # Errors
    /// Refused: no broker has let us in for longer than time would heal.
    pub(super) fn look_whether_refused(&self) -> Result<(), Error> {
        let context = self.inner.context();
        let Some(refusal) = context.door().refusal(Instant::now()) else { return Ok(()) };
        // Another connection may have come through, which nobody tells us.
        let topic = self.topics.keys().next().map(String::as_str);
        if self.inner.client().fetch_metadata(topic, PROBE_TIMEOUT).is_ok() {
            context.up();
            return Ok(());
        }
        Err(refusal.into_error(&self.config))
    }

    /// Stops sending, then finds out why.
    pub(super) fn why_it_failed(&self) -> Error {
        // What is behind the failed record must not be sent before it.
        self.inner.purge(PurgeConfig::default().queue().inflight());
        // The cause, or the rest of its batch, may be in reports that are still to come.
        std::thread::sleep(CAUSE_GRACE);
        let (failed, count, replay) = {
            let reports = self.inner.context().reports();
            (reports.failed.clone(), reports.refused, reports.failed_replay.clone())
        };
        let id = self.coordinator.as_ref().map(|(_, own)| own.id.as_str());
        if let Some((id, error)) = id.and_then(|id| Some((id, transactions::why(&self.inner)?))) {
            let not_added = self.inner.context().reports().not_added.clone().filter(|_| replay.is_none());
            let is_refused = error.rdkafka_error_code() == Some(RDKafkaErrorCode::TopicAuthorizationFailed);
            if let Some(NotAdded { topic, first }) = not_added.filter(|_| is_refused) {
                let code = RDKafkaErrorCode::TopicAuthorizationFailed;
                return refused(&Failed { code, topic, identity: first });
            }
            let why = transactions::failed(&error, id);
            if why.kind != Kind::DeliveryFailed && (replay.is_none() || why.kind == Kind::Fenced) {
                return why;
            }
        }
        // With the session ends the replay, and the next one has no such record. What a row of the same batch is refused for
        // shows itself there.
        if let Some((code, topic)) = replay {
            let failed = Failed { code, topic, identity: None };
            let as_batch = batch_refused(&failed);
            // The next session's batches are smaller, so that the replay can succeed.
            if as_batch.kind == Kind::BatchTooLarge && count > 1 && self.batch != Batch::Single {
                return as_batch;
            }
            let topic = failed.topic;
            let what = format!("Kafka did not take a record of a replay for topic {topic:?}: {code}");
            return Error::new(Kind::DeliveryFailed, what);
        }
        // A fatal error of its own, such as a refused producer id, comes without a report of a record.
        if let Some((code, reason)) = self.inner.client().fatal_error()
            && failed.as_ref().is_none_or(|failed| is_consequence(failed.code))
            && code != RDKafkaErrorCode::GaplessGuarantee
        {
            return refused(&Failed { code, topic: reason, identity: None });
        }
        match failed {
            None => Error::new(Kind::DeliveryFailed, "the producer is broken, and no record says why"),
            // Kafka refuses a batch as a whole for its size, and for some that is wrong with one record of it.
            Some(failed) if count > 1 && self.batch != Batch::Single => batch_refused(&failed),
            Some(failed) => refused(&failed),
        }
    }
}

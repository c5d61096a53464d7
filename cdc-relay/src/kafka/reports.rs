//! What librdkafka tells: delivery reports, errors and its log.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use rdkafka::{
    ClientContext,
    config::RDKafkaLogLevel,
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Headers as _, Message as _},
    producer::{DeliveryResult, ProducerContext},
};
use relay_core::{progress::Ticket, record::Identity};

use super::{
    door::Door,
    refusal::{Failed, is_consequence},
};
use crate::{
    admin::Metrics,
    faults::{self, Fault},
    wait::Waker,
};

/// Stands for the checkpoint where a record has its ticket.
pub(super) const CHECKPOINT: usize = usize::MAX;

/// Stands beside the ticket of a record that is published once more. No producer has 2^62 records.
pub(super) const REPLAYED: usize = 1 << 62;

/// How a record is known to librdkafka.
pub(super) fn opaque(ticket: Ticket) -> usize {
    usize::try_from(ticket.0).unwrap_or(CHECKPOINT)
}

/// The ticket of a record that is known to librdkafka so.
pub(super) fn ticket_of(opaque: usize) -> Ticket {
    Ticket((opaque & !REPLAYED) as u64)
}

/// What Kafka has said since it was last asked.
#[derive(Debug, Default)]
pub(super) struct Reports {
    pub(super) acknowledged: Vec<Ticket>,
    pub(super) checkpointed: bool,
    /// The first failure that is a cause; those that follow from it are not kept.
    pub(super) failed: Option<Failed>,
    /// The topic that could not be made part of the open transaction.
    pub(super) not_added: Option<NotAdded>,
    /// The open transaction cannot be committed any more.
    pub(super) is_transaction_broken: bool,
    /// One that was published once more and failed by itself, or with its topic.
    pub(super) failed_replay: Option<(RDKafkaErrorCode, String)>,
    /// How many records were refused by themselves, or for what another of their batch is.
    pub(super) refused: usize,
}

/// A topic that Kafka keeps out of a transaction.
#[derive(Debug, Clone)]
pub(super) struct NotAdded {
    pub(super) topic: String,
    /// The first row that was to go there.
    pub(super) first: Option<Identity>,
}

pub(super) struct Context {
    reports: Mutex<Reports>,
    waker: Waker,
    metrics: Metrics,
    /// Whether it has been told that no broker can be reached.
    told_down: AtomicBool,
    door: Door,
}

impl Context {
    pub(super) fn new(waker: Waker, metrics: Metrics) -> Self {
        let told_down = AtomicBool::new(false);
        Self { reports: Mutex::default(), waker, metrics, told_down, door: Door::default() }
    }

    pub(super) fn door(&self) -> &Door {
        &self.door
    }

    pub(super) fn reports(&self) -> MutexGuard<'_, Reports> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake(&self) {
        self.waker.wake();
    }

    fn fail(&self, code: RDKafkaErrorCode, message: Option<(&BorrowedMessage<'_>, usize)>) {
        let mut reports = self.reports();
        let is_replay = message.is_some_and(|(_, opaque)| opaque != CHECKPOINT && opaque & REPLAYED != 0);
        let message = message.map(|(message, _)| message);
        if let Some(message) = message.filter(|_| is_replay)
            && (!is_consequence(code)
                || reports.not_added.as_ref().is_some_and(|not_added| not_added.topic == message.topic()))
        {
            reports.failed_replay.get_or_insert((code, message.topic().to_owned()));
        }
        if let (Some(not_added), Some(message)) = (&mut reports.not_added, message)
            && not_added.first.is_none()
            && not_added.topic == message.topic()
        {
            not_added.first = identity_of(message);
        }
        reports.refused += usize::from(!is_consequence(code));
        if reports.failed.as_ref().is_none_or(|f| is_consequence(f.code)) {
            let topic = message.map(|m| m.topic().to_owned()).unwrap_or_default();
            reports.failed = Some(Failed { code, topic, identity: message.and_then(identity_of) });
        }
        drop(reports);
        self.waker.wake();
    }

    fn down(&self, reason: &str) {
        self.metrics.kafka_up.set(Some(0.0));
        if !self.told_down.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                reason,
                last_failure = self.door.last_failure(),
                "no Kafka broker can be reached; records wait and input pauses at its bound"
            );
        }
    }

    pub(super) fn up(&self) {
        self.metrics.kafka_up.set(Some(1.0));
        self.door.open();
        if self.told_down.swap(false, Ordering::Relaxed) {
            tracing::info!("Kafka can be reached again");
        }
    }
}

/// Which row a record that came back was made of.
fn identity_of(message: &BorrowedMessage<'_>) -> Option<Identity> {
    let headers = message.headers()?;
    let text = |name: &str| std::str::from_utf8(headers.iter().find(|h| h.key == name)?.value?).ok();
    Some(Identity { commit_lsn: text("lsn")?.parse().ok()?, seq: text("seq")?.parse().ok()? })
}

/// The topic that librdkafka's line says Kafka does not allow us to write to in a transaction. The others of the same
/// request have a line, too: they were not attempted.
fn not_allowed(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once("Failed to add partition \"")?;
    let (topic, why) = rest.split_once('"')?;
    why.ends_with("Topic authorization failed").then_some(topic)
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        // What matters comes by `error`, by delivery reports and by the door; librdkafka's own lines are for
        // whoever asks.
        tracing::debug!(?level, facility, "librdkafka: {message}");
        self.door.log(facility, message);
        // Which topic it is about is told nowhere else, and comes before its records are given up.
        if facility == "ADDPARTS"
            && let Some(topic) = not_allowed(message)
        {
            self.reports().not_added.get_or_insert(NotAdded { topic: topic.to_owned(), first: None });
        }
        // That a transaction is broken is told nowhere else, unless a record of it failed by itself.
        if facility == "TXNERR" {
            self.reports().is_transaction_broken = true;
            self.waker.wake();
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AllBrokersDown) => self.down(reason),
            Some(RDKafkaErrorCode::Fatal) => {
                tracing::warn!(reason, "the producer is broken and will be replaced");
                self.fail(RDKafkaErrorCode::Fatal, None);
            }
            // Fatal, too: the producer gets no id.
            Some(code @ RDKafkaErrorCode::ClusterAuthorizationFailed) => self.fail(code, None),
            code => {
                tracing::debug!(reason, "librdkafka: {error}");
                self.door.failed(code, reason, Instant::now());
            }
        }
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, ticket: usize) {
        match result {
            // Nobody has said where it is: librdkafka concludes from a later record of its partition that this one was
            // written as well. But a broker takes any sequence number from a producer that it does not know yet, so after
            // it has refused the first one for the moment (too few replicas in sync), the second may be the first.
            Ok(message) if message.offset() < 0 => {
                self.fail(RDKafkaErrorCode::Inconsistent, Some((message, ticket)));
            }
            Ok(_) => {
                let mut reports = self.reports();
                let first = reports.acknowledged.is_empty();
                if ticket == CHECKPOINT {
                    reports.checkpointed = true;
                } else if !faults::has(Fault::ConfirmOnEnqueue) {
                    reports.acknowledged.push(ticket_of(ticket));
                }
                drop(reports);
                if first {
                    self.waker.wake();
                }
            }
            Err((error, message)) => {
                let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
                self.fail(code, Some((message, ticket)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_request_with_several_topics_only_the_one_that_is_not_allowed_is_blamed() {
        let line = |topic: &str, why: &str| {
            format!(
                "[thrd:b1]: localhost:9092/1: Failed to add partition \"{topic}\" [0] to transaction: Broker: {why}"
            )
        };
        let skipped = line("cdc-relay-checkpoints", "Operation not attempted");
        assert_eq!(not_allowed(&skipped), None);
        assert_eq!(
            not_allowed(&line("outbox.event.order", "Topic authorization failed")),
            Some("outbox.event.order")
        );
        assert_eq!(
            not_allowed("Failed to add partitions to transaction: Broker: Topic authorization failed"),
            None
        );
    }
}

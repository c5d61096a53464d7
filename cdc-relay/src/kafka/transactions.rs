//! Kafka's transactions: the calls that wait, on a thread of their own
//! (<https://cwiki.apache.org/confluence/display/KAFKA/KIP-98>).

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rdkafka::{
    error::{KafkaError, RDKafkaErrorCode as Code},
    producer::{BaseProducer, Producer as _},
};

use super::reports::Context;
use crate::error::{Error, Kind};

/// How long one call may wait; it is resumed until Kafka has answered.
const CALL: Duration = Duration::from_secs(1);
/// Before a call is tried again that Kafka could not carry out.
const PAUSE: Duration = Duration::from_millis(20);
/// Between two looks at whether what was acknowledged is freed.
const FREED: Duration = Duration::from_micros(100);
/// How long the end of what is left open may hold up whoever leaves it.
const ABORT_LIMIT: Duration = Duration::from_secs(1);
/// Between two lines of the log about a call that takes long.
const TELL_INTERVAL: Duration = Duration::from_secs(10);

/// Whose transactions they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Transactional {
    /// The `transactional.id`. Of the producers that have it, Kafka lets the last one write that was fenced.
    pub(crate) id: String,
    /// `transaction.timeout.ms`.
    pub(crate) timeout: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Fence,
    Commit,
    Abort,
}

impl Order {
    fn what(self) -> &'static str {
        match self {
            Self::Fence => "give us our transactional id, and to end what a producer before us had begun",
            Self::Commit => "commit our transaction",
            Self::Abort => "abort our transaction",
        }
    }
}

/// What was carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Done {
    /// No other producer of our id can write any more, and what it had begun is over.
    Fenced,
    Committed,
    Aborted,
}

/// Carries out one order after the other.
pub(super) struct Coordinator {
    orders: Option<Sender<Order>>,
    results: Receiver<Result<Done, Error>>,
    closing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Coordinator {
    pub(super) fn start(producer: Arc<BaseProducer<Context>>, id: String) -> Result<Self, Error> {
        let (orders, ordered) = channel();
        let (told, results) = channel();
        let closing = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&closing);
        let work = move || {
            while let Ok(order) = ordered.recv() {
                let Some(result) = carry_out(&producer, order, &stop) else { return };
                let result = result.map_err(|e| failed(&e, &id));
                if told.send(result).is_err() {
                    return;
                }
                producer.context().wake();
            }
        };
        let thread = std::thread::Builder::new().name("transactions".into()).spawn(work);
        let thread = thread.map_err(|e| Error::new(Kind::Internal, format!("cannot start a thread: {e}")))?;
        Ok(Self { orders: Some(orders), results, closing, thread: Some(thread) })
    }

    pub(super) fn fence(&self) {
        self.order(Order::Fence);
    }

    pub(super) fn commit(&self) {
        self.order(Order::Commit);
    }

    /// Aborts the transaction that is open, unless it is being committed, and waits for it within [`ABORT_LIMIT`]. Nothing
    /// depends on it but how long consumers wait there: whoever fences next aborts it, and Kafka does by itself in the end.
    pub(super) fn abort(&mut self) {
        self.order(Order::Abort);
        // The thread ends with the last order, and with it the results.
        self.orders = None;
        let until = Instant::now() + ABORT_LIMIT;
        let mut done = None;
        while let Ok(result) = self.results.recv_timeout(until.saturating_duration_since(Instant::now())) {
            done = Some(result);
        }
        match done {
            Some(Ok(Done::Aborted)) => {}
            Some(Err(e)) => tracing::debug!("the open transaction is left to Kafka: {e}"),
            _ => tracing::debug!("the open transaction is left to Kafka, which does not answer"),
        }
    }

    fn order(&self, order: Order) {
        if let Some(orders) = &self.orders {
            // The thread ends only when we do.
            let _ = orders.send(order);
        }
    }

    pub(super) fn result(&self) -> Option<Result<Done, Error>> {
        self.results.try_recv().ok()
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // It cannot panic, and if it did there would be nothing to do about it here.
            let _ = thread.join();
        }
    }
}

/// None when nobody waits any more.
fn carry_out(
    producer: &BaseProducer<Context>,
    order: Order,
    stop: &AtomicBool,
) -> Option<Result<Done, KafkaError>> {
    let mut said = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let done = match order {
            Order::Fence => producer.init_transactions(CALL).map(|()| Done::Fenced),
            Order::Commit => {
                wait_until_empty(producer, stop);
                producer.commit_transaction(CALL).map(|()| Done::Committed)
            }
            Order::Abort => producer.abort_transaction(CALL).map(|()| Done::Aborted),
        };
        match done {
            Ok(done) => return Some(Ok(done)),
            Err(e) if may_be_resumed(&e) => {
                if said.elapsed() >= TELL_INTERVAL {
                    said = Instant::now();
                    tracing::warn!("Kafka takes long to {}: {e}", order.what());
                }
                std::thread::sleep(PAUSE);
            }
            Err(e) => return Some(Err(e)),
        }
    }
    None
}

/// Everything in the transaction is acknowledged, but the event that told so may not be freed yet, and until then it
/// counts: the commit's own flush would wait a tenth of a second for what is over in a moment.
fn wait_until_empty(producer: &BaseProducer<Context>, stop: &AtomicBool) {
    while producer.in_flight_count() > 0 && !stop.load(Ordering::Relaxed) {
        std::thread::sleep(FREED);
    }
}

fn may_be_resumed(error: &KafkaError) -> bool {
    match error {
        KafkaError::Transaction(e) => e.is_retriable() && !e.is_fatal() && !e.txn_requires_abort(),
        // Reports that have not been taken yet.
        KafkaError::Flush(_) => true,
        _ => false,
    }
}

/// What broke the open transaction. Asked of a producer that is of no more use, because asking may begin another.
pub(super) fn why(producer: &BaseProducer<Context>) -> Option<KafkaError> {
    let error = producer.begin_transaction().err()?;
    // What is in its way is no cause.
    let is_cause =
        !matches!(error.rdkafka_error_code(), Some(Code::State | Code::Conflict | Code::PreviousInProgress));
    is_cause.then_some(error)
}

/// Whether the code means that the producer's epoch is over.
pub(super) fn is_fenced(code: Code) -> bool {
    matches!(code, Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch)
}

/// The session's end because another has our transactional id, or the coordinator has ended our transaction.
pub(super) fn fenced(id: Option<&str>) -> Error {
    let id = id.unwrap_or("our transactional id");
    Error::new(
        Kind::Fenced,
        format!("Kafka has ended the transaction of {id}, or given the id to another producer"),
    )
}

pub(super) fn failed(error: &KafkaError, id: &str) -> Error {
    let code = error.rdkafka_error_code().unwrap_or(Code::Unknown);
    let text = match error {
        KafkaError::Transaction(e) => e.string(),
        other => other.to_string(),
    };
    match code {
        _ if is_fenced(code) => fenced(Some(id)),
        Code::TransactionalIdAuthorizationFailed => {
            Error::new(Kind::Refused, format!("Kafka does not allow us the transactional id {id}")).hint(format!(
                "grant it (kafka-acls.sh --add --producer --transactional-id {id} --topic … --allow-principal User:…), then start again"
            ))
        }
        Code::InvalidTransactionTimeout => {
            Error::new(Kind::Misconfigured, format!("Kafka does not take the time-out of transactions: {text}"))
                .hint("set transactions.timeout_seconds to at most the broker's transaction.max.timeout.ms")
        }
        Code::UnsupportedFeature | Code::UnsupportedVersion => {
            Error::new(Kind::Refused, format!("Kafka knows no transactions: {text}"))
                .hint("exactly-once delivery needs Kafka 0.11 or later; set delivery = \"at-least-once\"")
        }
        _ => Error::new(Kind::DeliveryFailed, format!("Kafka's transaction failed: {text} ({code})")),
    }
}

//! The thread that takes librdkafka's events: what became of each record, and what is wrong with the brokers.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use rdkafka::producer::{BaseProducer, Producer as _};

use super::reports::Context;
use crate::error::{Error, Kind};

/// How long one poll of librdkafka may last; a stop waits as long.
const POLL: Duration = Duration::from_millis(100);

/// Dropping it ends the thread, and waits for that.
pub(super) struct Poller {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    closing: AtomicBool,
    /// Whether the thread is about to sleep, and has to be woken for what is sent.
    asleep: AtomicBool,
}

impl Poller {
    /// Takes the events of `producer` from now on.
    ///
    /// # Errors
    /// No thread can be started.
    pub(super) fn start(producer: Arc<BaseProducer<Context>>) -> Result<Self, Error> {
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("kafka-poll".into()).spawn(move || own.run(&producer));
        let thread = thread.map_err(|e| Error::new(Kind::Internal, format!("cannot start a thread: {e}")))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// A record was handed over, whose report is to be taken.
    pub(super) fn sent(&self) {
        if self.shared.asleep.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl Shared {
    /// While nothing is in flight it sleeps between looks. `poll` takes no part of a millisecond for a time to wait: it
    /// spins through the last one of each call, which would be most of what an idle relay needs.
    fn run(&self, producer: &BaseProducer<Context>) {
        while !self.closing.load(Ordering::SeqCst) {
            if producer.in_flight_count() > 0 {
                producer.poll(POLL);
                continue;
            }
            producer.poll(Duration::ZERO);
            self.asleep.store(true, Ordering::SeqCst);
            // Who sends, counts first and wakes then; so either this sees the record, or that one sees us asleep.
            if producer.in_flight_count() == 0 && !self.closing.load(Ordering::SeqCst) {
                std::thread::park_timeout(POLL);
            }
            self.asleep.store(false, Ordering::SeqCst);
        }
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        self.wake();
        if let Some(thread) = self.thread.take() {
            // It cannot panic, and if it did there would be nothing to do about it here.
            let _ = thread.join();
        }
    }
}

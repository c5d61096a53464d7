//! Reader pacing.
//!
//! Postgres' walsender sends every message at once, whatever the reader does: a system call and a way through the network stack each
//! and, where the reader waits for it, a wake-up. A reader that naps for a moment whenever it has drained the socket saves the
//! wake-ups, and many reads of its own. A quiet stream is not paced: after the nap that follows the last row the reader blocks.

use std::time::Duration;

/// Long enough for several rows to arrive, short enough to cost a row that comes alone nothing that counts.
const NAP: Duration = Duration::from_micros(200);

/// When to nap. One belongs to each stream.
#[derive(Debug)]
pub(crate) struct Pace {
    /// None: never, for whoever wants to compare.
    nap: Option<Duration>,
    /// Whether messages have come since the last nap.
    busy: bool,
}

impl Pace {
    /// The pace of the relay.
    pub(crate) fn new() -> Self {
        Self { nap: Some(NAP), busy: false }
    }

    /// Takes every byte at once, as other readers do.
    pub(crate) fn eager() -> Self {
        Self { nap: None, busy: false }
    }

    /// A message of the log came.
    pub(crate) fn message(&mut self) {
        self.busy = true;
    }

    /// The socket is drained. Naps if messages came since the last nap; false if the caller has to wait instead.
    pub(crate) fn drained(&mut self) -> bool {
        let busy = std::mem::take(&mut self.busy);
        match self.nap {
            Some(nap) if busy => std::thread::sleep(nap),
            _ => return false,
        }
        true
    }
}

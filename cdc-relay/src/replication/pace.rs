//! Reader pacing.
//!
//! Postgres' walsender sends each message at once: a system call, a way through the network stack and, where the reader waits for
//! it, a wake-up. It gets cheap only while the reader's receive window is full: then a send adds to what waits in the server's own
//! socket. So a reader that is behind naps whenever it has drained the socket, until its window is full. How far behind it is, the
//! server tells: when it sent a transaction, and when that was committed. A nap is a small part of that, so nobody waits noticeably
//! longer. A reader that is not behind naps for a moment, which saves wake-ups; and a quiet stream is not paced: after the nap that
//! follows the last row the reader blocks.

use std::time::Duration;

/// The least: several rows arrive, and one that comes alone is not noticeably later.
const SHORTEST: Duration = Duration::from_micros(200);
/// The most: a window is full by then, and what is behind it fits into the server's socket.
const LONGEST: Duration = Duration::from_millis(20);
/// A nap is so small a part of how far behind the reader is.
const PART: u32 = 20;

/// When to nap. One belongs to each stream.
#[derive(Debug)]
pub(crate) struct Pace {
    /// False: never naps, for whoever wants to compare.
    paces: bool,
    /// Whether messages have come since the last nap.
    busy: bool,
}

impl Pace {
    /// The pace of the relay.
    pub(crate) fn new() -> Self {
        Self { paces: true, busy: false }
    }

    /// Takes every byte at once, as other readers do.
    pub(crate) fn eager() -> Self {
        Self { paces: false, busy: false }
    }

    /// A message of the log came.
    pub(crate) fn message(&mut self) {
        self.busy = true;
    }

    /// The socket is drained, and what was read last was `behind` when the server sent it. Naps if messages came since the last nap;
    /// false if the caller has to wait instead.
    pub(crate) fn drained(&mut self, behind: Duration) -> bool {
        let naps = std::mem::take(&mut self.busy) && self.paces;
        if naps {
            std::thread::sleep(nap(behind));
        }
        naps
    }
}

fn nap(behind: Duration) -> Duration {
    (behind / PART).clamp(SHORTEST, LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nap_is_a_small_part_of_how_far_behind_the_reader_is() {
        assert_eq!(nap(Duration::ZERO), SHORTEST);
        assert_eq!(nap(Duration::from_millis(100)), Duration::from_millis(5));
        assert_eq!(
            nap(Duration::MAX),
            LONGEST,
            "hours behind, and still it has to answer its server in time"
        );
    }

    #[test]
    fn one_nap_follows_messages_and_none_silence() {
        let mut pace = Pace::new();
        assert!(!pace.drained(Duration::ZERO), "nothing came");
        pace.message();
        assert!(pace.drained(Duration::ZERO));
        assert!(!pace.drained(Duration::ZERO), "nothing came since");
        let mut eager = Pace::eager();
        eager.message();
        assert!(!eager.drained(Duration::MAX));
    }
}

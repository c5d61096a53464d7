//! What was read of the stream while one of Kafka's transactions is committed: the next one takes it, in its order.

use std::collections::VecDeque;

use relay_core::Lsn;

use crate::replication::stream::Event;

/// What one event costs beside its message, in bytes.
const OVERHEAD_BYTES: usize = 32;

#[derive(Debug)]
enum Held {
    Wal { start: Lsn, length: usize },
    Keepalive { wal_end: Lsn },
}

/// Events that wait, oldest first.
#[derive(Debug)]
pub(crate) struct Ahead {
    limit_bytes: usize,
    events: VecDeque<Held>,
    /// Their messages, one after the other.
    messages: Vec<u8>,
    /// Up to here they have been taken.
    taken: usize,
}

impl Ahead {
    /// Takes up to `limit_bytes`, and one event more. That is beside what is in flight.
    pub(crate) fn new(limit_bytes: usize) -> Self {
        Self { limit_bytes, events: VecDeque::new(), messages: Vec::new(), taken: 0 }
    }

    /// A request for a reply is not kept: it cannot wait.
    pub(crate) fn push(&mut self, event: &Event<'_>) {
        match event {
            Event::Wal { start, message } => {
                self.events.push_back(Held::Wal { start: *start, length: message.len() });
                self.messages.extend_from_slice(message);
            }
            Event::Keepalive { wal_end, .. } => match self.events.back_mut() {
                // On an idle stream they would pile up.
                Some(Held::Keepalive { wal_end: last }) => *last = *wal_end,
                _ => self.events.push_back(Held::Keepalive { wal_end: *wal_end }),
            },
        }
    }

    /// The oldest event.
    pub(crate) fn take(&mut self) -> Option<Event<'_>> {
        match self.events.pop_front() {
            None => {
                self.messages.clear();
                // One that was very large does not keep its room.
                self.messages.shrink_to(self.limit_bytes);
                self.taken = 0;
                None
            }
            Some(Held::Keepalive { wal_end }) => Some(Event::Keepalive { wal_end, reply_requested: false }),
            Some(Held::Wal { start, length }) => {
                let from = self.taken;
                self.taken += length;
                Some(Event::Wal { start, message: &self.messages[from..self.taken] })
            }
        }
    }

    /// Whether more may be pushed. What was taken counts until all is.
    pub(crate) fn has_room(&self) -> bool {
        self.messages.len() + self.events.len() * OVERHEAD_BYTES < self.limit_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_out_in_their_order() {
        let mut ahead = Ahead::new(7 + 4 * OVERHEAD_BYTES);
        let wal = |start, message| Event::Wal { start: Lsn(start), message };
        let keepalive = |end| Event::Keepalive { wal_end: Lsn(end), reply_requested: false };
        for round in 0..2 {
            for event in [wal(1, b"one"), keepalive(2), keepalive(3), wal(4, b""), wal(5, b"five")] {
                assert!(ahead.has_room(), "{round}");
                ahead.push(&event);
            }
            assert!(!ahead.has_room());
            for event in [wal(1, b"one"), keepalive(3), wal(4, b""), wal(5, b"five")] {
                assert_eq!(ahead.take(), Some(event));
            }
            assert_eq!(ahead.take(), None);
            assert!(ahead.has_room());
        }
    }
}

//! The server's log: where it ends, how fast it grows, and for how long a slot that stands still would last.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use relay_core::Lsn;

use crate::{
    error::{Error, Kind},
    replication::connection::Connection,
};

/// The rate is that of so long before now.
const WINDOW: Duration = Duration::from_mins(5);
/// At most so many looks are kept; with more of them the window is shorter.
const LOOKS_LIMIT: usize = 600;

/// The end of the log at several times.
#[derive(Debug, Default)]
pub(crate) struct Growth {
    /// When, and the bytes written until then since the log began.
    looks: VecDeque<(Instant, f64)>,
}

impl Growth {
    /// Takes in how far the log is now; how many bytes a second were written lately, once that is known.
    pub(crate) fn look(&mut self, now: Instant, position_bytes: f64) -> Option<f64> {
        // Another server's log.
        if self.looks.back().is_some_and(|(_, last)| position_bytes < *last) {
            self.looks.clear();
        }
        self.looks.push_back((now, position_bytes));
        // The last one outside stays: it says how the window begins.
        while self.looks.len() > LOOKS_LIMIT
            || self.looks.get(1).is_some_and(|(second, _)| now.saturating_duration_since(*second) >= WINDOW)
        {
            self.looks.pop_front();
        }
        let (first, from) = self.looks.front()?;
        let seconds = now.saturating_duration_since(*first).as_secs_f64();
        (seconds > 0.0).then(|| (position_bytes - from) / seconds)
    }
}

/// How many seconds the slot would last if it stood still; 0 once the server may give it up at any time. None where
/// nothing is written, and so no end is in sight.
pub(crate) fn seconds_to_loss(safe_wal_bytes: f64, bytes_per_second: f64) -> Option<f64> {
    if safe_wal_bytes <= 0.0 {
        return Some(0.0);
    }
    (bytes_per_second > 0.0).then(|| safe_wal_bytes / bytes_per_second)
}

/// The end of the last record in the server's log: what can be confirmed of it.
pub(crate) fn end_of_log(connection: &mut Connection) -> Result<Lsn, Error> {
    let sql = "SELECT pg_current_wal_insert_lsn(), (SELECT setting FROM pg_settings WHERE name = 'wal_block_size'), \
               (SELECT setting FROM pg_settings WHERE name = 'wal_segment_size')";
    let row = connection.simple_query(sql)?.into_iter().next().unwrap_or_default();
    let mut columns = row.into_iter().map(Option::unwrap_or_default);
    let mut column = || columns.next().unwrap_or_default();
    let lsn: Result<Lsn, _> = column().parse();
    let lsn = lsn.map_err(|e| Error::new(Kind::Internal, format!("the end of the log: {e}")))?;
    let (block, segment) = (column().parse().unwrap_or(8192), column().parse().unwrap_or(16 << 20));
    Ok(before_header(lsn, block, segment))
}

/// The place where the next record is inserted, without the header of its page where that is all there is of the page: it is
/// written with the record, so that nobody could confirm it before.
fn before_header(insert: Lsn, block: u64, segment: u64) -> Lsn {
    // The sizes of XLogLongPageHeaderData, which a segment begins with, and of XLogPageHeaderData.
    let header = if insert.0 % segment < block { 40 } else { 24 };
    if insert.0 % block == header { Lsn(insert.0 - header) } else { insert }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_only_a_pages_header_is_not_waited_for() {
        let before = |lsn| before_header(Lsn(lsn), 8192, 16 << 20).0;
        for (insert, end) in [
            ((16 << 20) + 40, 16 << 20),
            ((16 << 20) + 24, (16 << 20) + 24),
            (8192 + 24, 8192),
            (8192 + 40, 8192 + 40),
            (8192 + 48, 8192 + 48),
            (3 * 8192, 3 * 8192),
        ] {
            assert_eq!(before(insert), end, "{insert}");
        }
    }

    #[test]
    fn the_rate_is_that_of_the_window_and_of_one_server() {
        let (start, mut growth) = (Instant::now(), Growth::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(growth.look(at(0), 1000.0), None, "one look says nothing");
        assert_eq!(growth.look(at(2), 1200.0), Some(100.0));
        assert_eq!(growth.look(at(302), 31_200.0), Some(100.0), "since the second look");
        assert_eq!(growth.look(at(602), 31_200.0), Some(0.0), "nothing in the last five minutes");
        assert_eq!(growth.look(at(604), 10.0), None, "it goes back: another server");
        assert_eq!(growth.look(at(606), 30.0), Some(10.0));
        for n in 0..10_000 {
            growth.look(at(606) + Duration::from_micros(n), 30.0);
        }
        assert!(growth.looks.len() <= LOOKS_LIMIT);
    }

    #[test]
    fn a_slot_is_lost_when_what_is_safe_is_written() {
        assert_eq!(seconds_to_loss(1000.0, 10.0), Some(100.0));
        assert_eq!(seconds_to_loss(-5.0, 0.0), Some(0.0), "at the next checkpoint of the server");
        assert_eq!(seconds_to_loss(1000.0, 0.0), None);
    }
}

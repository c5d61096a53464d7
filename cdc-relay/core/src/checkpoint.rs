//! How far the log is published, as Kafka remembers it.

use crate::{Lsn, disposal::Halt, record::Identity};

/// A transaction, by what no other one on the same history of the log shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    pub commit_lsn: Lsn,
    /// When it committed, in microseconds since Postgres' epoch (2000-01-01).
    pub committed_at_us: i64,
}

/// A position in the log: everything before it is in Kafka, or left out by a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Checkpoint {
    /// Every transaction that committed before it: the end of one, or the end of the log when there was nothing left.
    pub lsn: Lsn,
    /// And of one transaction behind it the changes before this one.
    pub part: Option<Identity>,
    /// The last transaction of all those, where it is known.
    pub last: Option<Mark>,
}

impl From<Lsn> for Checkpoint {
    /// Whole transactions only, the last of them unknown.
    fn from(lsn: Lsn) -> Self {
        Self { lsn, part: None, last: None }
    }
}

impl Checkpoint {
    /// Whether the row is published. A transaction ends behind its commit LSN, and the next one commits where it ends
    /// at the earliest.
    pub fn covers(&self, row: Identity) -> bool {
        row.commit_lsn < self.lsn
            || self.part.is_some_and(|part| row.commit_lsn == part.commit_lsn && row.seq < part.seq)
    }

    /// The first commit LSN of which nothing is covered.
    fn end(&self) -> Lsn {
        self.part.map_or(self.lsn, |part| self.lsn.max(Lsn(part.commit_lsn.0.saturating_add(1))))
    }
}

/// What a session that passes over what is published watches meanwhile: that it is what was published. A server that
/// was restored from a backup may have written something else to the same positions.
#[derive(Debug)]
pub(crate) struct Passage {
    checkpoint: Checkpoint,
    /// The stream begins here.
    confirmed: Lsn,
    /// The last transaction that came.
    seen: Option<Mark>,
    is_over: bool,
}

impl Passage {
    pub(crate) fn new(checkpoint: Checkpoint, confirmed: Lsn) -> Self {
        Self { checkpoint, confirmed, seen: None, is_over: false }
    }

    pub(crate) fn covers(&self, row: Identity) -> bool {
        !self.is_over && self.checkpoint.covers(row)
    }

    /// Whether it came to its end, and all was as it should be.
    pub(crate) fn is_over(&self) -> bool {
        self.is_over
    }

    /// A transaction begins.
    pub(crate) fn begin(&mut self, mark: Mark) -> Result<(), Halt> {
        if self.is_over {
            return Ok(());
        }
        if mark.commit_lsn >= self.checkpoint.end() {
            return self.end();
        }
        self.seen = Some(mark);
        // Behind the last one, and behind what is covered as a whole, there was nothing.
        match self.checkpoint.last {
            Some(last) if mark != last && mark.commit_lsn >= last.commit_lsn.min(self.checkpoint.lsn) => {
                Err(self.another(last))
            }
            _ => Ok(()),
        }
    }

    /// Outside any transaction, everything up to `wal_end` was sent.
    pub(crate) fn idle_until(&mut self, wal_end: Lsn) -> Result<(), Halt> {
        if self.is_over || wal_end < self.checkpoint.end() { Ok(()) } else { self.end() }
    }

    fn end(&mut self) -> Result<(), Halt> {
        if let Some(last) = self.checkpoint.last {
            let is_there = self.seen == Some(last);
            let is_before = self.seen.is_none() && last.commit_lsn < self.confirmed;
            if !is_there && !is_before {
                return Err(self.another(last));
            }
        }
        self.is_over = true;
        Ok(())
    }

    fn another(&self, published: Mark) -> Halt {
        Halt::AnotherLog { published, found: self.seen, checkpoint: self.checkpoint.lsn }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(commit_lsn: u64) -> Mark {
        Mark { commit_lsn: Lsn(commit_lsn), committed_at_us: 7 }
    }

    fn row(commit_lsn: u64, seq: u64) -> Identity {
        Identity { commit_lsn: Lsn(commit_lsn), seq }
    }

    fn checkpoint(lsn: u64, part: Option<Identity>, last: u64) -> Checkpoint {
        Checkpoint { lsn: Lsn(lsn), part, last: Some(mark(last)) }
    }

    #[test]
    fn whole_transactions_and_the_first_part_of_one_are_covered() {
        let checkpoint = checkpoint(20, Some(row(30, 5)), 30);
        for covered in [row(1, 0), row(19, 100), row(30, 0), row(30, 4)] {
            assert!(checkpoint.covers(covered), "{covered:?}");
        }
        // The next one may commit right where the last one ended.
        for open in [row(20, 0), row(29, 0), row(30, 5), row(31, 0)] {
            assert!(!checkpoint.covers(open), "{open:?}");
        }
    }

    #[test]
    fn a_log_that_has_what_was_published_is_passed_over() {
        let mut passage = Passage::new(checkpoint(20, None, 15), Lsn(10));
        for commit_lsn in [10, 15, 20] {
            passage.begin(mark(commit_lsn)).unwrap();
        }
        // A stream that begins behind the last one.
        Passage::new(checkpoint(20, None, 15), Lsn(16)).idle_until(Lsn(20)).unwrap();
        // A part, and what follows.
        let mut passage = Passage::new(checkpoint(20, Some(row(30, 5)), 30), Lsn(10));
        for commit_lsn in [15, 30] {
            passage.begin(mark(commit_lsn)).unwrap();
        }
        assert!(passage.covers(row(30, 4)) && !passage.covers(row(30, 5)));
        passage.begin(mark(31)).unwrap();
        // It is not known which was the last.
        let mut passage = Passage::new(Lsn(20).into(), Lsn(10));
        passage.begin(mark(12)).unwrap();
        passage.begin(mark(20)).unwrap();
    }

    #[test]
    fn a_log_that_has_something_else_in_its_place_is_another() {
        let found_after = |checkpoint, confirmed: u64, begun: &[Mark]| {
            let mut passage = Passage::new(checkpoint, Lsn(confirmed));
            let begun = begun.iter().try_for_each(|mark| passage.begin(*mark));
            let Err(Halt::AnotherLog { found, .. }) = begun.and_then(|()| passage.idle_until(Lsn(40))) else {
                panic!("it is not")
            };
            found
        };
        let found = |confirmed, begun: &[Mark]| found_after(checkpoint(20, None, 15), confirmed, begun);
        // The last one is missing, has another before it only, another behind it, or committed at another time.
        assert_eq!(found(10, &[]), None);
        assert_eq!(found(10, &[mark(12)]), Some(mark(12)));
        assert_eq!(found(10, &[mark(15), mark(18)]), Some(mark(18)));
        let late = Mark { committed_at_us: 8, ..mark(15) };
        assert_eq!(found(10, &[late]), Some(late));
        // Something behind the last one, although the stream begins behind it.
        assert_eq!(found(16, &[mark(17)]), Some(mark(17)));
        // At once, before anything of it is handled: it may end behind the checkpoint, or be before a part.
        assert!(Passage::new(checkpoint(20, None, 15), Lsn(16)).begin(mark(19)).is_err());
        let part = checkpoint(20, Some(row(30, 5)), 30);
        assert!(Passage::new(part, Lsn(16)).begin(mark(25)).is_err());
        assert_eq!(found_after(part, 16, &[mark(17)]), Some(mark(17)));
    }
}

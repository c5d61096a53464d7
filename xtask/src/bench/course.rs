//! How the records of one measurement came to be in their topic, as seen from outside.

use std::time::Duration;

/// Looks at how many there are.
#[derive(Debug, Default)]
pub(super) struct Course {
    /// When some were first seen, and how many.
    first: Option<(Duration, u64)>,
    /// The same of a half of them.
    half: Option<(Duration, u64)>,
    last: Option<(Duration, u64)>,
    /// When there were more than before.
    grown: Duration,
}

impl Course {
    /// So many of `all` are there, so long after the start.
    pub(super) fn look(&mut self, at: Duration, count: u64, all: u64) {
        if count == 0 {
            return;
        }
        self.first.get_or_insert((at, count));
        if self.last.is_none_or(|(_, before)| count > before) {
            self.grown = at;
        }
        if count >= all / 2 {
            self.half.get_or_insert((at, count));
        }
        self.last = Some((at, count));
    }

    /// When some were first seen.
    pub(super) fn first(&self) -> Option<Duration> {
        self.first.map(|(at, _)| at)
    }

    /// For how long none has come.
    pub(super) fn quiet(&self, at: Duration) -> Duration {
        at.saturating_sub(self.grown)
    }

    /// Records a second, from when some were first seen; None where all of them were.
    pub(super) fn rate(&self) -> Option<f64> {
        rate(self.first?, self.last?)
    }

    /// The same of the second half: of whoever has become warm.
    pub(super) fn warm_rate(&self) -> Option<f64> {
        rate(self.half?, self.last?)
    }
}

#[expect(clippy::cast_precision_loss, reason = "no count of rows comes near 2^52")]
fn rate((from, before): (Duration, u64), (to, after): (Duration, u64)) -> Option<f64> {
    let seconds = to.saturating_sub(from).as_secs_f64();
    (after > before && seconds > 0.0).then(|| (after - before) as f64 / seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_start_is_not_part_of_the_rate() {
        let mut course = Course::default();
        let s = Duration::from_secs;
        for (at, count) in [(1, 0), (5, 100), (6, 400), (7, 600), (9, 1000)] {
            course.look(s(at), count, 1000);
        }
        assert_eq!(course.first(), Some(s(5)));
        assert_eq!((course.rate(), course.warm_rate()), (Some(225.0), Some(200.0)));
        course.look(s(11), 1000, 1000);
        assert_eq!(
            (course.quiet(s(12)), Course::default().quiet(s(3))),
            (s(3), s(3)),
            "none since 9 s, none ever"
        );
        let mut at_once = Course::default();
        at_once.look(s(1), 10, 10);
        assert_eq!((at_once.rate(), at_once.warm_rate()), (None, None));
    }
}

//! Points in time as text: what Postgres writes, and what CloudEvents wants.

use std::fmt::Write as _;

const MS_PER_DAY: i64 = 86_400_000;
/// Longer ones Postgres does not have: its last year is 294276.
const YEAR_MAX_DIGITS: usize = 6;

/// Milliseconds since the Unix epoch, of a `timestamptz` or `timestamp` (taken for UTC) as Postgres writes them
/// with `DateStyle = ISO`
/// (<https://www.postgresql.org/docs/current/datatype-datetime.html#DATATYPE-DATETIME-OUTPUT>), of RFC 3339, or of
/// a whole number, which is such milliseconds itself. What is finer is cut off.
///
/// None where it is none of these, `infinity` included, or not after 1970-01-01T00:00:00Z: Kafka has no such times.
pub(crate) fn parse_ms(text: &str) -> Option<i64> {
    if text.bytes().all(|b| b.is_ascii_digit()) {
        return text.parse().ok().filter(|ms| *ms > 0);
    }
    let mut input = Input(text.as_bytes());
    let year_digits = input.0.iter().take_while(|b| b.is_ascii_digit()).count();
    if !(4..=YEAR_MAX_DIGITS).contains(&year_digits) {
        return None;
    }
    let year = input.digits(year_digits)?;
    let month = input.after(b"-")?.digits(2).filter(|m| (1..=12).contains(m))?;
    let day = input.after(b"-")?.digits(2).filter(|d| (1..=days_in(year, month)).contains(d))?;
    let hour = input.after(b" Tt")?.digits(2).filter(|h| *h <= 23)?;
    let minute = input.after(b":")?.digits(2).filter(|m| *m <= 59)?;
    let second = input.after(b":")?.digits(2).filter(|s| *s <= 59)?;
    let fraction_ms = if input.after(b".").is_some() { input.fraction_ms()? } else { 0 };
    let offset_seconds = input.offset_seconds()?;
    // What is left is an era, or is not a time.
    if !input.0.is_empty() {
        return None;
    }
    let seconds = hour * 3600 + minute * 60 + second - offset_seconds;
    let ms = days_since_epoch(year, month, day) * MS_PER_DAY + seconds * 1000 + fraction_ms;
    (ms > 0).then_some(ms)
}

/// Writes it as RFC 3339 in UTC. False, and nothing is written, where that has no such time: it is not after the
/// epoch, or after the year 9999.
pub(crate) fn put_rfc3339(out: &mut String, ms: i64) -> bool {
    let (year, month, day) = date_of(ms.div_euclid(MS_PER_DAY));
    if ms <= 0 || year > 9999 {
        return false;
    }
    let (hours, minutes) = (ms / 3_600_000 % 24, ms / 60_000 % 60);
    let (seconds, fraction) = (ms / 1000 % 60, ms % 1000);
    // Writing to a String cannot fail.
    let _ = write!(out, "{year:04}-{month:02}-{day:02}T{hours:02}:{minutes:02}:{seconds:02}.{fraction:03}Z");
    true
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn after(&mut self, any_of: &[u8]) -> Option<&mut Self> {
        let (first, rest) = self.0.split_first()?;
        any_of.contains(first).then(|| {
            self.0 = rest;
            self
        })
    }

    fn digits(&mut self, count: usize) -> Option<i64> {
        let (digits, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        let value = |n: i64, b: &u8| b.is_ascii_digit().then(|| n * 10 + i64::from(b - b'0'));
        digits.iter().try_fold(0, value)
    }

    /// The digits behind the point: the first three are milliseconds.
    fn fraction_ms(&mut self) -> Option<i64> {
        let count = self.0.iter().take_while(|b| b.is_ascii_digit()).count();
        let ms = match count {
            0 => return None,
            1 => self.digits(1)? * 100,
            2 => self.digits(2)? * 10,
            _ => self.digits(3)?,
        };
        self.0 = self.0.get(count.saturating_sub(3)..).filter(|_| count > 3).unwrap_or(self.0);
        Some(ms)
    }

    /// `+HH`, `+HH:MM`, `+HH:MM:SS`, the same with `-`, `Z`, or nothing.
    fn offset_seconds(&mut self) -> Option<i64> {
        let sign = match self.0.first() {
            Some(b'+') => 1,
            Some(b'-') => -1,
            Some(b'Z' | b'z') => 0,
            _ => return Some(0),
        };
        self.0 = &self.0[1..];
        if sign == 0 {
            return Some(0);
        }
        let mut seconds = self.digits(2).filter(|h| *h <= 23)? * 3600;
        for unit in [60, 1] {
            if self.after(b":").is_none() {
                break;
            }
            seconds += self.digits(2).filter(|n| *n <= 59)? * unit;
        }
        Some(sign * seconds)
    }
}

fn days_in(year: i64, month: i64) -> i64 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        _ => 31,
    }
}

/// Days from 1970-01-01 in the proleptic Gregorian calendar, by eras of 400 years whose years begin in March.
/// (<https://howardhinnant.github.io/date_algorithms.html#days_from_civil>)
fn days_since_epoch(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// Year, month and day: [`days_since_epoch`] undone.
fn date_of(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn postgres_and_rfc_3339_are_read() {
        for (text, expected) in [
            ("2026-01-01 00:00:00+00", 1_767_225_600_000),
            ("2026-01-01 00:00:00", 1_767_225_600_000),
            ("2026-01-01 00:00:00.123456+00", 1_767_225_600_123),
            ("2026-01-01 00:00:00.1", 1_767_225_600_100),
            ("2026-01-01 00:00:00.12", 1_767_225_600_120),
            ("2026-01-01 00:00:00.9999999", 1_767_225_600_999),
            ("2026-01-01T02:30:00+02:30", 1_767_225_600_000),
            ("2025-12-31 18:29:57-05:30:03", 1_767_225_600_000),
            ("2026-01-01t00:00:00z", 1_767_225_600_000),
            ("2024-02-29 12:00:00+00", 1_709_208_000_000),
            ("1970-01-01 00:00:00.001+00", 1),
            ("294276-12-31 23:59:59.999999+00", 9_224_318_015_999_999),
            ("1767225600000", 1_767_225_600_000),
        ] {
            assert_eq!(parse_ms(text), Some(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_for_kafka_is_none() {
        for text in [
            "",
            "infinity",
            "-infinity",
            "yesterday",
            "0",
            "-5",
            "+5",
            "1970-01-01 00:00:00+00",
            "1969-12-31 23:59:59+00",
            "2026-01-01",
            "2026-01-01 00:00",
            "2026-13-01 00:00:00",
            "2026-00-01 00:00:00",
            "2026-02-29 00:00:00",
            "2026-04-31 00:00:00",
            "2026-01-00 00:00:00",
            "2026-01-01 24:00:00",
            "2026-01-01 00:60:00",
            "2026-01-01 00:00:60",
            "2026-01-01 00:00:00.",
            "2026-01-01 00:00:00+",
            "2026-01-01 00:00:00+24",
            "2026-01-01 00:00:00+00:",
            "2026-01-01 00:00:00 UTC",
            "2026-01-01 00:00:00+00 BC",
            "01.01.2026 00:00:00",
            "9999999-01-01 00:00:00",
            "99999999999999999999999",
            "2026-1-1 00:00:00",
            "１２",
            "2026-01-01 00:00:00é",
        ] {
            assert_eq!(parse_ms(text), None, "{text}");
        }
    }

    #[test]
    fn rfc_3339_has_no_year_10000() {
        let mut out = String::new();
        assert!(put_rfc3339(&mut out, 1_767_225_600_007));
        assert_eq!(out, "2026-01-01T00:00:00.007Z");
        for ms in [0, -1, i64::MIN, i64::MAX, 253_402_300_800_000] {
            assert!(!put_rfc3339(&mut out, ms), "{ms}");
        }
    }

    proptest! {
        #[test]
        fn parsing_is_total(text: String, digits in "[-0-9:+. TZ]{0,40}") {
            let _ = (parse_ms(&text), parse_ms(&digits));
        }

        #[test]
        fn what_is_written_is_read_again(ms in 1_i64..253_402_300_800_000) {
            let mut out = String::new();
            prop_assert!(put_rfc3339(&mut out, ms));
            prop_assert_eq!(parse_ms(&out), Some(ms));
        }

        #[test]
        fn each_day_follows_the_one_before(days in -1_000_000_i64..100_000_000) {
            let (year, month, day) = date_of(days);
            prop_assert_eq!(days_since_epoch(year, month, day), days);
            prop_assert!((1..=12).contains(&month) && (1..=days_in(year, month)).contains(&day));
        }
    }
}

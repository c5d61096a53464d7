//! Points in time as people write them.

use chrono::{DateTime, TimeDelta, Utc};

/// An RFC 3339 time, or how long ago: `90s`, `15m`, `2h`, `3d`.
pub(super) fn parse(text: &str) -> Result<DateTime<Utc>, String> {
    parse_at(text, Utc::now())
}

fn parse_at(text: &str, now: DateTime<Utc>) -> Result<DateTime<Utc>, String> {
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Ok(time.to_utc());
    }
    let ago = || {
        let unit = text.chars().last()?;
        let number: u32 = text.strip_suffix(unit)?.parse().ok()?;
        let seconds = match unit {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            _ => return None,
        };
        now.checked_sub_signed(TimeDelta::try_seconds(i64::from(number) * seconds)?)
    };
    ago().ok_or_else(|| {
        format!(
            "{text:?} is neither a time such as 2026-11-21T13:00:00Z nor how long ago, such as 15m, 2h or 3d"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_absolute_or_so_long_ago() {
        let now: DateTime<Utc> = "2026-11-21T12:00:00Z".parse().unwrap();
        for (text, wanted) in [
            ("2026-11-21T13:00:00+02:00", "2026-11-21T11:00:00Z"),
            ("0s", "2026-11-21T12:00:00Z"),
            ("15m", "2026-11-21T11:45:00Z"),
            ("2h", "2026-11-21T10:00:00Z"),
            ("3d", "2026-11-18T12:00:00Z"),
        ] {
            assert_eq!(parse_at(text, now), Ok(wanted.parse().unwrap()), "{text}");
        }
        for wrong in ["", "d", "-1h", "2w", "2026-11-21", "5 m", "é", "4294967295d"] {
            assert!(parse_at(wrong, now).unwrap_err().contains("15m"), "{wrong}");
        }
    }
}

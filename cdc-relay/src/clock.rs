//! The time of day as Postgres counts it.

use std::time::{Duration, SystemTime};

/// 2000-01-01T00:00:00Z.
const POSTGRES_EPOCH: Duration = Duration::from_secs(946_684_800);

/// Microseconds since Postgres' epoch, by this machine's clock.
pub(crate) fn postgres_now_us() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH + POSTGRES_EPOCH).unwrap_or_default();
    i64::try_from(now.as_micros()).unwrap_or(i64::MAX)
}

/// Microseconds from a time of Postgres' until now; 0 where its clock is ahead of ours.
pub(crate) fn us_since(postgres_us: i64) -> u64 {
    u64::try_from(postgres_now_us().saturating_sub(postgres_us)).unwrap_or(0)
}

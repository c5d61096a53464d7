//! The part of the configuration that says how long rows stay in the outbox.

use std::time::Duration;

use serde::Deserialize;

#[derive(Debug, Clone, Copy, Deserialize, PartialEq, Default)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum RetentionMode {
    #[default]
    Keep,
    Delete,
    DropPartitions,
}

#[derive(Debug, Clone, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RetentionConfig {
    pub(crate) mode: RetentionMode,
    pub(crate) older_than_seconds: u64,
    pub(crate) column: String,
}

impl Default for RetentionConfig {
    fn default() -> Self {
        Self { mode: RetentionMode::Keep, older_than_seconds: 604_800, column: "created_at".into() }
    }
}

/// What leaves the outboxes once it is in Kafka, and confirmed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Retention {
    /// Nothing.
    Keep,
    /// Rows that are older than this by the time in this column.
    Delete { older_than: Duration, column: String },
    /// Partitions whose range ended so long ago.
    DropPartitions { older_than: Duration },
}

/// Ten years.
const SECONDS_MAX: u64 = 315_360_000;

impl RetentionConfig {
    /// What it says, or the key that cannot be, and why.
    pub(super) fn check(self) -> Result<Retention, (&'static str, String)> {
        let Self { mode, older_than_seconds, column } = self;
        if older_than_seconds > SECONDS_MAX {
            return Err(("retention.older_than_seconds", format!("must be 0 to {SECONDS_MAX}")));
        }
        let older_than = Duration::from_secs(older_than_seconds);
        match mode {
            RetentionMode::Keep => Ok(Retention::Keep),
            RetentionMode::Delete if column.is_empty() || column.contains('\0') => {
                Err(("retention.column", "must name the column that tells a row's age".into()))
            }
            RetentionMode::Delete => Ok(Retention::Delete { older_than, column }),
            RetentionMode::DropPartitions => Ok(Retention::DropPartitions { older_than }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_names_its_key() {
        let check = |change: fn(&mut RetentionConfig)| {
            let mut config = RetentionConfig { mode: RetentionMode::Delete, ..RetentionConfig::default() };
            change(&mut config);
            config.check().map_err(|(key, _)| key)
        };
        assert_eq!(check(|c| c.older_than_seconds = u64::MAX), Err("retention.older_than_seconds"));
        assert_eq!(check(|c| c.column.clear()), Err("retention.column"));
        assert_eq!(check(|c| c.mode = RetentionMode::Keep), Ok(Retention::Keep));
        assert!(matches!(check(|c| c.older_than_seconds = 0), Ok(Retention::Delete { .. })));
    }
}

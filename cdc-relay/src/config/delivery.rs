//! The part of the configuration that says what is promised of each row.

use std::time::Duration;

use relay_core::{relay::Delivery, transactions::Sizes};
use serde::Deserialize;

/// A promise as the configuration spells it.
#[derive(Debug, Clone, Copy, Deserialize, PartialEq, Default)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DeliveryName {
    #[default]
    AtLeastOnce,
    ExactlyOnce,
}

/// Kafka's transactions.
#[derive(Debug, Clone, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TransactionsConfig {
    pub(crate) bytes: usize,
    pub(crate) milliseconds: u64,
    pub(crate) timeout_seconds: u64,
}

impl Default for TransactionsConfig {
    fn default() -> Self {
        Self { bytes: 4 * 1024 * 1024, milliseconds: 20, timeout_seconds: 15 }
    }
}

impl TransactionsConfig {
    /// What is promised, and `transaction.timeout.ms`; or the key that cannot be, and why.
    pub(super) fn check(self, name: DeliveryName) -> Result<(Delivery, Duration), (&'static str, String)> {
        let Self { bytes, milliseconds, timeout_seconds } = self;
        if !(16 * 1024..=1 << 30).contains(&bytes) {
            return Err(("transactions.bytes", "must be 16384 (16 KiB) to 1073741824 (1 GiB)".into()));
        }
        if !(2..=900).contains(&timeout_seconds) {
            return Err(("transactions.timeout_seconds", "must be 2 to 900".into()));
        }
        let (time, timeout) = (Duration::from_millis(milliseconds), Duration::from_secs(timeout_seconds));
        // Far enough below it that what is closed then can still be committed.
        let split_after = timeout / 3;
        if time > split_after {
            let why = format!(
                "must be at most a third of transactions.timeout_seconds, {} here",
                split_after.as_millis()
            );
            return Err(("transactions.milliseconds", why));
        }
        let delivery = match name {
            DeliveryName::AtLeastOnce => Delivery::AtLeastOnce,
            DeliveryName::ExactlyOnce => Delivery::ExactlyOnce(Sizes { bytes, time, split_after }),
        };
        Ok((delivery, timeout))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_names_its_key() {
        let key = |change: fn(&mut TransactionsConfig)| {
            let mut config = TransactionsConfig::default();
            change(&mut config);
            config.check(DeliveryName::ExactlyOnce).unwrap_err().0
        };
        assert_eq!(key(|c| c.bytes = 0), "transactions.bytes");
        assert_eq!(key(|c| c.timeout_seconds = 1), "transactions.timeout_seconds");
        assert_eq!(key(|c| c.milliseconds = 5001), "transactions.milliseconds");
    }
}

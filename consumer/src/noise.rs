//! librdkafka's log lines without the noise: when Kafka is away it repeats itself for every broker and attempt.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use rdkafka::{config::RDKafkaLogLevel, error::KafkaError};

/// The same error is told at most this often.
const EVERY: Duration = Duration::from_secs(30);

/// Tells each kind of error once in a while, with the number of those it kept to itself.
pub(crate) struct Noise {
    client: &'static str,
    // By error code or log facility, of which there are a few hundred at most.
    told: Mutex<HashMap<String, (Instant, u64)>>,
}

impl Noise {
    /// For a client whose name is told with each line.
    pub(crate) fn new(client: &'static str) -> Self {
        Self { client, told: Mutex::new(HashMap::new()) }
    }

    /// A log line of librdkafka's.
    pub(crate) fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        use RDKafkaLogLevel::{Alert, Critical, Emerg, Error, Info, Notice, Warning};
        let client = self.client;
        match level {
            // These come once more as errors, with a code to count them by.
            _ if matches!(facility, "FAIL" | "ERROR") => tracing::debug!(client, facility, message),
            Emerg | Alert | Critical | Error | Warning => {
                if let Some(kept_back) = self.may_tell(facility, Instant::now()) {
                    tracing::warn!(client, facility, message, kept_back);
                }
            }
            Notice | Info => tracing::info!(client, facility, message),
            RDKafkaLogLevel::Debug => tracing::debug!(client, facility, message),
        }
    }

    /// An error of the client as a whole.
    pub(crate) fn error(&self, error: &KafkaError, reason: &str) {
        if let Some(kept_back) = self.may_tell(&error.to_string(), Instant::now()) {
            tracing::warn!(client = self.client, %error, reason, kept_back, "Kafka");
        }
    }

    /// How many of this kind were kept back, if this one may be told.
    fn may_tell(&self, kind: &str, now: Instant) -> Option<u64> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, kept_back)) = told.get_mut(kind) {
            if now.duration_since(*at) < EVERY {
                *kept_back += 1;
                return None;
            }
            let count = *kept_back;
            (*at, *kept_back) = (now, 0);
            return Some(count);
        }
        told.insert(kind.to_owned(), (now, 0));
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_told_once_in_a_while_and_the_others_are_counted() {
        let noise = Noise::new("test");
        let start = Instant::now();
        assert_eq!(noise.may_tell("down", start), Some(0));
        assert_eq!(noise.may_tell("down", start + Duration::from_secs(1)), None);
        assert_eq!(noise.may_tell("other", start), Some(0));
        assert_eq!(noise.may_tell("down", start + EVERY), Some(1));
    }
}

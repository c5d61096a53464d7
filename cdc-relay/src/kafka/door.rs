//! Whether Kafka lets us in. librdkafka tries every connection again for ever, whatever the reason; which of them
//! time does not heal is decided here.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientContext,
    config::RDKafkaLogLevel,
    consumer::ConsumerContext,
    error::{KafkaError, RDKafkaErrorCode},
};

use super::trust;
use crate::{
    config::KafkaConfig,
    error::{Error, Kind},
};

/// A broker that has just started may not know its users yet.
const REFUSED_GRACE: Duration = Duration::from_secs(10);
/// Connections that are closed without a word mean the wrong protocol, or a proxy whose brokers are not up yet.
const SHUT_GRACE: Duration = Duration::from_secs(30);

/// Why a connection came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// The broker does not take our name and password.
    Credentials,
    /// We do not trust the broker's certificate.
    Untrusted,
    /// The broker does not take our certificate, or wants one.
    Alert,
    /// TLS failed otherwise.
    Tls,
    /// The broker closes the connection without a word.
    Shut,
}

#[derive(Debug, Clone)]
pub(super) struct Refusal {
    cause: Cause,
    since: Instant,
    reason: String,
}

#[derive(Debug, Default)]
struct State {
    /// Whether a broker has ever answered.
    was_open: bool,
    refusal: Option<Refusal>,
    last_failure: String,
}

/// What is known of the connections of one client.
#[derive(Debug, Default)]
pub(super) struct Door(Mutex<State>);

impl Door {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A broker has answered.
    pub(super) fn open(&self) {
        let mut state = self.state();
        (state.was_open, state.refusal) = (true, None);
    }

    /// A connection has failed, in librdkafka's words, with its code where it told one.
    pub(super) fn failed(&self, code: Option<RDKafkaErrorCode>, message: &str, now: Instant) {
        let reason = without_timing(message);
        let cause = cause(code, reason);
        let mut state = self.state();
        reason.clone_into(&mut state.last_failure);
        match (cause, &state.refusal) {
            // Nobody is there at all, so nobody refuses us.
            (None, Some(Refusal { cause: Cause::Shut, .. })) if reason.contains("Connect to") => {
                state.refusal = None;
            }
            (None, _) | (Some(Cause::Shut), Some(_)) => {}
            (Some(Cause::Shut), None) if state.was_open => {}
            (Some(_), Some(known)) if known.cause != Cause::Shut => {}
            (Some(cause), _) => {
                if cause != Cause::Shut {
                    tracing::error!(reason, "Kafka refuses the connection");
                }
                state.refusal = Some(Refusal { cause, since: now, reason: reason.into() });
            }
        }
    }

    /// A line of librdkafka's log. Some failures of connections are told nowhere else.
    pub(super) fn log(&self, facility: &str, line: &str) {
        if facility == "FAIL" {
            let thread = line.strip_prefix("[thrd:").and_then(|rest| rest.split_once("]: "));
            self.failed(None, thread.map_or(line, |(_, message)| message), Instant::now());
        }
    }

    pub(super) fn last_failure(&self) -> String {
        self.state().last_failure.clone()
    }

    /// A refusal, however short it is.
    pub(super) fn any_refusal(&self) -> Option<Refusal> {
        self.state().refusal.clone()
    }

    /// A refusal that has lasted for longer than its grace.
    pub(super) fn refusal(&self, now: Instant) -> Option<Refusal> {
        let grace = |cause| if cause == Cause::Shut { SHUT_GRACE } else { REFUSED_GRACE };
        self.state().refusal.clone().filter(|r| now.saturating_duration_since(r.since) >= grace(r.cause))
    }
}

/// What a client that only asks knows of its connections.
#[derive(Debug, Default)]
pub(super) struct Visitor {
    pub(super) door: Door,
}

impl ClientContext for Visitor {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(?level, facility, "librdkafka: {message}");
        self.door.log(facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(reason, "librdkafka: {error}");
        self.door.failed(error.rdkafka_error_code(), reason, Instant::now());
    }
}

impl ConsumerContext for Visitor {}

impl Refusal {
    /// What an operator has to know of it. May look at the broker's certificate, for a few seconds.
    pub(super) fn into_error(self, config: &KafkaConfig) -> Error {
        let protocol = config.properties.get("security.protocol").map_or("plaintext", |p| p.expose());
        let hint = match self.cause {
            Cause::Credentials => {
                "check kafka.properties.\"sasl.username\", \"sasl.password\" and \"sasl.mechanism\" against the broker's users \
                 (kafka-configs.sh --describe --entity-type users)"
                    .to_owned()
            }
            Cause::Untrusted => {
                let why = trust::why_not(config, &self.reason);
                let why = why.map(|why| format!("the certificate: {why}. ")).unwrap_or_default();
                format!(
                    "{why}kafka.properties.\"ssl.ca.location\" must hold the authority that signed the broker's certificate, \
                     which must be valid now and for the host name in kafka.brokers and in advertised.listeners"
                )
            }
            Cause::Alert => "the broker wants a certificate of ours, or does not take the one it got (its log says why): check \
                 kafka.properties.\"ssl.certificate.location\" and \"ssl.key.location\", who signed it, and its dates"
                .to_owned(),
            Cause::Tls => "check the ssl.* settings in kafka.properties".to_owned(),
            Cause::Shut => format!(
                "every connection is closed before it is answered, as when one side speaks TLS or SASL and the other does not: \
                 kafka.properties.\"security.protocol\" is {protocol}; compare it with the protocol of that listener \
                 (listener.security.protocol.map)"
            ),
        };
        Error::new(Kind::Refused, format!("Kafka does not let us in: {}", self.reason)).hint(hint)
    }
}

/// librdkafka's codes do not tell all, so its words count too. Tested against real brokers.
fn cause(code: Option<RDKafkaErrorCode>, reason: &str) -> Option<Cause> {
    if reason.contains("certificate verify failed") {
        Some(Cause::Untrusted)
    } else if reason.contains("SSL alert number") {
        Some(Cause::Alert)
    } else if reason.contains("Disconnected") {
        Some(Cause::Shut)
    } else if code == Some(RDKafkaErrorCode::Authentication) || reason.contains(": SASL ") {
        Some(Cause::Credentials)
    } else if code == Some(RDKafkaErrorCode::SSL) || reason.contains("SSL handshake failed") {
        Some(Cause::Tls)
    } else {
        None
    }
}

/// Without `(after 23ms in state UP, 1 identical error(s) suppressed)`.
fn without_timing(message: &str) -> &str {
    message.rsplit_once(" (after ").map_or(message, |(reason, _)| reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERIFY: &str = "ssl://kafka:9093/1: SSL handshake failed: error:0A000086:SSL routines::certificate verify failed (after 4ms in state SSL_HANDSHAKE)";
    const CLOSED: &str = "kafka:9093/bootstrap: Disconnected: connection closed by peer: receive 0 after POLLIN (after 2ms in state APIVERSION_QUERY)";
    const NOBODY: &str = "kafka:9093/bootstrap: Connect to ipv4#127.0.0.1:9093 failed: Connection refused (after 0ms in state CONNECT)";

    fn cause_after(door: &Door, now: Instant, grace: Duration) -> Option<Cause> {
        assert!(door.refusal(now + grace.saturating_sub(Duration::from_secs(1))).is_none());
        door.refusal(now + grace).map(|r| r.cause)
    }

    #[test]
    fn a_refusal_counts_once_it_has_lasted_and_nobody_has_answered() {
        let (door, now) = (Door::default(), Instant::now());
        door.failed(Some(RDKafkaErrorCode::SSL), VERIFY, now);
        assert_eq!(cause_after(&door, now, REFUSED_GRACE), Some(Cause::Untrusted));
        // Neither a repetition nor another broker that is away changes since when.
        door.failed(Some(RDKafkaErrorCode::BrokerTransportFailure), VERIFY, now + Duration::from_secs(5));
        door.failed(Some(RDKafkaErrorCode::BrokerTransportFailure), NOBODY, now + Duration::from_secs(6));
        assert_eq!(cause_after(&door, now, REFUSED_GRACE), Some(Cause::Untrusted));
        door.open();
        assert_eq!(cause_after(&door, now, REFUSED_GRACE), None);
    }

    #[test]
    fn words_do_where_there_is_no_code() {
        let sasl = "sasl_ssl://kafka:9093/bootstrap: SASL authentication error: Authentication failed during authentication";
        assert_eq!(cause(None, sasl), Some(Cause::Credentials));
        assert_eq!(cause(None, without_timing(CLOSED)), Some(Cause::Shut));
        assert_eq!(cause(None, without_timing(NOBODY)), None);
        let alert = "ssl://kafka:9093/1: Receive failed: error:0A000412:SSL routines::ssl/tls alert bad certificate: SSL alert number 42";
        assert_eq!(cause(None, alert), Some(Cause::Alert));
    }

    #[test]
    fn a_broker_that_closes_is_only_taken_for_the_wrong_one_at_the_start() {
        let now = Instant::now();
        let door = Door::default();
        door.failed(None, CLOSED, now);
        assert_eq!(cause_after(&door, now, SHUT_GRACE), Some(Cause::Shut));
        door.failed(None, NOBODY, now);
        assert_eq!(cause_after(&door, now, SHUT_GRACE), None, "it is away, not closed");
        door.open();
        door.failed(None, CLOSED, now);
        assert_eq!(cause_after(&door, now, SHUT_GRACE), None, "it is restarting");
        door.failed(Some(RDKafkaErrorCode::Authentication), "SASL authentication error", now);
        assert_eq!(cause_after(&door, now, REFUSED_GRACE), Some(Cause::Credentials));
    }
}

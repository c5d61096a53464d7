//! Deliberate faults, so that what looks for losses, repetitions and disorder can be shown to find them. Only the
//! program `cdc-relay-faulty` has them, which is built with the feature `faults`; in `cdc-relay` the answer is a
//! constant.

/// A mistake that a relay could make. `CDC_RELAY_FAULT` names the one that is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// `confirm-on-enqueue`: a record counts as acknowledged once it is in the producer's queue.
    ConfirmOnEnqueue,
    /// `retry-reorders`: what a broker refuses for the moment is sent again after what was sent behind it.
    RetryReorders,
}

/// Whether this relay makes the mistake.
#[cfg(feature = "faults")]
pub(crate) fn has(fault: Fault) -> bool {
    static CHOSEN: std::sync::LazyLock<Option<Fault>> =
        std::sync::LazyLock::new(|| match std::env::var("CDC_RELAY_FAULT").as_deref() {
            Ok("confirm-on-enqueue") => Some(Fault::ConfirmOnEnqueue),
            Ok("retry-reorders") => Some(Fault::RetryReorders),
            _ => None,
        });
    option_env!("CARGO_BIN_NAME") == Some("cdc-relay-faulty") && *CHOSEN == Some(fault)
}

/// This relay makes none.
#[cfg(not(feature = "faults"))]
pub(crate) const fn has(_: Fault) -> bool {
    false
}

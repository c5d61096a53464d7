//! Deliberate faults, so that what looks for losses, repetitions and disorder can be shown to find them. Only the
//! program `cdc-relay-faulty` has them, which is built with the feature `faults`; in `cdc-relay` the answer is a
//! constant.

/// A mistake that a relay could make. `CDC_RELAY_FAULT` names the one that is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// `confirm-on-enqueue`: a record counts as acknowledged once it is in the producer's queue.
    ConfirmOnEnqueue,
    /// `checkpoint-outside`: the checkpoint is written beside Kafka's transaction, before that is committed.
    CheckpointOutside,
    /// `resume-behind`: with exactly-once delivery, the checkpoint is taken to cover its LSN and the next one.
    ResumeBehind,
    /// `retry-reorders`: what a broker refuses for the moment is sent again after what was sent behind it.
    RetryReorders,
}

/// Whether this relay makes the mistake.
#[cfg(feature = "faults")]
pub(crate) fn has(fault: Fault) -> bool {
    static CHOSEN: std::sync::LazyLock<Option<Fault>> =
        std::sync::LazyLock::new(|| match std::env::var("CDC_RELAY_FAULT").as_deref() {
            Ok("confirm-on-enqueue") => Some(Fault::ConfirmOnEnqueue),
            Ok("checkpoint-outside") => Some(Fault::CheckpointOutside),
            Ok("resume-behind") => Some(Fault::ResumeBehind),
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

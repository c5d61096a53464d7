//! The one error of this tool: what happened, and the exact next step.

use std::fmt;

/// Why a command could not do what it was asked to.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    message: String,
    hint: Option<String>,
}

/// The result of everything here.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// A failure without a hint yet.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None }
    }

    /// The same failure with the exact next step.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\n  {}", hint.replace('\n', "\n  ")),
            None => Ok(()),
        }
    }
}

/// Says what was being done when an error of another kind came up.
pub(crate) trait Explain<T> {
    /// `what` completes the sentence "cannot …".
    fn explain(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: fmt::Display> Explain<T> for std::result::Result<T, E> {
    fn explain(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Failure::new(format!("cannot {}: {error}", what())))
    }
}

//! Exit codes and the one error every `main` returns.
//!
//! A supervisor can act on the code alone: 64 and 65 will not get better by starting again, 69 and 75 may.

use std::{fmt, process::ExitCode};

/// Why a service stops other than by being asked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// 64: the configuration is wrong. Starting again changes nothing.
    BadConfiguration,
    /// 65: halted on poison or on a lost position. A person has to decide; a supervisor leaves it down.
    Halted,
    /// 69: a service we need refused us for good (wrong password, no permission, no such database).
    Refused,
    /// 70: a bug of ours.
    Internal,
    /// 75: gave up after the configured time; starting again may help.
    GaveUp,
}

impl Kind {
    /// The process's exit code (the numbers are those of BSD's `sysexits.h`).
    pub fn code(self) -> u8 {
        match self {
            Self::BadConfiguration => 64,
            Self::Halted => 65,
            Self::Refused => 69,
            Self::Internal => 70,
            Self::GaveUp => 75,
        }
    }
}

/// An error that ends the process: what happened, and what to do about it.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Decides the exit code.
    pub kind: Kind,
    /// What happened, in one sentence, without secrets.
    pub message: String,
    /// The exact next step, where there is one.
    pub hint: Option<String>,
}

impl Failure {
    /// A failure without a hint yet.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None }
    }

    /// The same failure with the exact next step for whoever reads it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// 64: the configuration is wrong.
    pub fn configuration(message: impl Into<String>) -> Self {
        Self::new(Kind::BadConfiguration, message)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\n  hint: {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Failure {}

/// Parses the command line. `--help` and `--version` are printed; a mistake is told, and is exit code 64.
///
/// # Errors
/// The code to end with.
pub fn parse_command_line<T: clap::Parser>() -> Result<T, ExitCode> {
    T::try_parse().map_err(|e| {
        // Nobody is left to tell if this cannot be printed.
        let _ = e.print();
        if e.use_stderr() { ExitCode::from(Kind::BadConfiguration.code()) } else { ExitCode::SUCCESS }
    })
}

/// Turns the end of `main` into an exit code, telling the failure on standard error.
pub fn report(name: &str, result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{name}: {failure}");
            ExitCode::from(failure.kind.code())
        }
    }
}

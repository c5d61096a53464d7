//! What an operator should mend before it hurts, although the relay runs: a list of findings, each with what mends it.

mod failover;

use serde::Serialize;

use crate::{config::Settings, error::Error};

/// Something that should be otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// What kind it is, for programs: words with hyphens, never changed.
    pub(crate) name: &'static str,
    /// Which server; empty where it is not about one.
    pub(crate) server: String,
    pub(crate) found: String,
    /// What to run there, in this order: each a statement of SQL, a command or a comment.
    pub(crate) mend: Vec<String>,
}

/// What was found, and what could not be looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Report {
    pub(crate) findings: Vec<Finding>,
    pub(crate) notes: Vec<String>,
}

impl Report {
    fn finding(
        &mut self,
        name: &'static str,
        server: &impl ToString,
        found: impl Into<String>,
        mend: &[&str],
    ) {
        let mend = mend.iter().map(|line| (*line).to_owned()).collect();
        self.findings.push(Finding { name, server: server.to_string(), found: found.into(), mend });
    }

    fn note(&mut self, what: impl Into<String>) {
        self.notes.push(what.into());
    }
}

/// Looks at everything there is to look at. Changes nothing.
///
/// # Errors
/// No server can be asked.
pub(crate) fn examine(settings: &Settings) -> Result<Report, Error> {
    let mut report = Report::default();
    failover::examine(settings, &mut report)?;
    Ok(report)
}

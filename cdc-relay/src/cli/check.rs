//! `cdc-relay check`

use serde_json::json;
use service::{Failure, exit, table::printable};

use crate::{
    check::{self, Report},
    config::Settings,
};

#[derive(Debug, clap::Args)]
pub(super) struct Check {
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Prints what was found and what mends it.
pub(super) fn check(settings: &Settings, check: &Check) -> Result<(), Failure> {
    let report = check::examine(settings);
    if check.json {
        service::say!("{}", json!(report));
    } else {
        print(&report);
    }
    match report.findings.len() {
        0 => Ok(()),
        n => {
            let found = if n == 1 { "1 finding".into() } else { format!("{n} findings") };
            Err(Failure::new(exit::Kind::Halted, found))
        }
    }
}

fn print(Report { findings, notes }: &Report) {
    if findings.is_empty() {
        service::say!("nothing was found that has to be mended");
    }
    for (i, finding) in findings.iter().enumerate() {
        if i > 0 {
            service::say!();
        }
        service::say!("{}", format!("{}  {}", finding.name, finding.server).trim_end());
        service::say!("  {}", printable(&finding.found));
        finding.mend.iter().for_each(|line| service::say!("    {line}"));
    }
    for note in notes {
        service::say!("\nnote: {}", printable(note));
    }
}

//! `cdc-relay check`

use serde_json::json;
use service::{
    Failure, exit,
    table::{self, or_dash, printable},
};

use crate::{
    check::{self, Finding, Report},
    config::Settings,
    error::Error,
};

#[derive(Debug, clap::Args)]
pub(super) struct Check {
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Prints what was found and what mends it.
pub(super) fn check(settings: &Settings, check: &Check) -> Result<(), Failure> {
    let report = check::examine(settings).map_err(Error::into_failure)?;
    if check.json {
        println!("{}", json!(report));
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
    let row = |f: &Finding| [f.name.to_owned(), or_dash(&f.server), printable(&f.found)];
    if findings.is_empty() {
        println!("nothing was found that has to be mended");
    } else {
        table::print(["FINDING", "SERVER", "FOUND"], &findings.iter().map(row).collect::<Vec<_>>());
    }
    for finding in findings {
        println!("\n{} {}", finding.name, finding.server);
        finding.mend.iter().for_each(|line| println!("    {line}"));
    }
    for note in notes {
        println!("\nnote: {}", printable(note));
    }
}

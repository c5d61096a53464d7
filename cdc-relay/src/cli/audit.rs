//! `cdc-relay audit`

use std::time::Duration;

use serde_json::json;
use service::{
    Failure, exit,
    table::{self, cut, or_dash, printable},
};

use crate::{
    audit::{self, Ask, Finding, Report},
    config::Settings,
    error::Error,
};

/// How many findings a table shows.
const SHOWN: usize = 20;
/// The most of an id or a key that a table shows, in characters.
const CELL_CHARS: usize = 36;

#[derive(Debug, clap::Args)]
pub(super) struct Audit {
    /// Look only for rows that meet this condition of SQL, such as "created >= '2026-11-21'"
    #[arg(long = "where", value_name = "SQL")]
    filter: Option<String>,
    /// The column that says when a row was written, where outbox.timestamp names none: it tells a lost record from one that
    /// Kafka's retention has deleted
    #[arg(long, value_name = "COLUMN", default_value = "created_at")]
    time_column: String,
    /// How long the relay may take to confirm what was committed before the audit began
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(..=86_400))]
    wait: u64,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Prints what the comparison came to.
pub(super) fn audit(settings: &Settings, audit: &Audit) -> Result<(), Failure> {
    let ask = Ask {
        filter: audit.filter.clone(),
        time_column: audit.time_column.clone(),
        wait: Duration::from_secs(audit.wait),
    };
    let report = audit::audit(settings, &ask).map_err(Error::into_failure)?;
    if audit.json {
        service::say!("{}", json!(report));
    } else {
        print(&report);
    }
    let Report { missing, duplicates, out_of_order, unconfirmed, .. } = report;
    if report.found() > 0 {
        let what = format!("{missing} missing, {duplicates} duplicates, {out_of_order} out of order");
        return Err(Failure::new(exit::Kind::Halted, what));
    }
    if unconfirmed > 0 {
        let what = format!("{unconfirmed} rows are in no topic and not confirmed either");
        return Err(Failure::new(exit::Kind::GaveUp, what)
            .hint("run it again while a relay runs, or with a longer --wait"));
    }
    Ok(())
}

fn print(report: &Report) {
    let figures = [
        ("rows in the outbox", report.rows),
        ("  published", report.published),
        ("  dead-lettered", report.dead_lettered),
        ("  left out by policy", report.left_out),
        ("  not confirmed yet", report.unconfirmed),
        ("  unknown", report.unknown),
        ("  MISSING", report.missing),
        ("records in their topics", report.records),
        ("  of no such row", report.other_records),
        ("  replayed, redriven", report.replayed),
        ("  order cannot be told", report.unordered),
        ("  DUPLICATE", report.duplicates),
        ("  OUT OF ORDER", report.out_of_order),
    ];
    for (name, count) in figures {
        service::say!("{name:<24} {count:>12}");
    }
    service::say!("{:<24} {:>12}", "committed before", report.compared_to);
    let cell = |text: &str| cut(&or_dash(text), CELL_CHARS);
    let row = |f: &Finding| {
        let place = match (f.partition, f.offset) {
            (Some(partition), Some(offset)) => format!("{}/{partition}/{offset}", f.topic),
            _ => or_dash(&f.topic),
        };
        [f.kind.to_owned(), cell(&f.id), cell(&f.key), place, or_dash(&f.detail)]
    };
    if !report.findings.is_empty() {
        service::say!();
        let rows: Vec<_> = report.findings.iter().take(SHOWN).map(row).collect();
        table::print(["FINDING", "ID", "KEY", "WHERE", "DETAIL"], &rows);
    }
    let hidden = report.found().saturating_sub(report.findings.len().min(SHOWN) as u64);
    if hidden > 0 {
        service::say!("… and {hidden} more; --json names up to a thousand of each kind");
    }
    for note in &report.notes {
        service::say!("\nnote: {}", printable(note));
    }
}

//! `redrive` and `discard`: which letters, and the question to the relay.

use std::{collections::BTreeSet, time::Duration};

use relay_core::redrive::{Next, Options, Place};
use service::{Failure, exit, table};

use super::Filter;
use crate::{
    cli::relay_api::RelayApi,
    config::Settings,
    dlq::{
        api::{Aggregate, LETTERS_LIMIT, PATH, Report, Request},
        archive::Archive,
    },
    error::Error,
};

/// The relay gives a redrive up by itself when nothing comes of it; this is for a relay that does not answer at all.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3600);

#[derive(Debug, clap::Args)]
pub(crate) struct Selection {
    /// Each as PARTITION/OFFSET, as `list` tells it
    #[arg(value_name = "PARTITION/OFFSET")]
    letters: Vec<Place>,
    /// Every open letter. Frees parked aggregates that have none, too
    #[arg(long, conflicts_with = "letters")]
    all: bool,
    #[command(flatten)]
    filter: Filter,
    /// Only tell what would be done. Asks no relay
    #[arg(long)]
    dry_run: bool,
    /// Where the relay is. Without this, http.listen of the configuration. Where that has an admin token, it is sent
    #[arg(long, value_name = "URL")]
    relay: Option<String>,
    /// A JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Redrive {
    #[command(flatten)]
    selection: Selection,
    /// Publish to this topic instead of each letter's own
    #[arg(long, value_name = "NAME", conflicts_with = "all")]
    to_topic: Option<String>,
    /// Publish once more what was redriven before: name it, or add --state redriven
    #[arg(long)]
    again: bool,
    /// Publish what there is of letters whose row could not be read whole
    #[arg(long)]
    as_is: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Discard {
    #[command(flatten)]
    selection: Selection,
}

pub(super) fn redrive(settings: &Settings, redrive: &Redrive) -> Result<(), Failure> {
    let Redrive { selection, to_topic: topic, again, as_is } = redrive;
    let request = Request {
        topic: topic.clone(),
        again: *again,
        as_is: *as_is,
        all: selection.all,
        ..Request::default()
    };
    selection.carry_out(settings, request)
}

pub(super) fn discard(settings: &Settings, discard: &Discard) -> Result<(), Failure> {
    let selection = &discard.selection;
    selection.carry_out(settings, Request { discard: true, all: selection.all, ..Request::default() })
}

/// How it went over all requests.
#[derive(Debug, Default)]
struct Sum {
    letters: usize,
    open: usize,
}

impl Selection {
    fn carry_out(&self, settings: &Settings, mut request: Request) -> Result<(), Failure> {
        let places = self.resolve(settings, &mut request)?;
        let mut sum = Sum::default();
        // Freeing what is empty is worth a request, even where there is no letter.
        let batches: Vec<&[Place]> =
            if places.is_empty() && self.all { vec![&[]] } else { places.chunks(LETTERS_LIMIT).collect() };
        for batch in batches {
            let report = if self.dry_run {
                dry_run(settings, batch, &request)?
            } else {
                request.letters = batch.iter().map(Place::to_string).collect();
                let relay = RelayApi::new(settings, self.relay.as_deref(), Some(ANSWER_TIMEOUT))?;
                relay.post(PATH, &request, "`cdc-relay dlq list` shows what it did")?
            };
            sum.letters += report.letters.len();
            sum.open += report.letters.iter().filter(|line| !line.done).count();
            self.tell(&report);
        }
        if sum.letters == 0 && !self.json {
            service::say!("there are no such letters");
        }
        if sum.open > 0 {
            let what = format!("{} of {} letters stay open", sum.open, sum.letters);
            return Err(Failure::new(exit::Kind::Halted, what).hint("the table above says why, for each"));
        }
        Ok(())
    }

    /// Which letters, and whose.
    fn resolve(&self, settings: &Settings, request: &mut Request) -> Result<Vec<Place>, Failure> {
        if self.letters.is_empty() && !self.all && !self.filter.names_something() {
            return Err(Failure::configuration(
                "say which letters: PARTITION/OFFSET, --all, or a filter such as --reason",
            )
            .hint("`cdc-relay dlq list` tells which there are, and --dry-run what would be done"));
        }
        let entries = self.filter.entries(settings, &self.letters)?;
        let sources: BTreeSet<&String> = entries.iter().map(|entry| &entry.about.source).collect();
        if sources.len() > 1 {
            let what = format!("these letters are of {} relays: {sources:?}", sources.len());
            return Err(Failure::configuration(what).hint("choose one with --source"));
        }
        request.source = sources.into_iter().next().cloned();
        if self.letters.is_empty() {
            return Ok(entries.iter().map(|entry| entry.about.letter).collect());
        }
        // What is named and is not there is for the answer to tell.
        let named: BTreeSet<Place> = self.letters.iter().copied().collect();
        Ok(named.into_iter().collect())
    }

    fn tell(&self, report: &Report) {
        if self.json {
            service::say!("{}", serde_json::json!(report));
            return;
        }
        if !report.letters.is_empty() {
            let would = if self.dry_run { "would be " } else { "" };
            let rows = report.letters.iter().map(|line| {
                let would =
                    if matches!(line.outcome.as_str(), "redriven" | "discarded") { would } else { "" };
                [line.letter.clone(), format!("{would}{}", line.outcome), table::or_dash(&line.detail)]
            });
            let rows: Vec<_> = rows.collect();
            table::print(["LETTER", "OUTCOME", "DETAIL"], &rows);
        }
        let name = |a: &Aggregate| table::printable(&format!("{}/{}", a.kind, a.id));
        let freed = if self.dry_run { "would be freed" } else { "freed" };
        for aggregate in &report.freed {
            service::say!("{freed}: {}", name(aggregate));
        }
        for aggregate in &report.still_parked {
            service::say!("still parked: {}, {} letters are open", name(aggregate), aggregate.open_letters);
        }
    }
}

/// What a relay would do.
fn dry_run(settings: &Settings, batch: &[Place], request: &Request) -> Result<Report, Failure> {
    let Request { again, as_is, discard, all, .. } = *request;
    let options = Options { again, as_is, discard, all, has_topic: request.topic.is_some() };
    // Where no letter is there is no source, and nothing of it either.
    let source = request.source.as_deref().unwrap_or_default();
    let archive = Archive::open(settings).map_err(Error::into_failure)?;
    let plan = archive.plan(source, batch.iter().copied().collect(), options);
    let mut plan = plan.map_err(Error::into_failure)?;
    // None is refused, so none is left.
    while let Next::Take(step) = plan.next_step() {
        plan.settled(&step);
    }
    let freed = plan.free();
    Ok(Report::new(&plan, &freed))
}

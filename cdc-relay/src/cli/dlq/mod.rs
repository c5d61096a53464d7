//! `cdc-relay dlq`: a look at the dead letters, and what to ask the relay to do with them.

mod look;
mod redrive;

use chrono::{DateTime, Utc};
use relay_core::{
    poison::Kind,
    redrive::{Place, State},
};
use service::Failure;

use crate::{
    cli::aggregate,
    config::Settings,
    dlq::archive::{Archive, Entry},
    error::Error,
};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List dead letters. Reads their topic itself; no relay is needed.
    List(look::List),
    /// Show everything of one: what is known of it, its headers and its value.
    Show(look::Show),
    /// Have the active relay publish letters to their topics, once what they failed on is mended.
    ///
    /// Input pauses meanwhile, so that order is kept: the letters of a parked aggregate are taken from its first open one
    /// on, without a gap, and the aggregate is freed when none is left. What its topic still refuses stays open. Exits
    /// with 65 when a letter stays open.
    Redrive(redrive::Redrive),
    /// Have the active relay give letters up: they are marked as discarded, and never published. In order, as in redrive.
    Discard(redrive::Discard),
}

pub(super) fn carry_out(settings: &Settings, command: &Command) -> Result<(), Failure> {
    match command {
        Command::List(list) => look::list(settings, list),
        Command::Show(show) => look::show(settings, show),
        Command::Redrive(redrive) => redrive::redrive(settings, redrive),
        Command::Discard(discard) => redrive::discard(settings, discard),
    }
}

/// Which letters.
#[derive(Debug, clap::Args)]
pub(crate) struct Filter {
    /// Only of this kind of poison, as in dlq.reason
    #[arg(long, value_name = "KIND", value_parser = kinds())]
    reason: Option<String>,
    /// Only of this event type
    #[arg(long = "type", value_name = "EVENT_TYPE")]
    event_type: Option<String>,
    /// Only of this aggregate
    #[arg(long, value_name = "TYPE/ID", value_parser = aggregate)]
    aggregate: Option<(String, String)>,
    /// Only with this key, which is the aggregate's id
    #[arg(long)]
    key: Option<String>,
    /// Only dead-lettered then or later, such as 2026-11-21T13:00:00Z
    #[arg(long, value_name = "RFC3339")]
    since: Option<DateTime<Utc>>,
    /// Those of which this became
    #[arg(long, value_name = "STATE", default_value = "open", value_parser = ["open", "redriven", "discarded", "any"])]
    state: String,
    /// Whose letters: dlq.source, or `any`. Without this, those of every slot of the configured name
    #[arg(long, value_name = "SYSTEM/SLOT|any")]
    source: Option<String>,
}

fn kinds() -> clap::builder::PossibleValuesParser {
    let configurable = Kind::CONFIGURABLE.iter().map(|kind| kind.name());
    clap::builder::PossibleValuesParser::new(configurable.chain([Kind::Parked.name()]))
}

impl Filter {
    fn names_something(&self) -> bool {
        let Self { reason, event_type, aggregate, key, since, .. } = self;
        reason.is_some() || event_type.is_some() || aggregate.is_some() || key.is_some() || since.is_some()
    }

    /// The letters that it lets through, and of these only `named`, where that is not empty.
    fn entries(&self, settings: &Settings, named: &[Place]) -> Result<Vec<Entry>, Failure> {
        let slot = format!("/{}", settings.slot);
        let archive = Archive::open(settings).map_err(Error::into_failure)?;
        let entries = archive.entries(|about| {
            let is_ours = match self.source.as_deref() {
                None => about.source.ends_with(&slot),
                Some(source) => source == "any" || source == about.source,
            };
            let is = |wanted: &Option<String>, value: &str| wanted.as_ref().is_none_or(|w| w == value);
            is_ours
                && (named.is_empty() || named.contains(&about.letter))
                && is(&self.reason, &about.reason)
                && is(&self.event_type, &about.event_type)
                && is(&self.key, &about.aggregate_id)
                && self
                    .aggregate
                    .as_ref()
                    .is_none_or(|(kind, id)| *kind == about.aggregate_type && *id == about.aggregate_id)
                && self
                    .since
                    .is_none_or(|since| DateTime::parse_from_rfc3339(&about.at).is_ok_and(|at| at >= since))
        });
        let mut entries: Vec<Entry> = entries.map_err(Error::into_failure)?.into_values().collect();
        // What is named is looked at whatever became of it.
        entries.retain(|entry| !named.is_empty() || self.takes(entry.state));
        Ok(entries)
    }

    fn takes(&self, state: State) -> bool {
        self.state == "any" || self.state == state.name()
    }
}

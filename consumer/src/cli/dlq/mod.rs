//! `consumer dlq`: a look at a group's dead letters, and what the group is to do with them.

mod copy;
mod look;
mod redrive;
mod sender;

use chrono::{DateTime, Utc};
use service::Failure;

use super::time;
use crate::{
    config::Settings,
    ledger::{Chosen, Ledger},
};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List dead letters, oldest first.
    List(look::List),
    /// Show everything of one: what is known of it, what waits behind it, its headers and its value.
    Show(look::Show),
    /// Have the group try letters once more, once what they failed on is mended. Waits for what becomes of each.
    ///
    /// They go to <group>-redrive, which only this group reads, in the order of their places; each is counted, and what
    /// fails again is a dead letter as before. Exits with 65 when a letter stays open, 75 when nobody deals with them.
    Redrive(redrive::Redrive),
    /// Have the group give letters up: each is settled without being applied, and what waits behind it goes on.
    ///
    /// The group itself does so, in order, as in redrive.
    Discard(redrive::Discard),
}

pub(super) async fn carry_out(
    settings: &Settings,
    ledger: &mut Ledger,
    command: Command,
) -> Result<(), Failure> {
    match command {
        Command::List(list) => look::list(ledger, &list).await,
        Command::Show(show) => look::show(settings, ledger, &show).await,
        Command::Redrive(redrive) => redrive::redrive(settings, ledger, redrive).await,
        Command::Discard(discard) => redrive::discard(settings, ledger, discard).await,
    }
}

/// Which letters.
#[derive(Debug, clap::Args)]
pub(super) struct Filter {
    /// Only of this reason, as in dlq.reason; may be repeated
    #[arg(long, value_name = "REASON")]
    reason: Vec<String>,
    /// Only of this event type, the record's header `type`; may be repeated
    #[arg(long = "type", value_name = "EVENT_TYPE")]
    types: Vec<String>,
    /// Only with this key; may be repeated
    #[arg(long)]
    key: Vec<String>,
    /// Only dead-lettered then or later: 2026-11-21T13:00:00Z, or how long ago: 15m, 2h, 3d
    #[arg(long, value_name = "TIME", value_parser = time::parse)]
    from: Option<DateTime<Utc>>,
    /// Only dead-lettered then or earlier
    #[arg(long, value_name = "TIME", value_parser = time::parse)]
    to: Option<DateTime<Utc>>,
}

impl Filter {
    fn names_something(&self) -> bool {
        let Self { reason, types, key, from, to } = self;
        !reason.is_empty() || !types.is_empty() || !key.is_empty() || from.is_some() || to.is_some()
    }

    fn chosen(&self) -> Chosen {
        Chosen {
            reasons: self.reason.clone(),
            types: self.types.clone(),
            keys: self.key.iter().map(|key| key.clone().into_bytes()).collect(),
            from: self.from,
            to: self.to,
            ..Chosen::default()
        }
    }
}

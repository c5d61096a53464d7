//! The commands that look at a group or tell it something, whether or not an instance of it runs.

use clap::Subcommand;
use service::Failure;

use super::{dlq, pause};
use crate::{config::Settings, handler::Tables, ledger::Ledger};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Look at the group's dead letters, and have the group try them again or give them up.
    Dlq {
        #[command(subcommand)]
        command: dlq::Command,
    },
    /// Have all instances of the group stop applying events, until `resume`. Returns when no batch is under way.
    ///
    /// The instances stay members of the group and keep their partitions, and nothing is lost.
    Pause(pause::Pause),
    /// Let the group go on after `pause`.
    Resume(pause::Resume),
}

pub(super) async fn carry_out(settings: &Settings, tables: Tables, command: Command) -> Result<(), Failure> {
    let mut ledger = Ledger::open(settings, tables).await?;
    match command {
        Command::Dlq { command } => dlq::carry_out(settings, &mut ledger, command).await,
        Command::Pause(pause) => pause::pause(settings, &mut ledger, &pause).await,
        Command::Resume(resume) => pause::resume(settings, &mut ledger, &resume).await,
    }
}

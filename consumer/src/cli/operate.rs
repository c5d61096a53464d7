//! The commands that look at a group or tell it something, whether or not an instance of it runs.

use clap::Subcommand;
use service::Failure;

use super::{dlq, pause, seek, status};
use crate::{config::Settings, handler::Tables, ledger::Ledger};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Tell where the group stands: who consumes, the lag of each partition in records and in seconds, dead letters.
    Status(status::Status),
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
    /// Move the group's offsets, while nobody consumes.
    ///
    /// A seek back applies nothing anew: what the group has applied is recognised (`consumer rebuild` does apply it). A
    /// seek forward skips records for good. Exits with 65 while the group has members.
    Seek(seek::Seek),
}

pub(super) async fn carry_out(settings: &Settings, tables: Tables, command: Command) -> Result<(), Failure> {
    let open = || Ledger::open(settings, tables);
    match command {
        Command::Status(status) => status::status(settings, &mut open().await?, &status).await,
        Command::Dlq { command } => dlq::carry_out(settings, &mut open().await?, command).await,
        Command::Pause(pause) => pause::pause(settings, &mut open().await?, &pause).await,
        Command::Resume(resume) => pause::resume(settings, &mut open().await?, &resume).await,
        // Needs no database.
        Command::Seek(seek) => seek::seek(settings, &seek),
    }
}

//! The command line.

mod accept_gap;
mod audit;
mod bytes;
mod check;
mod dlq;
mod init;
mod probe;
mod relay_api;
mod replay;
mod run;
mod status;
mod tail;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use service::{Failure, exit};

use crate::{
    config::{Config, ENV_PREFIX, EXAMPLE, Settings},
    error::Error,
    kafka,
};

/// Streams the inserts of an outbox table from a Postgres logical replication slot to Kafka.
///
/// Exit codes: 0 clean stop, 64 bad configuration, 65 halted on poison or a lost position, 69 a service refused
/// us for good, 70 internal, 75 gave up after the configured time.
#[derive(Debug, Parser)]
#[command(name = "cdc-relay", version)]
struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Option<Command>,
}

/// The configuration's file and its common keys. Every key can also be set by an environment variable,
/// `CDC_RELAY_SECTION__KEY`.
#[derive(Debug, clap::Args)]
struct Options {
    /// The configuration file (TOML).
    #[arg(long, global = true, env = "CDC_RELAY_CONFIG")]
    config: Option<PathBuf>,
    /// Check the configuration and exit: 0 if it is good, 64 if not.
    #[arg(long, global = true)]
    check_config: bool,
    /// postgres.url; a password is better kept out of it.
    #[arg(long, global = true)]
    postgres_url: Option<String>,
    /// postgres.slot
    #[arg(long, global = true)]
    slot: Option<String>,
    /// postgres.publication
    #[arg(long, global = true)]
    publication: Option<String>,
    /// outbox.table
    #[arg(long, global = true)]
    table: Option<String>,
    /// route.topic
    #[arg(long, global = true)]
    topic: Option<String>,
    /// kafka.brokers
    #[arg(long, global = true)]
    brokers: Option<String>,
    /// http.listen
    #[arg(long, global = true)]
    listen: Option<String>,
    /// log.level
    #[arg(long, global = true)]
    log_level: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Stream until asked to stop (SIGTERM, SIGINT). This is the default.
    Run,
    /// Create the publication, the slot, the relay's own topics and the first checkpoint where they are missing.
    Init(init::Init),
    /// Go on although something may be missing: after a slot was lost, dropped, moved or restored, or past a transaction
    /// that cannot be published.
    ///
    /// Without --yes it only says what it would do, and exits with 65 if that is anything.
    AcceptGap(accept_gap::AcceptGap),
    /// Look for what should be mended before it hurts, and say what mends it.
    ///
    /// The server's settings, the role's rights, the publication, the slot, what retention needs, the topics, their replicas and
    /// limits, certificates that end, and what the slot needs to survive the promotion of a standby. Changes nothing. Exits
    /// with 65 if anything was found.
    Check(check::Check),
    /// Compare the outbox's rows with the topics by their ids: what is missing, what is there twice, what is out of order.
    ///
    /// Rows that are deleted from the outbox cannot be looked for. Changes nothing, needs SELECT on the outbox and Read on the
    /// topics. Exits with 65 if anything was found, and with 75 if rows are in no topic that may still come.
    Audit(audit::Audit),
    /// Look at the slot, at the checkpoint in Kafka and at the relay, and say how far behind it is.
    ///
    /// What is not known, because Kafka or the relay is away or the server does not tell, is a dash, or null. Takes a second,
    /// in which it sees how fast the log grows; changes nothing.
    Status(status::Status),
    /// Show the outbox's rows as they are committed, as the records that they are to be, without disturbing the relay.
    ///
    /// Reads from a temporary slot, which is gone when this ends. Needs no more rights than the relay has (REPLICATION), one
    /// more slot and walsender of the server's limits, and no Kafka.
    Tail(tail::Tail),
    /// Have the active relay publish records once more: rows of the retained outbox by id, aggregate or time, or records by LSN.
    ///
    /// Without --yes it only says which. A replayed record is what it was, with the header `replayed`; one that is made of a
    /// row has no headers lsn and seq, which a row does not tell. Only what the slot has confirmed is published again, so no
    /// first occurrence is overtaken; the stream goes on meanwhile. Ctrl-C ends it. Exits with 65 if something cannot be
    /// published or is not there.
    Replay(Box<replay::Replay>),
    /// Read and decode the slot's log to nowhere, and say how fast that went.
    ///
    /// Tells how fast this Postgres can give us this slot's log, and nothing else happens: nothing is published, and
    /// nothing is confirmed, so that the relay reads all of it again. It needs the slot for itself; a relay that
    /// starts meanwhile stands by.
    Probe(probe::Probe),
    /// Look at dead letters, and have the relay publish them after all.
    Dlq {
        #[command(subcommand)]
        command: Box<dlq::Command>,
    },
    /// Things about the configuration.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print every key with its default.
    Example,
}

/// An aggregate, as `TYPE/ID`.
fn aggregate(text: &str) -> Result<(String, String), String> {
    let parts = text.split_once('/').ok_or_else(|| format!("{text:?} is not TYPE/ID"))?;
    Ok((parts.0.to_owned(), parts.1.to_owned()))
}

impl Options {
    fn load(self) -> Result<Settings, Failure> {
        let flags = [
            ("postgres.url", self.postgres_url),
            ("postgres.slot", self.slot),
            ("postgres.publication", self.publication),
            ("outbox.table", self.table),
            ("route.topic", self.topic),
            ("kafka.brokers", self.brokers),
            ("http.listen", self.listen),
            ("log.level", self.log_level),
        ];
        let flags: Vec<_> = flags.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
        let settings =
            service::config::load::<Config>(ENV_PREFIX, self.config.as_deref(), &flags)?.check()?;
        kafka::check(&settings.kafka).map_err(Error::into_failure)?;
        Ok(settings)
    }
}

pub(crate) fn main() -> ExitCode {
    match exit::parse_command_line() {
        Ok(cli) => exit::report("cdc-relay", carry_out(cli)),
        Err(code) => code,
    }
}

fn carry_out(cli: Cli) -> Result<(), Failure> {
    if let Some(Command::Config { command: ConfigCommand::Example }) = cli.command {
        service::say!("{}", EXAMPLE.trim_end());
        return Ok(());
    }
    let check_only = cli.options.check_config;
    let settings = cli.options.load()?;
    if check_only {
        service::say!("the configuration is good");
        return Ok(());
    }
    match cli.command {
        Some(Command::Init(command)) => init::init(&settings, command),
        Some(Command::AcceptGap(command)) => accept_gap::accept_gap(&settings, &command),
        Some(Command::Check(check)) => check::check(&settings, &check),
        Some(Command::Audit(audit)) => audit::audit(&settings, &audit),
        Some(Command::Status(status)) => status::status(&settings, &status),
        Some(Command::Tail(tail)) => tail::tail(&settings, &tail),
        Some(Command::Replay(replay)) => replay::replay(&settings, &replay),
        Some(Command::Probe(probe)) => probe::probe(&settings, &probe),
        Some(Command::Dlq { command }) => dlq::carry_out(&settings, &command),
        _ => run::run(settings),
    }
}

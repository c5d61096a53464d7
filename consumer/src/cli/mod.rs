//! The command line.

mod dlq;
mod operate;
mod pause;
mod seek;
mod status;
mod time;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};
use service::{Failure, Health, exit, exit::Kind, fleet::Fleet, logs, shutdown::Shutdown};

use crate::{
    app, config,
    config::{Config, Settings},
    database::Database,
    group,
    handler::Tables,
    offer::Offer,
    rebuild::{self, Choice},
};

/// Applies events from Kafka, each once, to a database of its own.
///
/// Exit codes: 0 clean stop, 64 bad configuration, 65 something stays that a person has to decide about (a dead letter
/// that stays open), 69 a service refused us for good, 70 internal, 75 gave up after the configured time.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The configuration file (TOML); `config example` prints one.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check the configuration and exit: 0 if it is right, 64 if not.
    #[arg(long, global = true)]
    check_config: bool,
    /// What to do with the records (consumer.handler); a wrong one names the choices.
    #[arg(long, global = true, value_name = "NAME")]
    handler: Option<String>,
    /// Kafka's bootstrap servers (kafka.brokers).
    #[arg(long, global = true, value_name = "HOST:PORT,…")]
    brokers: Option<String>,
    /// The consumer group; the handler's name unless told (kafka.group).
    #[arg(long, global = true, value_name = "NAME")]
    group: Option<String>,
    /// The topics to consume; the handler's own unless told (kafka.topics).
    #[arg(long, global = true, value_name = "NAME,…")]
    topics: Option<String>,
    /// Where health and metrics are served (http.listen).
    #[arg(long, global = true, value_name = "ADDRESS:PORT")]
    listen: Option<String>,
    /// A level or a filter (log.level).
    #[arg(long, global = true, value_name = "LEVEL")]
    log_level: Option<String>,
    /// text or json (log.format).
    #[arg(long, global = true, value_name = "FORMAT")]
    log_format: Option<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Make or migrate the tables of the consumer's own database, and exit. Every start does it too; this is for what
    /// needs the tables before there is a consumer, such as a relay for its outbox.
    Migrate,
    /// Make the handler's projection anew from the beginning of its topics, beside the live one, and swap them.
    ///
    /// The live consumers go on, and so do readers. Nothing is published again, and no dead letter is sent.
    Rebuild {
        /// Keep the tables that are replaced, in a schema of their own
        #[arg(long)]
        keep_old: bool,
        /// Swap although records fail that had not failed before; they become dead letters
        #[arg(long)]
        accept_failures: bool,
        /// Rebuild although the first records of the topics are gone (by retention)
        #[arg(long)]
        accept_missing: bool,
    },
    #[command(flatten)]
    Operate(operate::Command),
    /// About the configuration.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Print every key with its default.
    Example,
}

impl Args {
    fn config(&self) -> Result<Config, Failure> {
        let flags: Vec<(&str, String)> = [
            ("consumer.handler", &self.handler),
            ("kafka.brokers", &self.brokers),
            ("kafka.group", &self.group),
            ("kafka.topics", &self.topics),
            ("http.listen", &self.listen),
            ("log.level", &self.log_level),
            ("log.format", &self.log_format),
        ]
        .into_iter()
        .filter_map(|(key, value)| Some((key, value.clone()?)))
        .collect();
        service::config::load("CONSUMER", self.config.as_deref(), &flags)
    }

    /// What is to be done, with what of the configuration it needs, checked.
    fn work(self, config: Config, offers: Vec<Offer>) -> Result<Work, Failure> {
        if matches!(self.command, Some(Command::Migrate)) {
            return Ok(Work::Migrate(Box::new(config.postgres.check()?)));
        }
        let offer = Offer::choose(offers, &config.consumer.handler)?;
        let settings = Box::new(config.check(&offer)?);
        group::check(&settings.kafka)?;
        Ok(match self.command {
            Some(Command::Rebuild { keep_old, accept_failures, accept_missing }) => {
                rebuild::check(offer.name(), &offer.traits())?;
                Work::Rebuild(settings, offer, Choice { keep_old, accept_failures, accept_missing })
            }
            Some(Command::Operate(command)) => Work::Operate(settings, offer.traits().tables, command),
            _ => Work::Consume(settings, offer),
        })
    }
}

/// What this process is started for.
enum Work {
    Consume(Box<Settings>, Offer),
    Operate(Box<Settings>, Tables, operate::Command),
    Rebuild(Box<Settings>, Offer, Choice),
    Migrate(Box<Database>),
}

impl Work {
    /// Who is told of this instance.
    fn fleet(&self, health: &Health) -> Fleet {
        let Self::Consume(settings, _) = self else { return Fleet::default() };
        let (service, version) = (settings.handler, env!("CARGO_PKG_VERSION"));
        Fleet::join(settings.fleet.clone(), service, version, health)
    }

    async fn carry_out(self, health: Health) -> Result<(), Failure> {
        match self {
            Self::Consume(settings, offer) => {
                let (_trigger, shutdown) = Shutdown::on_signals()?;
                let app = app::App::build(*settings, offer.traits(), health).await?;
                offer.run(app, shutdown).await
            }
            // A signal ends it at once, wherever it is.
            Self::Operate(settings, tables, command) => operate::carry_out(&settings, tables, command).await,
            Self::Rebuild(settings, offer, choice) => {
                let (_trigger, shutdown) = Shutdown::on_signals()?;
                rebuild::run(*settings, offer, choice, shutdown).await
            }
            Self::Migrate(database) => {
                let (_trigger, shutdown) = Shutdown::on_signals()?;
                tokio::select! {
                    prepared = database.prepare("consumer-migrate", Tables::Ours, "") => prepared,
                    () = shutdown.requested() => {
                        Err(Failure::new(Kind::GaveUp, "stopped before the tables were made"))
                    }
                }
            }
        }
    }
}

/// A program of these handlers.
pub fn main(offers: Vec<Offer>) -> ExitCode {
    match exit::parse_command_line::<Args>() {
        Ok(args) => exit::report("consumer", run(args, offers)),
        Err(code) => code,
    }
}

fn run(args: Args, offers: Vec<Offer>) -> Result<(), Failure> {
    if let Some(Command::Config { command: ConfigCommand::Example }) = args.command {
        service::say!("{}", config::EXAMPLE.trim_end());
        return Ok(());
    }
    let config = args.config()?;
    let (log, check_only) = (config.log.0.clone(), args.check_config);
    let work = args.work(config, offers)?;
    if check_only {
        service::say!("the configuration is right");
        return Ok(());
    }
    logs::init(&log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::new(Kind::Internal, format!("cannot start the runtime: {e}")))?;
    let health = Health::default();
    let fleet = work.fleet(&health);
    let outcome = runtime.block_on(work.carry_out(health.clone()));
    // A call into librdkafka that still waits for a broker must not hold up the exit.
    runtime.shutdown_timeout(Duration::from_millis(100));
    fleet.leave();
    outcome
}

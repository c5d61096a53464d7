//! `order-api`: command line, configuration, logs, runtime; the rest is [`order_api::app`].

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};
use order_api::{
    app,
    auth::{self, NewToken, Scope},
    config::Config,
};
use service::{Failure, exit, exit::Kind, logs, shutdown::Shutdown};

/// Takes orders over HTTP and writes each with its event and outbox row in one transaction.
#[derive(Debug, Parser)]
#[command(version, about, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(flatten)]
    serve: Serve,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Args)]
struct Serve {
    /// The TOML file to read; every key also has a variable, `ORDER_API_SECTION__KEY`.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Check the configuration and exit: 0 if it is right, 64 if not.
    #[arg(long)]
    check_config: bool,
    /// `http.listen`: address:port to listen on.
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<String>,
    /// `postgres.url`: where the orders database is. Leave the password out: others see your arguments.
    #[arg(long, value_name = "URL")]
    postgres_url: Option<String>,
    /// `log.level`: error, warn, info, debug, trace or a filter.
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// `log.format`: text or json.
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// About the configuration.
    Config {
        #[command(subcommand)]
        what: ConfigCommand,
    },
    /// About the tokens that open the API.
    Token {
        #[command(subcommand)]
        what: TokenCommand,
    },
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make a token. The token itself is told once, on standard error; what to append to `auth.tokens_path` goes to
    /// standard output.
    New {
        /// Who it is for. Two tokens of one name are the same client.
        #[arg(long, value_name = "NAME")]
        name: String,
        /// What it allows: read (GET, HEAD), write (everything else), or both.
        #[arg(long, value_delimiter = ',', required = true)]
        scopes: Vec<Scope>,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print every key with its default and what it means.
    Example,
}

impl Serve {
    fn load(&self) -> Result<Config, Failure> {
        let flags = [
            ("http.listen", &self.listen),
            ("postgres.url", &self.postgres_url),
            ("log.level", &self.log_level),
            ("log.format", &self.log_format),
        ];
        let flags: Vec<_> = flags.into_iter().filter_map(|(k, v)| Some((k, v.clone()?))).collect();
        let config: Config = service::config::load("ORDER_API", self.config.as_deref(), &flags)?;
        config.check()?;
        Ok(config)
    }
}

fn main() -> ExitCode {
    let cli: Cli = match exit::parse_command_line() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    let result = match cli.command {
        Some(Command::Config { what: ConfigCommand::Example }) => {
            service::say!("{}", order_api::config::EXAMPLE.trim_end());
            Ok(())
        }
        Some(Command::Token { what: TokenCommand::New { name, scopes } }) => make_token(&name, &scopes),
        None => run(&cli.serve),
    };
    exit::report("order-api", result)
}

fn make_token(name: &str, scopes: &[Scope]) -> Result<(), Failure> {
    let NewToken { token, entry } = auth::new_token(name, scopes)?;
    eprintln!("The token of {name}, which nobody can tell again: {token}");
    service::say!("{entry}");
    Ok(())
}

fn run(serve: &Serve) -> Result<(), Failure> {
    let config = serve.load()?;
    if serve.check_config {
        service::say!("the configuration is right");
        return Ok(());
    }
    logs::init(&config.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::new(Kind::Internal, format!("cannot start the runtime: {e}")))?;
    runtime.block_on(async {
        let (_trigger, shutdown) = Shutdown::on_signals()?;
        app::build(&config).await?.run_until_stopped(shutdown).await;
        Ok(())
    })
}

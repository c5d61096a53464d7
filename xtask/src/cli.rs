//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

mod bench;

pub(crate) use self::bench::{All, ApiBench, Bench, ConsumerBench, EndToEnd, Publishing, RATES, Scenario};
pub(crate) use crate::chaos::Fault;

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "The local stack and the developer's tools"
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start Postgres, Kafka and the services, and keep them running until Ctrl-C
    Up(Up),
    /// Stop everything that `up` started
    Down(Place),
    /// Show each process, its port, health and lag
    Status(Status),
    /// Print the logs
    Logs(Logs),
    /// Build a service and start it again
    Restart(One),
    /// Stop one process and leave it down
    Stop(One),
    /// Start one process that `stop` stopped, or that gave up
    Start(One),
    /// Start Postgres and Kafka on free ports and run `cargo test` against them
    Test(Test),
    /// Run the relay's state machine in a simulated world that fails at random; needs no servers
    Sim(Sim),
    /// Fuzz the relay's core; needs a C++ compiler (g++), nothing else
    Fuzz(Fuzz),
    /// Measure the relay beside Debezium Server and the limits, the API and the consumer, on servers of their own
    Bench(Bench),
    /// Kill, stop and cut off everything at random moments under load, and check that nothing is lost, repeated or out
    /// of order
    Chaos(Chaos),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Chaos {
    /// The campaign's folder: its data, logs and journals [default: .stack/chaos in the repository]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Decides which faults happen, in which order and when [default: a new one]; that of a campaign that was stopped
    /// goes on with it
    #[arg(long, value_name = "SEED")]
    pub seed: Option<u64>,
    /// The same campaign from its beginning again
    #[arg(long, value_name = "SEED", conflicts_with = "seed")]
    pub replay: Option<u64>,
    /// How many faults, those that a stopped campaign has done included [default: 100, or as many as --minutes allow]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub kills: Option<u64>,
    /// Begin no further round after so many minutes
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub minutes: Option<u64>,
    /// What the relay promises, and is held to. The relays' other settings are those of their environment variables,
    /// `CDC_RELAY_…`
    #[arg(long, value_enum, default_value = "at-least-once")]
    pub delivery: Delivery,
    /// Only these faults, with commas; each as often in proportion to the others as among all
    #[arg(long, value_enum, value_name = "FAULT", value_delimiter = ',')]
    pub only: Vec<Fault>,
    /// Another build of cdc-relay in place of this repository's, held to the same
    #[arg(long, value_name = "FILE")]
    pub relay: Option<PathBuf>,
    /// The version of Postgres
    #[arg(long, value_enum, default_value = "18", env = POSTGRES)]
    pub postgres: Postgres,
    /// Print the table as JSON on standard output
    #[arg(long)]
    pub json: bool,
    /// Take the services' binaries as they are
    #[arg(long, env = NO_BUILD)]
    pub no_build: bool,
}

/// How the relay delivers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Delivery {
    AtLeastOnce,
    ExactlyOnce,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Fuzz {
    /// Which target; all of them, one after the other, unless named
    #[arg(value_enum)]
    pub target: Option<Target>,
    /// How long each target is fuzzed
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: u64,
    /// Run this input only, for instance one that crashed
    #[arg(long, value_name = "FILE", requires = "target")]
    pub input: Option<PathBuf>,
    /// Instead of fuzzing, add what covers new code from this folder to the corpus that is in the repository
    #[arg(long, value_name = "DIR", requires = "target", conflicts_with = "input")]
    pub merge: Option<PathBuf>,
}

/// A fuzz target, a file of cdc-relay/core/fuzz/fuzz_targets/.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Target {
    /// One message of pgoutput
    Pgoutput,
    /// A session, from bytes to records and confirmed LSNs
    Stream,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Sim {
    /// How many worlds, by the seeds from 0 on
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub seeds: u64,
    /// This one world instead, for instance one that failed
    #[arg(long, value_name = "SEED")]
    pub seed: Option<u64>,
}

/// Which stack.
#[derive(Debug, Clone, Args)]
pub(crate) struct Place {
    /// Where the stack keeps its data, logs and state [default: .stack in the repository]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Up {
    #[command(flatten)]
    pub place: Place,
    /// The version of Postgres, from Maven; `system` is an installed one, 15 or later (`cargo xtask test` sets this for
    /// the stacks of tests)
    #[arg(long, value_enum, default_value = "18", env = POSTGRES)]
    pub postgres: Postgres,
    /// A Postgres setting, e.g. `wal_sender_timeout=10s`; repeatable
    #[arg(long, value_name = "NAME=VALUE", value_parser = setting)]
    pub postgres_set: Vec<(String, String)>,
    /// A broker setting, e.g. `log.segment.bytes=1048576`; `NAME+=VALUE` adds to a list such as `listeners`; repeatable
    #[arg(long, value_name = "NAME=VALUE", value_parser = broker_setting)]
    pub kafka_set: Vec<(String, String)>,
    /// How many Kafka brokers
    #[arg(long, default_value = "1", value_parser = brokers)]
    pub brokers: u16,
    /// How many instances of a service (order-api, cdc-relay, consumers-relay, pharmacy, fulfillment, messages, acks,
    /// order-view); repeatable
    #[arg(long, value_name = "NAME=N", value_parser = scale)]
    pub scale: Vec<(String, u16)>,
    /// The documented ports, or free ones
    #[arg(long, value_enum, default_value = "fixed")]
    pub ports: Ports,
    /// Return when everything is ready, and leave it running
    #[arg(long)]
    pub detach: bool,
    /// Start Postgres and Kafka only
    #[arg(long)]
    pub infra_only: bool,
    /// Print where things are as JSON on standard output
    #[arg(long)]
    pub json: bool,
    /// Wipe the data first (downloads are kept)
    #[arg(long)]
    pub fresh: bool,
    /// Take the services' binaries as they are (`cargo xtask test` sets this for the stacks of tests)
    #[arg(long, env = NO_BUILD)]
    pub no_build: bool,
    /// We are the supervisor that `--detach` started
    #[arg(long, hide = true)]
    pub background: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Status {
    #[command(flatten)]
    pub place: Place,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Logs {
    #[command(flatten)]
    pub place: Place,
    /// Go on printing what is added
    #[arg(short, long)]
    pub follow: bool,
    /// How many of the last lines of each log
    #[arg(short = 'n', long, default_value_t = 200)]
    pub lines: usize,
    /// Only this process (or all instances of this service)
    pub service: Option<String>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct One {
    #[command(flatten)]
    pub place: Place,
    /// A service (all its instances), one instance, or a server: order-api, pharmacy-2, postgres, kafka-1 …
    pub service: String,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Test {
    /// The version of Postgres
    #[arg(long, value_enum, default_value = "18")]
    pub postgres: Postgres,
    /// Passed on to `cargo test` (`--workspace` unless a package is named with `-p`)
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Postgres {
    #[value(name = "15")]
    V15,
    #[value(name = "16")]
    V16,
    #[value(name = "17")]
    V17,
    #[value(name = "18")]
    V18,
    System,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Ports {
    Fixed,
    Auto,
}

/// The environment's form of `--postgres`.
pub(crate) const POSTGRES: &str = "XTASK_POSTGRES";
/// The environment's form of `--no-build`.
pub(crate) const NO_BUILD: &str = "XTASK_NO_BUILD";

/// The most instances of one service: a limit against typing errors, not of the services.
pub(crate) const INSTANCES_MAX: u16 = 16;

/// Services that `--scale` knows.
pub(crate) const SERVICES: [&str; 8] = [
    "order-api",
    "cdc-relay",
    "consumers-relay",
    "pharmacy",
    "fulfillment",
    "messages",
    "acks",
    "order-view",
];

impl Delivery {
    /// As the relay calls it.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

impl Postgres {
    /// As it is written on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

fn brokers(text: &str) -> Result<u16, String> {
    match text {
        "1" => Ok(1),
        "3" => Ok(3),
        _ => Err("1, or 3 with replication factor 3".to_owned()),
    }
}

fn setting(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("want NAME=VALUE, e.g. wal_sender_timeout=10s")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
    checked(name, value, plain)
}

/// The name keeps the `+` of `NAME+=VALUE`.
fn broker_setting(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("want NAME=VALUE, e.g. log.segment.bytes=1048576")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    checked(name.strip_suffix('+').unwrap_or(name), value, plain)?;
    Ok((name.to_owned(), value.to_owned()))
}

fn checked(name: &str, value: &str, plain: fn(char) -> bool) -> Result<(String, String), String> {
    if name.is_empty() || !name.chars().all(plain) {
        return Err(format!("{name:?} is not a name of a setting"));
    }
    if value.contains(['\n', '\r', '\0']) {
        return Err("a value is one line".to_owned());
    }
    Ok((name.to_owned(), value.to_owned()))
}

fn scale(text: &str) -> Result<(String, u16), String> {
    let known = SERVICES.join(", ");
    let (name, count) = text.split_once('=').ok_or("want NAME=N, e.g. pharmacy=3")?;
    if !SERVICES.contains(&name) {
        return Err(format!("no service {name:?}; there are {known}"));
    }
    match count.parse::<u16>() {
        Ok(count) if (1..=INSTANCES_MAX).contains(&count) => Ok((name.to_owned(), count)),
        _ => Err(format!("{count:?} is not a number from 1 to {INSTANCES_MAX}")),
    }
}

impl Up {
    /// How many instances of `service` to start; the last `--scale` of a name counts.
    pub(crate) fn instances(&self, service: &str) -> u16 {
        self.scale.iter().rev().find(|(name, _)| name == service).map_or(1, |(_, count)| *count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn up(args: &[&str]) -> Result<Up, String> {
        let all = ["xtask", "up"].iter().chain(args);
        match Cli::try_parse_from(all).map_err(|error| error.to_string())?.command {
            Command::Up(up) => Ok(up),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn the_plain_command_is_one_of_everything_on_18() {
        let up = up(&[]).unwrap();
        assert_eq!((up.postgres, up.brokers, up.ports), (Postgres::V18, 1, Ports::Fixed));
        assert!(SERVICES.iter().all(|service| up.instances(service) == 1));
        assert!(!up.detach && !up.fresh && !up.infra_only && !up.json);
    }

    #[test]
    fn scale_is_per_service_and_the_last_one_counts() {
        let up = up(&["--scale", "order-api=3", "--scale", "pharmacy=2", "--scale", "order-api=4"]).unwrap();
        assert_eq!(up.instances("order-api"), 4);
        assert_eq!(up.instances("pharmacy"), 2);
        assert_eq!(up.instances("fulfillment"), 1);
    }

    #[test]
    fn nonsense_is_refused_with_the_reason() {
        assert!(up(&["--scale", "web=2"]).unwrap_err().contains("order-api, cdc-relay"));
        assert!(up(&["--scale", "pharmacy=0"]).is_err());
        assert!(up(&["--scale", "pharmacy=17"]).is_err());
        assert!(up(&["--scale", "pharmacy"]).unwrap_err().contains("NAME=N"));
        assert!(up(&["--brokers", "2"]).is_err());
        assert!(up(&["--postgres", "14"]).is_err());
        assert!(up(&["--postgres-set", "x;y=1"]).is_err());
        assert!(up(&["--postgres-set", "fsync"]).is_err());
    }

    #[test]
    fn a_setting_may_hold_an_equals_sign() {
        let up = up(&["--postgres-set", "cluster_name=a=b"]).unwrap();
        assert_eq!(up.postgres_set, [("cluster_name".to_owned(), "a=b".to_owned())]);
    }

    #[test]
    fn a_brokers_setting_may_add_to_a_list() {
        let added = up(&["--kafka-set", "listeners+=S://localhost:1"]).unwrap();
        assert_eq!(added.kafka_set, [("listeners+".to_owned(), "S://localhost:1".to_owned())]);
        for bad in ["listeners", "=1", "+=1", "a b=1", "a=1\nb=2"] {
            assert!(up(&["--kafka-set", bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_campaign_has_only_faults_that_there_are() {
        let parse = |only: &str| match Cli::try_parse_from(["xtask", "chaos", "--only", only]) {
            Ok(Cli { command: Command::Chaos(chaos) }) => Ok(chaos.only),
            other => Err(other.unwrap_err().to_string()),
        };
        assert_eq!(parse("kafka-cut,relay-kill"), Ok(vec![Fault::KafkaCut, Fault::RelayKill]));
        assert!(parse("relay").unwrap_err().contains("relay-kill, relay-pause"));
    }

    #[test]
    fn test_passes_unknown_arguments_on() {
        let parse = |args: &[&str]| match Cli::try_parse_from(args).unwrap().command {
            Command::Test(test) => (test.postgres, test.args),
            other => panic!("{other:?}"),
        };
        let all = parse(&["xtask", "test", "--postgres", "15", "-p", "xtask", "--", "--nocapture"]);
        assert_eq!(all.0, Postgres::V15);
        assert_eq!(all.1, ["-p", "xtask", "--", "--nocapture"]);
        assert_eq!(parse(&["xtask", "test"]).1, Vec::<String>::new());
    }
}

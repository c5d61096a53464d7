//! The command line of `cargo xtask bench`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{Delivery, NO_BUILD, Postgres, setting};
use crate::bench::{Workload, scaled};

/// What a bench's relays promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Deliveries {
    AtLeastOnce,
    ExactlyOnce,
    Both,
}

impl Deliveries {
    /// Which of them.
    pub(crate) fn all(self) -> &'static [Delivery] {
        match self {
            Self::AtLeastOnce => &[Delivery::AtLeastOnce],
            Self::ExactlyOnce => &[Delivery::ExactlyOnce],
            Self::Both => &[Delivery::AtLeastOnce, Delivery::ExactlyOnce],
        }
    }
}

/// One scenario, or without one all of them.
#[derive(Debug, Clone, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Bench {
    #[command(subcommand)]
    pub scenario: Option<Scenario>,
    #[command(flatten)]
    pub all: All,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum Scenario {
    /// How fast the log of a slot is drained, in proportion to `pg_recvlogical` over the same log
    Drain(Drain),
    /// One transaction of 1,000,000 rows: memory, and the time to the first and the last event
    Bigtx(Publishing),
    /// How late a consumer sees rows that come at steady rates, and the highest rate that lasts
    Steady(Steady),
    /// `kill -9` under load: the time to the first event after it, and what comes twice
    Restart(Publishing),
    /// A minute without an event: CPU, memory, and the log that is retained while others write
    Idle(Publishing),
    /// The same rows through Debezium Server and the relay: every difference of their records
    DropIn(Publishing),
    /// What the pacing of the relay's session costs a row that comes alone
    Pacing(Publishing),
    /// Whether the relay costs more CPU or allocations a row than the repository says
    Gate(Gate),
    /// Orders over HTTP until they are answered, seen in Kafka and applied by each consumer group
    EndToEnd(EndToEnd),
    /// How many orders a second the API takes, in proportion to pgbench with the API's own statement
    Api(ApiBench),
    /// How many events a second the consumer applies, in proportion to SQL that writes the same rows and to a
    /// confluent-kafka consumer that does nothing; and how long the first event of a new topic takes
    Consumer(ConsumerBench),
}

/// All scenarios, each at its defaults, with Debezium Server and the limits (fetched once, 780 MB; needs Java 21).
#[derive(Debug, Clone, Args)]
pub(crate) struct All {
    /// How often every arm runs
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// A part or a multiple of each scenario's rows
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = factor)]
    pub rows_factor: f64,
    /// The version of Postgres
    #[arg(long, value_enum, default_value = "18")]
    pub postgres: Postgres,
    /// Print the numbers as JSON on standard output
    #[arg(long)]
    pub json: bool,
    /// Take the services' binaries as they are
    #[arg(long, env = NO_BUILD)]
    pub no_build: bool,
}

impl All {
    /// What it means to the scenarios of publishers.
    pub(crate) fn publishing(&self) -> Publishing {
        Publishing {
            rounds: self.rounds,
            rows_factor: self.rows_factor,
            delivery: Deliveries::Both,
            peers: true,
            against: None,
            setup: self.setup(self.no_build),
        }
    }

    pub(crate) fn end_to_end(&self) -> EndToEnd {
        let Self { postgres, json, .. } = *self;
        let seconds = self.scaled(SECONDS);
        EndToEnd { rate: ORDER_RATES.to_vec(), seconds, postgres, json, no_build: true }
    }

    pub(crate) fn api(&self) -> ApiBench {
        let seconds = self.scaled(SECONDS);
        ApiBench { connections: 32, seconds, rounds: self.rounds, setup: self.setup(true) }
    }

    pub(crate) fn consumer(&self) -> ConsumerBench {
        ConsumerBench {
            events: self.scaled(EVENTS),
            rounds: self.rounds,
            partitions: 6,
            handler: OrderHandler::Pharmacy,
            batch_records: None,
            setup: self.setup(true),
        }
    }

    fn setup(&self, no_build: bool) -> Setup {
        Setup { postgres: self.postgres, postgres_set: Vec::new(), json: self.json, no_build }
    }

    fn scaled(&self, number: u64) -> u64 {
        scaled(number, self.rows_factor)
    }
}

/// Rows per second, of the steady scenario.
pub(crate) const RATES: [u32; 3] = [500, 2_000, 10_000];
/// Orders per second.
const ORDER_RATES: [u32; 2] = [100, 500];
/// How long an API is measured, at a time.
const SECONDS: u64 = 10;
/// How many the consumer applies.
const EVENTS: u64 = 500_000;

#[derive(Debug, Clone, Args)]
pub(crate) struct Steady {
    /// Rows per second; repeatable
    #[arg(long, value_name = "N", default_values_t = RATES, value_parser = clap::value_parser!(u32).range(1..=200_000))]
    pub rate: Vec<u32>,
    /// Look for the highest rate that lasts, too
    #[arg(long)]
    pub highest: bool,
    #[command(flatten)]
    pub publishing: Publishing,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Gate {
    /// Write down what it costs now
    #[arg(long)]
    pub update: bool,
    /// How often the relay and what it is compared with take turns
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Print the numbers as JSON on standard output
    #[arg(long)]
    pub json: bool,
    /// Take the relay's binary as it is
    #[arg(long, env = NO_BUILD)]
    pub no_build: bool,
}

impl Gate {
    /// What it means to the scenarios of publishers: always the same, so that it can be compared.
    pub(crate) fn publishing(&self) -> Publishing {
        Publishing {
            rounds: self.rounds,
            rows_factor: 1.0,
            delivery: Deliveries::AtLeastOnce,
            peers: false,
            against: None,
            setup: Setup {
                postgres: Postgres::V18,
                postgres_set: Vec::new(),
                json: self.json,
                no_build: self.no_build,
            },
        }
    }
}

#[derive(Debug, Clone, Args)]
pub(crate) struct EndToEnd {
    /// Orders per second; repeatable
    #[arg(long, value_name = "N", default_values_t = ORDER_RATES, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub rate: Vec<u32>,
    /// How long each rate lasts
    #[arg(long, value_name = "N", default_value_t = SECONDS, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub seconds: u64,
    /// The version of Postgres
    #[arg(long, value_enum, default_value = "18")]
    pub postgres: Postgres,
    /// Print the numbers as JSON on standard output
    #[arg(long)]
    pub json: bool,
    /// Take the services' binaries as they are
    #[arg(long, env = NO_BUILD)]
    pub no_build: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ConsumerBench {
    /// How many events there are
    #[arg(long, value_name = "N", default_value_t = EVENTS, value_parser = clap::value_parser!(u64).range(1..=5_000_000))]
    pub events: u64,
    /// How often the arms take turns
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// How many partitions the topic has, and connections there are to the database
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=60))]
    pub partitions: u32,
    /// Which handler of the consumer's
    #[arg(long, value_enum, default_value = "pharmacy")]
    pub handler: OrderHandler,
    /// The most events of one transaction [default: the consumer's own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub batch_records: Option<u64>,
    #[command(flatten)]
    pub setup: Setup,
}

/// A handler that applies order events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OrderHandler {
    Pharmacy,
    Fulfillment,
}

impl OrderHandler {
    /// As the consumer calls it.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ApiBench {
    /// How many connections there are to the API, and of pgbench and the API to the database
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=150))]
    pub connections: u32,
    /// How long each run takes, after it is warm
    #[arg(long, value_name = "N", default_value_t = SECONDS, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub seconds: u64,
    /// How often the two take turns
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    #[command(flatten)]
    pub setup: Setup,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Drain {
    /// What is drained; repeatable [default: all of them]
    #[arg(long, value_enum, value_name = "NAME")]
    pub workload: Vec<Workload>,
    #[command(flatten)]
    pub publishing: Publishing,
}

/// What the scenarios of publishers have in common.
#[derive(Debug, Clone, Args)]
pub(crate) struct Publishing {
    /// How often every arm runs
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// A part or a multiple of the scenario's rows
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = factor)]
    pub rows_factor: f64,
    /// What the relay promises; both: one after the other in every round, and what exactly-once costs. The
    /// relay's other settings are those of its environment variables, `CDC_RELAY_…`
    #[arg(long, value_enum, value_name = "WHAT", default_value = "at-least-once")]
    pub delivery: Deliveries,
    /// Beside it Debezium Server, at its defaults and tuned (fetched once, 780 MB; needs Java 21), a publisher that polls the
    /// table, and a producer that has all records at hand
    #[arg(long)]
    pub peers: bool,
    /// Another build of cdc-relay, which is measured beside the one of this repository
    #[arg(long, value_name = "FILE")]
    pub against: Option<PathBuf>,
    #[command(flatten)]
    pub setup: Setup,
}

/// The servers and binaries that are measured, and how the numbers are told.
#[derive(Debug, Clone, Args)]
pub(crate) struct Setup {
    /// The version of Postgres
    #[arg(long, value_enum, default_value = "18")]
    pub postgres: Postgres,
    /// A Postgres setting, e.g. `synchronous_commit=off`; repeatable
    #[arg(long, value_name = "NAME=VALUE", value_parser = setting)]
    pub postgres_set: Vec<(String, String)>,
    /// Print the numbers as JSON on standard output
    #[arg(long)]
    pub json: bool,
    /// Take the services' binaries as they are
    #[arg(long, env = NO_BUILD)]
    pub no_build: bool,
}

fn factor(text: &str) -> Result<f64, String> {
    let bounds = 0.000_1..=10.0;
    let factor = text.parse().ok().filter(|factor| bounds.contains(factor));
    factor.ok_or_else(|| "a number from 0.0001 to 10".to_owned())
}

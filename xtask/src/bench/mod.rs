//! `cargo xtask bench`: throughput, latency, cost and loss of the relay beside its peers and its limits, of the API and of the
//! consumer, on servers of their own.

mod aims;
mod api;
mod arm;
mod arms;
mod bigtx;
mod consumer;
mod contents;
mod course;
mod debezium;
mod document;
mod drain;
mod drained;
mod drop_in;
mod end_to_end;
mod gate;
mod host;
mod idle;
mod limits;
mod load;
mod numbers;
mod observer;
mod pacing;
mod page;
mod plot;
mod publisher;
mod relay;
mod restart;
mod section;
mod servers;
mod steady;
mod trial;
mod usage;
mod workload;

use std::cell::Cell;

pub(crate) use self::workload::{Workload, scaled};
use self::{
    arms::Arms,
    document::{Document, version},
    section::Section,
    servers::{SETTINGS, Servers},
};
use crate::{
    cli::{self, Scenario},
    failure::{Failure, Result},
    layout::Layout,
    progress::Progress,
    services,
};

/// What the scenarios of publishers share.
struct Bench<'a> {
    servers: &'a Servers,
    arms: &'a Arms,
    rounds: u32,
    /// A part or a multiple of each scenario's rows.
    factor: f64,
    /// The same of the times that those take which last a while. Of all scenarios together they are whole, whatever the factor: a
    /// virtual machine warms up, and a server logs by itself, in seconds and not in rows.
    times: f64,
    next: Cell<usize>,
    is_warm: Cell<bool>,
}

impl Bench<'_> {
    /// Of the next measurement: no slot, topic or checkpoint has it yet.
    fn number(&self) -> usize {
        self.next.replace(self.next.get() + 1)
    }
}

/// A scenario of publishers, over servers that all of them use.
enum Task<'a> {
    Drain(Workload),
    Steady { rates: &'a [u32], highest: bool },
    Idle,
    Bigtx,
    Restart,
    DropIn,
    Pacing,
    Gate { update: bool },
}

/// Runs one scenario, or all of them.
pub(crate) async fn bench(command: &cli::Bench) -> Result<()> {
    let progress = &Progress::new(None);
    let mut document = Document::new();
    let out = &mut document;
    let (name, json) = match &command.scenario {
        None => {
            all(&command.all, out, progress).await?;
            ("all", command.all.json)
        }
        Some(Scenario::Drain(args)) => {
            let all = if args.workload.is_empty() { &Workload::ALL[..] } else { &args.workload };
            let tasks: Vec<_> = all.iter().copied().map(Task::Drain).collect();
            publishers(&args.publishing, &tasks, out, progress).await?;
            ("drain", args.publishing.setup.json)
        }
        Some(Scenario::Steady(args)) => {
            let task = Task::Steady { rates: &args.rate, highest: args.highest };
            publishers(&args.publishing, &[task], out, progress).await?;
            ("steady", args.publishing.setup.json)
        }
        Some(Scenario::Idle(args)) => {
            publishers(args, &[Task::Idle], out, progress).await?;
            ("idle", args.setup.json)
        }
        Some(Scenario::Bigtx(args)) => {
            publishers(args, &[Task::Bigtx], out, progress).await?;
            ("bigtx", args.setup.json)
        }
        Some(Scenario::Restart(args)) => {
            publishers(args, &[Task::Restart], out, progress).await?;
            ("restart", args.setup.json)
        }
        Some(Scenario::DropIn(args)) => {
            publishers(&cli::Publishing { peers: true, ..args.clone() }, &[Task::DropIn], out, progress)
                .await?;
            ("drop-in", args.setup.json)
        }
        Some(Scenario::Pacing(args)) => {
            publishers(args, &[Task::Pacing], out, progress).await?;
            ("pacing", args.setup.json)
        }
        Some(Scenario::Gate(args)) => {
            publishers(&args.publishing(), &[Task::Gate { update: args.update }], out, progress).await?;
            ("gate", args.json)
        }
        Some(Scenario::EndToEnd(args)) => {
            end_to_end::end_to_end(args, out, progress).await?;
            ("end-to-end", args.json)
        }
        Some(Scenario::Api(args)) => {
            api::api(args, out, progress).await?;
            ("api", args.setup.json)
        }
        Some(Scenario::Consumer(args)) => {
            consumer::consumer(args, out, progress).await?;
            ("consumer", args.setup.json)
        }
    };
    document.finish(name, json, progress)
}

/// Everything, with all peers and both deliveries.
async fn all(args: &cli::All, document: &mut Document, progress: &Progress) -> Result<()> {
    let mut tasks: Vec<_> = Workload::ALL.into_iter().map(Task::Drain).collect();
    tasks.extend([
        Task::Bigtx,
        Task::Steady { rates: &cli::RATES, highest: true },
        Task::Restart,
        Task::Idle,
        Task::DropIn,
        Task::Pacing,
    ]);
    if !args.no_build {
        services::build(&Layout::open(None)?, progress)?;
    }
    // What is missing is missing now, not after an hour.
    api::pgbench()?;
    consumer::install(progress)?;
    let publishing = args.publishing();
    let arms = Arms::new(&publishing, progress)?;
    publishers_with((&arms, 1.0), &publishing, &tasks, document, progress).await?;
    let end_to_end = end_to_end::end_to_end(&args.end_to_end(), document, progress).await;
    document.failed("end-to-end", end_to_end);
    let api = api::api(&args.api(), document, progress).await;
    document.failed("api", api);
    let consumer = consumer::consumer(&args.consumer(), document, progress).await;
    document.failed("consumer", consumer);
    let aims = aims::section(&document.sections);
    document.sections.extend(aims);
    Ok(())
}

/// Runs scenarios of publishers; their servers are gone when it returns.
async fn publishers(
    args: &cli::Publishing,
    tasks: &[Task<'_>],
    document: &mut Document,
    progress: &Progress,
) -> Result<()> {
    if let Some(against) = args.against.as_ref().filter(|path| !path.is_file()) {
        return Err(Failure::new(format!("there is no {}", against.display())));
    }
    if !args.setup.no_build {
        services::build(&Layout::open(None)?, progress)?;
    }
    let arms = Arms::new(args, progress)?;
    publishers_with((&arms, args.rows_factor), args, tasks, document, progress).await
}

async fn publishers_with(
    (arms, times): (&Arms, f64),
    args: &cli::Publishing,
    tasks: &[Task<'_>],
    document: &mut Document,
    progress: &Progress,
) -> Result<()> {
    document.busy();
    document.few(args.rounds);
    let (servers, mut stack) =
        Servers::start(args.setup.postgres, &args.setup.postgres_set, progress).await?;
    document.version(version(&arms.relay)?);
    document.version(format!("PostgreSQL {}", servers.postgres_version));
    document.version(format!("Kafka {}", servers.kafka_version));
    document.version(version(&arm::recvlogical()?)?);
    if let Some(debezium) = arms.debezium().next() {
        document.version(format!("Debezium Server {}", debezium.version()?));
    }
    let own = SETTINGS.iter().map(|(name, value)| format!("{name}={value}"));
    document.postgres_settings =
        own.chain(args.setup.postgres_set.iter().map(|(name, value)| format!("{name}={value}"))).collect();
    let maintenance = stack.endpoints().postgres_superuser;
    let bench = Bench {
        servers: &servers,
        arms,
        rounds: args.rounds,
        factor: args.rows_factor,
        times,
        next: Cell::new(0),
        is_warm: Cell::new(false),
    };
    let result = tokio::select! {
        result = run(&bench, tasks, &maintenance, document) => result,
        () = stack.interrupted() => Err(Failure::new("interrupted")),
    };
    servers.stop(stack, result.is_err()).await;
    result
}

/// One after the other. What fails is told, and keeps none of the others.
async fn run(
    bench: &Bench<'_>,
    tasks: &[Task<'_>],
    maintenance: &str,
    document: &mut Document,
) -> Result<()> {
    bench.servers.create_database(maintenance).await?;
    for task in tasks {
        let (name, section) = match task {
            Task::Drain(workload) => ("drain", drain::drain(bench, *workload).await),
            Task::Steady { rates, highest } => ("steady", steady::steady(bench, rates, *highest).await),
            Task::Idle => ("idle", idle::idle(bench).await),
            Task::Bigtx => ("bigtx", bigtx::bigtx(bench).await),
            Task::Restart => ("restart", restart::restart(bench).await),
            Task::DropIn => ("drop-in", drop_in::drop_in(bench).await),
            Task::Pacing => ("pacing", pacing::pacing(bench).await),
            Task::Gate { update } => ("gate", gate::gate(bench, *update).await),
        };
        document.sections.push(section.unwrap_or_else(|failure| Section::failed(name, &failure)));
    }
    Ok(())
}

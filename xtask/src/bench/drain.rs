//! `cargo xtask bench drain`: the relay against `pg_recvlogical`, over the same log.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::Command,
};

use super::{
    arm::{self, Arm, Run},
    host::{self, Host},
    idle,
    relay::{Relay, arm_name},
    report::{Drained, Measured, Report, Versions, exactly_once_ratio},
    servers::{SETTINGS, Servers},
    steady,
    workload::{self, Workload, Written},
};
use crate::{
    cli::{self, Delivery},
    failure::{Explain, Failure, Result},
    layout::Layout,
    progress::Progress,
    services,
};

/// Runs the bench; its servers are gone when it returns.
pub(crate) async fn drain(args: &cli::Drain) -> Result<()> {
    let progress = Progress::new(None);
    let recvlogical = arm::recvlogical()?;
    if let Some(against) = args.against.as_ref().filter(|path| !path.is_file()) {
        return Err(Failure::new(format!("there is no {}", against.display())));
    }
    if !args.no_build {
        services::build(&Layout::open(None)?, &progress)?;
    }
    let relay = services::binary("cdc-relay")?;
    let (relay_version, recvlogical_version) = (version(&relay)?, version(&recvlogical)?);
    // Before we are busy ourselves.
    let busy = host::busy();
    let (servers, mut stack) = Servers::start(args.postgres, &args.postgres_set, &progress).await?;
    let mut report = Report {
        host: Host::look(),
        versions: Versions {
            relay: relay_version,
            pg_recvlogical: recvlogical_version,
            postgres: servers.postgres_version.clone(),
            kafka: servers.kafka_version.clone(),
        },
        postgres_settings: settings(args),
        rounds: args.rounds,
        workloads: Vec::new(),
        idle: Vec::new(),
        steady: Vec::new(),
        warnings: busy.into_iter().collect(),
    };
    let arms = Arms::new(&relay, args.against.as_deref(), args.delivery.all());
    let maintenance = stack.endpoints().postgres_superuser;
    let result = tokio::select! {
        result = measure(args, &servers, &arms, &maintenance, &mut report) => result,
        () = stack.interrupted() => Err(Failure::new("interrupted")),
    };
    servers.stop(stack, result.is_err()).await;
    result?;
    report.doubt();
    let text = if args.json {
        serde_json::to_string_pretty(&report).explain(|| "print the report".to_owned())?
    } else {
        report.text()
    };
    writeln!(io::stdout(), "{text}").explain(|| "print the report".to_owned())
}

fn settings(args: &cli::Drain) -> Vec<String> {
    let own = SETTINGS.iter().map(|(name, value)| format!("{name}={value}"));
    own.chain(args.postgres_set.iter().map(|(name, value)| format!("{name}={value}"))).collect()
}

/// What a program says of itself.
pub(super) fn version(program: &Path) -> Result<String> {
    let output = Command::new(program).arg("--version").output();
    let output = output.explain(|| format!("run {} --version", program.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The readers by their names, the one that the others are measured by first.
struct Arms {
    /// This repository's.
    relay: PathBuf,
    readers: Vec<(&'static str, Arm)>,
}

impl Arms {
    fn new(relay: &Path, against: Option<&Path>, deliveries: &[Delivery]) -> Self {
        let own = |path: &Path| path.to_path_buf();
        let mut arms = vec![("pg_recvlogical", Arm::Recvlogical), ("session", Arm::Session(own(relay)))];
        let whole = |binary: &Path, is_against| {
            let arm = |delivery| Arm::Relay(Relay { binary: own(binary), delivery });
            let named = deliveries.iter().map(|&delivery| (arm_name(delivery, is_against), arm(delivery)));
            named.collect::<Vec<_>>()
        };
        arms.extend(whole(relay, false));
        if let Some(other) = against {
            arms.push(("session (against)", Arm::Session(own(other))));
            arms.extend(whole(other, true));
        }
        Self { relay: own(relay), readers: arms }
    }

    /// Those that reach Kafka.
    fn relays(&self) -> impl Iterator<Item = (&'static str, &Relay)> {
        self.readers.iter().filter_map(|(name, arm)| match arm {
            Arm::Relay(relay) => Some((*name, relay)),
            _ => None,
        })
    }
}

async fn measure(
    args: &cli::Drain,
    servers: &Servers,
    arms: &Arms,
    maintenance: &str,
    report: &mut Report,
) -> Result<()> {
    servers.create_database(maintenance).await?;
    let chosen = if args.workload.is_empty() { Workload::ALL.to_vec() } else { args.workload.clone() };
    let mut number = 0;
    for workload in chosen {
        let shape = workload.shape(args.rows_factor);
        if matches!(workload, Workload::Idle | Workload::Steady) {
            for round in 1..=args.rounds {
                let what = format!("{}, round {round} of {}", workload.name(), args.rounds);
                let step = servers.progress.step(&what);
                if workload == Workload::Idle {
                    report.idle.push(idle::round(servers, &arms.relay, shape).await?);
                } else {
                    let mut relays = Vec::new();
                    for relay in arms.relays() {
                        relays.push(steady::round(servers, relay, shape, number).await?);
                        number += 1;
                    }
                    report.steady.push(relays);
                }
                step.done(&what);
            }
            continue;
        }
        let written = workload::write(servers, workload.name(), shape).await?;
        if number == 0 {
            // A broker that has just started is slow; the first one to use it would pay.
            let step = servers.progress.step("warming up");
            for (_, relay) in arms.relays() {
                Arm::Relay(relay.clone()).run(servers, &written, number).await?;
                number += 1;
            }
            step.done("warmed up");
        }
        let mut runs: Vec<Vec<Run>> = vec![Vec::new(); arms.readers.len()];
        for round in 1..=args.rounds {
            one_round(args, servers, arms, (workload, &written, round), &mut number, &mut runs).await?;
        }
        workload::forget(servers).await?;
        let baseline = runs[0].clone();
        let measured: Vec<Measured> = arms
            .readers
            .iter()
            .zip(runs)
            .filter_map(|((name, _), runs)| Measured::of(name, shape.rows, runs, &baseline))
            .collect();
        report.workloads.push(Drained {
            workload: workload.name(),
            rows: shape.rows,
            rows_per_transaction: shape.rows_per_transaction,
            wal_bytes: written.wal_bytes,
            exactly_once_ratio: exactly_once_ratio(&measured),
            arms: measured,
        });
    }
    Ok(())
}

/// Every arm once.
async fn one_round(
    args: &cli::Drain,
    servers: &Servers,
    arms: &Arms,
    (workload, written, round): (Workload, &Written, u32),
    number: &mut usize,
    runs: &mut [Vec<Run>],
) -> Result<()> {
    for ((name, arm), runs) in arms.readers.iter().zip(runs) {
        let what = format!("{}, round {round} of {}, {name}", workload.name(), args.rounds);
        let step = servers.progress.step(&what);
        let run = arm.run(servers, written, *number).await?;
        *number += 1;
        step.done(&format!("{what}: {:.1}k rows/s", run.rows_per_second / 1e3));
        runs.push(run);
    }
    Ok(())
}

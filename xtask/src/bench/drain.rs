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
    report::{Drained, Measured, Report, Versions},
    servers::{SETTINGS, Servers},
    workload::{self, Workload, Written},
};
use crate::{
    cli,
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
        warnings: busy.into_iter().collect(),
    };
    let arms = Arms::new(&relay, args.against.as_deref());
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
    fn new(relay: &Path, against: Option<&Path>) -> Self {
        let own = |path: &Path| path.to_path_buf();
        let mut arms = vec![
            ("pg_recvlogical", Arm::Recvlogical),
            ("session", Arm::Session(own(relay))),
            ("relay", Arm::Relay(own(relay))),
        ];
        if let Some(other) = against {
            arms.push(("session (against)", Arm::Session(own(other))));
            arms.push(("relay (against)", Arm::Relay(own(other))));
        }
        Self { relay: own(relay), readers: arms }
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
        if workload == Workload::Idle {
            for round in 1..=args.rounds {
                let step = servers.progress.step(format!("idle, round {round} of {}", args.rounds));
                report.idle.push(idle::round(servers, &arms.relay, shape).await?);
                step.done(&format!("idle, round {round} of {}", args.rounds));
            }
            continue;
        }
        let written = workload::write(servers, workload.name(), shape).await?;
        if number == 0 {
            // A broker that has just started is slow; the first one to use it would pay.
            let step = servers.progress.step("warming up");
            Arm::Relay(arms.relay.clone()).run(servers, &written, number).await?;
            step.done("warmed up");
            number += 1;
        }
        let mut runs: Vec<Vec<Run>> = vec![Vec::new(); arms.readers.len()];
        for round in 1..=args.rounds {
            one_round(args, servers, arms, (workload, &written, round), &mut number, &mut runs).await?;
        }
        workload::forget(servers).await?;
        let baseline = runs[0].clone();
        let measured = arms.readers.iter().zip(runs);
        report.workloads.push(Drained {
            workload: workload.name(),
            rows: shape.rows,
            rows_per_transaction: shape.rows_per_transaction,
            wal_bytes: written.wal_bytes,
            arms: measured
                .filter_map(|((name, _), runs)| Measured::of(name, shape.rows, runs, &baseline))
                .collect(),
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

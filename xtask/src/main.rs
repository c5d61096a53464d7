//! The local stack and the developer's tools: `cargo xtask up | down | status | logs | restart | test | …`.

mod backoff;
mod bench;
mod chaos;
mod cli;
mod control;
mod crew;
mod desk;
mod down;
mod ending;
mod endpoints;
mod failure;
mod fuzz;
mod identity;
mod kafka;
mod keeper;
mod layout;
mod logs;
mod maven;
mod ports;
mod postgres;
mod prerequisites;
mod progress;
mod services;
mod sim;
mod spec;
mod state;
mod status;
mod supervise;
mod test;
mod topics;
mod up;

use std::process::ExitCode;

use clap::Parser;

use crate::{
    cli::{Cli, Command, One},
    failure::{Explain, Result},
    keeper::Order,
    layout::Layout,
    progress::Progress,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Postgres may run as another user, who has to read what we unpack and write.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime.explain(|| "start the runtime".to_owned()).and_then(|runtime| {
        let result = runtime.block_on(run(&cli.command));
        // A probe that hangs on a dead server is not waited for.
        runtime.shutdown_background();
        result
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{}{failure}", up::FAILED);
            ExitCode::FAILURE
        }
    }
}

async fn run(command: &Command) -> Result<()> {
    match command {
        Command::Up(args) => up::up(args).await,
        Command::Down(args) => down::down(args).await,
        Command::Status(args) => status::status(args).await,
        Command::Logs(args) => logs::print(args).await,
        Command::Restart(args) => restart(args).await,
        Command::Stop(args) => tell(args, Order::Stop).await,
        Command::Start(args) => tell(args, Order::Start).await,
        Command::Test(args) => test::test(args).await,
        Command::Sim(args) => sim::sim(args).await,
        Command::Fuzz(args) => fuzz::fuzz(args).await,
        Command::Bench(command) => bench::bench(command).await,
        Command::Chaos(args) => Box::pin(chaos::chaos(args)).await,
    }
}

async fn restart(args: &One) -> Result<()> {
    let layout = Layout::open(args.place.dir.as_deref())?;
    let state = state::running(&layout)?;
    let known =
        state.processes.iter().find(|entry| entry.name == args.service || entry.service == args.service);
    if known.is_some_and(|entry| services::package(&entry.service).is_some()) {
        services::build(&layout, &Progress::new(None))?;
    }
    tell(args, Order::Restart).await
}

/// Sends a command to the supervisor and prints its answer.
async fn tell(args: &One, order: Order) -> Result<()> {
    let layout = Layout::open(args.place.dir.as_deref())?;
    state::running(&layout)?;
    println!("{}", control::send(&layout, order, &args.service).await?);
    Ok(())
}

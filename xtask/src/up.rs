//! `cargo xtask up`: everything that takes the user's terminal, then the supervisor, here or in the background.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    time::Instant,
};

use tokio::io::{AsyncBufReadExt, BufReader};

use crate::{
    cli::Up,
    down, ending,
    endpoints::Endpoints,
    failure::{Explain, Failure, Result},
    identity,
    layout::Layout,
    logs, maven, ports, postgres, prerequisites,
    progress::Progress,
    services, state,
    supervise::{self, Interrupts, Stack},
};

/// The supervisor in the background says this when all is ready; what it says before is progress.
const READY: &str = "ready.";
/// What stands before a failure on standard error; everything after it belongs to the failure.
pub(crate) const FAILED: &str = "xtask: ";

/// Runs the stack; returns when it has stopped, or with `--detach` when it is ready.
pub(crate) async fn up(up: &Up) -> Result<()> {
    let layout = Layout::open(up.place.dir.as_deref())?;
    if up.background {
        return background(up, &layout).await;
    }
    let progress = Progress::new(None);
    let since = Instant::now();
    {
        // The supervisor does this again; here it spares a build that would be for nothing.
        let _lock = state::lock(&layout)?.ok_or_else(|| supervise::already(&layout))?;
        down::clear(&layout, &progress).await;
        ports::choose(up, &layout.downloads)?;
    }
    prepare(up, &layout, &progress)?;
    if up.detach {
        detach(&layout, &progress).await?;
        let state = state::running(&layout)?;
        return tell(up, &layout, &progress, &state.endpoints, since);
    }
    let mut stack = Stack::start(up, &layout, &progress).await?;
    let followers = follow(&layout, &stack);
    let told = tell(up, &layout, &progress, &stack.endpoints(), since);
    let result = match told {
        Ok(()) => stack.run().await,
        Err(failure) => Err(failure),
    };
    stack.stop().await;
    drop(followers);
    result
}

/// What may take minutes: downloads and the build. With everything there it takes a moment.
fn prepare(up: &Up, layout: &Layout, progress: &Progress) -> Result<()> {
    prerequisites::disk(&layout.dir)?;
    prerequisites::java()?;
    if !up.infra_only {
        prerequisites::cargo()?;
    }
    maven::kafka(layout, progress)?;
    postgres::install(layout, progress, up.postgres)?;
    if !up.infra_only && !up.no_build {
        services::build(layout, progress)?;
    }
    Ok(())
}

/// Prints where things are, for a person or for a script.
fn tell(up: &Up, layout: &Layout, progress: &Progress, endpoints: &Endpoints, since: Instant) -> Result<()> {
    progress.line(&format!("ready in {:.1} s", since.elapsed().as_secs_f64()));
    if up.json {
        let text = serde_json::to_string_pretty(endpoints).explain(|| "print the endpoints".to_owned())?;
        return writeln!(io::stdout(), "{text}").explain(|| "print the endpoints".to_owned());
    }
    let place = up.place.dir.as_ref().map(|dir| format!(" --dir {}", dir.display())).unwrap_or_default();
    progress.line(&summary(endpoints, &layout.endpoints().display().to_string()));
    let stop = if up.detach { format!("cargo xtask down{place}") } else { "Ctrl-C".to_owned() };
    progress
        .line(&format!("  cargo xtask status{place} · cargo xtask logs -f{place} · {stop} stops everything"));
    Ok(())
}

fn summary(endpoints: &Endpoints, path: &str) -> String {
    let mut lines = vec![String::new()];
    let mut say = |name: &str, value: &str| lines.push(format!("  {name:<19} {value}"));
    for (number, url) in endpoints.order_apis.iter().enumerate() {
        say(if number == 0 { "order-api" } else { "" }, url);
    }
    if let Some(url) = &endpoints.cdc_relay {
        say("cdc-relay", url);
    }
    if let Some(url) = &endpoints.consumers_relay {
        say("consumers-relay", url);
    }
    for (name, url) in &endpoints.consumers {
        say(name, url);
    }
    say("orders database", &endpoints.postgres);
    say("consumers database", &endpoints.consumer_postgres);
    say("kafka", &endpoints.kafka);
    say("for scripts", path);
    if let Some(api) = &endpoints.order_api {
        let order = r#"{"customerId":"c-1","restaurantId":"r-1","items":[{"menuItemId":"m-1","name":"Soup","price":"6.25","quantity":2}]}"#;
        lines.push("\n  Post an order, see its event, see it at a consumer:".to_owned());
        lines.push(format!("    curl -i {api}/api/orders -H 'content-type: application/json' -d '{order}'"));
        let format = r"'%T p%p o%o %k %h\n%s\n'";
        lines.push(format!("    kcat -b {} -C -q -t order-events -e -f {format}", endpoints.kafka));
        let sql = "SELECT order_id, status, version, total_amount FROM pharmacy_orders";
        lines.push(format!("    psql {} -c '{sql}'", endpoints.consumer_postgres));
        lines.push(String::new());
    }
    lines.join("\n")
}

/// The services' logs on the terminal, each line with the name of its process.
fn follow(layout: &Layout, stack: &Stack) -> tokio::task::JoinSet<()> {
    let state = stack.state();
    let ours: Vec<_> =
        state.processes.iter().filter(|entry| services::package(&entry.service).is_some()).collect();
    let width = ours.iter().map(|entry| entry.name.len()).max().unwrap_or(0);
    let mut followers = tokio::task::JoinSet::new();
    for entry in ours {
        let path = layout.log(&entry.name);
        let from = fs::metadata(&path).map_or(0, |meta| meta.len());
        followers.spawn(logs::follow(path, from, format!("{:width$} | ", entry.name)));
    }
    followers
}

/// Starts the supervisor in the background and shows its progress until it is ready or has failed.
async fn detach(layout: &Layout, progress: &Progress) -> Result<()> {
    let log_path = layout.log("supervisor");
    let program = services::this_program()?;
    let mut command = Command::new(program);
    command.args(std::env::args_os().skip(1)).arg("--background");
    // Its progress comes through the pipe; once we have gone, it is in the log alone.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
    let mut interrupts = Interrupts::new()?;
    let mut supervisor =
        tokio::process::Command::from(command).spawn().explain(|| "start the supervisor".to_owned())?;
    let (Some(pid), Some(pipe)) = (supervisor.id(), supervisor.stderr.take()) else {
        return Err(Failure::new("the supervisor did not start"));
    };
    let mut lines = BufReader::new(pipe).lines();
    let mut failure = String::new();
    loop {
        tokio::select! {
            line = lines.next_line() => match line {
                Ok(Some(line)) if line == READY => return Ok(()),
                Ok(Some(line)) if failure.is_empty() => match line.strip_prefix(FAILED) {
                    Some(why) => failure.push_str(why),
                    None => progress.line(&line),
                },
                Ok(Some(line)) => failure = format!("{failure}\n{line}"),
                _ => break,
            },
            () = interrupts.next() => {
                progress.line("stopping");
                identity::send(pid, rustix::process::Signal::TERM);
            }
        }
    }
    let status = supervisor.wait().await.explain(|| "wait for the supervisor".to_owned())?;
    if failure.is_empty() {
        failure = format!("the supervisor ended: {}", ending::describe(status));
    }
    Err(Failure::new(failure).hint(format!("more in {}", log_path.display())))
}

/// The supervisor in the background.
async fn background(up: &Up, layout: &Layout) -> Result<()> {
    let path = layout.log("supervisor");
    if up.fresh {
        let _ = fs::remove_file(&path);
    }
    let log = OpenOptions::new().create(true).append(true).open(&path);
    let progress = Progress::new(Some(log.explain(|| format!("write {}", path.display()))?));
    let mut stack = Stack::start(up, layout, &progress).await?;
    progress.line(READY);
    let result = stack.run().await;
    stack.stop().await;
    result
}

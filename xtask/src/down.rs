//! `cargo xtask down`, also for a stack whose supervisor was killed.

use std::{fs, time::Duration};

use rustix::process::Signal;
use tokio::time::Instant;

use crate::{
    cli::Place,
    failure::{Failure, Result},
    identity::Identity,
    layout::Layout,
    ports, postgres,
    progress::Progress,
    spec::Layer,
    state::{self, State},
};

/// How long a supervisor may take to stop its processes, before they are killed.
const SUPERVISOR_LIMIT: Duration = Duration::from_secs(90);
/// How long processes without a supervisor may take.
const ORPHAN_LIMIT: Duration = Duration::from_secs(20);
/// How long a killed process may take to go.
const KILLED_LIMIT: Duration = Duration::from_secs(10);
/// How long a supervisor that is just starting may take to write its state.
const STATE_LIMIT: Duration = Duration::from_secs(5);

/// Stops a stack, and says so when there is none.
pub(crate) async fn down(place: &Place) -> Result<()> {
    let layout = Layout::open(place.dir.as_deref())?;
    let progress = Progress::new(None);
    let since = Instant::now();
    let supervised = state::lock(&layout)?.is_none();
    if supervised {
        let state = state_of(&layout).await?;
        let step = progress.step(format!("stopping the stack in {}", layout.dir.display()));
        state.supervisor.signal(Signal::TERM);
        if !state.supervisor.ended_within(SUPERVISOR_LIMIT).await {
            state.supervisor.signal(Signal::KILL);
            state.supervisor.ended_within(KILLED_LIMIT).await;
        }
        drop(step);
    }
    let Some(_lock) = state::lock(&layout)? else {
        return Err(Failure::new("the supervisor does not end").hint("`cargo xtask status` tells more"));
    };
    let orphans = clear(&layout, &progress).await;
    let _ = fs::remove_dir_all(&layout.run);
    let seconds = since.elapsed().as_secs_f64();
    let dir = layout.dir.display();
    progress.line(&match (supervised, orphans) {
        (true, _) => format!("stopped the stack in {dir} ({seconds:.1} s)"),
        (false, 0) => format!("nothing runs in {dir}"),
        (false, _) => format!("stopped {orphans} processes without a supervisor ({seconds:.1} s)"),
    });
    Ok(())
}

/// The state of a stack that holds the lock, which it takes a moment before it writes its state.
async fn state_of(layout: &Layout) -> Result<State> {
    let until = Instant::now() + STATE_LIMIT;
    loop {
        match state::read(layout).filter(|state| state.supervisor.alive()) {
            Some(state) => return Ok(state),
            None if Instant::now() > until => {
                return Err(Failure::new(format!(
                    "{} is locked, but not by a supervisor",
                    layout.dir.display()
                ))
                .hint("see who has its file `lock` open"));
            }
            None => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Stops what a killed supervisor left, in the reverse order of its start, and forgets it. To be called under
/// the lock. Returns how many processes there were.
pub(crate) async fn clear(layout: &Layout, progress: &Progress) -> usize {
    let state = state::read(layout);
    let mut count = 0;
    if let Some(state) = &state {
        let mut layers: Vec<Layer> = state.processes.iter().map(|entry| entry.layer).collect();
        layers.sort_unstable();
        layers.dedup();
        for layer in layers.into_iter().rev() {
            let of_layer = state.processes.iter().filter(|entry| entry.layer == layer);
            let orphans: Vec<_> =
                of_layer.filter_map(|entry| Some((&entry.name, entry.identity.as_ref()?))).collect();
            let orphans: Vec<_> = orphans.into_iter().filter(|(_, process)| process.alive()).collect();
            for (name, process) in &orphans {
                progress.line(&format!(
                    "  stopping {name} (process {}), left by a killed supervisor",
                    process.pid
                ));
                process.signal(layer.stop_signal());
            }
            count += orphans.len();
            for (_, process) in orphans {
                if !process.ended_within(ORPHAN_LIMIT).await {
                    process.signal(Signal::KILL);
                }
            }
        }
        count += kill(layout, state).await;
    } else {
        count += kill_marked(layout).await;
    }
    let _ = fs::remove_file(layout.state());
    let _ = fs::remove_file(layout.endpoints());
    count
}

/// Kills every process of a stack at once, those included that the state does not know. Returns how many.
pub(crate) async fn kill(layout: &Layout, state: &State) -> usize {
    let known = state.processes.iter().filter_map(|entry| entry.identity.clone());
    let alive: Vec<Identity> = known.filter(Identity::alive).collect();
    let count = end(&alive, Signal::KILL, KILLED_LIMIT).await + kill_marked(layout).await;
    postgres::clear_remains(&state.cluster).await;
    count
}

/// Those that bear the mark of this stack, but whose id was not written down in time.
async fn kill_marked(layout: &Layout) -> usize {
    let (key, value) = layout.mark();
    end(&marked(key, &value), Signal::KILL, KILLED_LIMIT).await
}

/// Stops every stack that was started with this variable in its environment, and whatever else was.
pub(crate) async fn stop_all_with(key: &str, value: &str) {
    let command = |process: &Identity| fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
    let supervises =
        |process: &Identity| command(process).split(|byte| *byte == 0).any(|arg| arg == b"--background");
    let supervisors: Vec<Identity> = marked(key, value).into_iter().filter(supervises).collect();
    end(&supervisors, Signal::TERM, ORPHAN_LIMIT).await;
    end(&marked(key, value), Signal::KILL, KILLED_LIMIT).await;
}

/// Sends a signal to processes and waits for their end. Returns how many there were.
async fn end(processes: &[Identity], signal: Signal, limit: Duration) -> usize {
    for process in processes {
        process.signal(signal);
    }
    for process in processes {
        process.ended_within(limit).await;
    }
    processes.len()
}

/// The processes with this variable in their environment, but for ourselves.
fn marked(key: &str, value: &str) -> Vec<Identity> {
    let mark = format!("{key}={value}").into_bytes();
    ports::processes().into_iter().filter(|pid| bears(*pid, &mark)).filter_map(Identity::of).collect()
}

fn bears(pid: u32, mark: &[u8]) -> bool {
    if pid == std::process::id() {
        return false;
    }
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment.split(|byte| *byte == 0).any(|variable| variable == mark)
}

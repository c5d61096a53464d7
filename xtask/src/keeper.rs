//! Keeps one process running: one task per process, which owns its child.

use std::{pin::pin, process::ExitStatus, sync::Arc, time::Duration};

use rustix::process::Signal;
use tokio::{
    process::Child,
    sync::{mpsc, oneshot},
    time::{Instant, sleep, timeout},
};

use crate::{
    backoff::{Backoff, HEALTHY_AFTER},
    desk::Desk,
    ending,
    identity::{self, Identity},
    postgres,
    spec::{Layer, Spec},
    state::Phase,
};

/// Exit codes of our services that starting again does not mend: bad configuration, and halted on poison or a
/// lost position.
const NOT_MENDED: [i32; 2] = [64, 65];

/// What a keeper can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Order {
    Start,
    Stop,
    Restart,
    /// Stop, and keep no longer.
    End,
    /// The same by SIGKILL.
    Kill,
}

/// An order, and where to answer when it is carried out (for `Start` and `Restart`: when it is under way).
pub(crate) type Asked = (Order, oneshot::Sender<()>);

enum Next {
    Start,
    /// After a death.
    Wait(Duration),
    Rest,
    End,
}

/// Runs until it is told to end.
pub(crate) async fn keep(spec: Spec, desk: Arc<Desk>, mut orders: mpsc::Receiver<Asked>) {
    let mut backoff = Backoff::new();
    let mut next = Next::Start;
    loop {
        next = match next {
            Next::Start => life(&spec, &desk, &mut orders, &mut backoff).await,
            Next::Wait(delay) => tokio::select! {
                () = sleep(delay) => Next::Start,
                asked = orders.recv() => idle(&spec, &desk, asked),
            },
            Next::Rest => {
                let asked = orders.recv().await;
                idle(&spec, &desk, asked)
            }
            Next::End => return,
        }
    }
}

/// An order while nothing runs.
fn idle(spec: &Spec, desk: &Desk, asked: Option<Asked>) -> Next {
    let Some((order, done)) = asked else { return Next::End };
    let next = match order {
        Order::Start | Order::Restart => Next::Start,
        Order::Stop => Next::Rest,
        Order::End | Order::Kill => Next::End,
    };
    desk.now(&spec.name, if matches!(next, Next::Start) { Phase::Starting } else { Phase::Stopped });
    let _ = done.send(());
    next
}

/// From the start of the process to its end.
async fn life(spec: &Spec, desk: &Desk, orders: &mut mpsc::Receiver<Asked>, backoff: &mut Backoff) -> Next {
    if spec.layer == Layer::Postgres {
        postgres::clear_remains(&spec.cwd).await;
    }
    let mut child = match spec.spawn(desk.layout.mark()) {
        Ok(child) => child,
        Err(failure) => return wait(spec, desk, backoff, &failure.to_string()),
    };
    let Some(pid) = child.id() else { return wait(spec, desk, backoff, "it has no process id") };
    if let Some(identity) = Identity::of(pid) {
        desk.spawned(&spec.name, identity);
    }
    let again = desk.phase(&spec.name).is_some_and(|(_, restarts)| restarts > 0);
    let mut ready = false;
    let mut probe = pin!(spec.ready());
    let mut healthy = pin!(sleep(Duration::MAX));
    loop {
        tokio::select! {
            status = child.wait() => {
                let code = status.as_ref().ok().and_then(ExitStatus::code);
                let why = status.map_or_else(|error| error.to_string(), ending::describe);
                return died(spec, desk, backoff, pid, &why, code);
            }
            () = &mut probe, if !ready => {
                ready = true;
                healthy.as_mut().reset(Instant::now() + HEALTHY_AFTER);
                desk.now(&spec.name, Phase::Ready);
                if again {
                    desk.progress.line(&format!("  {} ready again, process {pid}", spec.name));
                }
            }
            () = &mut healthy => {
                backoff.reset();
                healthy.as_mut().reset(Instant::now() + Duration::from_secs(86_400));
            }
            asked = orders.recv() => {
                let (order, done) = match asked {
                    Some((order, done)) => (order, Some(done)),
                    None => (Order::End, None),
                };
                if order != Order::Start {
                    let grace = if order == Order::Kill { Duration::ZERO } else { spec.grace };
                    end(spec, desk, &mut child, pid, grace, orders).await;
                    desk.now(&spec.name, if order == Order::Restart { Phase::Starting } else { Phase::Stopped });
                }
                if let Some(done) = done {
                    let _ = done.send(());
                }
                match order {
                    Order::Start => {}
                    Order::Restart => return Next::Start,
                    Order::Stop => return Next::Rest,
                    Order::End | Order::Kill => return Next::End,
                }
            }
        }
    }
}

/// Asks the process to stop, and kills it when it does not within its grace, or when told to on the way.
async fn end(
    spec: &Spec,
    desk: &Desk,
    child: &mut Child,
    pid: u32,
    grace: Duration,
    orders: &mut mpsc::Receiver<Asked>,
) {
    // The child is not waited for yet, so its id is still its own.
    if grace > Duration::ZERO && identity::send(pid, spec.layer.stop_signal()) {
        let deadline = Instant::now() + grace;
        loop {
            tokio::select! {
                _ = child.wait() => break,
                () = tokio::time::sleep_until(deadline) => {
                    let grace = grace.as_secs();
                    desk.progress.line(&format!("  {} did not stop within {grace} s: killing it", spec.name));
                    break;
                }
                asked = orders.recv() => match asked {
                    Some((Order::Kill, _)) | None => break,
                    Some(_) => {}
                },
            }
        }
    }
    if child.id().is_some() {
        identity::send(pid, Signal::KILL);
        let _ = timeout(Duration::from_secs(10), child.wait()).await;
    }
    if spec.layer == Layer::Postgres {
        postgres::clear_remains(&spec.cwd).await;
    }
}

fn died(spec: &Spec, desk: &Desk, backoff: &mut Backoff, pid: u32, why: &str, code: Option<i32>) -> Next {
    let ours = spec.layer > Layer::Kafka;
    if ours && code.is_some_and(|code| NOT_MENDED.contains(&code)) {
        desk.progress.line(&format!(
            "!! {} (process {pid}) ended: {why}. It is left down, because starting it again would not help.\n\
             !! See {} and then: cargo xtask start {}",
            spec.name,
            spec.log.display(),
            spec.name
        ));
        desk.now(&spec.name, Phase::Down { why: why.to_owned() });
        return Next::Rest;
    }
    wait(spec, desk, backoff, &format!("process {pid} {why}"))
}

fn wait(spec: &Spec, desk: &Desk, backoff: &mut Backoff, why: &str) -> Next {
    let delay = backoff.next();
    desk.progress.line(&format!(
        "  {} died: {why}; starting it again in {:.1} s (log {})",
        spec.name,
        delay.as_secs_f64(),
        spec.log.display()
    ));
    desk.now(&spec.name, Phase::Waiting { why: why.to_owned() });
    Next::Wait(delay)
}

//! One session after the other: what follows from the end of each, and how long to wait.

use std::time::{Duration, Instant};

use service::{Failure, exit};

use crate::{
    admin::State,
    error::{Error, Policy},
    foreign, pipeline,
    setup::Desk,
    shared::Shared,
    standby,
    start::Memory,
    wait::Wakeups,
};

const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LIMIT: Duration = Duration::from_secs(5);

/// What one session leaves to the next.
struct Course {
    backoff: Duration,
    unwell_since: Option<Instant>,
    memory: Memory,
    /// Whether the slot may still have to be made.
    first: bool,
}

/// Runs sessions until a stop is asked for or an error ends the process.
pub(crate) fn run(shared: &Shared, wakeups: &Wakeups) -> Result<(), Failure> {
    let mut course =
        Course { backoff: BACKOFF_FIRST, unwell_since: None, memory: Memory::default(), first: true };
    while !shared.stopping() {
        let Err(error) = attempt(shared, wakeups, &mut course) else { return Ok(()) };
        shared.metrics.error(error.kind);
        course.memory.learn(&error, &shared.settings).map_err(Error::into_failure)?;
        match error.kind.policy() {
            Policy::Stop(_) => return Err(error.into_failure()),
            Policy::StandBy => {
                (course.backoff, course.unwell_since) = (BACKOFF_FIRST, None);
                course.memory.stand_by();
                standby::wait(shared, wakeups);
            }
            Policy::Retry if shared.stopping() => {
                let what =
                    format!("stopped without a clean end, what was not confirmed is read again: {error}");
                return Err(Failure::new(exit::Kind::GaveUp, what));
            }
            Policy::Retry => {
                shared.metrics.enter(State::Connecting);
                let since = *course.unwell_since.get_or_insert_with(Instant::now);
                if shared.settings.give_up_after.is_some_and(|limit| since.elapsed() >= limit) {
                    let seconds = since.elapsed().as_secs();
                    let what = format!("nothing went on for {seconds} s, the last error: {error}");
                    return Err(Failure::new(exit::Kind::GaveUp, what));
                }
                shared.health.failed(error.message.clone());
                shared.health.not_ready("reconnecting", error.message.clone());
                tracing::warn!(retry_in_ms = course.backoff.as_millis(), "{error}");
                pause(shared, wakeups, course.backoff.mul_f64(0.5 + fastrand::f64() / 2.0));
                course.backoff = (course.backoff * 2).min(BACKOFF_LIMIT);
            }
        }
    }
    Ok(())
}

fn attempt(shared: &Shared, wakeups: &Wakeups, course: &mut Course) -> Result<(), Error> {
    if shared.settings.create_slot && course.first {
        Desk::open(&shared.settings)?.init()?;
    }
    course.first = false;
    let end = pipeline::session(shared, wakeups, &mut course.memory);
    if end.was_well {
        (course.backoff, course.unwell_since) = (BACKOFF_FIRST, None);
    }
    end.result.map_err(|error| foreign::explain(&shared.settings, error, &|| shared.stopping()))
}

/// Waits for the whole time, unless a stop is asked for.
fn pause(shared: &Shared, wakeups: &Wakeups, time: Duration) {
    let until = Instant::now() + time;
    while !shared.stopping() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        wakeups.wait(left);
    }
}

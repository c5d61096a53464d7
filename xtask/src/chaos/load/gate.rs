//! What the writers pass before each thing they do.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Lets the writers go on, rest or stop.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Open,
    Paused,
    Stopped,
}

impl Gate {
    pub(super) fn pause(&self) {
        self.set(State::Paused);
    }

    pub(super) fn resume(&self) {
        self.set(State::Open);
    }

    /// For good.
    pub(super) fn stop(&self) {
        self.set(State::Stopped);
    }

    fn set(&self, state: State) {
        let mut now = self.lock();
        if *now != State::Stopped {
            *now = state;
        }
        self.changed.notify_all();
    }

    /// Returns after that time and when the gate is open: true; or as soon as it is stopped: false.
    pub(super) fn pass(&self, after: Duration) -> bool {
        let until = Instant::now() + after;
        let mut state = self.lock();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            state = match *state {
                State::Stopped => return false,
                State::Open if left.is_zero() => return true,
                State::Paused => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                State::Open => {
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;

    #[test]
    fn whoever_waits_goes_on_when_it_is_opened_and_leaves_when_it_is_stopped() {
        let gate = Gate::default();
        assert!(gate.pass(Duration::ZERO));
        gate.pause();
        let (passed, told) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                passed.send(gate.pass(Duration::ZERO)).unwrap();
                passed.send(gate.pass(Duration::from_secs(3600))).unwrap();
            });
            told.try_recv().unwrap_err();
            gate.resume();
            assert_eq!(told.recv(), Ok(true));
            gate.stop();
            assert_eq!(told.recv(), Ok(false));
        });
        gate.resume();
        assert!(!gate.pass(Duration::ZERO), "for good");
    }
}

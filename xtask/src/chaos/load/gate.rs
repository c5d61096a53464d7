//! What the writers pass before each thing they do.

use std::{
    sync::{Condvar, Mutex, PoisonError},
    time::Duration,
};

/// Lets the writers go on until it is stopped.
#[derive(Debug, Default)]
pub(super) struct Gate {
    is_stopped: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    /// For good.
    pub(super) fn stop(&self) {
        *self.is_stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Returns after that time: true; or as soon as it is stopped: false.
    pub(super) fn pass(&self, after: Duration) -> bool {
        let is_stopped = self.is_stopped.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(is_stopped, after, |is_stopped| !*is_stopped);
        let (is_stopped, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !*is_stopped
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use super::*;

    #[test]
    fn whoever_waits_leaves_when_it_is_stopped_for_good() {
        let gate = Gate::default();
        assert!(gate.pass(Duration::ZERO));
        let (passed, told) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| passed.send(gate.pass(Duration::from_secs(3600))));
            told.try_recv().unwrap_err();
            gate.stop();
            assert_eq!(told.recv(), Ok(false));
        });
        assert!(!gate.pass(Duration::ZERO));
    }
}

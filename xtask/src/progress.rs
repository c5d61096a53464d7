//! One line per step, with its duration; a live line for what takes long.
//!
//! All of it goes to standard error, so that `--json` has standard output to itself.

use std::{
    fs::File,
    io::{IsTerminal, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// How often the live line of a terminal is drawn.
const DRAW_INTERVAL: Duration = Duration::from_millis(200);
/// How often a step that takes long is told where there is no terminal.
const TELL_INTERVAL: Duration = Duration::from_secs(10);

/// Where progress is told. Clones tell to the same place.
#[derive(Debug, Clone)]
pub(crate) struct Progress {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    terminal: bool,
    /// Written as well, if there is one.
    log: Option<File>,
    /// The steps under way, by number.
    steps: Vec<(u64, Live)>,
    next: u64,
    /// A live line stands on the terminal.
    drawn: bool,
}

#[derive(Debug)]
struct Live {
    what: String,
    detail: String,
    since: Instant,
    told: Instant,
}

/// A step under way. Dropped without `done`, it leaves no line.
#[derive(Debug)]
pub(crate) struct Step {
    progress: Progress,
    number: u64,
    since: Instant,
}

impl Progress {
    /// Tells to standard error and, if given, to a log file.
    pub(crate) fn new(log: Option<File>) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let inner = Inner { terminal, log, steps: Vec::new(), next: 0, drawn: false };
        let progress = Self { inner: Arc::new(Mutex::new(inner)) };
        let watched = Arc::downgrade(&progress.inner);
        // Lives as long as there is anybody to tell; it owns nothing.
        thread::spawn(move || {
            while let Some(inner) = watched.upgrade() {
                inner.lock().unwrap_or_else(PoisonError::into_inner).tick();
                drop(inner);
                thread::sleep(DRAW_INTERVAL);
            }
        });
        progress
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A line of its own.
    pub(crate) fn line(&self, text: &str) {
        self.lock().line(text);
    }

    /// Begins a step, named as what is being done ("starting Kafka").
    pub(crate) fn step(&self, what: impl Into<String>) -> Step {
        let now = Instant::now();
        let mut inner = self.lock();
        let number = inner.next;
        inner.next += 1;
        let live = Live { what: what.into(), detail: String::new(), since: now, told: now };
        inner.steps.push((number, live));
        drop(inner);
        Step { progress: self.clone(), number, since: now }
    }
}

impl Step {
    /// More about a step under way ("12 files"), for the live line.
    pub(crate) fn detail(&self, detail: impl Into<String>) {
        let mut inner = self.progress.lock();
        if let Some((_, live)) = inner.steps.iter_mut().find(|(number, _)| *number == self.number) {
            live.detail = detail.into();
        }
    }

    /// The step is over; `result` says what there is now ("Kafka ready on …").
    pub(crate) fn done(self, result: &str) {
        let line = format!("  {result} ({:.1} s)", self.since.elapsed().as_secs_f64());
        let mut inner = self.progress.lock();
        inner.steps.retain(|(number, _)| *number != self.number);
        inner.line(&line);
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        let mut inner = self.progress.lock();
        inner.steps.retain(|(number, _)| *number != self.number);
        inner.clear();
    }
}

impl Inner {
    fn line(&mut self, text: &str) {
        self.clear();
        // Nobody may be reading any more (`up --detach` has returned); the log has it.
        let _ = writeln!(std::io::stderr(), "{text}");
        if let Some(log) = &mut self.log {
            let _ = writeln!(log, "{text}");
        }
    }

    fn clear(&mut self) {
        if self.drawn {
            let _ = write!(std::io::stderr(), "\r\x1b[2K");
            self.drawn = false;
        }
    }

    fn tick(&mut self) {
        let now = Instant::now();
        if self.terminal {
            let live = self.steps.iter().map(|(_, live)| live.text(now)).collect::<Vec<_>>().join(", ");
            self.clear();
            if !live.is_empty() {
                let _ = write!(std::io::stderr(), "  … {}", live.chars().take(110).collect::<String>());
                let _ = std::io::stderr().flush();
                self.drawn = true;
            }
            return;
        }
        let late = self.steps.iter_mut().filter(|(_, live)| now - live.told >= TELL_INTERVAL);
        let lines: Vec<String> = late
            .map(|(_, live)| {
                live.told = now;
                format!("  … {}", live.text(now))
            })
            .collect();
        for line in lines {
            self.line(&line);
        }
    }
}

impl Live {
    fn text(&self, now: Instant) -> String {
        let detail = if self.detail.is_empty() { String::new() } else { format!(", {}", self.detail) };
        format!("{}{detail} ({} s)", self.what, (now - self.since).as_secs())
    }
}

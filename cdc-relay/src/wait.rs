//! Waiting: for the socket, a wake-up from another thread, or a deadline, whichever is first.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc,
        mpsc::{SyncSender, TrySendError},
    },
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Wakes the thread that waits on its [`Wakeups`]. Waking one that is awake costs its next wait.
#[derive(Debug, Clone)]
pub(crate) struct Waker(Arc<UnixStream>);

impl Waker {
    pub(crate) fn wake(&self) {
        // A full pipe is a wake-up that is pending already.
        let _ = (&*self.0).write(&[1]);
    }
}

/// Sends to the thread that a [`Waker`] wakes.
#[derive(Debug)]
pub(crate) struct WakingSender<T> {
    pub(crate) told: SyncSender<T>,
    pub(crate) waker: Waker,
}

impl<T> WakingSender<T> {
    /// Sends, waiting for room if there is none. False where nobody receives any more.
    pub(crate) fn send(&self, news: T) -> bool {
        // The receiver takes one only when it is awake, so it is woken before we may have to wait, too.
        let is_sent = match self.told.try_send(news) {
            Err(TrySendError::Full(news)) => {
                self.waker.wake();
                self.told.send(news).is_ok()
            }
            sent => sent.is_ok(),
        };
        self.waker.wake();
        is_sent
    }
}

/// The waiting side of a [`Waker`].
#[derive(Debug)]
pub(crate) struct Wakeups(UnixStream);

/// A waker and who it wakes.
pub(crate) fn pair() -> io::Result<(Waker, Wakeups)> {
    let (there, here) = UnixStream::pair()?;
    there.set_nonblocking(true)?;
    here.set_nonblocking(true)?;
    Ok((Waker(Arc::new(there)), Wakeups(here)))
}

impl Wakeups {
    /// Waits for a wake-up, for `timeout` at most.
    pub(crate) fn wait(&self, timeout: Duration) {
        wait_on(&mut [PollFd::new(&self.0, PollFlags::IN)], timeout);
        self.clear();
    }

    /// Waits for a wake-up or for the socket to be readable (or writable, where that is wanted), for `timeout`
    /// at most. Neither is told apart: whoever is woken looks at everything.
    pub(crate) fn wait_with(&self, socket: BorrowedFd<'_>, read: bool, write: bool, timeout: Duration) {
        if !read && !write {
            // The kernel tells a hang-up even to those who wait for nothing, and would not let us sleep.
            return self.wait(timeout);
        }
        let mut interest = PollFlags::empty();
        interest.set(PollFlags::IN, read);
        interest.set(PollFlags::OUT, write);
        wait_on(
            &mut [PollFd::new(&self.0, PollFlags::IN), PollFd::from_borrowed_fd(socket, interest)],
            timeout,
        );
        self.clear();
    }

    fn clear(&self) {
        let mut sink = [0; 256];
        while matches!((&self.0).read(&mut sink), Ok(n) if n == sink.len()) {}
    }
}

/// Waits for the socket to be readable (or writable, where that is wanted), for `timeout` at most.
pub(crate) fn for_socket(socket: BorrowedFd<'_>, write: bool, timeout: Duration) {
    let interest = if write { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
    wait_on(&mut [PollFd::new(&socket.as_fd(), interest)], timeout);
}

fn wait_on(fds: &mut [PollFd<'_>], timeout: Duration) {
    let timeout = Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    };
    // An interrupted wait is a short one; any other failure shows itself in the read that follows.
    let _ = poll(fds, Some(&timeout));
}

//! Where the admin API leaves a redrive for the pipeline: one at a time, and only while there is a session.

use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, PoisonError},
};

use relay_core::redrive::{Options, Place};
use tokio::sync::oneshot;

use super::api::{Failed, Report};

/// What is asked for.
#[derive(Debug)]
pub(crate) struct Order {
    /// Whose letters, `SYSTEM/SLOT`.
    pub(crate) source: String,
    pub(crate) letters: BTreeSet<Place>,
    /// Instead of each letter's own.
    pub(crate) topic: Option<String>,
    pub(crate) options: Options,
}

/// What comes of it.
pub(crate) type Answer = Result<Report, Failed>;

/// An order, and who waits for it.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) order: Order,
    pub(crate) reply: oneshot::Sender<Answer>,
}

/// Why an order is not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NotNow {
    /// There is no session.
    Closed,
    /// Another is under way.
    Busy,
    /// The letters are another relay's; whose they would have to be.
    NotOurs(String),
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Closed,
    /// To the letters of this source.
    Open(String),
    Waiting(Job),
    UnderWay,
}

/// Shared by the pipeline and the admin API.
#[derive(Debug, Default)]
pub(crate) struct Desk(Mutex<State>);

impl Desk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Orders for letters of this source, `SYSTEM/SLOT`, are taken from now on, and none is under way.
    pub(crate) fn open(&self, source: String) {
        *self.state() = State::Open(source);
    }

    /// Orders are not taken any more; one that waits is dropped, which its owner hears.
    pub(crate) fn close(&self) {
        *self.state() = State::Closed;
    }

    /// Leaves an order, whose source is filled in where it names none.
    pub(crate) fn leave(&self, mut order: Order) -> Result<oneshot::Receiver<Answer>, NotNow> {
        let mut state = self.state();
        match &*state {
            State::Closed => Err(NotNow::Closed),
            State::Waiting(_) | State::UnderWay => Err(NotNow::Busy),
            State::Open(source) if !order.source.is_empty() && order.source != *source => {
                Err(NotNow::NotOurs(source.clone()))
            }
            State::Open(source) => {
                order.source.clone_from(source);
                let (reply, answer) = oneshot::channel();
                *state = State::Waiting(Job { order, reply });
                Ok(answer)
            }
        }
    }

    /// The order that waits; it is under way until the desk is [opened](Self::open) again.
    pub(crate) fn take(&self) -> Option<Job> {
        let mut state = self.state();
        if !matches!(*state, State::Waiting(_)) {
            return None;
        }
        match std::mem::replace(&mut *state, State::UnderWay) {
            State::Waiting(job) => Some(job),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order() -> Order {
        Order { source: String::new(), letters: BTreeSet::new(), topic: None, options: Options::default() }
    }

    #[test]
    fn one_order_at_a_time_and_none_without_a_session() {
        let desk = Desk::default();
        assert_eq!(desk.leave(order()).err(), Some(NotNow::Closed));
        desk.open("1/a".into());
        let mut first = desk.leave(order()).unwrap();
        assert_eq!(desk.leave(order()).err(), Some(NotNow::Busy));
        let job = desk.take().unwrap();
        assert_eq!(job.order.source, "1/a");
        assert!(desk.take().is_none());
        assert_eq!(desk.leave(order()).err(), Some(NotNow::Busy));
        drop(job);
        assert!(matches!(first.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
        desk.open("1/a".into());
        let foreign = Order { source: "1/b".into(), ..order() };
        assert_eq!(desk.leave(foreign).err(), Some(NotNow::NotOurs("1/a".into())));
        let mut second = desk.leave(order()).unwrap();
        desk.close();
        assert!(matches!(second.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
    }
}

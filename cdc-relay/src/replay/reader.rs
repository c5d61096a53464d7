//! Finds what is to be replayed on a thread of its own, a few records ahead of the pipeline.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
    mpsc::{Receiver, TryRecvError, sync_channel},
};

use super::{
    finder::{Found, find},
    selection::Selection,
};
use crate::{
    error::{Error, Kind},
    shared::Shared,
    wait::WakingSender,
};

/// How many batches may wait to be taken.
const WAITING_BATCHES: usize = 1;
/// A batch has at most so many records, or so many bytes and one record.
const BATCH_RECORDS: usize = 256;
const BATCH_BYTES: usize = 1 << 20;

/// What the thread tells.
#[derive(Debug)]
pub(crate) enum News {
    Found(Vec<Found>),
    /// There is no more.
    End,
    Failed(Error),
}

pub(crate) struct Reader {
    stop: Arc<AtomicBool>,
    news: Receiver<News>,
}

impl Reader {
    pub(crate) fn start(shared: &Shared, selection: Selection) -> Result<Self, Error> {
        let stop = Arc::new(AtomicBool::new(false));
        let (told, news) = sync_channel(WAITING_BATCHES);
        let (settings, server, stopped) = (Arc::clone(&shared.settings), shared.server(), Arc::clone(&stop));
        let sender = WakingSender { told, waker: shared.waker.clone() };
        let work = move || {
            let tell = |news| if sender.send(news) { Ok(()) } else { Err(nobody()) };
            let patience = || if stopped.load(Ordering::Relaxed) { Err(nobody()) } else { Ok(()) };
            let (mut batch, mut bytes) = (Vec::new(), 0);
            let found = find(&settings, &selection, server, &patience, &mut |found| {
                bytes += match &found {
                    Found::Record(hit) => hit.record.record().cost_bytes(),
                    Found::Until(_) | Found::LookedAt(_) | Found::NoRow(_) => 0,
                };
                // How far the log has to be confirmed is told at once.
                let is_full =
                    batch.len() >= BATCH_RECORDS || bytes >= BATCH_BYTES || matches!(found, Found::Until(_));
                batch.push(found);
                if is_full {
                    bytes = 0;
                    return tell(News::Found(std::mem::take(&mut batch)));
                }
                Ok(())
            });
            let told = found.and_then(|()| {
                tell(News::Found(batch))?;
                tell(News::End)
            });
            if let Err(e) = told {
                // Whoever is not interested any more has dropped us.
                sender.send(News::Failed(e));
            }
        };
        let thread = std::thread::Builder::new().name("replay".into()).spawn(work);
        thread.map_err(|e| Error::new(Kind::Internal, format!("cannot start a thread: {e}")))?;
        Ok(Self { stop, news })
    }

    /// What it tells next, if there is anything.
    pub(crate) fn news(&self) -> Option<News> {
        match self.news.try_recv() {
            Ok(news) => Some(news),
            Err(TryRecvError::Empty) => None,
            // It has told its end, or why it ends, unless it panicked.
            Err(TryRecvError::Disconnected) => {
                Some(News::Failed(Error::new(Kind::Internal, "the thread that finds records panicked")))
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // The thread sees it soon, and nobody waits for that: the stream must not.
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn nobody() -> Error {
    Error::new(Kind::GaveUp, "nobody waits for the replay any more")
}

//! Reads the dead-letter topic for a redrive, on a thread of its own: first all of it while the relay streams, then, once
//! the relay is at rest, what has come since, and at last the letters that are wanted, one by one.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
    mpsc::{Receiver, Sender, channel, sync_channel},
};

use rdkafka::message::OwnedMessage;
use relay_core::{
    Lsn,
    parking::Key,
    redrive::{Index, Options, Place, Plan},
};

use super::{
    api::Order,
    archive::too_many,
    letter::{self, Found},
};
use crate::{
    config::Settings,
    error::{Error, Kind},
    kafka::{History, Patience},
    shared::Shared,
    wait::WakingSender,
};

/// How many letters may wait to be published. Each may be as large as the topic allows.
const WAITING_LETTERS: usize = 4;

/// What the thread tells.
#[derive(Debug)]
pub(crate) enum News {
    /// All of the topic was read, up to its end of then.
    Read,
    /// What to do.
    Planned(Plan),
    /// The next letter of the plan; None where it is not there any more.
    Letter(Option<Box<OwnedMessage>>),
    /// There are no more.
    End,
    Failed(Error),
}

pub(crate) struct Reader {
    stop: Arc<AtomicBool>,
    news: Receiver<News>,
    at_rest: Sender<(Vec<Key>, Lsn)>,
    /// Records that were read so far.
    seen: Arc<AtomicU64>,
}

impl Reader {
    /// `parked`: the aggregates that are parked at the moment.
    pub(crate) fn start(shared: &Shared, order: &Order, parked: Vec<Key>) -> Result<Self, Error> {
        let stop = Arc::new(AtomicBool::new(false));
        let (told, news) = sync_channel(WAITING_LETTERS);
        let (at_rest, rested) = channel();
        let (settings, waker) = (Arc::clone(&shared.settings), shared.waker.clone());
        let index = Index::new(order.letters.clone(), parked);
        let (source, options, stopped) = (order.source.clone(), order.options, Arc::clone(&stop));
        let seen = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&seen);
        let work = move || {
            let tell = WakingSender { told, waker: waker.clone() };
            let patience = || {
                if stopped.load(Ordering::Relaxed) { Err(nobody()) } else { Ok(()) }
            };
            let topic = Topic { settings: &settings, source, patience: &patience, seen: &counted };
            if let Err(e) = topic.work(index, options, &rested, &tell) {
                // Whoever is not interested any more has dropped us.
                tell.send(News::Failed(e));
            }
        };
        let thread = std::thread::Builder::new().name("redrive".into()).spawn(work);
        thread.map_err(|e| Error::new(Kind::Internal, format!("cannot start a thread: {e}")))?;
        Ok(Self { stop, news, at_rest, seen })
    }

    /// What it tells next, if there is anything.
    pub(crate) fn news(&self) -> Option<News> {
        self.news.try_recv().ok()
    }

    /// How many records it has read: while they become more, it is well.
    pub(crate) fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }

    /// Nothing more comes into the topic: the rest can be read, and the plan be made.
    pub(crate) fn at_rest(&self, parked: Vec<Key>, settled_to: Lsn) {
        // A thread that is gone has told why.
        let _ = self.at_rest.send((parked, settled_to));
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // The thread sees it soon. Nobody waits for that: closing a consumer takes its time, and the stream must not.
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn nobody() -> Error {
    Error::new(Kind::GaveUp, "nobody waits for the redrive any more")
}

/// The dead-letter topic of one relay.
struct Topic<'a> {
    settings: &'a Settings,
    source: String,
    patience: Patience<'a>,
    seen: &'a AtomicU64,
}

impl Topic<'_> {
    fn work(
        &self,
        mut index: Index,
        options: Options,
        rested: &Receiver<(Vec<Key>, Lsn)>,
        tell: &WakingSender<News>,
    ) -> Result<(), Error> {
        let topic = &self.settings.dead_letter_topic;
        let Some(mut history) = History::open(&self.settings.kafka, topic, self.patience)? else {
            return Err(Error::new(Kind::Refused, format!("topic {topic} does not exist")));
        };
        self.read_on(&mut history, &mut index)?;
        let tell = |news| if tell.send(news) { Ok(()) } else { Err(nobody()) };
        tell(News::Read)?;
        let (parked, settled_to) = rested.recv().map_err(|_| nobody())?;
        index.at_rest(parked, settled_to);
        self.read_on(&mut history, &mut index)?;
        let plan = index.plan(options);
        let places = if options.discard { Vec::new() } else { plan.places() };
        tell(News::Planned(plan))?;
        for Place { partition, offset } in places {
            let letter = history.fetch(partition, offset, self.patience)?;
            tell(News::Letter(letter.map(Box::new)))?;
        }
        tell(News::End)
    }

    fn read_on(&self, history: &mut History, index: &mut Index) -> Result<(), Error> {
        history.read_on(self.patience, |message| {
            self.seen.fetch_add(1, Ordering::Relaxed);
            match letter::read(message) {
                Some(Found::Letter(about)) if about.source == self.source => {
                    index.letter(about.letter, &about.for_plan(self.settings)).map_err(too_many)?;
                }
                Some(Found::Marker { source, of, state }) if source == self.source => index.mark(of, state),
                _ => {}
            }
            Ok(())
        })
    }
}

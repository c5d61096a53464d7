//! The dead-letter topic as a command looks at it, without any relay.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use rdkafka::{Message as _, message::OwnedMessage};
use relay_core::redrive::{Full, INDEX_LIMIT, Index, Options, Place, Plan, State};
use serde::Serialize;

use super::letter::{self, About, Found};
use crate::{
    config::Settings,
    error::{Error, Kind},
    kafka::History,
    ledger,
    scribe::no_answer,
};

/// How long Kafka may have nothing to say.
const KAFKA_TIMEOUT: Duration = Duration::from_secs(30);
/// The most letters that are held in memory.
const HELD_LIMIT: usize = 500_000;

/// A letter, and what became of it.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Entry {
    #[serde(flatten)]
    pub(crate) about: About,
    /// What is there of its value; None is a tombstone.
    pub(crate) value_bytes: Option<usize>,
    #[serde(serialize_with = "state_name")]
    pub(crate) state: State,
    /// How often it was redriven.
    pub(crate) redriven: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn state_name<S: serde::Serializer>(state: &State, out: S) -> Result<S::Ok, S::Error> {
    out.serialize_str(state.name())
}

/// The topic, and how long it may be silent.
pub(crate) struct Archive<'a> {
    settings: &'a Settings,
    heard: Cell<Instant>,
    history: History,
}

impl<'a> Archive<'a> {
    /// # Errors
    /// There is no such topic, or Kafka does not answer.
    pub(crate) fn open(settings: &'a Settings) -> Result<Self, Error> {
        let since = Instant::now();
        let patience = || if since.elapsed() < KAFKA_TIMEOUT { Ok(()) } else { Err(no_answer(settings)) };
        let topic = &settings.dead_letter_topic;
        let Some(history) = History::open(&settings.kafka, topic, &patience)? else {
            let what = format!("topic {topic} does not exist");
            return Err(Error::new(Kind::Refused, what).hint(
                "poison.dead_letter_topic names it; `cdc-relay init` creates it where a policy in [poison] needs it",
            ));
        };
        Ok(Self { settings, heard: Cell::new(since), history })
    }

    /// Every letter that is wanted, in the order of the topic.
    ///
    /// # Errors
    /// There are more than fit in memory.
    pub(crate) fn entries(
        mut self,
        wanted: impl Fn(&About) -> bool,
    ) -> Result<BTreeMap<Place, Entry>, Error> {
        let mut entries: BTreeMap<Place, Entry> = BTreeMap::new();
        self.read(|found, value_bytes| {
            match found {
                Found::Letter(about) if wanted(&about) => {
                    if entries.len() >= HELD_LIMIT {
                        let what = format!("there are more than {HELD_LIMIT} such letters");
                        return Err(Error::new(Kind::Refused, what)
                            .hint("narrow it: --since, --reason, --type, --aggregate"));
                    }
                    let entry = Entry { value_bytes, state: State::Open, redriven: 0, about: *about };
                    entries.insert(entry.about.letter, entry);
                }
                Found::Letter(_) => {}
                Found::Marker { source, of, state } => {
                    if let Some(entry) = entries.get_mut(&of).filter(|e| e.about.source == source) {
                        entry.state = state;
                        entry.redriven += u32::from(state == State::Redriven);
                    }
                }
            }
            Ok(())
        })?;
        Ok(entries)
    }

    /// One record; None where it is not there.
    pub(crate) fn fetch(mut self, at: Place) -> Result<Option<OwnedMessage>, Error> {
        let (settings, since) = (self.settings, Instant::now());
        let patience = || if since.elapsed() < KAFKA_TIMEOUT { Ok(()) } else { Err(no_answer(settings)) };
        self.history.fetch(at.partition, at.offset, &patience)
    }

    /// What a redrive would do at the moment.
    pub(crate) fn plan(
        mut self,
        source: &str,
        wanted: BTreeSet<Place>,
        options: Options,
    ) -> Result<Plan, Error> {
        let settings = self.settings;
        let since = Instant::now();
        let patience = || if since.elapsed() < KAFKA_TIMEOUT { Ok(()) } else { Err(no_answer(settings)) };
        let parked = ledger::read_parked(settings, source, &patience)?;
        let mut index = Index::new(wanted, parked.into_keys());
        self.read(|found, _| {
            match found {
                Found::Letter(about) if about.source == source => {
                    index.letter(about.letter, &about.for_plan(settings)).map_err(too_many)?;
                }
                Found::Marker { source: whose, of, state } if whose == source => index.mark(of, state),
                _ => {}
            }
            Ok(())
        })?;
        Ok(index.plan(options))
    }

    fn read(&mut self, mut take: impl FnMut(Found, Option<usize>) -> Result<(), Error>) -> Result<(), Error> {
        let (settings, heard) = (self.settings, &self.heard);
        let patience =
            || if heard.get().elapsed() < KAFKA_TIMEOUT { Ok(()) } else { Err(no_answer(settings)) };
        self.history.read_on(&patience, |message| {
            heard.set(Instant::now());
            letter::read(message).map_or(Ok(()), |found| take(found, message.payload().map(<[u8]>::len)))
        })
    }
}

/// More letters have to be looked at than may be held.
pub(super) fn too_many(_: Full) -> Error {
    let what = format!("more than {INDEX_LIMIT} letters of parked aggregates are open, which is the limit");
    Error::new(Kind::Refused, what).hint(
        "redrive and discard cannot look at so many. Save them elsewhere and delete the oldest from the topic \
         (kafka-delete-records.sh)",
    )
}

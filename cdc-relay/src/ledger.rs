//! What the relay writes down about itself in Kafka: its checkpoints, and the aggregates that are parked. Both in
//! compacted topics, each entry under a key that begins with the cluster's system identifier and the slot.

use std::{
    collections::{BTreeMap, btree_map::Entry as Slot},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, channel},
    },
    thread::JoinHandle,
};

use chrono::{SecondsFormat, Utc};
use rdkafka::Message as _;
use relay_core::{Lsn, checkpoint::Mark, parking::Key, record::Identity};
use serde::{Deserialize, Serialize};

use crate::{
    config::Settings,
    error::{Error, Kind},
    kafka::{Entry, History, Patience},
    shared::{Shared, instance},
};

/// Everything up to `lsn` is settled in Kafka.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Checkpoint {
    /// As `X/Y`: the end LSN of a transaction, or the end of the log at a time when nothing was in flight.
    #[serde(with = "lsn_text")]
    pub(crate) lsn: Lsn,
    /// How many changes behind `lsn`, of the transaction `last`, are settled as well: 0 with at-least-once delivery.
    pub(crate) seq: u64,
    /// The last transaction that is settled, as a whole or in part, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) last: Option<Last>,
    /// Counts the times that a gap was accepted: a checkpoint of a later generation supersedes those before it, whatever
    /// their LSNs.
    #[serde(default)]
    pub(crate) generation: u64,
    /// The timeline that `lsn` belongs to.
    pub(crate) timeline: u32,
    /// Who wrote it: host and process id.
    pub(crate) instance: String,
    pub(crate) publication: String,
    /// Whether the stream had what `pg_logical_emit_message` wrote, too: it counts in the ordinals.
    #[serde(default)]
    pub(crate) messages: bool,
    /// Not a position yet: what was in the table before the slot is being published, and has to be published again from
    /// its beginning if that does not end.
    #[serde(default, skip_serializing_if = "is_false")]
    pub(crate) backfilling: bool,
    /// When, RFC 3339.
    pub(crate) at: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_false(value: &bool) -> bool {
    !value
}

/// A transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Last {
    #[serde(with = "lsn_text")]
    commit_lsn: Lsn,
    /// In microseconds since 2000-01-01.
    committed_at_us: i64,
}

impl Checkpoint {
    /// The position that it tells.
    pub(crate) fn position(&self) -> relay_core::Checkpoint {
        let Self { lsn, seq, last, .. } = *self;
        let part = last.filter(|_| seq > 0).map(|last| Identity { commit_lsn: last.commit_lsn, seq });
        let mark = |Last { commit_lsn, committed_at_us }| Mark { commit_lsn, committed_at_us };
        relay_core::Checkpoint { lsn, part, last: last.map(mark) }
    }
}

/// A parked aggregate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Parked {
    aggregate_type: String,
    aggregate_id: String,
    #[serde(with = "lsn_text")]
    lsn: Lsn,
    seq: u64,
    at: String,
}

/// Whose entries they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Owner {
    /// The cluster's system identifier.
    pub(crate) system: String,
    pub(crate) slot: String,
}

impl Owner {
    /// Its entries' keys begin with this, and its dead letters carry it as `dlq.source`.
    pub(crate) fn key(&self) -> String {
        format!("{}/{}", self.system, self.slot)
    }

    /// The `transactional.id` of the relay that has the slot.
    pub(crate) fn transactional_id(&self) -> String {
        format!("cdc-relay-{}-{}", self.system, self.slot)
    }
}

/// What was written down.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Ledger {
    pub(crate) checkpoint: Option<Checkpoint>,
    /// Of slots of the same name in other clusters: the system identifier, and the checkpoint.
    pub(crate) others: Vec<(String, Checkpoint)>,
    pub(crate) parked: BTreeMap<Key, Identity>,
}

impl Ledger {
    /// How often a gap was accepted so far.
    pub(crate) fn generation(&self) -> u64 {
        self.checkpoint.as_ref().map_or(0, |c| c.generation)
    }

    /// Reads it, waiting for Kafka as long as `patience` is Ok.
    pub(crate) fn read(settings: &Settings, owner: &Owner, patience: Patience<'_>) -> Result<Self, Error> {
        let suffix = format!("/{}", owner.slot);
        let topic = &settings.kafka.checkpoint_topic;
        let wanted = |key: &str| key.ends_with(&suffix);
        let entries = read_entries(settings, topic, patience, wanted, supersedes)?;
        let mut checkpoints = entries.unwrap_or_default();
        let checkpoint = checkpoints.remove(&owner.key()).map(|value| parse(topic, &value)).transpose()?;
        let others = checkpoints.iter().filter_map(|(key, value)| {
            // Another's entry that cannot be read is not ours to mend.
            Some((key.strip_suffix(&suffix)?.to_owned(), serde_json::from_slice(value).ok()?))
        });
        let others = others.collect();
        Ok(Self { checkpoint, others, parked: read_parked(settings, &owner.key(), patience)? })
    }
}

/// The parked aggregates of an owner, by its [key](Owner::key).
///
/// # Errors
/// Halted where their topic does not exist and a policy needs it.
pub(crate) fn read_parked(
    settings: &Settings,
    owner: &str,
    patience: Patience<'_>,
) -> Result<BTreeMap<Key, Identity>, Error> {
    let prefix = format!("{owner}/");
    let topic = &settings.parked_keys_topic;
    let wanted = |key: &str| key.starts_with(&prefix);
    let entries = match read_entries(settings, topic, patience, wanted, |_, _| true) {
        // Without a policy that parks there may be no such topic, or none for us.
        Err(e) if !settings.may_park() && e.kind == Kind::Refused => {
            tracing::debug!("parked keys are not read: {e}");
            BTreeMap::new()
        }
        Ok(None) if !settings.may_park() => BTreeMap::new(),
        Ok(None) => {
            let what = format!("topic {topic} does not exist, and a policy in [poison] is park-key");
            return Err(Error::new(Kind::Halted, what).hint("`cdc-relay init` creates it"));
        }
        Ok(Some(entries)) => entries,
        Err(e) => return Err(e),
    };
    let parse = |value: &Vec<u8>| {
        let Parked { aggregate_type, aggregate_id, lsn, seq, .. } = parse(topic, value)?;
        Ok((Key { aggregate_type, aggregate_id }, Identity { commit_lsn: lsn, seq }))
    };
    entries.values().map(parse).collect()
}

/// Whether the checkpoint that comes later in the topic is the later one. A relay that lost its slot while it was
/// frozen may still write one when it wakes, after its successor's.
fn supersedes(earlier: &[u8], later: &[u8]) -> bool {
    let order =
        |value| serde_json::from_slice::<Checkpoint>(value).ok().map(|c| (c.generation, c.lsn, c.seq));
    match (order(earlier), order(later)) {
        (Some(earlier), Some(later)) => later >= earlier,
        // One that cannot be read must not be hidden.
        (earlier, _) => earlier.is_some(),
    }
}

/// The value of each key that `wanted` wants: the last, of those that supersede the one before. None when there is no
/// such topic.
fn read_entries(
    settings: &Settings,
    topic: &str,
    patience: Patience<'_>,
    wanted: impl Fn(&str) -> bool,
    supersedes: impl Fn(&[u8], &[u8]) -> bool,
) -> Result<Option<BTreeMap<String, Vec<u8>>>, Error> {
    let mut entries: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let Some(mut history) = History::open(&settings.kafka, topic, patience)? else { return Ok(None) };
    history.read_on(patience, |message| {
        let key = message.key().and_then(|key| std::str::from_utf8(key).ok());
        let Some(key) = key.filter(|key| wanted(key)) else { return Ok(()) };
        match message.payload() {
            None => drop(entries.remove(key)),
            Some(value) => match entries.entry(key.to_owned()) {
                Slot::Vacant(free) => drop(free.insert(value.to_vec())),
                Slot::Occupied(mut taken) if supersedes(taken.get(), value) => {
                    taken.insert(value.to_vec());
                }
                Slot::Occupied(_) => {}
            },
        }
        Ok(())
    })?;
    Ok(Some(entries))
}

fn parse<T: serde::de::DeserializeOwned>(topic: &str, value: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(value).map_err(|e| {
        let what = format!("an entry of ours in topic {topic} cannot be read: {e}");
        Error::new(Kind::Halted, what).hint("somebody else writes to this topic, or a newer relay did")
    })
}

/// Reads the ledger on a thread of its own, so that the slot can be kept meanwhile.
#[derive(Debug)]
pub(crate) struct Reader {
    stop: Arc<AtomicBool>,
    result: Receiver<Result<Ledger, Error>>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    pub(crate) fn start(shared: &Shared, owner: Owner) -> Result<Self, Error> {
        let stop = Arc::new(AtomicBool::new(false));
        let (told, result) = channel();
        let (stopped, settings, waker) =
            (Arc::clone(&stop), Arc::clone(&shared.settings), shared.waker.clone());
        let read = move || {
            // Whoever is not interested any more has dropped us.
            let patience = || {
                if stopped.load(Ordering::Relaxed) {
                    Err(Error::new(Kind::GaveUp, "nobody waits for the ledger any more"))
                } else {
                    Ok(())
                }
            };
            let _ = told.send(Ledger::read(&settings, &owner, &patience));
            waker.wake();
        };
        let thread = std::thread::Builder::new().name("ledger".into()).spawn(read);
        let thread = thread.map_err(|e| Error::new(Kind::Internal, format!("cannot start a thread: {e}")))?;
        Ok(Self { stop, result, thread: Some(thread) })
    }

    /// What was read, once it was.
    pub(crate) fn take(&self) -> Option<Result<Ledger, Error>> {
        self.result.try_recv().ok()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It cannot panic, and if it did there would be nothing to do about it here.
            let _ = thread.join();
        }
    }
}

/// Writes entries of one owner.
#[derive(Debug, Clone)]
pub(crate) struct Writer {
    pub(crate) owner: Owner,
    pub(crate) timeline: u32,
    /// Of the checkpoints that it writes.
    pub(crate) generation: u64,
    pub(crate) backfilling: bool,
    instance: String,
}

impl Writer {
    pub(crate) fn new(owner: Owner, timeline: u32) -> Self {
        Self { owner, timeline, generation: 0, backfilling: false, instance: instance() }
    }

    pub(crate) fn checkpoint(&self, settings: &Settings, position: relay_core::Checkpoint) -> Entry {
        let relay_core::Checkpoint { lsn, part, last } = position;
        let checkpoint = Checkpoint {
            lsn,
            seq: part.map_or(0, |part| part.seq),
            last: last.map(|Mark { commit_lsn, committed_at_us }| Last { commit_lsn, committed_at_us }),
            generation: self.generation,
            timeline: self.timeline,
            instance: self.instance.clone(),
            publication: settings.publication.clone(),
            messages: settings.source.messages.is_some(),
            backfilling: self.backfilling,
            at: now(),
        };
        entry(&settings.kafka.checkpoint_topic, self.owner.key(), Some(&checkpoint))
    }

    pub(crate) fn parked(&self, settings: &Settings, key: &Key, first: Option<Identity>) -> Entry {
        let Key { aggregate_type, aggregate_id } = key;
        let name = format!("{}/{aggregate_type}/{aggregate_id}", self.owner.key());
        let parked = first.map(|first| Parked {
            aggregate_type: aggregate_type.clone(),
            aggregate_id: aggregate_id.clone(),
            lsn: first.commit_lsn,
            seq: first.seq,
            at: now(),
        });
        entry(&settings.parked_keys_topic, name, parked.as_ref())
    }
}

fn now() -> String {
    Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true)
}

fn entry(topic: &str, key: String, value: Option<&impl Serialize>) -> Entry {
    // These structs have text and numbers only, which cannot fail.
    let value = value.map(|v| serde_json::to_vec(v).unwrap_or_default());
    Entry { topic: topic.to_owned(), key, value }
}

mod lsn_text {
    use relay_core::Lsn;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
    pub(super) fn serialize<S: Serializer>(lsn: &Lsn, out: S) -> Result<S::Ok, S::Error> {
        out.collect_str(lsn)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Lsn, D::Error> {
        String::deserialize(input)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_checkpoint_of_a_relay_that_lost_its_slot_supersedes_nothing() {
        let checkpoint = |generation, lsn: &str| {
            format!(
                r#"{{"lsn":"{lsn}","seq":0,"generation":{generation},"timeline":1,"instance":"i","publication":"p","at":"t"}}"#
            )
        };
        let supersedes = |earlier: &str, later: &str| supersedes(earlier.as_bytes(), later.as_bytes());
        assert!(supersedes(&checkpoint(0, "0/5"), &checkpoint(0, "0/6")));
        assert!(!supersedes(&checkpoint(0, "0/6"), &checkpoint(0, "0/5")));
        // A gap was accepted, for instance because the server was restored.
        assert!(supersedes(&checkpoint(0, "0/6"), &checkpoint(1, "0/2")));
        assert!(!supersedes(&checkpoint(1, "0/2"), &checkpoint(0, "0/7")));
        assert!(
            supersedes(&checkpoint(0, "0/6"), "damaged") && !supersedes("damaged", &checkpoint(0, "0/6"))
        );
    }
}

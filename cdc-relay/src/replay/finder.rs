//! Finds what a replay selects, in order: rows in one snapshot of the outboxes, or records by a look at the topics.

use std::{
    collections::{HashMap, HashSet, hash_map::DefaultHasher},
    hash::{Hash as _, Hasher as _},
    time::Duration,
};

use chrono::{SecondsFormat, Utc};
use rdkafka::{
    Message as _,
    message::{BorrowedMessage, Headers as _},
};
use relay_core::{Lsn, parking::Key, poison::Poison, record::Record};

use super::{
    REPLAYED,
    selection::{Records, Rows, Selection},
};
use crate::{
    clock,
    config::Settings,
    error::{Error, Kind},
    kafka::{History, Patience, Tails},
    owned_record::OwnedRecord,
    replication::{connection::Connection, handshake::Purpose, place::Place},
    rows,
    snapshot::Snapshot,
};

/// How long the server may take for the next row: it may have to sort them all first.
const READ_TIMEOUT: Duration = Duration::from_hours(1);
/// The most records of one partition: their places are held in memory.
const PARTITION_LIMIT: usize = 500_000;
/// After so many records of a topic it is told that they were looked at.
const LOOKED_AT_LEAST: u64 = 1000;

/// What is found, in this order: once where the log has to be confirmed, then records, then what there is not.
#[derive(Debug)]
pub(crate) enum Found {
    /// Everything that comes was committed before it; nothing of it may be published before the slot has confirmed that.
    Until(Lsn),
    Record(Box<Hit>),
    /// So many records of a topic were looked at since this was told last: it goes on.
    LookedAt(u64),
    /// No outbox has a row with this id.
    NoRow(String),
}

/// A record to be published again.
#[derive(Debug)]
pub(crate) struct Hit {
    pub(crate) record: OwnedRecord,
    /// Of a row, where it can be told.
    pub(crate) aggregate: Option<Key>,
    /// Why the row makes no record.
    pub(crate) poison: Option<Poison>,
}

/// Who takes what is found.
pub(crate) type Take<'a> = &'a mut dyn FnMut(Found) -> Result<(), Error>;

/// Hands over all that is selected. `server` is the one to ask for rows; None: any that will do.
///
/// # Errors
/// Postgres or Kafka is away or refuses, a column or a topic is not there; what `patience` and `take` say.
pub(crate) fn find(
    settings: &Settings,
    selection: &Selection,
    server: Option<Place>,
    patience: Patience<'_>,
    take: Take<'_>,
) -> Result<(), Error> {
    match selection {
        Selection::Rows(rows) => find_rows(settings, rows, server, patience, take),
        Selection::Records(records) => find_records(settings, records, patience, take),
    }
}

fn now() -> String {
    Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true)
}

fn find_rows(
    settings: &Settings,
    rows: &Rows,
    server: Option<Place>,
    patience: Patience<'_>,
    take: Take<'_>,
) -> Result<(), Error> {
    let (info, timeout) = (&settings.postgres, settings.connect_timeout);
    let mut connection = match server {
        Some(server) => Connection::connect_to(info, server, Purpose::Sql, timeout)?,
        None => Connection::connect(info, Purpose::Sql, timeout)?,
    };
    if connection.is_in_recovery()? {
        let what = format!("Postgres at {} is a standby: its outbox may be behind", connection.place());
        return Err(Error::new(Kind::Refused, what)
            .hint("name the primary in postgres.url, or all hosts and target_session_attrs=read-write"));
    }
    connection.set_answer_timeout(READ_TIMEOUT)?;
    // So that a statement ends with us, where the server can look; not every platform can.
    let _ = connection.simple_query("SET client_connection_check_interval = '5s'");
    let mut snapshot = Snapshot::begin(&mut connection, settings, None, None)?.with_patience(patience);
    // The snapshot is of this statement, so its rows were committed before what it tells.
    take(Found::Until(snapshot.end_of_log()?))?;
    let (at, mut seen) = (now(), HashSet::new());
    let clauses = |outbox: &_| rows.clauses(outbox);
    let read =
        rows::read_whole(&mut snapshot, settings, clock::postgres_now_us(), clauses, |record, poison| {
            patience()?;
            if !rows.ids.is_empty() {
                seen.insert(plain(record.row_id));
            }
            take(Found::Record(Box::new(of_row(record, poison, &at))))
        });
    read.map_err(explain)?;
    for id in rows.ids.iter().filter(|id| !seen.contains(&plain(id))) {
        take(Found::NoRow(id.clone()))?;
    }
    snapshot.end()
}

/// An id as far as two ways to write a UUID do not differ.
fn plain(id: &str) -> String {
    id.chars().filter(|c| !"{-}".contains(*c)).flat_map(char::to_lowercase).collect()
}

fn of_row(record: &Record<'_>, poison: Option<&Poison>, at: &str) -> Hit {
    // They are not known of a row; and no row has headers of its own of these names.
    let mut owned = OwnedRecord::of_row(record, |name| name != "lsn" && name != "seq");
    owned.headers.push_text(REPLAYED, at);
    Hit { record: owned, aggregate: Key::of(record), poison: poison.cloned() }
}

fn explain(error: Error) -> Error {
    match error.sqlstate.as_deref() {
        // It says already what to grant.
        Some("42501") => error,
        Some("42703") => Error { kind: Kind::Misconfigured, ..error }.hint(
            "a replay by time or aggregate needs a column that tells the time, of each outbox: --time-column (created_at without \
             it), or --order-by where only the order is missing",
        ),
        Some(state) if state.starts_with("22") || state.starts_with("42") => {
            Error { kind: Kind::Misconfigured, ..error }
                .hint("each value has to be one of its column's type, in each outbox: look at ids, aggregate and times")
        }
        _ => error,
    }
}

fn find_records(
    settings: &Settings,
    records: &Records,
    patience: Patience<'_>,
    take: Take<'_>,
) -> Result<(), Error> {
    let (tails, at) = (Tails::open(&settings.kafka)?, now());
    for topic in &records.topics {
        let Some(mut history) = History::open(&settings.kafka, topic, patience)? else {
            let what = format!("topic {topic:?} does not exist");
            return Err(Error::new(Kind::Misconfigured, what).hint("look at --topic"));
        };
        for partition in history.partitions() {
            for offset in places(&tails, topic, partition, records, patience, take)? {
                // Deleted meanwhile.
                let Some(message) = history.fetch(partition, offset, patience)? else { continue };
                let mut record = OwnedRecord::of_message(&message);
                record.headers.push_text(REPLAYED, &at);
                take(Found::Record(Box::new(Hit { record, aggregate: None, poison: None })))?;
            }
        }
    }
    Ok(())
}

/// The offsets of the partition's records that are wanted, each once, in order.
fn places(
    tails: &Tails,
    topic: &str,
    partition: i32,
    wanted: &Records,
    patience: Patience<'_>,
    take: Take<'_>,
) -> Result<Vec<i64>, Error> {
    let mut tail = tails.tail(topic, partition, patience)?;
    let mut firsts: HashMap<(Lsn, u64, u64), i64> = HashMap::new();
    loop {
        // What is behind an older record is no older, but for what was replayed or redriven.
        let (mut is_older, mut count, mut told) = (None, 0, Ok(()));
        let there_is_more = tail.window(|message| {
            count += 1;
            if count == LOOKED_AT_LEAST {
                told = std::mem::replace(&mut told, Ok(())).and_then(|()| take(Found::LookedAt(count)));
                count = 0;
            }
            let Some((lsn, seq, id)) = identity(message) else { return };
            let has = |name| message.headers().is_some_and(|all| all.iter().any(|h| h.key == name));
            if has(REPLAYED) {
                return;
            }
            if !has("redriven") {
                is_older = Some(is_older.unwrap_or(true) && lsn < wanted.from);
            }
            if (wanted.from..=wanted.through).contains(&lsn) {
                let first = firsts.entry((lsn, seq, id)).or_insert(message.offset());
                *first = message.offset().min(*first);
            }
        })?;
        told?;
        take(Found::LookedAt(count))?;
        if firsts.len() > PARTITION_LIMIT {
            let what = format!(
                "partition {partition} of topic {topic:?} has more than {PARTITION_LIMIT} such records"
            );
            return Err(Error::new(Kind::Misconfigured, what).hint("take fewer LSNs at a time"));
        }
        if !there_is_more || is_older == Some(true) {
            break;
        }
    }
    let mut offsets: Vec<i64> = firsts.into_values().collect();
    offsets.sort_unstable();
    Ok(offsets)
}

/// The commit LSN and the ordinal that the relay's headers tell, and a hash of the id.
fn identity(message: &BorrowedMessage<'_>) -> Option<(Lsn, u64, u64)> {
    let headers = message.headers()?;
    // A row's own headers come after the relay's.
    let value = |name: &str| headers.iter().find(|h| h.key == name)?.value;
    let text = |name: &str| std::str::from_utf8(value(name)?).ok();
    let mut hasher = DefaultHasher::new();
    value("id")?.hash(&mut hasher);
    Some((text("lsn")?.parse().ok()?, text("seq")?.parse().ok()?, hasher.finish()))
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn a_uuid_is_the_same_however_it_is_written() {
        let written = "A0EEBC99-9c0b-4ef8-bb6d-6bb9bd380a11";
        assert_eq!(plain(written), plain("{a0eebc999c0b4ef8bb6d6bb9bd380a11}"));
        assert_ne!(plain(written), plain("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a12"));
    }
}

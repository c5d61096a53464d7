//! The outbox compared with the topics, row by row: what is missing, what is there twice, what is out of order.
//!
//! First the rows' ids in one snapshot, then the end of the server's log, then the wait until the slot has confirmed that:
//! what is in the snapshot and was to be published is in Kafka from then on. Only then the topics are read.

mod remains;
mod tally;
mod topics;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use relay_core::{
    Lsn,
    poison::{Poison, Policy},
    record::Record,
    route::is_legal_topic,
    source::Options,
};
use serde::Serialize;

use self::{
    remains::{Remains, with_time},
    tally::{BYTES_PER_ROW, NO_TOPIC, Tally},
    topics::{Reader, Topic},
};
use crate::{
    config::Settings,
    error::{Error, Kind},
    replication::{connection::Connection, handshake::Purpose},
    rows,
    slot::Slot,
    snapshot::Snapshot,
    wal,
};

/// The most rows that are compared: 1.1 GiB of memory.
const ROWS_LIMIT: u64 = 20_000_000;
/// The most topics that they can be sent to.
const TOPICS_LIMIT: usize = 10_000;
/// The most findings of each kind that are named; more are only counted.
const LISTED_LIMIT: usize = 1000;
/// How long one statement may take: the slowest counts the rows.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(600);
/// How often the slot is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// What is wanted.
#[derive(Debug)]
pub(crate) struct Ask {
    /// A condition of SQL: only rows that meet it are looked for.
    pub(crate) filter: Option<String>,
    /// The column that says when a row was written, where `outbox.timestamp` names none.
    pub(crate) time_column: String,
    /// How long the relay may take to confirm what was committed before the audit.
    pub(crate) wait: Duration,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// `missing`, `duplicate` or `out-of-order`.
    pub(crate) kind: &'static str,
    /// Empty where only the record is known.
    pub(crate) table: String,
    pub(crate) id: String,
    pub(crate) key: String,
    pub(crate) topic: String,
    /// Of a record.
    pub(crate) partition: Option<i32>,
    pub(crate) offset: Option<i64>,
    pub(crate) detail: String,
}

/// What the comparison came to. Each row is counted once, and so is each record.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) rows: u64,
    pub(crate) published: u64,
    pub(crate) dead_lettered: u64,
    /// The relay leaves them out, as a policy says.
    pub(crate) left_out: u64,
    pub(crate) missing: u64,
    /// In no topic, and theirs has lost records that it had; one of theirs can be among them.
    pub(crate) unknown: u64,
    /// In no topic, and not confirmed either.
    pub(crate) unconfirmed: u64,
    pub(crate) records: u64,
    pub(crate) other_records: u64,
    pub(crate) duplicates: u64,
    pub(crate) out_of_order: u64,
    pub(crate) unordered: u64,
    pub(crate) replayed: u64,
    /// Rows that were committed before this LSN were compared.
    pub(crate) compared_to: String,
    /// Those that are missing come first.
    pub(crate) findings: Vec<Finding>,
    #[serde(skip)]
    listed: BTreeMap<&'static str, usize>,
    /// How many findings are counted above and not named.
    pub(crate) not_listed: u64,
    pub(crate) topics: Vec<Topic>,
    pub(crate) notes: Vec<String>,
}

/// What became of the slot until the audit could begin.
#[derive(Debug, PartialEq, Eq)]
enum Slots {
    Confirmed,
    /// Not in time; where it stands.
    Behind(Option<Lsn>),
    /// Nobody will ever publish from it.
    Gone(&'static str),
}

impl Report {
    /// How many findings there are.
    pub(crate) fn found(&self) -> u64 {
        self.missing + self.duplicates + self.out_of_order
    }

    fn list(&mut self, finding: Finding) {
        let listed = self.listed.entry(finding.kind).or_default();
        if *listed < LISTED_LIMIT {
            *listed += 1;
            self.findings.push(finding);
        }
    }
}

/// Compares. Changes nothing.
///
/// # Errors
/// Postgres or Kafka does not answer or refuses, or there is more than fits in memory.
pub(crate) fn audit(settings: &Settings, ask: &Ask) -> Result<Report, Error> {
    if settings.source.outboxes.is_empty() {
        let what = "there is no outbox table, and messages leave no rows that could be compared";
        return Err(
            Error::new(Kind::Misconfigured, what).hint("only [outbox] and [[outboxes]] can be audited")
        );
    }
    let mut connection = Connection::connect(&settings.postgres, Purpose::Sql, settings.connect_timeout)?;
    if connection.is_in_recovery()? {
        let what = format!(
            "Postgres at {} is a standby, which does not tell what the slot has confirmed",
            connection.place()
        );
        return Err(Error::new(Kind::Refused, what)
            .hint("name the primary in postgres.url, or all hosts and target_session_attrs=read-write"));
    }
    connection.set_answer_timeout(STATEMENT_TIMEOUT)?;
    let (mut tally, numbers) = expect(&mut connection, settings, ask)?;
    let end = wal::end_of_log(&mut connection)?;
    let slot = wait(&mut connection, settings, end, ask.wait)?;

    let mut report = Report { compared_to: end.to_string(), ..Report::default() };
    let reader = Reader::new(settings);
    let (mut topics, mut remains) = (BTreeMap::new(), BTreeMap::new());
    for (name, number) in &numbers {
        let (topic, left) = reader.compare(name, &mut tally, |finding| report.list(finding))?;
        if let Some(left) = left.filter(|_| topic.is_cut()) {
            remains.insert(name.clone(), left);
        }
        topics.insert(*number, topic);
    }
    reader.read_letters(&mut tally)?;
    report.count(&tally, &topics, &slot);
    if report.missing + report.unknown > 0 {
        list_missing(&mut report, &mut connection, settings, ask, &mut tally, &remains)?;
        let is_whole = |number| !topics.get(&number).is_some_and(Topic::is_cut);
        report.note_gone(tally.standing(is_whole).untold);
    }
    report.findings.sort_by_key(|finding| finding.kind != "missing");
    report.not_listed = report.found().saturating_sub(report.findings.len() as u64);
    report.note(settings, ask, &slot, topics.values());
    report.topics = topics.into_values().collect();
    Ok(report)
}

/// What there ought to be, and the numbers of the topics.
fn expect(
    connection: &mut Connection,
    settings: &Settings,
    ask: &Ask,
) -> Result<(Tally, BTreeMap<String, u16>), Error> {
    let mut snapshot = Snapshot::begin(connection, settings, ask.filter.as_deref(), None)?;
    let count = snapshot.count()?;
    let narrow = |what: String| Error::new(Kind::Refused, what).hint("choose some of the rows with --where");
    if count > ROWS_LIMIT {
        let what = format!(
            "the outbox has {count} rows, and at most {ROWS_LIMIT} are compared, at {BYTES_PER_ROW} bytes each"
        );
        return Err(narrow(what));
    }
    let mut tally = Tally::with_capacity(usize::try_from(count).unwrap_or(0));
    let mut numbers: BTreeMap<String, u16> = BTreeMap::new();
    rows::read(&mut snapshot, &settings.source, "", |record, poison| {
        let number = if is_legal_topic(record.topic) {
            match numbers.get(record.topic) {
                Some(number) => *number,
                None if numbers.len() >= TOPICS_LIMIT => {
                    return Err(narrow(format!("the rows go to more than {TOPICS_LIMIT} topics")));
                }
                None => {
                    let number = u16::try_from(numbers.len()).unwrap_or(NO_TOPIC);
                    numbers.insert(record.topic.to_owned(), number);
                    number
                }
            }
        } else {
            NO_TOPIC
        };
        let is_left_out = is_left_out(settings, poison);
        let key = record.key.unwrap_or_default();
        tally.expect(number, record.topic, record.row_id.as_bytes(), key, is_left_out);
        Ok(())
    })?;
    snapshot.end()?;
    tally.seal();
    Ok((tally, numbers))
}

fn is_left_out(settings: &Settings, poison: Option<&Poison>) -> bool {
    poison.is_some_and(|poison| settings.policies.of(poison.kind()) == Policy::Skip)
}

/// Waits until the slot has confirmed `end`.
fn wait(connection: &mut Connection, settings: &Settings, end: Lsn, limit: Duration) -> Result<Slots, Error> {
    let since = Instant::now();
    loop {
        let Some(slot) = Slot::look(connection, &settings.slot)? else {
            return Ok(Slots::Gone("does not exist"));
        };
        slot.check_kind(&settings.slot)?;
        if slot.is_lost {
            return Ok(Slots::Gone("is lost"));
        }
        if slot.confirmed.is_some_and(|confirmed| confirmed >= end) {
            return Ok(Slots::Confirmed);
        }
        if since.elapsed() >= limit {
            return Ok(Slots::Behind(slot.confirmed));
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// Names the rows that are missing, which the tally knows by their hashes only, and takes for missing those of a cut topic that
/// cannot be among what it has lost.
fn list_missing(
    report: &mut Report,
    connection: &mut Connection,
    settings: &Settings,
    ask: &Ask,
    tally: &mut Tally,
    remains: &BTreeMap<String, Remains>,
) -> Result<(), Error> {
    let mut snapshot = Snapshot::begin(connection, settings, ask.filter.as_deref(), None)?;
    let outboxes = &settings.source.outboxes;
    let outboxes: Result<_, _> =
        outboxes.iter().map(|outbox| with_time(&mut snapshot, outbox, &ask.time_column)).collect();
    let source = Options { outboxes: outboxes?, ..settings.source.clone() };
    rows::read(&mut snapshot, &source, "", |record: &Record<'_>, poison| {
        if !tally.tell(record.topic, record.row_id.as_bytes()) {
            return Ok(());
        }
        let left = remains.get(record.topic);
        if left.is_some_and(|left| left.would_hold(record)) {
            report.unknown -= 1;
            report.missing += 1;
        }
        if left.is_none_or(|left| left.would_hold(record)) {
            report.list(Finding {
                kind: "missing",
                table: record.table.to_owned(),
                id: record.row_id.to_owned(),
                key: record.aggregate_id.to_owned(),
                topic: record.topic.to_owned(),
                partition: None,
                offset: None,
                detail: poison.map(ToString::to_string).unwrap_or_default(),
            });
        }
        Ok(())
    })?;
    snapshot.end()
}

impl Report {
    fn count(&mut self, tally: &Tally, topics: &BTreeMap<u16, Topic>, slot: &Slots) {
        let all = tally.standing(|_| true);
        self.rows = all.published + all.dead_lettered + all.left_out + all.absent;
        (self.published, self.dead_lettered, self.left_out) =
            (all.published, all.dead_lettered, all.left_out);
        if matches!(slot, Slots::Behind(_)) {
            self.unconfirmed = all.absent;
        } else {
            self.unknown = tally.standing(|number| topics.get(&number).is_some_and(Topic::is_cut)).absent;
            self.missing = all.absent - self.unknown;
        }
        for topic in topics.values() {
            self.records += topic.records;
            self.other_records += topic.other_records;
            self.duplicates += topic.duplicates;
            self.out_of_order += topic.out_of_order;
            self.unordered += topic.unordered;
            self.replayed += topic.replayed;
        }
    }

    fn note_gone(&mut self, gone: u64) {
        if gone > 0 {
            let what = format!(
                "{gone} of the missing rows were deleted from the outbox meanwhile: their ids are not known any more"
            );
            self.notes.push(what);
        }
    }

    /// Says what the figures do not.
    fn note<'a>(
        &mut self,
        settings: &Settings,
        ask: &Ask,
        slot: &Slots,
        topics: impl Iterator<Item = &'a Topic>,
    ) {
        let Self { missing, unknown, unconfirmed, unordered, ref mut notes, .. } = *self;
        let name = &settings.slot;
        match slot {
            Slots::Confirmed => {}
            Slots::Gone(why) => notes.push(format!(
                "slot {name:?} {why}, so nobody will publish what is in no topic: it counts as missing"
            )),
            Slots::Behind(_) if unconfirmed == 0 => {}
            Slots::Behind(at) => {
                let at = at.map_or("nowhere".to_owned(), |at| at.to_string());
                notes.push(format!(
                    "slot {name:?} stands at {at} and has not confirmed {} in time: {unconfirmed} rows that are in no topic may \
                     still come. Does a relay run? --wait SECONDS waits longer",
                    self.compared_to
                ));
            }
        }
        for topic in topics {
            let name = &topic.name;
            if !topic.exists {
                notes.push(format!("topic {name} does not exist"));
            } else if !topic.deleted_before.is_empty() {
                let parts = topic.deleted_before.join(", ");
                notes.push(format!(
                    "the beginning of topic {name} is deleted (partition {parts}): whether a row without a record had one in what is \
                     gone cannot be known"
                ));
            } else if topic.compacted == Some(true) {
                notes.push(format!(
                    "topic {name} is compacted: whether a row without a record had one there cannot be known"
                ));
            }
        }
        if unknown > 0 {
            notes.push(format!(
                "{unknown} rows are in no topic and count as unknown for that, not as missing: they are no newer than what their \
                 partition still holds, or do not tell their time (column {:?}, --time-column)",
                ask.time_column
            ));
        }
        if missing > 0 && settings.policies.any(Policy::Skip) {
            notes.push("a policy in [poison] is skip: rows that it left out for what Kafka said of them count as missing".into());
        }
        if unordered > 0 {
            notes.push(format!(
                "{unordered} records have no headers lsn and seq (another product wrote them): their order cannot be told"
            ));
        }
        if settings.source.messages.is_some() {
            notes.push("messages of the table-less outbox leave no rows: they were not compared".into());
        }
    }
}

//! `cdc-relay replay`: which records, a look at them, and the question to the relay.

use std::{
    cell::Cell,
    collections::BTreeSet,
    sync::mpsc::{RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use serde::Serialize;
use service::{
    Failure, exit,
    table::{self, cut, or_dash, printable},
};

use super::{aggregate, relay_api::RelayApi};
use crate::{
    config::Settings,
    error::Error,
    kafka::is_compacted,
    replay::{
        api::{HowFar, PATH, Report},
        finder::{Found, Hit, find},
        selection::{Aggregate, RecordsRequest, Request, RowsRequest, Selection},
    },
    scribe::no_answer,
};

/// How many records and refusals a table shows.
const SHOWN: usize = 20;
/// How many records the JSON of a look names.
const NAMED: usize = 1000;
/// The most of an id or a key that a table shows, in characters.
const CELL_CHARS: usize = 36;
/// How many topics are asked about.
const TOPICS_ASKED: usize = 10;
/// How long Kafka may have nothing to say while records are looked for.
const KAFKA_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a replay that is under way says how far it is.
const TELL_INTERVAL: Duration = Duration::from_secs(2);

#[derive(Debug, clap::Args)]
pub(super) struct Replay {
    /// The row with this id. May be given several times; they are published in this order
    #[arg(long = "id", value_name = "ID", conflicts_with_all = ["aggregate", "since", "until"])]
    ids: Vec<String>,
    /// The rows of this aggregate, in the order of their time
    #[arg(long, value_name = "TYPE/ID", value_parser = aggregate)]
    aggregate: Option<(String, String)>,
    /// The rows of this time or later, such as 2026-11-21T13:00:00Z, in the order of their time
    #[arg(long, value_name = "RFC3339")]
    since: Option<DateTime<Utc>>,
    /// The rows from before this time
    #[arg(long, value_name = "RFC3339")]
    until: Option<DateTime<Utc>>,
    /// The column that tells a row's time
    #[arg(long, value_name = "COLUMN", default_value = "created_at")]
    time_column: String,
    /// Publish rows in the order of these columns instead, such as "seq desc"
    #[arg(long, value_name = "COLUMNS")]
    order_by: Option<String>,
    /// Records of this topic instead of rows. May be given several times
    #[arg(
        long = "from-topic",
        value_name = "TOPIC",
        requires_all = ["from_lsn", "through_lsn"],
        conflicts_with_all = ["ids", "aggregate", "since", "until", "order_by"]
    )]
    topics: Vec<String>,
    /// The first commit of which records are wanted, as their header lsn has it
    #[arg(long, value_name = "X/Y", requires = "topics")]
    from_lsn: Option<String>,
    /// The last one
    #[arg(long, value_name = "X/Y", requires = "topics")]
    through_lsn: Option<String>,
    /// Do it. Without this, only look what would be published. Asks no relay then
    #[arg(long)]
    yes: bool,
    /// Where the relay is. Without this, http.listen of the configuration. Where that has an admin token, it is sent
    #[arg(long, value_name = "URL")]
    relay: Option<String>,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Looks, or has the relay publish.
pub(super) fn replay(settings: &Settings, replay: &Replay) -> Result<(), Failure> {
    let request = replay.request();
    let selection = request.clone().check(settings).map_err(|errors| {
        let details: Vec<_> = errors.iter().map(|e| format!("{} {}", e.pointer, e.detail)).collect();
        Failure::configuration(format!("this cannot be replayed: {}", details.join("; ")))
            .hint("say which records: --id, --aggregate, --since and --until, or --from-topic with --from-lsn and --through-lsn")
    })?;
    if replay.yes { replay.carry_out(settings, &request) } else { replay.look(settings, &selection) }
}

impl Replay {
    fn request(&self) -> Request {
        if !self.topics.is_empty() {
            let records = RecordsRequest {
                topics: self.topics.clone(),
                from_lsn: self.from_lsn.clone().unwrap_or_default(),
                through_lsn: self.through_lsn.clone().unwrap_or_default(),
            };
            return Request { rows: None, records: Some(records) };
        }
        let aggregate = self.aggregate.clone().map(|(kind, id)| Aggregate { kind, id });
        let rows = RowsRequest {
            ids: self.ids.clone(),
            aggregate,
            since: self.since,
            until: self.until,
            time_column: Some(self.time_column.clone()),
            order_by: self.order_by.clone(),
        };
        Request { rows: Some(rows), records: None }
    }

    /// Says what would be published.
    fn look(&self, settings: &Settings, selection: &Selection) -> Result<(), Failure> {
        let (mut look, mut told, heard) = (Look::default(), Instant::now(), Cell::new(Instant::now()));
        // Postgres has time-outs of its own.
        let patience = || {
            let is_kafka = matches!(selection, Selection::Records(_));
            if is_kafka && heard.get().elapsed() >= KAFKA_TIMEOUT { Err(no_answer(settings)) } else { Ok(()) }
        };
        let found = find(settings, selection, None, &patience, &mut |found| {
            heard.set(Instant::now());
            look.take(&found);
            if told.elapsed() >= TELL_INTERVAL {
                told = Instant::now();
                let looked_at = look.looked_at.max(look.records);
                eprintln!("{looked_at} records looked at so far, {} found", look.records);
            }
            Ok(())
        });
        found.map_err(Error::into_failure)?;
        look.look_at_topics(settings);
        if self.json {
            service::say!("{}", serde_json::json!(look));
        } else {
            look.print();
        }
        finish(look.refused, look.missing)
    }

    fn carry_out(&self, settings: &Settings, request: &Request) -> Result<(), Failure> {
        let relay = &RelayApi::new(settings, self.relay.as_deref(), None)?;
        let (done, is_done) = channel::<()>();
        let report: Report = std::thread::scope(|scope| {
            scope.spawn(move || {
                while is_done.recv_timeout(TELL_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                    match relay.get(PATH) {
                        Ok(HowFar { under_way: true, published }) => {
                            eprintln!("{published} records published so far; Ctrl-C ends it");
                        }
                        Ok(_) => {}
                        Err(e) => eprintln!("how far it is cannot be told: {e}"),
                    }
                }
            });
            let report = relay.post(PATH, request, "records with the header replayed are what it did");
            drop(done);
            report
        })?;
        if self.json {
            service::say!("{}", serde_json::json!(report));
        } else {
            print(&report);
        }
        finish(report.refused, report.missing)
    }
}

/// What a look found.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Look {
    records: u64,
    bytes: u64,
    refused: u64,
    missing: u64,
    missing_ids: Vec<String>,
    #[serde(skip)]
    looked_at: u64,
    /// Of the topics that they go to: those that keep the last record of each key only, as far as Kafka tells us.
    compacted: Vec<String>,
    /// The first [`NAMED`].
    named: Vec<Named>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Named {
    id: String,
    #[serde(rename = "type")]
    event_type: String,
    key: String,
    topic: String,
    partition: Option<i32>,
    /// Of a record.
    lsn: Option<String>,
    bytes: Option<usize>,
    /// Why it would not be published.
    why: Option<String>,
}

impl Look {
    fn take(&mut self, found: &Found) {
        match found {
            Found::Until(_) => {}
            Found::LookedAt(count) => self.looked_at += count,
            Found::NoRow(id) => {
                self.missing += 1;
                self.missing_ids.push(id.clone());
            }
            Found::Record(hit) => {
                let Hit { record, poison, .. } = &**hit;
                self.records += 1;
                self.bytes += record.value.as_ref().map_or(0, |value| value.len() as u64);
                self.refused += u64::from(poison.is_some());
                if self.named.len() < NAMED {
                    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                    let header = |name: &str| record.headers.get(name).flatten().map(text);
                    self.named.push(Named {
                        id: record.row_id.clone(),
                        event_type: header("type").unwrap_or_default(),
                        key: record.key.as_deref().map(text).unwrap_or_default(),
                        topic: record.topic.clone(),
                        partition: record.partition,
                        lsn: header("lsn"),
                        bytes: record.value.as_ref().map(Vec::len),
                        why: poison.as_ref().map(ToString::to_string),
                    });
                }
            }
        }
    }

    fn look_at_topics(&mut self, settings: &Settings) {
        let topics: BTreeSet<&String> = self.named.iter().map(|named| &named.topic).collect();
        for topic in topics.into_iter().take(TOPICS_ASKED) {
            match is_compacted(&settings.kafka, topic) {
                Some(true) => self.compacted.push(topic.clone()),
                Some(false) => {}
                // Kafka is away, or we may not ask: nor will it tell of the others.
                None => return,
            }
        }
    }

    fn print(&self) {
        let cell = |text: &str| cut(&or_dash(text), CELL_CHARS);
        let row = |n: &Named| {
            let bytes = n.bytes.map_or_else(|| "tombstone".to_owned(), |bytes| bytes.to_string());
            [cell(&n.id), cell(&n.event_type), cell(&n.key), or_dash(&n.topic), bytes]
        };
        let rows: Vec<_> = self.named.iter().take(SHOWN).map(row).collect();
        if !rows.is_empty() {
            table::print(["ID", "TYPE", "KEY", "TOPIC", "BYTES"], &rows);
        }
        for Named { id, why, .. } in self.named.iter().take(SHOWN) {
            if let Some(why) = why {
                service::say!("{} cannot be published: {}", printable(id), printable(why));
            }
        }
        let hidden = self.records.saturating_sub(rows.len() as u64);
        if hidden > 0 {
            service::say!("… and {hidden} more");
        }
        tell_missing(self.missing, &self.missing_ids);
        for topic in &self.compacted {
            service::say!(
                "note: topic {topic} is compacted: a replayed record becomes its key's last, and Kafka removes newer ones"
            );
        }
        let (records, bytes) = (self.records - self.refused, self.bytes);
        service::say!("{records} records would be published once more, {bytes} bytes of values");
        if records > 0 {
            service::say!("nothing was published: --yes does it");
        }
    }
}

fn print(report: &Report) {
    let rows: Vec<_> = report
        .refusals
        .iter()
        .take(SHOWN)
        .map(|r| [or_dash(&r.id), or_dash(&r.topic), printable(&r.why)])
        .collect();
    if !rows.is_empty() {
        table::print(["NOT PUBLISHED", "TOPIC", "WHY"], &rows);
    }
    let hidden = report.refused.saturating_sub(rows.len() as u64);
    if hidden > 0 {
        service::say!("… and {hidden} more");
    }
    tell_missing(report.missing, &report.missing_ids);
    service::say!("{} of {} records published once more", report.published, report.found);
}

fn tell_missing(missing: u64, ids: &[String]) {
    for id in ids.iter().take(SHOWN) {
        service::say!("no outbox has a row with the id {}", printable(id));
    }
    let hidden = missing.saturating_sub(SHOWN.min(ids.len()) as u64);
    if hidden > 0 {
        service::say!("… nor with {hidden} more");
    }
}

fn finish(refused: u64, missing: u64) -> Result<(), Failure> {
    if refused + missing == 0 {
        return Ok(());
    }
    let what = format!("{refused} records cannot be published, and {missing} ids are in no outbox");
    Err(Failure::new(exit::Kind::Halted, what))
}

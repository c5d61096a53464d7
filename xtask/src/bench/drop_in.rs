//! The same rows through Debezium Server and through the relay, each record held against the other's: what a consumer would
//! notice.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

use rdkafka::{
    Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    message::Headers,
};
use serde::Serialize;
use sqlx::{AssertSqlSafe, PgConnection};
use uuid::Uuid;

use super::{
    Bench,
    arm::{copy_slot, drop_slot},
    debezium::{Debezium, Tuning},
    publisher::Ready,
    relay::Relay,
    section::{Section, head},
    servers::{Servers, execute},
    workload::{self, BASE_SLOT},
};
use crate::{
    cli::Delivery,
    failure::{Explain, Failure, Result},
    kafka,
    topics::{self, Quiet, Topic},
};

const PARTITIONS: i32 = 3;
/// How long nothing must come until all of a publisher's records are taken to be there.
const QUIET: Duration = Duration::from_secs(3);
/// How long they may take to come.
const LIMIT: Duration = Duration::from_secs(90);
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
const POLL_LIMIT: Duration = Duration::from_secs(30);
/// So much of a value is shown.
const SHOWN: usize = 48;

/// A type of the payload column, and rows of it.
struct Kind {
    payload: &'static str,
    /// What Debezium Server needs beside its settings for text.
    settings: &'static [(&'static str, &'static str)],
    /// What it is, and an expression for the payload.
    rows: &'static [(&'static str, &'static str)],
}

const KINDS: [Kind; 3] = [
    Kind {
        payload: "jsonb",
        settings: &[],
        rows: &[
            ("object", r#"'{"b": 1, "a": [1, 2.50, null, true]}'"#),
            ("large number", r#"'{"n": 12345678901234567890.1234567890}'"#),
            ("array", "'[1, 2]'"),
            ("string", r#"'"text"'"#),
            ("JSON null", "'null'"),
            ("empty object", "'{}'"),
            ("unicode", r#"'{"пицца": "Käse 🍕 \u00e9 \" \\ \n"}'"#),
            ("SQL NULL", "NULL"),
            ("200 KB", "jsonb_build_object('text', repeat('Quattro stagioni ', 12000))"),
        ],
    },
    Kind {
        payload: "text",
        settings: &[],
        rows: &[
            ("JSON as text", r#"'{ "b" : 1,  "a" : 2 }'"#),
            ("no JSON", "'Quattro stagioni'"),
            ("lines", "E'one\\ntwo\\ttabbed\\r\\n'"),
            ("unicode", "'Käse 🍕 пицца'"),
            ("empty text", "''"),
            ("SQL NULL", "NULL"),
            ("200 KB", "repeat('Quattro stagioni ', 12000)"),
        ],
    },
    Kind {
        payload: "bytea",
        settings: &[
            ("debezium.format.value", "binary"),
            (
                "debezium.sink.kafka.producer.value.serializer",
                "org.apache.kafka.common.serialization.ByteArraySerializer",
            ),
        ],
        rows: &[
            ("bytes", r"'\x00ff10'"),
            ("no bytes", r"'\x'"),
            ("SQL NULL", "NULL"),
            ("200 KB", "decode(repeat('00ff10ab', 50000), 'hex')"),
        ],
    },
];

/// A record as a consumer has it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    partition: i32,
    timestamp: Option<i64>,
    headers: BTreeMap<String, Vec<u8>>,
}

/// How the two differ in one place of a record.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Difference {
    place: String,
    /// None: nobody knows.
    why: Option<&'static str>,
}

/// A difference, where it is, and of one row what it looks like.
#[derive(Debug, Clone, Serialize)]
struct Found {
    #[serde(flatten)]
    difference: Difference,
    rows: Vec<String>,
    debezium: String,
    relay: String,
}

/// Compares both, for each type of the payload.
pub(super) async fn drop_in(bench: &Bench<'_>) -> Result<Section> {
    let debezium = bench.arms.debezium().find(|it| it.tuning == Tuning::Tuned);
    let debezium = debezium.ok_or_else(|| {
        Failure::new("without Debezium Server there is nothing to compare with").hint("add --peers")
    })?;
    let relay =
        Relay { binary: bench.arms.relay.clone(), delivery: Delivery::AtLeastOnce, count_allocations: false };
    let (mut found, mut rows, mut failures) = (Vec::new(), 0, Vec::new());
    for kind in &KINDS {
        let step = bench.servers.progress.step(format!("drop-in, {}", kind.payload));
        let pairs = both(bench, kind, debezium, &relay).await?;
        rows += pairs.len();
        for (name, theirs, ours) in pairs {
            let name = format!("{} {name}", kind.payload);
            let Some(ours) = ours else {
                failures.push(format!("{name}: the relay has not published it"));
                continue;
            };
            for (difference, debezium, relay) in differences(theirs.as_ref(), &ours) {
                let Some(known) = found.iter_mut().find(|it: &&mut Found| it.difference == difference) else {
                    found.push(Found { difference, rows: vec![name.clone()], debezium, relay });
                    continue;
                };
                known.rows.push(name.clone());
            }
        }
        step.done(&format!("drop-in, {}: compared", kind.payload));
    }
    let title = format!("{rows} rows through Debezium Server and through the relay, into the same topics");
    let mut section = Section::of("drop-in", title, &found)?;
    section.notes.push(
        "every place in which a record of the relay differs from Debezium's of the same row: topic, key, value, partition, timestamp, \
         headers. Where nothing is listed, they are the same to the byte"
            .to_owned(),
    );
    section.table = head(["PLACE", "ROWS", "DEBEZIUM", "RELAY", "WHY"]);
    found.sort_by(|one, other| one.difference.cmp(&other.difference));
    for Found { difference, rows: of, debezium, relay } in &found {
        let which = if of.len() == rows { "all".to_owned() } else { of.join(", ") };
        let why = difference.why.unwrap_or("unexplained");
        section.table.push(vec![
            difference.place.clone(),
            which,
            debezium.clone(),
            relay.clone(),
            why.to_owned(),
        ]);
    }
    failures.extend(found.iter().filter(|it| it.difference.why.is_none()).map(|it| {
        format!("{} differs, and nobody knows why: {} and {}", it.difference.place, it.debezium, it.relay)
    }));
    section.failures = failures;
    Ok(section)
}

/// A row's name, and its record by each.
type Pair = (&'static str, Option<Seen>, Option<Seen>);

async fn both(bench: &Bench<'_>, kind: &Kind, debezium: &Debezium, relay: &Relay) -> Result<Vec<Pair>> {
    let servers = bench.servers;
    let mut connection = servers.connect().await?;
    let aggregate = format!("drop-in-{}", kind.payload);
    let ids = write(&mut connection, kind, &aggregate).await?;
    let topic = format!("outbox.event.{aggregate}");
    let new = Topic { name: topic.clone(), partitions: PARTITIONS, settings: BTreeMap::new() };
    topics::create(&servers.kafka, vec![new], kafka::replication(1)).await?;
    let (number, next) = (bench.number(), bench.number());
    let slot = copy_slot(&mut connection, number).await?;
    // The dollar is doubled, or Quarkus would look for a setting of that name.
    let route = "outbox.event.$${routedByValue}".to_owned();
    let ready = debezium.init_with(servers, &slot, route, number, kind.settings)?;
    let theirs = records(servers, ready, &topic, 0, ids.len()).await?;
    drop_slot(&mut connection, &slot).await?;
    let slot = copy_slot(&mut connection, next).await?;
    let ready = relay.init(servers, &slot, "outbox.event.${aggregatetype}".to_owned(), next).await?;
    let ours = behind(&theirs, records(servers, ready, &topic, theirs.len(), ids.len()).await?);
    drop_slot(&mut connection, &slot).await?;
    workload::forget(servers).await?;
    let by_id = |records: Vec<Seen>| -> HashMap<Uuid, Seen> {
        records.into_iter().filter_map(|seen| Some((id(&seen)?, seen))).collect()
    };
    let (mut theirs, mut ours) = (by_id(theirs), by_id(ours));
    let pairs =
        kind.rows.iter().zip(ids).map(|((name, _), id)| (*name, theirs.remove(&id), ours.remove(&id)));
    Ok(pairs.collect())
}

/// What is in each partition behind what was there.
fn behind(before: &[Seen], mut all: Vec<Seen>) -> Vec<Seen> {
    let mut there = BTreeMap::new();
    for seen in before {
        *there.entry(seen.partition).or_insert(0) += 1;
    }
    all.retain(|seen| match there.get_mut(&seen.partition) {
        Some(left) if *left > 0 => {
            *left -= 1;
            false
        }
        _ => true,
    });
    all
}

/// Debezium Server writes it as JSON.
fn id(seen: &Seen) -> Option<Uuid> {
    std::str::from_utf8(seen.headers.get("id")?).ok()?.trim_matches('"').parse().ok()
}

/// Makes the outbox, and writes the rows, each in a transaction; their ids.
async fn write(connection: &mut PgConnection, kind: &Kind, aggregate: &str) -> Result<Vec<Uuid>> {
    for sql in [
        "DROP PUBLICATION IF EXISTS cdc_relay".to_owned(),
        "DROP TABLE IF EXISTS outbox".to_owned(),
        format!(
            "CREATE TABLE outbox (id uuid PRIMARY KEY, aggregatetype varchar(255) NOT NULL, aggregateid varchar(255) NOT NULL, \
             type varchar(255) NOT NULL, payload {})",
            kind.payload
        ),
        "CREATE PUBLICATION cdc_relay FOR TABLE outbox WITH (publish = 'insert')".to_owned(),
        format!("SELECT pg_create_logical_replication_slot('{BASE_SLOT}', 'pgoutput')"),
    ] {
        execute(connection, sql).await?;
    }
    let mut ids = Vec::new();
    for (number, (_, payload)) in kind.rows.iter().enumerate() {
        let sql = format!(
            "INSERT INTO outbox VALUES (gen_random_uuid(), $1, $2, 'Событие', {payload}) RETURNING id"
        );
        let inserted = sqlx::query_scalar(AssertSqlSafe(sql)).bind(aggregate).bind(format!("ключ-{number}"));
        ids.push(inserted.fetch_one(&mut *connection).await.explain(|| "write a row".to_owned())?);
    }
    Ok(ids)
}

/// Runs a publisher until its records are in the topic, behind those that are there; at most `most`, but all that come.
async fn records(
    servers: &Servers,
    mut ready: Ready,
    topic: &str,
    there: usize,
    most: usize,
) -> Result<Vec<Seen>> {
    let mut running = ready.run()?;
    let (mut count, mut since) = (there, Instant::now());
    let begun = Instant::now();
    loop {
        running.look()?;
        let (bootstrap, name) = (servers.kafka.clone(), topic.to_owned());
        let now = tokio::task::spawn_blocking(move || size(&bootstrap, &name));
        let now = now.await.explain(|| "look at the topic".to_owned())??;
        if now > count {
            (count, since) = (now, Instant::now());
        }
        // A row of which nothing comes is a difference, too.
        if (count >= there + most || count > there) && since.elapsed() > QUIET {
            break;
        }
        if begun.elapsed() > LIMIT {
            return Err(running.failed("no record has come".to_owned()));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    running.end().await?;
    let (bootstrap, name) = (servers.kafka.clone(), topic.to_owned());
    let all = tokio::task::spawn_blocking(move || read(&bootstrap, &name, count));
    let all = all.await.explain(|| "read the topic".to_owned())??;
    Ok(all)
}

fn reader(bootstrap: &str) -> Result<BaseConsumer<Quiet>> {
    let mut config = topics::client(bootstrap);
    config.set("group.id", "bench").set("enable.auto.commit", "false");
    config.create_with_context(Quiet).explain(|| "make a Kafka client".to_owned())
}

fn size(bootstrap: &str, topic: &str) -> Result<usize> {
    let reader = reader(bootstrap)?;
    (0..PARTITIONS).try_fold(0, |sum, partition| {
        let (low, high) =
            reader.fetch_watermarks(topic, partition, POLL_LIMIT).explain(|| format!("look at {topic}"))?;
        Ok(sum + usize::try_from(high - low).unwrap_or(0))
    })
}

/// All records of the topic.
fn read(bootstrap: &str, topic: &str, count: usize) -> Result<Vec<Seen>> {
    let reader = reader(bootstrap)?;
    let mut partitions = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        let added = partitions.add_partition_offset(topic, partition, Offset::Beginning);
        added.explain(|| format!("read {topic}"))?;
    }
    reader.assign(&partitions).explain(|| format!("read {topic}"))?;
    let mut all = Vec::new();
    while all.len() < count {
        let record = reader.poll(POLL_LIMIT);
        let record = record.ok_or_else(|| Failure::new(format!("the records of {topic} do not come")))?;
        let record = record.explain(|| format!("read {topic}"))?;
        let headers = record.headers().into_iter().flat_map(|all| all.iter());
        all.push(Seen {
            key: record.key().map(<[u8]>::to_vec),
            value: record.payload().map(<[u8]>::to_vec),
            partition: record.partition(),
            timestamp: record.timestamp().to_millis(),
            headers: headers
                .map(|header| (header.key.to_owned(), header.value.unwrap_or_default().to_vec()))
                .collect(),
        });
    }
    Ok(all)
}

/// Where they differ, and what each has there.
fn differences(theirs: Option<&Seen>, ours: &Seen) -> Vec<(Difference, String, String)> {
    let Some(theirs) = theirs else {
        let difference = Difference { place: "record".into(), why: why("record", None, None) };
        return vec![(difference, "none".into(), shown(ours.value.as_deref()))];
    };
    let text = |number: &dyn ToString| Some(number.to_string().into_bytes());
    let at = |seen: &Seen| seen.timestamp.and_then(|at| text(&at));
    let mut places = vec![
        ("key".to_owned(), theirs.key.clone(), ours.key.clone()),
        ("value".to_owned(), theirs.value.clone(), ours.value.clone()),
        ("partition".to_owned(), text(&theirs.partition), text(&ours.partition)),
        ("timestamp".to_owned(), at(theirs), at(ours)),
    ];
    let names: BTreeSet<&String> = theirs.headers.keys().chain(ours.headers.keys()).collect();
    for name in names {
        places.push((
            format!("header {name}"),
            theirs.headers.get(name).cloned(),
            ours.headers.get(name).cloned(),
        ));
    }
    let differ = places.into_iter().filter(|(_, theirs, ours)| theirs != ours);
    differ
        .map(|(place, theirs, ours)| {
            let why = why(&place, theirs.as_deref(), ours.as_deref());
            let missing = if place.starts_with("header") { "none" } else { "null" };
            let show = |value: Option<&[u8]>| value.map_or_else(|| missing.to_owned(), |it| shown(Some(it)));
            (Difference { place, why }, show(theirs.as_deref()), show(ours.as_deref()))
        })
        .collect()
}

/// What is known of a difference.
fn why(place: &str, theirs: Option<&[u8]>, ours: Option<&[u8]>) -> Option<&'static str> {
    let is_json_of = |theirs: &[u8], ours: &[u8]| {
        serde_json::from_slice::<String>(theirs).is_ok_and(|text| text.as_bytes() == ours)
    };
    match (place, theirs, ours) {
        ("header id", Some(theirs), Some(ours)) if is_json_of(theirs, ours) => {
            Some("Debezium writes header values as JSON, the relay the text itself")
        }
        ("header eventType", Some(_), None) => {
            Some("named by Debezium's additional.placement; the relay has it as type")
        }
        ("header type", None, Some(_)) => {
            Some("Debezium has it where additional.placement says, here as eventType")
        }
        ("header aggregatetype" | "header lsn" | "header seq", None, Some(_)) => {
            Some("the relay says what row of which commit it was")
        }
        ("timestamp", Some(_), Some(_)) => {
            Some("Debezium: when it handled the row; the relay: when the row was committed")
        }
        _ => None,
    }
}

fn shown(value: Option<&[u8]>) -> String {
    let Some(value) = value else { return "null".to_owned() };
    let text = String::from_utf8_lossy(value);
    let text = text.escape_debug().to_string().replace("\\\"", "\"");
    if text.chars().count() <= SHOWN {
        return text;
    }
    let head: String = text.chars().take(SHOWN).collect();
    format!("{head}… ({} bytes)", value.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(headers: &[(&str, &str)]) -> Seen {
        Seen {
            key: Some(b"k".to_vec()),
            value: Some(b"v".to_vec()),
            partition: 1,
            timestamp: Some(1),
            headers: headers
                .iter()
                .map(|(name, value)| ((*name).into(), value.as_bytes().to_vec()))
                .collect(),
        }
    }

    #[test]
    fn what_is_known_is_explained_and_what_is_not_is_told() {
        let (theirs, mut ours) = (seen(&[("id", "\"1\"")]), seen(&[("id", "1"), ("lsn", "0/1")]));
        ours.value = Some(b"w".to_vec());
        let found = differences(Some(&theirs), &ours);
        let whys: Vec<_> = found.iter().map(|(it, ..)| (it.place.as_str(), it.why.is_some())).collect();
        assert_eq!(whys, [("value", false), ("header id", true), ("header lsn", true)]);
        assert_eq!(differences(Some(&ours), &ours), []);
        assert_eq!(differences(None, &ours)[0].0.place, "record");
        let long = shown(Some("é\n".repeat(60).as_bytes()));
        assert!(long.starts_with("é\\né") && long.ends_with("… (180 bytes)"), "{long}");
    }
}

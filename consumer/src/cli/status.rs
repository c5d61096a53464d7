//! `status`: where a group stands, whether or not an instance of it runs.

use std::collections::BTreeMap;

use chrono::Utc;
use rdkafka::Message as _;
use serde_json::{Value, json};
use service::{
    Failure,
    table::{self, or_dash},
};
use tokio::{task::block_in_place, time::Instant};

use super::pause;
use crate::{
    cluster::{Cluster, Group},
    config::Settings,
    delivery::redrive_topic,
    group::PartitionId,
    ledger,
    ledger::{Chosen, Ledger},
};

/// How long may be spent on reading when the first waiting records were written; of the others it is not told.
const READING_LIMIT: std::time::Duration = std::time::Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(super) struct Status {
    /// A JSON object
    #[arg(long)]
    json: bool,
}

/// Where the group stands in a partition.
struct Position {
    id: PartitionId,
    committed: Option<i64>,
    end: i64,
    lag: i64,
    /// How old the first waiting record is; nothing if that is not known.
    lag_seconds: Option<i64>,
    /// Who consumes it.
    owner: Option<String>,
}

/// What the database knows.
struct Letters {
    reasons: Vec<(String, i64)>,
    blocked_keys: i64,
    parked: i64,
}

pub(super) async fn status(settings: &Settings, ledger: &mut Ledger, status: &Status) -> Result<(), Failure> {
    let paused = ledger.paused().await?;
    let reasons = ledger.by_reason(&Chosen::default()).await?;
    let (blocked_keys, parked) = ledger.blocked().await?;
    let letters = Letters { reasons, blocked_keys, parked };
    let (group, positions, missing) = block_in_place(|| ask(settings))?;
    if status.json {
        service::say!("{}", as_json(settings, &group, &positions, paused.as_ref(), &letters));
    } else {
        tell(settings, &group, &positions, paused.as_ref(), &letters);
    }
    for topic in missing {
        let then =
            if topic == redrive_topic(&settings.kafka.group) { ": nothing can be redriven" } else { "" };
        eprintln!("the topic {topic} does not exist{then}");
    }
    Ok(())
}

/// What Kafka knows: the group, where it stands, and which of its topics are not there.
fn ask(settings: &Settings) -> Result<(Group, Vec<Position>, Vec<String>), Failure> {
    let mut cluster = Cluster::new(&settings.kafka)?;
    let (mut ids, mut missing) = (Vec::new(), Vec::new());
    let redrive = redrive_topic(&settings.kafka.group);
    for name in settings.kafka.topics.iter().chain([&redrive]) {
        match cluster.topic(name)? {
            Some(topic) => ids.extend((0..topic.partitions).map(|partition| (name.clone(), partition))),
            None => missing.push(name.clone()),
        }
    }
    let group = cluster.group()?;
    let committed = cluster.committed(&ids)?;
    let owners: BTreeMap<&PartitionId, &str> =
        group.members.iter().flat_map(|m| m.partitions.iter().map(|id| (id, m.id.as_str()))).collect();
    let until = Instant::now() + READING_LIMIT;
    let mut positions = Vec::with_capacity(ids.len());
    for id in ids {
        let (begin, end) = cluster.bounds(&id)?;
        let committed = committed.get(&id).copied();
        // Retention may have taken what it has not seen.
        let next = committed.unwrap_or(begin).max(begin);
        let (lag, lag_seconds) = if next >= end {
            (0, Some(0))
        } else if Instant::now() < until {
            match cluster.first(&id, next)? {
                // Markers of transactions have offsets and are no records.
                None => (0, Some(0)),
                Some(first) => (end - next, age(first.timestamp().to_millis())),
            }
        } else {
            (end - next, None)
        };
        let owner = owners.get(&id).map(|owner| (*owner).to_owned());
        positions.push(Position { id, committed, end, lag, lag_seconds, owner });
    }
    Ok((group, positions, missing))
}

fn age(written_ms: Option<i64>) -> Option<i64> {
    Some((Utc::now().timestamp_millis() - written_ms?).max(0) / 1000)
}

fn tell(
    settings: &Settings,
    group: &Group,
    positions: &[Position],
    paused: Option<&ledger::Pause>,
    letters: &Letters,
) {
    let count = match group.members.len() {
        0 => "no instance consumes".into(),
        1 => "1 instance".into(),
        many => format!("{many} instances"),
    };
    service::say!(
        "group    {} ({}), {}, {count}",
        settings.kafka.group,
        settings.handler,
        group.state.to_lowercase()
    );
    service::say!("paused   {}", paused.map_or_else(|| "no".into(), pause::since));
    let reasons: Vec<String> = letters.reasons.iter().map(|(reason, n)| format!("{n} {reason}")).collect();
    let open: i64 = letters.reasons.iter().map(|(_, count)| count).sum();
    let reasons = if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join(", ")) };
    service::say!(
        "letters  {open} open{reasons}; blocked keys: {}, parked records: {}",
        letters.blocked_keys,
        letters.parked
    );
    if !group.members.is_empty() {
        service::say!();
        let rows = group.members.iter().map(|member| {
            let partitions = member.partitions.len().to_string();
            [or_dash(&member.id), or_dash(&member.client), or_dash(&member.host), partitions]
        });
        table::print(["INSTANCE", "CLIENT", "HOST", "PARTITIONS"], &rows.collect::<Vec<_>>());
    }
    service::say!();
    let known = |number: Option<i64>| number.map_or_else(|| "-".into(), |number| number.to_string());
    let mut rows: Vec<_> = positions
        .iter()
        .map(|p| {
            [
                format!("{}/{}", p.id.0, p.id.1),
                known(p.committed),
                p.end.to_string(),
                p.lag.to_string(),
                known(p.lag_seconds),
                or_dash(p.owner.as_deref().unwrap_or_default()),
            ]
        })
        .collect();
    let (lag, lag_seconds) = total(positions);
    rows.push(["all".into(), "-".into(), "-".into(), lag.to_string(), known(lag_seconds), "-".into()]);
    table::print(["PARTITION", "COMMITTED", "END", "LAG RECORDS", "LAG SECONDS", "INSTANCE"], &rows);
}

/// The records that wait in all partitions, and the age of the oldest of them.
fn total(positions: &[Position]) -> (i64, Option<i64>) {
    (positions.iter().map(|p| p.lag).sum(), positions.iter().filter_map(|p| p.lag_seconds).max())
}

fn as_json(
    settings: &Settings,
    group: &Group,
    positions: &[Position],
    paused: Option<&ledger::Pause>,
    letters: &Letters,
) -> Value {
    let (lag, lag_seconds) = total(positions);
    let ids = |ids: &[PartitionId]| ids.iter().map(|(topic, n)| format!("{topic}/{n}")).collect::<Vec<_>>();
    let members = group.members.iter().map(|member| {
        let partitions = ids(&member.partitions);
        json!({ "id": member.id, "client": member.client, "host": member.host, "partitions": partitions })
    });
    let partitions = positions.iter().map(|p| {
        json!({
            "topic": p.id.0, "partition": p.id.1, "committed": p.committed, "end": p.end,
            "lagRecords": p.lag, "lagSeconds": p.lag_seconds, "instance": p.owner,
        })
    });
    let reasons: BTreeMap<&str, i64> =
        letters.reasons.iter().map(|(r, count)| (r.as_str(), *count)).collect();
    json!({
        "group": settings.kafka.group,
        "handler": settings.handler,
        "state": group.state,
        "paused": pause::told(paused),
        "instances": members.collect::<Vec<_>>(),
        "partitions": partitions.collect::<Vec<_>>(),
        "lagRecords": lag,
        "lagSeconds": lag_seconds,
        "openLetters": reasons.values().sum::<i64>(),
        "openLettersByReason": reasons,
        "blockedKeys": letters.blocked_keys,
        "parkedRecords": letters.parked,
    })
}

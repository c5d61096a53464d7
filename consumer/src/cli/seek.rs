//! `seek`: moves a group's offsets while nobody consumes.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde_json::json;
use service::{Failure, exit::Kind, table};
use tokio::task::block_in_place;

use super::time;
use crate::{cluster::Cluster, config::Settings, group::PartitionId};

#[derive(Debug, clap::Args)]
pub(super) struct Seek {
    #[command(flatten)]
    to: Target,
    /// Only in this topic
    #[arg(long, value_name = "NAME")]
    topic: Option<String>,
    /// Only in this partition; may be repeated
    #[arg(long, value_name = "N")]
    partition: Vec<i32>,
    /// Only tell what would be done
    #[arg(long)]
    dry_run: bool,
    /// Yes, leave out what is skipped. Without this, a seek forward is a dry run
    #[arg(long)]
    yes: bool,
    /// A JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Target {
    /// To the first record written then or later: 2026-11-21T13:00:00Z, or how long ago: 15m, 2h, 3d
    #[arg(long = "to-time", value_name = "TIME", value_parser = time::parse)]
    time: Option<DateTime<Utc>>,
    /// To the oldest record that there is
    #[arg(long = "to-beginning")]
    beginning: bool,
    /// Behind the newest record
    #[arg(long = "to-end")]
    end: bool,
}

/// One partition's move.
struct Move {
    id: PartitionId,
    /// Nothing where the group has not been yet: it would begin with the oldest record.
    from: Option<i64>,
    to: i64,
    /// Records that come again (negative) or are skipped.
    records: i64,
}

pub(super) fn seek(settings: &Settings, seek: &Seek) -> Result<(), Failure> {
    block_in_place(|| {
        let cluster = Cluster::new(&settings.kafka)?;
        let moves = seek.moves(&cluster, &seek.partitions(&cluster, settings)?)?;
        let skipped: i64 = moves.iter().map(|m| m.records.max(0)).sum();
        let again: i64 = moves.iter().map(|m| -m.records.min(0)).sum();
        // Before anything is told, so that no table looks as if it had been done.
        if !seek.dry_run {
            nobody_consumes(&cluster, &settings.kafka.group)?;
        }
        seek.tell(&moves);
        if again > 0 {
            eprintln!(
                "{again} records come again: those that were applied are recognised and change nothing; \
                 `consumer rebuild` applies them anew"
            );
        }
        if skipped > 0 {
            eprintln!("{skipped} records are skipped, and never applied");
        }
        if seek.dry_run {
            return Ok(());
        }
        if skipped > 0 && !seek.yes {
            let why = "nothing was moved: records would be skipped for good, so this was a dry run";
            return Err(Failure::configuration(why).hint("add --yes"));
        }
        let offsets: BTreeMap<PartitionId, i64> = moves.into_iter().map(|m| (m.id, m.to)).collect();
        if offsets.is_empty() { Ok(()) } else { cluster.commit(&offsets) }
    })
}

/// # Errors
/// While it has members: they would go on where they are, and commit that.
fn nobody_consumes(cluster: &Cluster, group: &str) -> Result<(), Failure> {
    let members = cluster.group()?.members;
    if members.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = members.iter().map(|m| format!("{} at {}", m.id, m.host)).collect();
    let why = format!("{group} is being consumed by {}", names.join(", "));
    Err(Failure::new(Kind::Halted, why).hint(
        "stop them first (one that was killed is missed after session.timeout.ms); --dry-run works meanwhile",
    ))
}

impl Seek {
    fn partitions(&self, cluster: &Cluster, settings: &Settings) -> Result<Vec<PartitionId>, Failure> {
        let topics = &settings.kafka.topics;
        if let Some(topic) = self.topic.as_ref().filter(|topic| !topics.contains(topic)) {
            let why = format!("{} does not consume {topic}", settings.kafka.group);
            return Err(Failure::configuration(why).hint(format!("it consumes {}", topics.join(", "))));
        }
        let mut ids = Vec::new();
        for name in topics.iter().filter(|name| self.topic.as_ref().is_none_or(|topic| topic == *name)) {
            let Some(topic) = cluster.topic(name)? else {
                return Err(Failure::new(Kind::Refused, format!("the topic {name} does not exist"))
                    .hint("create it, or correct kafka.topics"));
            };
            if let Some(wrong) = self.partition.iter().find(|n| !(0..topic.partitions).contains(n)) {
                let why = format!("{name} has no partition {wrong}: it has 0 to {}", topic.partitions - 1);
                return Err(Failure::configuration(why));
            }
            let wanted = |n: &i32| self.partition.is_empty() || self.partition.contains(n);
            ids.extend((0..topic.partitions).filter(wanted).map(|n| (name.clone(), n)));
        }
        Ok(ids)
    }

    fn moves(&self, cluster: &Cluster, ids: &[PartitionId]) -> Result<Vec<Move>, Failure> {
        let committed = cluster.committed(ids)?;
        let at_time = match self.to.time {
            Some(time) => cluster.at_time(ids, time.timestamp_millis())?,
            None => BTreeMap::new(),
        };
        ids.iter()
            .map(|id| {
                let (begin, end) = cluster.bounds(id)?;
                let to = if self.to.beginning { begin } else { at_time.get(id).copied().unwrap_or(end) };
                let from = committed.get(id).copied();
                // Of what is not there any more nothing comes again.
                let records = to - from.unwrap_or(begin).max(begin);
                Ok(Move { id: id.clone(), from, to, records })
            })
            .collect()
    }

    fn tell(&self, moves: &[Move]) {
        if self.json {
            for Move { id, from, to, records } in moves {
                service::say!(
                    "{}",
                    json!({ "topic": id.0, "partition": id.1, "from": from, "to": to, "records": records })
                );
            }
            return;
        }
        let rows = moves.iter().map(|Move { id, from, to, records }| {
            let what = match records {
                0 => "none".into(),
                1.. => format!("{records} skipped"),
                _ => format!("{} again", -records),
            };
            let from = from.map_or_else(|| "-".into(), |from| from.to_string());
            [format!("{}/{}", id.0, id.1), from, to.to_string(), what]
        });
        table::print(["PARTITION", "FROM", "TO", "RECORDS"], &rows.collect::<Vec<_>>());
    }
}

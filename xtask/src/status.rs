//! `cargo xtask status`: what runs, how it is, and how far behind.

use std::{
    collections::HashMap,
    io::{self, Write},
    time::Duration,
};

use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
};
use serde::Serialize;
use sqlx::{Connection, PgConnection};

use crate::{
    cli,
    failure::{Explain, Result},
    identity::Identity,
    layout::Layout,
    services,
    spec::Probe,
    state::{self, Entry, State},
    topics::{self, Quiet},
};

/// How long Kafka and Postgres may take to tell the lags.
const LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug, Serialize)]
struct Row {
    process: String,
    port: u16,
    /// The process id, of a process that is alive.
    pid: Option<u32>,
    /// What the supervisor says, or `unsupervised` when it is gone.
    state: String,
    health: &'static str,
    restarts: u32,
    /// Records that the consumer's group has not committed yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    consumer_lag_records: Option<i64>,
    /// WAL that the relay's slot has not confirmed yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    slot_lag_bytes: Option<i64>,
}

/// Prints the table.
pub(crate) async fn status(args: &cli::Status) -> Result<()> {
    let layout = Layout::open(args.place.dir.as_deref())?;
    let supervised = state::lock(&layout)?.is_none();
    let state = match state::read(&layout) {
        Some(state) if supervised || state.processes.iter().any(alive) => state,
        _ => return state::running(&layout).map(drop),
    };
    let slots = slot_lags(&state).await;
    let mut rows = Vec::new();
    for entry in &state.processes {
        rows.push(row(&state, entry, supervised, &slots).await);
    }
    let text = if args.json {
        serde_json::to_string_pretty(&rows).explain(|| "print the status".to_owned())?
    } else {
        table(&rows)
    };
    // `| head` is not an error.
    let _ = writeln!(io::stdout(), "{text}");
    if !supervised {
        eprintln!("\nThe supervisor was killed; these processes are left. `cargo xtask down` stops them.");
    }
    Ok(())
}

fn alive(entry: &Entry) -> bool {
    entry.identity.as_ref().is_some_and(Identity::alive)
}

async fn row(state: &State, entry: &Entry, supervised: bool, slots: &HashMap<String, i64>) -> Row {
    let alive = alive(entry);
    let probe = match entry.service.as_str() {
        "postgres" => Probe::Postgres { url: state.endpoints.postgres_superuser.clone() },
        "kafka" => Probe::Kafka { port: entry.port },
        _ => Probe::Http { url: format!("http://127.0.0.1:{}/health/ready", entry.port) },
    };
    let health = match (alive, alive && probe.attempt().await) {
        (false, _) => "dead",
        (true, true) => "ready",
        (true, false) => "not ready",
    };
    let consumer = services::package(&entry.service) == Some("consumer");
    let group = entry.service.clone();
    let kafka = state.endpoints.kafka.clone();
    let lag = move || consumer_lag(&kafka, &group);
    let consumer_lag_records =
        if consumer { tokio::task::spawn_blocking(lag).await.ok().flatten() } else { None };
    Row {
        process: entry.name.clone(),
        port: entry.port,
        pid: entry.identity.as_ref().filter(|_| alive).map(|identity| identity.pid),
        state: if supervised { entry.phase.word().to_owned() } else { "unsupervised".to_owned() },
        health,
        restarts: entry.restarts,
        consumer_lag_records,
        slot_lag_bytes: services::slot(&entry.service).and_then(|slot| slots.get(slot).copied()),
    }
}

/// How far each slot is behind the end of the WAL, as far as Postgres tells.
async fn slot_lags(state: &State) -> HashMap<String, i64> {
    let ask = async {
        let mut connection = PgConnection::connect(&state.endpoints.postgres_superuser).await?;
        let sql = "SELECT slot_name::text, pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)::bigint \
                   FROM pg_replication_slots WHERE confirmed_flush_lsn IS NOT NULL";
        let lags: Vec<(String, i64)> = sqlx::query_as(sql).fetch_all(&mut connection).await?;
        Ok::<_, sqlx::Error>(lags.into_iter().collect())
    };
    tokio::time::timeout(LIMIT, ask).await.ok().and_then(std::result::Result::ok).unwrap_or_default()
}

/// How many records of its topic a group has not committed yet.
fn consumer_lag(bootstrap: &str, group: &str) -> Option<i64> {
    let topic = services::topic(group);
    let mut config = topics::client(bootstrap);
    config.set("group.id", group);
    let consumer: BaseConsumer<Quiet> = config.create_with_context(Quiet).ok()?;
    let metadata = consumer.fetch_metadata(Some(topic), LIMIT).ok()?;
    let mut wanted = TopicPartitionList::new();
    for partition in metadata.topics().first()?.partitions() {
        wanted.add_partition(topic, partition.id());
    }
    let committed = consumer.committed_offsets(wanted, LIMIT).ok()?;
    let mut lag = 0;
    for partition in committed.elements() {
        let (low, high) = consumer.fetch_watermarks(topic, partition.partition(), LIMIT).ok()?;
        let from = match partition.offset() {
            Offset::Offset(offset) => offset.max(low),
            _ => low,
        };
        lag += (high - from).max(0);
    }
    Some(lag)
}

fn table(rows: &[Row]) -> String {
    let header = ["PROCESS", "PORT", "PID", "STATE", "HEALTH", "RESTARTS", "CONSUMER LAG", "SLOT LAG"];
    let mut lines = vec![header.map(str::to_owned)];
    for row in rows {
        let dash = || "-".to_owned();
        lines.push([
            row.process.clone(),
            row.port.to_string(),
            row.pid.map_or_else(dash, |pid| pid.to_string()),
            row.state.clone(),
            row.health.to_owned(),
            row.restarts.to_string(),
            row.consumer_lag_records.map_or_else(dash, |lag| format!("{lag} records")),
            row.slot_lag_bytes.map_or_else(dash, |lag| format!("{lag} bytes")),
        ]);
    }
    let widths: Vec<usize> = (0..header.len())
        .map(|column| lines.iter().map(|line| line[column].len()).max().unwrap_or(0))
        .collect();
    let text = |line: &[String; 8]| {
        let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    lines.iter().map(text).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_aligned_and_a_missing_value_is_a_dash() {
        let row = Row {
            process: "cdc-relay".to_owned(),
            port: 8081,
            pid: None,
            state: "down".to_owned(),
            health: "dead",
            restarts: 2,
            consumer_lag_records: None,
            slot_lag_bytes: Some(1234),
        };
        let text = table(&[row]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0].find("PORT"), lines[1].find("8081"));
        assert!(lines[1].contains("-    down") && lines[1].ends_with("1234 bytes"), "{text}");
    }
}

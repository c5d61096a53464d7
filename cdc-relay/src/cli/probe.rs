//! `cdc-relay probe`: how fast this Postgres gives us this slot's log.

use std::{
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use relay_core::{
    Lsn, Relay, StatusUpdate, pgoutput,
    relay::{Delivery, Options},
};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use service::{Failure, exit::Kind as Exit};

use crate::{
    clock,
    config::Settings,
    error::{Error, Kind},
    ledger::Owner,
    replication::{
        connection::Connection,
        handshake::Purpose,
        pace::Pace,
        stream::{Event, ReplicationStream},
    },
    start, wait,
};

/// How often a terminal is told how far we are.
const TELL_INTERVAL: Duration = Duration::from_secs(1);
/// At most so many times from commit to here are kept, of the first transactions.
const LATENCIES_MAX: usize = 1_000_000;

/// Where to stop, and what to print.
#[derive(Debug, clap::Args)]
pub(super) struct Probe {
    /// Stop where everything that was committed before this LSN has been read [default: the end of the log as it
    /// is at the start].
    #[arg(long, value_name = "LSN", conflicts_with = "rows")]
    until: Option<Lsn>,
    /// Stop after so many rows of the outbox, and wait for them if need be.
    #[arg(long, value_name = "N")]
    rows: Option<u64>,
    /// Take every byte at once instead of pacing the server, to see what the pacing is worth.
    #[arg(long)]
    eager: bool,
    /// Tell the times from a row's commit until it was decoded here: of use where the log is written while we read,
    /// and where both machines have the same time.
    #[arg(long)]
    latency: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// What came of it.
#[derive(Debug, Default, Serialize)]
struct Measured {
    rows: u64,
    transactions: u64,
    /// Bytes of the server's messages, before decoding.
    bytes: u64,
    /// Changes that were not inserts into the outbox.
    ignored_changes: u64,
    /// From the start of the stream to the last message.
    seconds: f64,
    rows_per_second: f64,
    /// What this process used, from its start.
    cpu_seconds: f64,
    /// None where the system does not tell.
    peak_rss_bytes: Option<u64>,
    from_lsn: String,
    to_lsn: String,
    /// Only where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    commit_to_decoded_us: Option<Latency>,
}

/// Times from commit to here, in microseconds.
#[derive(Debug, Serialize)]
struct Latency {
    count: usize,
    p50: u32,
    p90: u32,
    p99: u32,
    max: u32,
}

/// Reads until the end that was asked for, and prints what that took.
pub(super) fn probe(settings: &Settings, probe: &Probe) -> Result<(), Failure> {
    let measured = Reading::begin(settings, probe).and_then(Reading::run).map_err(Error::into_failure)?;
    let text = if probe.json {
        serde_json::to_string_pretty(&measured)
            .map_err(|e| Failure::new(Exit::Internal, format!("cannot print the result: {e}")))?
    } else {
        measured.table()
    };
    service::say!("{text}");
    Ok(())
}

/// A session that ends in nothing.
struct Reading<'a> {
    probe: &'a Probe,
    stream: ReplicationStream,
    relay: Relay,
    pace: Pace,
    started: Instant,
    /// The slot's own: all that is ever reported, so that nothing is confirmed.
    confirmed: Lsn,
    until: Lsn,
    measured: Measured,
    latencies_us: Vec<u32>,
    /// When the transaction that is being read was committed, in microseconds since 2000.
    committed_at_us: i64,
    told: Instant,
}

impl<'a> Reading<'a> {
    fn begin(settings: &Settings, probe: &'a Probe) -> Result<Self, Error> {
        let until = match probe.until {
            Some(lsn) => lsn,
            None => end_of_log(settings)?,
        };
        let (stream, system, position, partitions) = start::take_slot(settings)?;
        let owner = Owner { system: system.identifier, slot: settings.slot.clone() };
        // It recalls no past, so it writes no checkpoint and confirms nothing.
        let mut relay = Relay::new(
            // Nothing is delivered, so the simplest promise will do.
            Options {
                delivery: Delivery::AtLeastOnce,
                ..start::relay_options(settings, &owner, &position, partitions)
            },
            position.confirmed,
            Duration::ZERO,
        );
        relay.set_listening(true, Duration::ZERO);
        Ok(Self {
            probe,
            stream,
            relay,
            pace: if probe.eager { Pace::eager() } else { Pace::new() },
            started: Instant::now(),
            confirmed: position.confirmed,
            until,
            measured: Measured::default(),
            latencies_us: Vec::new(),
            committed_at_us: 0,
            told: Instant::now(),
        })
    }

    fn run(mut self) -> Result<Measured, Error> {
        while !self.is_done() {
            self.feed_back()?;
            if !self.read()? && !self.pace.drained(self.stream.behind()) {
                let left = self.relay.next_deadline().saturating_sub(self.started.elapsed());
                wait::for_socket(self.stream.fd(), self.stream.wants_write(), left);
            }
            self.tell();
        }
        let seconds = self.started.elapsed().as_secs_f64();
        let end = self.relay.received();
        let confirmed = self.confirmed;
        if self.told > self.started && io::stderr().is_terminal() {
            eprintln!();
        }
        // How the goodbye goes changes nothing about what was measured.
        let _ = self.stream.finish(StatusUpdate { received: end, confirmed });
        let mut measured = self.measured;
        measured.ignored_changes = self.relay.ignored_changes();
        measured.seconds = seconds;
        #[expect(clippy::cast_precision_loss, reason = "no count of rows comes near 2^52")]
        let rows = measured.rows as f64;
        measured.rows_per_second = if seconds > 0.0 { rows / seconds } else { 0.0 };
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        measured.cpu_seconds = Duration::try_from(cpu).unwrap_or_default().as_secs_f64();
        measured.peak_rss_bytes = peak_rss_bytes();
        (measured.from_lsn, measured.to_lsn) = (confirmed.to_string(), end.to_string());
        measured.commit_to_decoded_us = self.probe.latency.then(|| Latency::of(self.latencies_us)).flatten();
        Ok(measured)
    }

    /// Whether everything that was asked for was read.
    fn is_done(&self) -> bool {
        match self.probe.rows {
            Some(rows) => self.measured.rows >= rows,
            None => self.relay.received() >= self.until && !self.relay.is_in_transaction(),
        }
    }

    /// Handles what was read and reads more; false when the socket is drained.
    fn read(&mut self) -> Result<bool, Error> {
        let now = self.started.elapsed();
        loop {
            match self.stream.next_event()? {
                None => return self.stream.fill(),
                Some(Event::Keepalive { wal_end, reply_requested }) => {
                    self.relay.handle_keepalive(wal_end, reply_requested, now)?;
                }
                Some(Event::Wal { start, message }) => {
                    self.pace.message();
                    self.measured.bytes += message.len() as u64;
                    self.measured.transactions += u64::from(message.first() == Some(&b'C'));
                    if self.probe.latency
                        && let Ok(pgoutput::Message::Begin { committed_at_us, .. }) =
                            pgoutput::decode(message)
                    {
                        self.committed_at_us = committed_at_us;
                    }
                    if let Some(record) = self.relay.handle_wal(start, message, now)? {
                        let ticket = record.ticket;
                        // Nowhere: it counts as delivered at once, so that its credit comes back.
                        self.relay.handle_settled(ticket)?;
                        self.measured.rows += 1;
                        if self.probe.latency && self.latencies_us.len() < LATENCIES_MAX {
                            self.latencies_us.push(us_since(self.committed_at_us));
                        }
                    }
                }
            }
            if self.is_done() {
                return Ok(true);
            }
        }
    }

    /// The status update that is due, with the slot's own confirmed LSN.
    fn feed_back(&mut self) -> Result<(), Error> {
        let now = self.started.elapsed();
        if self.stream.wants_write() {
            self.stream.flush()?;
        } else if let Some(status) = self.relay.take_status(now) {
            self.stream.send_status(StatusUpdate { confirmed: self.confirmed, ..status })?;
        }
        if self.relay.is_silent(now) {
            return Err(Error::new(Kind::PostgresAway, "the server has said nothing for too long"));
        }
        Ok(())
    }

    fn tell(&mut self) {
        if self.told.elapsed() < TELL_INTERVAL {
            return;
        }
        self.told = Instant::now();
        let mut stderr = io::stderr().lock();
        if stderr.is_terminal() {
            let (rows, at) = (self.measured.rows, self.relay.received());
            // Whoever does not see it loses nothing.
            let _ = write!(stderr, "\r… {rows} rows, at {at}").and_then(|()| stderr.flush());
        }
    }
}

/// The end of the server's log.
fn end_of_log(settings: &Settings) -> Result<Lsn, Error> {
    let mut connection = Connection::connect(&settings.postgres, Purpose::Sql, settings.connect_timeout)?;
    let sql = "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END";
    let rows = connection.simple_query(sql)?;
    let text = rows.into_iter().flatten().flatten().next().unwrap_or_default();
    text.parse().map_err(|e| Error::new(Kind::Internal, format!("the end of the log: {e}")))
}

/// Microseconds from a time of Postgres' (since 2000) until now.
fn us_since(postgres_us: i64) -> u32 {
    u32::try_from(clock::us_since(postgres_us)).unwrap_or(u32::MAX)
}

/// The most memory that this process had at once, as Linux tells it.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

impl Latency {
    fn of(mut times_us: Vec<u32>) -> Option<Self> {
        times_us.sort_unstable();
        let at = |percent: usize| times_us.get((times_us.len() * percent / 100).min(times_us.len() - 1));
        let max = *times_us.last()?;
        Some(Self { count: times_us.len(), p50: *at(50)?, p90: *at(90)?, p99: *at(99)?, max })
    }
}

impl Measured {
    fn table(&self) -> String {
        let mut lines = vec![
            ("rows", self.rows.to_string()),
            ("transactions", self.transactions.to_string()),
            ("other changes", self.ignored_changes.to_string()),
            ("bytes", self.bytes.to_string()),
            ("seconds", format!("{:.3}", self.seconds)),
            ("rows/s", format!("{:.0}", self.rows_per_second)),
            ("CPU seconds", format!("{:.3}", self.cpu_seconds)),
            ("from", self.from_lsn.clone()),
            ("to", self.to_lsn.clone()),
        ];
        if let Some(bytes) = self.peak_rss_bytes {
            lines.push(("peak memory", format!("{} KiB", bytes / 1024)));
        }
        if let Some(Latency { count, p50, p90, p99, max }) = &self.commit_to_decoded_us {
            lines.push((
                "commit to here",
                format!("{count} rows: p50 {p50} µs, p90 {p90} µs, p99 {p99} µs, max {max} µs"),
            ));
        }
        lines.iter().map(|(name, value)| format!("{name:<15} {value}")).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_sorted_times() {
        let latency = Latency::of((1..=100).rev().collect()).unwrap();
        assert_eq!((latency.p50, latency.p90, latency.p99, latency.max), (51, 91, 100, 100));
        let one = Latency::of(vec![7]).unwrap();
        assert_eq!((one.p50, one.p99, one.max), (7, 7, 7));
        assert!(Latency::of(Vec::new()).is_none());
    }
}

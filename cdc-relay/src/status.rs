//! One look at everything that says how the relay is: the slot, the checkpoint in Kafka, and the relay's own word.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use relay_core::Lsn;
use serde::Serialize;

use crate::{
    config::Settings,
    error::{Error, Kind},
    ledger::{Ledger, Owner},
    replication::{connection::Connection, handshake::Purpose, stream::identify},
    wal,
};

/// Between the two looks that tell how fast the log grows.
const RATE_INTERVAL: Duration = Duration::from_secs(1);
/// How long the relay may take to answer.
const RELAY_TIMEOUT: Duration = Duration::from_secs(3);
/// The most of an answer that is read, in bytes.
const ANSWER_LIMIT_BYTES: u64 = 4 << 20;

/// What is None is not known, or there is no such thing.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Look {
    pub(crate) slot: String,
    pub(crate) exists: bool,
    pub(crate) active: Option<bool>,
    /// Who streams from it, as far as the server tells us.
    pub(crate) holder: Option<Holder>,
    pub(crate) wal_status: Option<String>,
    /// From version 16 on.
    pub(crate) invalidation_reason: Option<String>,
    pub(crate) confirmed_lsn: Option<String>,
    pub(crate) restart_lsn: Option<String>,
    pub(crate) confirmed_lag_bytes: Option<i64>,
    pub(crate) restart_lag_bytes: Option<i64>,
    /// How long the log that the relay reported last had waited for that; without anything to report, or nobody to, since when
    /// the last checkpoint was.
    pub(crate) lag_seconds: Option<f64>,
    pub(crate) wal_bytes_per_second: Option<f64>,
    /// What may be written until the slot is lost; None where the server sets no limit.
    pub(crate) safe_wal_bytes: Option<i64>,
    /// At the present rate, if the slot stays where it is; 0 where it is beyond the limit.
    pub(crate) seconds_to_slot_loss: Option<f64>,
    pub(crate) checkpoint: Option<Checkpoint>,
    pub(crate) relay: Option<Relay>,
    /// Why something is not known.
    pub(crate) notes: Vec<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Holder {
    pub(crate) pid: String,
    pub(crate) application: Option<String>,
    pub(crate) client: Option<String>,
}

/// The last one in Kafka.
#[derive(Debug, Serialize)]
pub(crate) struct Checkpoint {
    pub(crate) lsn: String,
    pub(crate) at: String,
    pub(crate) age_seconds: Option<f64>,
    pub(crate) instance: String,
}

/// What the relay says of itself.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Relay {
    pub(crate) url: String,
    pub(crate) ready: Option<bool>,
    pub(crate) state: Option<String>,
    /// Why it is not ready.
    pub(crate) detail: Option<String>,
    pub(crate) in_flight_records: Option<u64>,
    pub(crate) in_flight_bytes: Option<u64>,
    /// Errors since it was started, by kind.
    pub(crate) errors: BTreeMap<String, u64>,
    /// Of those, the last one after which it tried again.
    pub(crate) last_error: Option<LastError>,
}

/// What went wrong, and when.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(crate) struct LastError {
    pub(crate) at: Option<String>,
    pub(crate) message: String,
}

/// Looks at it all.
///
/// # Errors
/// Postgres cannot be asked. Kafka and the relay may be away.
pub(crate) fn look(settings: &Settings, relay: &str) -> Result<Look, Error> {
    let mut connection = Connection::connect(&settings.postgres, Purpose::Sql, settings.connect_timeout)?;
    let mut status = Look { slot: settings.slot.clone(), ..Look::default() };
    if connection.is_in_recovery()? {
        let what = format!("Postgres at {} is a standby, which does not write the log", connection.place());
        return Err(Error::new(Kind::Refused, what)
            .hint("name the primary in postgres.url, or all hosts and target_session_attrs=read-write"));
    }
    let (first, since) = (wal_end(&mut connection)?, Instant::now());
    // Meanwhile.
    status.look_at_kafka(settings, &mut connection);
    status.ask_relay(relay);
    std::thread::sleep(RATE_INTERVAL.saturating_sub(since.elapsed()));
    let (second, seconds) = (wal_end(&mut connection)?, since.elapsed().as_secs_f64());
    #[expect(clippy::cast_precision_loss, reason = "no log grows by 2^52 bytes meanwhile")]
    let rate = second.bytes_since(first) as f64 / seconds;
    status.wal_bytes_per_second = Some(rate);
    status.look_at_slot(&mut connection, rate)?;
    Ok(status)
}

fn wal_end(connection: &mut Connection) -> Result<Lsn, Error> {
    let rows = connection.simple_query("SELECT pg_current_wal_lsn()")?;
    let text = rows.into_iter().flatten().flatten().next().unwrap_or_default();
    text.parse().map_err(|e| Error::new(Kind::Internal, format!("the end of the log: {e}")))
}

impl Look {
    fn look_at_slot(&mut self, connection: &mut Connection, rate: f64) -> Result<(), Error> {
        let sql = "SELECT s.active::text, s.active_pid, nullif(a.application_name, ''), host(a.client_addr), s.wal_status, \
                   to_jsonb(s) ->> 'invalidation_reason', s.confirmed_flush_lsn, s.restart_lsn, \
                   pg_wal_lsn_diff(pg_current_wal_lsn(), s.confirmed_flush_lsn)::int8, \
                   pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn)::int8, s.safe_wal_size, \
                   extract(epoch FROM r.flush_lag)::float8 \
                   FROM pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid \
                   LEFT JOIN pg_stat_replication r ON r.pid = s.active_pid WHERE s.slot_name = $1";
        let rows = connection.query(sql, &[&self.slot])?;
        let Some(row) = rows.into_iter().next() else { return Ok(()) };
        self.exists = true;
        let mut columns = row.into_iter();
        let mut column = || columns.next().flatten();
        self.active = column().map(|active| active == "true");
        let (pid, application, client) = (column(), column(), column());
        self.holder = pid.map(|pid| Holder { pid, application, client });
        (self.wal_status, self.invalidation_reason) = (column(), column());
        (self.confirmed_lsn, self.restart_lsn) = (column(), column());
        // It can be a little beyond the place up to which the log was written when we asked.
        let mut bytes = || column().and_then(|n| n.parse::<i64>().ok());
        (self.confirmed_lag_bytes, self.restart_lag_bytes) =
            (bytes().map(|n| n.max(0)), bytes().map(|n| n.max(0)));
        self.safe_wal_bytes = bytes();
        let reported: Option<f64> = column().and_then(|seconds| seconds.parse().ok());
        let since_checkpoint = self.checkpoint.as_ref().and_then(|checkpoint| checkpoint.age_seconds);
        self.lag_seconds = match self.confirmed_lag_bytes {
            Some(0) => Some(0.0),
            Some(_) => reported.or(since_checkpoint),
            None => None,
        };
        #[expect(clippy::cast_precision_loss, reason = "no disk has 2^52 bytes")]
        let left = self.safe_wal_bytes.map(|bytes| bytes as f64);
        self.seconds_to_slot_loss = left.and_then(|bytes| wal::seconds_to_loss(bytes, rate));
        Ok(())
    }

    fn look_at_kafka(&mut self, settings: &Settings, connection: &mut Connection) {
        let since = Instant::now();
        let patience = || {
            if since.elapsed() < settings.connect_timeout {
                return Ok(());
            }
            let what = format!("Kafka at {} has not answered in time", settings.kafka.brokers);
            Err(Error::new(Kind::DeliveryFailed, what))
        };
        let mut read = || -> Result<Ledger, Error> {
            let beside =
                connection.beside(&settings.postgres, Purpose::Replication, settings.connect_timeout);
            let owner = Owner { system: identify(&mut beside?)?.identifier, slot: settings.slot.clone() };
            Ledger::read(settings, &owner, &patience)
        };
        match read() {
            Err(e) => self.notes.push(format!("the checkpoint is not known: {e}")),
            Ok(Ledger { checkpoint: None, .. }) => {
                self.notes.push("Kafka has no checkpoint of this slot".into());
            }
            Ok(Ledger { checkpoint: Some(checkpoint), .. }) => {
                let at = chrono::DateTime::parse_from_rfc3339(&checkpoint.at).ok();
                let age = at.map(|at| chrono::Utc::now().signed_duration_since(at));
                #[expect(clippy::cast_precision_loss, reason = "no age has 2^52 milliseconds")]
                let age_seconds = age.map(|age| age.num_milliseconds().max(0) as f64 / 1000.0);
                let (lsn, at, instance) = (checkpoint.lsn.to_string(), checkpoint.at, checkpoint.instance);
                self.checkpoint = Some(Checkpoint { lsn, at, age_seconds, instance });
            }
        }
    }

    fn ask_relay(&mut self, url: &str) {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_global(Some(RELAY_TIMEOUT))
            .build()
            .into();
        let get = |path: &str| -> Result<String, ureq::Error> {
            let mut response = agent.get(format!("{url}{path}")).call()?;
            response.body_mut().with_config().limit(ANSWER_LIMIT_BYTES).read_to_string()
        };
        match get("/health/ready").and_then(|health| Ok((health, get("/metrics")?))) {
            Ok((health, metrics)) => self.relay = Some(Relay::parse(url, &health, &metrics)),
            Err(e) => self.notes.push(format!("the relay at {url} cannot be asked: {e}")),
        }
    }
}

impl Relay {
    fn parse(url: &str, health: &str, metrics: &str) -> Self {
        let health: serde_json::Value = serde_json::from_str(health).unwrap_or_default();
        let text = |name: &str| health[name].as_str().map(str::to_owned);
        let last = |name: &str| health["lastError"][name].as_str().map(str::to_owned);
        let gauge = |name: &str| {
            metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        };
        let errors = metrics.lines().filter_map(|line| {
            let (kind, count) = line.strip_prefix("cdc_relay_errors_total{kind=\"")?.split_once("\"} ")?;
            let count = count.parse().ok().filter(|count| *count > 0)?;
            Some((kind.to_owned(), count))
        });
        Self {
            url: url.to_owned(),
            ready: health["ready"].as_bool(),
            state: text("state"),
            detail: text("detail"),
            in_flight_records: gauge("cdc_relay_in_flight_records"),
            in_flight_bytes: gauge("cdc_relay_in_flight_bytes"),
            errors: errors.collect(),
            last_error: last("message").map(|message| LastError { at: last("at"), message }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_relay_does_not_say_is_not_known() {
        let metrics = "cdc_relay_in_flight_records 3\ncdc_relay_errors_total{kind=\"postgres_away\"} 2\n\
             cdc_relay_errors_total{kind=\"halted\"} 0\n# EOF";
        let relay = Relay::parse("http://x", r#"{"ready":true,"state":"streaming"}"#, metrics);
        assert_eq!(
            (relay.ready, relay.state.as_deref(), relay.detail.as_deref()),
            (Some(true), Some("streaming"), None)
        );
        assert_eq!((relay.in_flight_records, relay.in_flight_bytes), (Some(3), None));
        assert_eq!(relay.errors, BTreeMap::from([("postgres_away".into(), 2)]));
        let health = r#"{"ready":true,"state":"streaming","lastError":{"at":"2026-01-01T00:00:00Z","message":"gone"}}"#;
        let last = LastError { at: Some("2026-01-01T00:00:00Z".into()), message: "gone".into() };
        assert_eq!((relay.last_error, Relay::parse("", health, "").last_error), (None, Some(last)));
        let other = Relay::parse("http://x", "<html>", "");
        assert_eq!((other.ready, other.state, other.in_flight_records), (None, None, None));
    }
}

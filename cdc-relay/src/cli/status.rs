//! `cdc-relay status`

use serde_json::json;
use service::{
    Failure,
    table::{age, or_dash},
};

use super::relay_api::relay_url;
use crate::{
    config::Settings,
    error::Error,
    status::{self, Checkpoint, LastError, Look, Relay},
};

/// What lasts longer lasts long enough: two years.
const FAR_SECONDS: f64 = 2.0 * 365.0 * 86_400.0;

#[derive(Debug, clap::Args)]
pub(super) struct Status {
    /// Where the relay is. Without this, http.listen of the configuration
    #[arg(long, value_name = "URL")]
    relay: Option<String>,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Prints what there is to know; what is not known is a dash.
pub(super) fn status(settings: &Settings, status: &Status) -> Result<(), Failure> {
    let url = relay_url(settings, status.relay.as_deref());
    let found = status::look(settings, &url).map_err(Error::into_failure)?;
    if status.json {
        service::say!("{}", json!(found));
    } else {
        print(&found);
    }
    Ok(())
}

fn print(status: &Look) {
    let seconds = |seconds: Option<f64>| seconds.map(|seconds| format!("{seconds:.1} s"));
    let lsn = |bytes: Option<i64>, lsn: &Option<String>| {
        let lsn = lsn.as_ref().map(|lsn| format!(", at {lsn}")).unwrap_or_default();
        bytes.map(|bytes| format!("{bytes} bytes{lsn}"))
    };
    let state = match (status.exists, status.active) {
        (false, _) => "does not exist",
        (true, Some(true)) => "active",
        (true, _) => "nobody streams from it",
    };
    line("slot", Some(format!("{}, {state}", status.slot)));
    let holder = status.holder.as_ref().map(|holder| {
        let application = holder.application.as_deref().unwrap_or("an unnamed client");
        let client = holder.client.as_ref().map(|client| format!(" from {client}")).unwrap_or_default();
        format!("{application}{client}, server process {}", holder.pid)
    });
    line("held by", holder);
    let reason = status.invalidation_reason.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
    line("WAL", status.wal_status.as_ref().map(|wal| format!("{wal}{reason}")));
    line("confirmed lag", lsn(status.confirmed_lag_bytes, &status.confirmed_lsn));
    line("restart lag", lsn(status.restart_lag_bytes, &status.restart_lsn));
    line("lag", seconds(status.lag_seconds));
    line("WAL written", status.wal_bytes_per_second.map(|rate| format!("{rate:.0} bytes/s")));
    line(
        "until slot lost",
        status.safe_wal_bytes.map(|bytes| {
            let time = status.seconds_to_slot_loss.map_or_else(String::new, |seconds| {
                #[expect(clippy::cast_possible_truncation, reason = "as is enough for an age")]
                let time = if seconds > FAR_SECONDS { "years".to_owned() } else { age(seconds as i64) };
                format!(", {time} at this rate if it stays there")
            });
            format!("{bytes} bytes{time}")
        }),
    );
    line(
        "checkpoint",
        status
            .checkpoint
            .as_ref()
            .map(|Checkpoint { lsn, at, instance, .. }| format!("{lsn}, {at}, by {instance}")),
    );
    print_relay(status.relay.as_ref());
    for note in &status.notes {
        service::say!("note: {}", or_dash(note));
    }
}

/// What the relay says of itself.
fn print_relay(relay: Option<&Relay>) {
    line(
        "relay",
        relay.map(|Relay { url, state, .. }| {
            format!("{}, at {url}", state.as_deref().unwrap_or("in an unknown state"))
        }),
    );
    line("  says", relay.and_then(|relay| relay.detail.clone()));
    let in_flight = |relay: &Relay| {
        Some(format!("{} records, {} bytes", relay.in_flight_records?, relay.in_flight_bytes?))
    };
    line("  in flight", relay.and_then(in_flight));
    let errors = relay.map(|relay| {
        let errors: Vec<_> = relay.errors.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        if errors.is_empty() { "none".into() } else { errors.join(", ") }
    });
    line("  errors so far", errors);
    let last = relay.and_then(|relay| relay.last_error.as_ref());
    line(
        "  last error",
        last.map(|LastError { at, message }| {
            format!("{}, {message}", or_dash(at.as_deref().unwrap_or_default()))
        }),
    );
}

fn line(name: &str, value: Option<String>) {
    service::say!("{name:<16} {}", or_dash(&value.unwrap_or_default()));
}

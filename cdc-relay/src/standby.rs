//! Standing by: another process holds the slot. This one waits until the slot is free, and says who has it.
//!
//! It only looks: asking for a slot that is taken leaves an error in the server's log each time. It has no
//! connection to Kafka.

use std::{fmt, time::Duration};

use crate::{
    admin::State,
    error::Error,
    replication::{connection::Connection, handshake::Purpose},
    shared::Shared,
    slot::Slot,
    wait::Wakeups,
};

/// How often the slot is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// Who holds the slot, as far as the server tells us; what it does not tell is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    /// The server's process that streams from it.
    pub(crate) pid: String,
    /// What the client calls itself: of a relay `cdc-relay/HOST/PID`.
    pub(crate) application: String,
    /// The client's address; empty over a Unix socket, too.
    pub(crate) client: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, application, client } = self;
        let named = if application.is_empty() { "an unnamed client" } else { application };
        let from = if client.is_empty() { "" } else { " from " };
        write!(f, "{named}{from}{client} by server process {pid}")
    }
}

/// Returns when the slot seems to be free or gone, when Postgres does not answer, or when a stop is asked for.
pub(crate) fn wait(shared: &Shared, wakeups: &Wakeups) {
    shared.metrics.enter(State::Standby);
    // Somebody was told just now that the slot is taken. However often that happens, it happens no faster than this.
    wakeups.wait(LOOK_INTERVAL);
    if let Err(e) = watch(shared, wakeups) {
        tracing::debug!("whoever holds the slot cannot be watched: {e}");
    }
    shared.metrics.slot_held_by(None);
}

fn watch(shared: &Shared, wakeups: &Wakeups) -> Result<(), Error> {
    let settings = &*shared.settings;
    let mut connection = Connection::connect(&settings.postgres, Purpose::Sql, settings.connect_timeout)?;
    let mut known = String::new();
    while !shared.stopping() {
        let slot = Slot::look(&mut connection, &settings.slot)?;
        let Some(pid) = slot.and_then(|slot| slot.active_pid) else { return Ok(()) };
        if pid != known {
            let holder = Holder::ask(&mut connection, &pid)?;
            let detail = format!("slot {} is held by {holder}", settings.slot);
            tracing::info!("standing by: {detail}");
            shared.metrics.slot_held_by(Some(&holder));
            shared.health.ready_with("standby", detail);
            known = pid;
        }
        wakeups.wait(LOOK_INTERVAL);
    }
    Ok(())
}

impl Holder {
    fn ask(connection: &mut Connection, pid: &str) -> Result<Self, Error> {
        let sql = "SELECT application_name, host(client_addr) FROM pg_stat_activity WHERE pid = $1";
        let row = connection.query(sql, &[pid])?.into_iter().next().unwrap_or_default();
        let mut columns = row.into_iter().map(Option::unwrap_or_default);
        let mut column = || columns.next().unwrap_or_default();
        Ok(Self { pid: pid.to_owned(), application: column(), client: column() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_does_not_tell_is_not_made_up() {
        let text = |application: &str, client: &str| {
            let owned = str::to_owned;
            Holder { pid: "7".into(), application: owned(application), client: owned(client) }.to_string()
        };
        assert_eq!(text("cdc-relay/h/1", "10.0.0.1"), "cdc-relay/h/1 from 10.0.0.1 by server process 7");
        assert_eq!(text("cdc-relay/h/1", ""), "cdc-relay/h/1 by server process 7");
        assert_eq!(text("", ""), "an unnamed client by server process 7");
    }
}

//! A look at the slot from the outside, every few seconds, over a connection of its own.

use std::{
    sync::{
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::Duration,
};

use crate::{
    admin::Metrics,
    config::Settings,
    error::Error,
    replication::{connection::Connection, handshake::Purpose, place::Place},
    shared::Shared,
};

const INTERVAL: Duration = Duration::from_secs(2);
/// SQLSTATEs of the server's word to a session that it ends, and to who asks for one while it shuts down (or starts,
/// when there is no stream yet that it could wait for).
const SHUTS_DOWN: [&str; 2] = ["57P01", "57P03"];

/// Watches until the sending side of `stop` is dropped.
///
/// This connection is the first to hear of a fast shutdown: the server ends it at once, while it lets its
/// walsenders wait for whoever reads from them. So it tells the pipeline.
pub(crate) fn run(shared: &Shared, stop: &Receiver<()>) {
    let (settings, metrics) = (&*shared.settings, &shared.metrics);
    let (mut connection, mut wait) = (None, Duration::ZERO);
    while stop.recv_timeout(std::mem::replace(&mut wait, INTERVAL)) == Err(RecvTimeoutError::Timeout) {
        match look(settings, metrics, shared.server(), &mut connection) {
            Ok(()) => {
                // It answers, so it was only this connection that was ended.
                shared.postgres_stops.store(false, Ordering::Relaxed);
                metrics.postgres_up.set(1);
            }
            Err(e) => {
                connection = None;
                if e.sqlstate.as_deref().is_some_and(|state| SHUTS_DOWN.contains(&state)) {
                    shared.postgres_stops.store(true, Ordering::Relaxed);
                    shared.waker.wake();
                }
                if metrics.postgres_up.set(0) != 0 {
                    tracing::warn!("the slot cannot be watched: {e}");
                }
            }
        }
    }
}

/// Asks the server that is streamed from, where there is one: another would have another slot of that name.
fn look(
    settings: &Settings,
    metrics: &Metrics,
    server: Option<Place>,
    connection: &mut Option<Connection>,
) -> Result<(), Error> {
    if connection.as_ref().is_some_and(|open| server.as_ref().is_some_and(|server| server != open.place())) {
        *connection = None;
    }
    let (info, timeout) = (&settings.postgres, settings.connect_timeout);
    let open = match (connection.as_mut(), server) {
        (Some(open), _) => open,
        (None, Some(server)) => {
            connection.insert(Connection::connect_to(info, server, Purpose::Sql, timeout)?)
        }
        (None, None) => connection.insert(Connection::connect(info, Purpose::Sql, timeout)?),
    };
    let sql = "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)::int8, \
               pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::int8, coalesce(safe_wal_size, -1) \
               FROM pg_replication_slots WHERE slot_name = $1";
    let rows = open.query(sql, &[&settings.slot])?;
    let Some(row) = rows.first() else { return Ok(()) };
    let gauges =
        [&metrics.slot_confirmed_lag_bytes, &metrics.slot_restart_lag_bytes, &metrics.slot_safe_wal_bytes];
    for (gauge, value) in gauges.into_iter().zip(row) {
        if let Some(value) = value.as_deref().and_then(|v| v.parse().ok()) {
            gauge.set(value);
        }
    }
    Ok(())
}

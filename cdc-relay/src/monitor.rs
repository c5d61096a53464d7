//! A look at the slot from the outside, every few seconds, over a connection of its own.

use std::{
    sync::{
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use crate::{
    admin::SlotView,
    config::Settings,
    error::Error,
    replication::{connection::Connection, handshake::Purpose, place::Place},
    shared::Shared,
    wal::{self, Growth},
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
    let (mut connection, mut growth, mut wait) = (None, Growth::default(), Duration::ZERO);
    while stop.recv_timeout(std::mem::replace(&mut wait, INTERVAL)) == Err(RecvTimeoutError::Timeout) {
        match look(settings, shared.server(), &mut connection, &mut growth) {
            Ok(view) => {
                metrics.slot(&view);
                // It answers, so it was only this connection that was ended.
                shared.postgres_stops.store(false, Ordering::Relaxed);
                metrics.postgres_up.set(Some(1.0));
            }
            Err(e) => {
                connection = None;
                if e.sqlstate.as_deref().is_some_and(|state| SHUTS_DOWN.contains(&state)) {
                    shared.postgres_stops.store(true, Ordering::Relaxed);
                    shared.waker.wake();
                }
                metrics.slot(&SlotView::default());
                if metrics.postgres_up.set(Some(0.0)) != Some(0.0) {
                    tracing::warn!("the slot cannot be watched: {e}");
                }
            }
        }
    }
}

/// Asks the server that is streamed from, where there is one: another would have another slot of that name.
fn look(
    settings: &Settings,
    server: Option<Place>,
    connection: &mut Option<Connection>,
    growth: &mut Growth,
) -> Result<SlotView, Error> {
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
    let rows = open.query(LOOK, &[&settings.slot])?;
    Ok(rows.first().map(|row| view(row, growth)).unwrap_or_default())
}

/// One row, whether there is such a slot or not.
const LOOK: &str = "SELECT pg_wal_lsn_diff(wal.lsn, '0/0'), CASE WHEN slot_name IS NULL THEN 'missing' ELSE wal_status END, \
     pg_wal_lsn_diff(wal.lsn, confirmed_flush_lsn), pg_wal_lsn_diff(wal.lsn, restart_lsn), safe_wal_size \
     FROM pg_current_wal_lsn() wal (lsn) LEFT JOIN pg_replication_slots ON slot_name = $1";

fn view(row: &[Option<String>], growth: &mut Growth) -> SlotView {
    let number = |index: usize| row.get(index)?.as_deref()?.parse::<f64>().ok();
    let rate = number(0).and_then(|position| growth.look(Instant::now(), position));
    let safe_wal_bytes = number(4);
    let time_to_loss_seconds =
        safe_wal_bytes.zip(rate).and_then(|(bytes, rate)| wal::seconds_to_loss(bytes, rate));
    SlotView {
        wal_status: row.get(1).cloned().flatten(),
        confirmed_lag_bytes: number(2),
        restart_lag_bytes: number(3),
        safe_wal_bytes,
        wal_bytes_per_second: rate,
        time_to_loss_seconds,
    }
}

//! Making the slot. The server waits for every transaction that was open when it began: this says whose they are.
//! <https://www.postgresql.org/docs/current/protocol-replication.html#PROTOCOL-REPLICATION-CREATE-REPLICATION-SLOT>

use std::{
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread,
    time::Duration,
};

use relay_core::Lsn;

use crate::{
    config::Settings,
    error::{Error, Kind},
    replication::{
        connection::{Connection, TextRow},
        handshake::Purpose,
        stream::quote_identifier,
    },
    slot,
};

/// How long the server may take.
const TIMEOUT: Duration = Duration::from_secs(600);
/// How often it is asked what it waits for.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Without this the server would go on after we are gone, and leave a slot that nobody reads.
const NOTICE_OUR_END: &str = "SET client_connection_check_interval = '2s'";

/// Makes the slot, to be synchronised to standbys if `failover`; its confirmed LSN. The server waits for every
/// transaction that is open, for as long as they take; meanwhile the log says which.
///
/// # Errors
/// [`Kind::GaveUp`] after ten minutes, with those transactions.
pub(crate) fn make_slot(
    connection: &mut Connection,
    settings: &Settings,
    failover: bool,
) -> Result<Lsn, Error> {
    let create = if failover {
        slot::check_failover_version(connection)?;
        // Not temporary, not for prepared transactions.
        "SELECT lsn FROM pg_create_logical_replication_slot($1, 'pgoutput', false, false, true)"
    } else {
        "SELECT lsn FROM pg_create_logical_replication_slot($1, 'pgoutput')"
    };
    let mut maker = connection.beside(&settings.postgres, Purpose::Sql, settings.connect_timeout)?;
    maker.simple_query(NOTICE_OUR_END)?;
    let never = AtomicBool::new(false);
    make(connection, maker, &never, |maker| maker.query(create, &[&settings.slot]))?;
    confirmed(connection, settings)
}

/// What the database was when the slot was made, for as long as this is kept or has been taken over by a transaction.
pub(crate) struct Exported {
    pub(crate) snapshot: String,
    /// It exports the snapshot until it does something else.
    _maker: Connection,
}

/// Makes the slot as [`make_slot`] does, and keeps what the database was then: what is committed later is what the slot
/// streams, and nothing else.
///
/// # Errors
/// [`Kind::GaveUp`] also once `stop` is set.
pub(crate) fn make_exporting_slot(
    connection: &mut Connection,
    settings: &Settings,
    failover: bool,
    stop: &AtomicBool,
) -> Result<(Lsn, Exported), Error> {
    let mut options = String::from("SNAPSHOT 'export'");
    if failover {
        slot::check_failover_version(connection)?;
        options.push_str(", FAILOVER true");
    }
    let name = quote_identifier(&settings.slot);
    let create = format!("CREATE_REPLICATION_SLOT {name} LOGICAL pgoutput ({options})");
    let maker = connection.beside(&settings.postgres, Purpose::Replication, settings.connect_timeout)?;
    let (made, maker) = make(connection, maker, stop, |maker| maker.simple_query(&create))?;
    let snapshot = made.into_iter().next().and_then(|row| row.into_iter().nth(2)?);
    let missing = || Error::new(Kind::Internal, "the server has exported no snapshot");
    let exported = Exported { snapshot: snapshot.ok_or_else(missing)?, _maker: maker };
    Ok((confirmed(connection, settings)?, exported))
}

fn confirmed(connection: &mut Connection, settings: &Settings) -> Result<Lsn, Error> {
    let missing = || Error::new(Kind::Internal, "the slot that was made is not there");
    slot::find_slot(connection, settings)?.ok_or_else(missing)
}

/// Runs what makes the slot, while another connection looks what it waits for.
fn make(
    connection: &mut Connection,
    mut maker: Connection,
    stop: &AtomicBool,
    create: impl FnOnce(&mut Connection) -> Result<Vec<TextRow>, Error>,
) -> Result<(Vec<TextRow>, Connection), Error> {
    let pid = maker.simple_query("SELECT pg_backend_pid()")?.into_iter().flatten().flatten().next();
    let pid = pid.unwrap_or_default();
    maker.set_answer_timeout(TIMEOUT)?;
    let (made, ended) = channel();
    let result = thread::scope(|scope| {
        let (watch, pid) = (&mut *connection, &*pid);
        scope.spawn(move || tell(watch, pid, &ended, stop));
        let result = create(&mut maker);
        drop(made);
        result
    });
    result.map(|rows| (rows, maker)).map_err(|e| explain(connection, &pid, e, stop))
}

/// Until the slot is made, which closes the channel. A stop ends the server's waiting.
fn tell(connection: &mut Connection, pid: &str, ended: &Receiver<()>, stop: &AtomicBool) {
    let mut told = Vec::new();
    while ended.recv_timeout(LOOK_INTERVAL) == Err(RecvTimeoutError::Timeout) {
        if stop.load(Ordering::Relaxed) {
            cancel(connection, pid);
            return;
        }
        match find(connection, pid) {
            Ok(holders) if holders.is_empty() => {}
            Ok(holders) => {
                let who: Vec<_> = holders.iter().map(|holder| holder.who.clone()).collect();
                if who != told {
                    tracing::warn!("the slot waits for what began before it: {}", describe(&holders));
                    told = who;
                }
            }
            Err(e) => tracing::debug!("what the slot waits for cannot be found out: {e}"),
        }
    }
}

/// The server does not go on making the slot.
fn cancel(connection: &mut Connection, pid: &str) {
    if let Err(e) = connection.query("SELECT pg_cancel_backend($1::int4)", &[pid]) {
        tracing::warn!("the server's process {pid} may still make the slot, and cannot be cancelled: {e}");
    }
}

/// A timeout is explained by what was waited for.
fn explain(connection: &mut Connection, pid: &str, error: Error, stop: &AtomicBool) -> Error {
    if stop.load(Ordering::Relaxed) {
        return Error::new(Kind::GaveUp, "interrupted; no slot was made");
    }
    if error.kind != Kind::PostgresAway {
        return error;
    }
    let holders = find(connection, pid).unwrap_or_default();
    cancel(connection, pid);
    if holders.is_empty() {
        return error;
    }
    let what =
        format!("the slot could not be made in {} s: it waits for {}", TIMEOUT.as_secs(), describe(&holders));
    Error::new(Kind::GaveUp, what).hint("end these transactions, then start again")
}

/// A transaction that the slot waits for.
#[derive(Debug)]
struct Holder {
    who: String,
    since: String,
    ends: String,
}

fn describe(holders: &[Holder]) -> String {
    let one = |Holder { who, since, ends }: &Holder| format!("{who}{since} (to end it: {ends})");
    holders.iter().map(one).collect::<Vec<_>>().join("; ")
}

fn find(connection: &mut Connection, pid: &str) -> Result<Vec<Holder>, Error> {
    let sql = "SELECT b.pid::text, a.usename, a.application_name, a.state, \
               extract(epoch FROM clock_timestamp() - a.xact_start)::int8::text \
               FROM unnest(pg_blocking_pids($1::int4)) AS b(pid) LEFT JOIN pg_stat_activity a ON a.pid = b.pid \
               WHERE b.pid <> 0";
    let mut holders: Vec<Holder> = connection.query(sql, &[pid])?.iter().map(session).collect();
    // Of a prepared transaction there is no process: the lock tells its number.
    let sql = "SELECT p.gid, p.owner, quote_literal(p.gid) FROM pg_prepared_xacts p JOIN pg_locks l ON \
               l.locktype = 'transactionid' AND l.transactionid = p.transaction AND NOT l.granted \
               WHERE l.pid = $1::int4";
    holders.extend(connection.query(sql, &[pid])?.iter().map(prepared));
    Ok(holders)
}

fn session(row: &TextRow) -> Holder {
    let column = |n: usize| row.get(n).and_then(Option::as_deref).unwrap_or_default();
    let (pid, role, application, state, seconds) = (column(0), column(1), column(2), column(3), column(4));
    let named =
        |what: &str, name: &str| if name.is_empty() { String::new() } else { format!(", {what} {name}") };
    let state = if state.is_empty() { "in a transaction" } else { state };
    Holder {
        who: format!("server process {pid}{}{}", named("role", role), named("application", application)),
        since: if seconds.is_empty() { String::new() } else { format!(", {state} for {seconds} s") },
        ends: format!("SELECT pg_terminate_backend({pid})"),
    }
}

fn prepared(row: &TextRow) -> Holder {
    let column = |n: usize| row.get(n).and_then(Option::as_deref).unwrap_or_default();
    let (gid, role, quoted) = (column(0), column(1), column(2));
    Holder {
        who: format!("prepared transaction {gid} of role {role}"),
        since: String::new(),
        ends: format!("COMMIT PREPARED {quoted} or ROLLBACK PREPARED {quoted}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_does_not_tell_is_left_out() {
        let row = |columns: [Option<&str>; 5]| columns.map(|c| c.map(str::to_owned)).to_vec();
        let told = [
            session(&row([Some("7"), Some("app"), Some("psql"), Some("idle in transaction"), Some("35")])),
            session(&row([Some("8"), Some("app"), None, None, None])),
        ];
        assert_eq!(
            describe(&told),
            "server process 7, role app, application psql, idle in transaction for 35 s (to end it: SELECT \
             pg_terminate_backend(7)); server process 8, role app (to end it: SELECT pg_terminate_backend(8))"
        );
    }
}

//! The slot in Postgres: made once, verified before every session.

use relay_core::Lsn;

use crate::{
    config::Settings,
    error::{Error, Kind},
    position::REPUBLISH,
    publication,
    replication::{
        connection::Connection,
        conninfo::Target,
        handshake::{APPLICATION_NAME, Purpose},
        stream::quote_identifier,
    },
};

/// What a session has to know about its slot before it starts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Position {
    /// The slot's confirmed flush LSN.
    pub(crate) confirmed: Lsn,
    /// The server's `wal_sender_timeout`, in milliseconds; 0 is none.
    pub(crate) wal_sender_timeout_ms: u64,
}

/// Checks that slot and publication are there and are what we need.
///
/// # Errors
/// Halted with the remedy, where they are not.
pub(crate) fn verify(connection: &mut Connection, settings: &Settings) -> Result<Position, Error> {
    publication::verify(connection, settings)?;
    check_recovery(connection, settings)?;
    let Some(confirmed) = find_slot(connection, settings)? else {
        return Err(Error::new(Kind::Halted, format!("replication slot {:?} does not exist", settings.slot))
            .hint(format!("`cdc-relay init` creates it where it never was. Where it was, what was committed since is not in Kafka, and \
                   `cdc-relay accept-gap` says what it would do, `cdc-relay accept-gap --yes` goes on with a new one. {REPUBLISH}. The promotion \
                   of a standby keeps only a slot that was synchronised to it: postgres.failover = true, and `cdc-relay check`")));
    };
    let mut setting = |name: &str| -> Result<String, Error> {
        let rows = connection.query("SELECT setting FROM pg_settings WHERE name = $1", &[name])?;
        Ok(rows.into_iter().flatten().flatten().next().unwrap_or_default())
    };
    let wal_sender_timeout_ms = setting("wal_sender_timeout")?.parse().unwrap_or(0);
    check_synchronous(connection)?;
    Ok(Position { confirmed, wal_sender_timeout_ms })
}

/// Whoever streams under our name must not be waited for by transactions.
///
/// # Errors
/// Halted: the server would.
pub(crate) fn check_synchronous(connection: &mut Connection) -> Result<(), Error> {
    let rows = connection.simple_query("SHOW synchronous_standby_names")?;
    let standbys = rows.into_iter().flatten().flatten().next().unwrap_or_default();
    if counts_us(&standbys) {
        let what = format!(
            "synchronous_standby_names is {standbys:?}, which makes the relay a synchronous standby: while Kafka is away, \
             no transaction could commit"
        );
        return Err(Error::new(Kind::Halted, what).hint(
            "name the standbys in it one by one, without * and without cdc-relay, and reload the server",
        ));
    }
    Ok(())
}

/// On a standby there is no slot, or one that nobody may read until the promotion; with several hosts that means that
/// we are at the wrong one.
fn check_recovery(connection: &mut Connection, settings: &Settings) -> Result<(), Error> {
    if settings.postgres.target != Target::Any || !connection.is_in_recovery()? {
        return Ok(());
    }
    let sql = "SELECT to_jsonb(s) ->> 'synced' FROM pg_replication_slots s WHERE slot_name = $1";
    let rows = connection.query(sql, &[&settings.slot])?;
    if matches!(rows.first().map(Vec::as_slice), Some([Some(synced)]) if synced != "true") {
        // Somebody has made it here.
        return Ok(());
    }
    let what =
        format!("Postgres at {} is a standby, which has no slot that could be read", connection.place());
    Err(Error::new(Kind::Halted, what)
        .hint("name all hosts in postgres.url and add target_session_attrs=read-write: the primary is found then, also \
               after a promotion"))
}

/// Whether `synchronous_standby_names` includes a relay's `application_name`
/// (<https://www.postgresql.org/docs/current/runtime-config-replication.html#GUC-SYNCHRONOUS-STANDBY-NAMES>).
fn counts_us(standbys: &str) -> bool {
    let mut names = standbys.split(|c: char| c == ',' || c == '(' || c == ')' || c.is_whitespace());
    names.any(|name| {
        let name = name.trim_matches('"');
        // `cdc-relay` alone, too, although no relay has that name: every commit would wait for it.
        let kind = name.split('/').next().unwrap_or_default();
        name == "*" || kind.eq_ignore_ascii_case(APPLICATION_NAME)
    })
}

/// A slot as `pg_replication_slots` has it
/// (<https://www.postgresql.org/docs/current/view-pg-replication-slots.html>).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slot {
    plugin: String,
    database: String,
    /// The database that we are connected to.
    here: String,
    /// The server has removed log that it needed, or has invalidated it for another reason.
    pub(crate) is_lost: bool,
    /// It needs log beyond the server's limit, which the next checkpoint may remove.
    pub(crate) is_unreserved: bool,
    /// None while it is being made.
    pub(crate) confirmed: Option<Lsn>,
    /// The process that streams from it.
    pub(crate) active_pid: Option<String>,
    /// It is synchronised to standbys; never so before version 17.
    pub(crate) is_failover: bool,
}

impl Slot {
    /// Looks it up; None where there is no such slot.
    pub(crate) fn look(connection: &mut Connection, name: &str) -> Result<Option<Self>, Error> {
        let sql = "SELECT coalesce(plugin, 'physical'), coalesce(database, ''), current_database(), \
                   coalesce(wal_status, ''), confirmed_flush_lsn, active_pid, to_jsonb(s) ->> 'failover' \
                   FROM pg_replication_slots s WHERE slot_name = $1";
        let rows = connection.query(sql, &[name])?;
        let Some([plugin, database, here, wal_status, confirmed, active_pid, failover]) =
            rows.first().map(Vec::as_slice)
        else {
            return Ok(None);
        };
        let odd = |e| Error::new(Kind::Internal, format!("the confirmed LSN of slot {name:?}: {e}"));
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        Ok(Some(Self {
            plugin: text(plugin),
            database: text(database),
            here: text(here),
            is_lost: wal_status.as_deref() == Some("lost"),
            is_unreserved: wal_status.as_deref() == Some("unreserved"),
            confirmed: confirmed.as_deref().map(str::parse).transpose().map_err(odd)?,
            active_pid: active_pid.clone(),
            is_failover: failover.as_deref() == Some("true"),
        }))
    }

    /// Whether it can be ours at all.
    ///
    /// # Errors
    /// Halted: it is another plug-in's or another database's.
    pub(crate) fn check_kind(&self, name: &str) -> Result<(), Error> {
        let Self { plugin, database, here, .. } = self;
        let halted = |what: String, hint: &str| Err(Error::new(Kind::Halted, what).hint(hint));
        if plugin != "pgoutput" {
            let what = format!("slot {name:?} is for {plugin:?}, not for pgoutput");
            return halted(what, "choose another name with postgres.slot and run `cdc-relay init`");
        }
        if database != here {
            let what = format!("slot {name:?} belongs to database {database:?}, not to {here:?}");
            return halted(
                what,
                "mend the database in postgres.url, or choose another name with postgres.slot",
            );
        }
        Ok(())
    }
}

/// The slot's confirmed flush LSN, or None where there is no such slot.
pub(crate) fn find_slot(connection: &mut Connection, settings: &Settings) -> Result<Option<Lsn>, Error> {
    let name = &settings.slot;
    let Some(slot) = Slot::look(connection, name)? else { return Ok(None) };
    slot.check_kind(name)?;
    if slot.is_lost {
        let what = format!("slot {name:?} is lost: the server has removed the log that it still needed");
        return Err(Error::new(Kind::Halted, what).hint(format!(
            "what was committed since its confirmed LSN and is not in Kafka can only come from the outbox table now. `cdc-relay \
             accept-gap` says what it would do, `cdc-relay accept-gap --yes` goes on with a new slot. {REPUBLISH}. Raise \
             max_slot_wal_keep_size"
        )));
    }
    let in_the_making =
        || Error::new(Kind::SlotInUse, format!("slot {name:?} is still being made by another process"));
    slot.confirmed.ok_or_else(in_the_making).map(Some)
}

/// The first version that synchronises slots to standbys.
pub(crate) const FAILOVER_MAJOR: u32 = 17;

/// # Errors
/// Misconfigured where the server cannot synchronise slots.
pub(crate) fn check_failover_version(connection: &mut Connection) -> Result<(), Error> {
    let (major, version) = server_version(connection)?;
    if major >= FAILOVER_MAJOR {
        return Ok(());
    }
    let what = format!(
        "postgres.failover = true needs PostgreSQL {FAILOVER_MAJOR} or later, and the server is {version}"
    );
    Err(Error::new(Kind::Misconfigured, what).hint(
        "set postgres.failover = false: a slot of this server does not survive the promotion of a standby, after which the \
         relay stops and says so",
    ))
}

/// The server's major version, and as it calls itself.
pub(crate) fn server_version(connection: &mut Connection) -> Result<(u32, String), Error> {
    let rows = connection.simple_query("SHOW server_version")?;
    let version = rows.into_iter().flatten().flatten().next().unwrap_or_default();
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    Ok((digits.parse().unwrap_or(0), version))
}

/// What became of a slot's being synchronised to standbys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failover {
    /// It is not, and is not to be.
    Off,
    On,
    /// From now on.
    SwitchedOn,
    /// It is to be, but somebody streams from it.
    InUse,
}

/// Has an existing slot synchronised to standbys if the configuration says so. Never switches it off.
///
/// # Errors
/// Misconfigured where the server cannot.
pub(crate) fn switch_failover_on(
    connection: &mut Connection,
    settings: &Settings,
) -> Result<Failover, Error> {
    let slot = Slot::look(connection, &settings.slot)?;
    if slot.as_ref().is_some_and(|slot| slot.is_failover) {
        return Ok(Failover::On);
    }
    if !settings.failover {
        return Ok(Failover::Off);
    }
    check_failover_version(connection)?;
    if slot.is_some_and(|slot| slot.active_pid.is_some()) {
        return Ok(Failover::InUse);
    }
    let mut replication =
        connection.beside(&settings.postgres, Purpose::Replication, settings.connect_timeout)?;
    match replication.simple_query(&alter_failover(&settings.slot)) {
        Ok(_) => Ok(Failover::SwitchedOn),
        Err(e) if e.kind == Kind::SlotInUse => Ok(Failover::InUse),
        Err(e) => Err(e),
    }
}

/// The command of a replication connection that has a slot synchronised.
pub(crate) fn alter_failover(slot: &str) -> String {
    format!("ALTER_REPLICATION_SLOT {} (FAILOVER true)", quote_identifier(slot))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_synchronous_standby_is_recognised() {
        for ours in [
            "*",
            "FIRST 1 (a, *)",
            "ANY 2 (\"cdc-relay\", b)",
            "a,CDC-Relay",
            "2 (a,*)",
            "\"cdc-relay/h/1\", b",
        ] {
            assert!(counts_us(ours), "{ours}");
        }
        for others in ["", "a", "FIRST 1 (a, b)", "ANY 1 (cdc-relay-2)", "\"a b\""] {
            assert!(!counts_us(others), "{others}");
        }
    }
}

//! The slot and the publication: made by `init`, verified before every session.

use relay_core::Lsn;

use crate::{
    config::Settings,
    error::{Error, Kind},
    replication::{connection::Connection, handshake::Purpose},
};

/// What a session has to know about its slot before it starts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Position {
    /// The slot's confirmed flush LSN.
    pub(crate) confirmed: Lsn,
    /// The server's `wal_sender_timeout`, in milliseconds; 0 is none.
    pub(crate) wal_sender_timeout_ms: u64,
}

/// Whether `init` found a thing or made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Made {
    Existed,
    Created,
}

/// Checks that slot and publication are there and are what we need.
///
/// # Errors
/// Halted with the remedy, where they are not.
pub(crate) fn verify(connection: &mut Connection, settings: &Settings) -> Result<Position, Error> {
    verify_publication(connection, settings)?;
    let Some(confirmed) = find_slot(connection, settings)? else {
        return Err(Error::new(Kind::Halted, format!("replication slot {:?} does not exist", settings.slot))
            .hint("`cdc-relay init` creates it. Had it existed before, events committed since its confirmed LSN will not be in the new one"));
    };
    let rows =
        connection.simple_query("SELECT setting FROM pg_settings WHERE name = 'wal_sender_timeout'")?;
    let timeout = rows.first().and_then(|r| r.first()?.as_deref()?.parse().ok());
    Ok(Position { confirmed, wal_sender_timeout_ms: timeout.unwrap_or(0) })
}

/// The publication must publish the table's inserts: with another, everything would be confirmed and nothing
/// published.
fn verify_publication(connection: &mut Connection, settings: &Settings) -> Result<(), Error> {
    let (name, table) = (&settings.publication, &settings.source.table);
    let halted = |what: String, hint: String| Err(Error::new(Kind::Halted, what).hint(hint));
    let Some(inserts) = publishes_inserts(connection, name)? else {
        return halted(
            format!("publication {name:?} does not exist"),
            "`cdc-relay init` creates it. Had it existed before, events written while it was gone are not in the stream".into(),
        );
    };
    if !inserts {
        let hint = format!("let its owner run: ALTER PUBLICATION \"{name}\" SET (publish = 'insert')");
        return halted(format!("publication {name:?} does not publish inserts"), hint);
    }
    let sql = "SELECT 1 FROM pg_publication_tables WHERE pubname = $1 AND schemaname = $2 AND tablename = $3";
    if connection.query(sql, &[name, &table.schema, &table.name])?.is_empty() {
        let (schema, table) = (&table.schema, &table.name);
        let exists = connection
            .query("SELECT 1 FROM pg_tables WHERE schemaname = $1 AND tablename = $2", &[schema, table])?;
        if exists.is_empty() {
            let what = format!("there is no table {schema}.{table} in this database");
            return halted(what, "mend outbox.table, or the database in postgres.url".into());
        }
        let hint = format!(
            "let the publication's owner run: ALTER PUBLICATION \"{name}\" ADD TABLE \"{schema}\".\"{table}\""
        );
        return halted(format!("publication {name:?} does not have the table {schema}.{table}"), hint);
    }
    Ok(())
}

/// Whether the publication publishes inserts; None where there is no such publication.
fn publishes_inserts(connection: &mut Connection, name: &str) -> Result<Option<bool>, Error> {
    let rows = connection.query("SELECT pubinsert::text FROM pg_publication WHERE pubname = $1", &[name])?;
    Ok(rows.first().map(|row| row.first().is_some_and(|v| v.as_deref() == Some("true"))))
}

/// The slot's confirmed flush LSN, or None where there is no such slot.
fn find_slot(connection: &mut Connection, settings: &Settings) -> Result<Option<Lsn>, Error> {
    let sql = "SELECT coalesce(plugin, 'physical'), coalesce(database, ''), coalesce(wal_status, ''), confirmed_flush_lsn, \
               current_database() FROM pg_replication_slots WHERE slot_name = $1";
    let rows = connection.query(sql, &[&settings.slot])?;
    let Some([plugin, database, wal_status, confirmed, here]) = rows.first().map(Vec::as_slice) else {
        return Ok(None);
    };
    let slot = &settings.slot;
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let halted = |what: String, hint: &str| Err(Error::new(Kind::Halted, what).hint(hint));
    if text(plugin) != "pgoutput" {
        let what = format!("slot {slot:?} is for {:?}, not for pgoutput", text(plugin));
        return halted(what, "choose another name with postgres.slot and run `cdc-relay init`");
    }
    if database != here {
        let what = format!("slot {slot:?} belongs to database {:?}, not to {:?}", text(database), text(here));
        return halted(what, "mend the database in postgres.url, or choose another name with postgres.slot");
    }
    if text(wal_status) == "lost" {
        let what = format!("slot {slot:?} is lost: the server has removed the log that it still needed");
        let hint = "what was committed since its confirmed LSN and is not in Kafka has to be taken from the outbox table by hand; then \
                    SELECT pg_drop_replication_slot('…') and `cdc-relay init`. Raise max_slot_wal_keep_size";
        return halted(what, hint);
    }
    let Some(confirmed) = confirmed else {
        return Err(Error::new(
            Kind::SlotInUse,
            format!("slot {slot:?} is still being made by another process"),
        ));
    };
    match confirmed.parse() {
        Ok(lsn) => Ok(Some(lsn)),
        Err(e) => Err(Error::new(Kind::Internal, format!("the confirmed LSN of slot {slot:?}: {e}"))),
    }
}

/// Makes what is missing: the publication, then the slot, so that the slot's first change is already published.
pub(crate) fn init(settings: &Settings) -> Result<(Made, Made, Lsn), Error> {
    let mut connection = Connection::connect(&settings.postgres, Purpose::Sql, settings.connect_timeout)?;
    let publication = if publishes_inserts(&mut connection, &settings.publication)?.is_some() {
        Made::Existed
    } else {
        create_publication(&mut connection, settings)?;
        Made::Created
    };
    verify_publication(&mut connection, settings)?;
    if let Some(lsn) = find_slot(&mut connection, settings)? {
        return Ok((publication, Made::Existed, lsn));
    }
    let sql = "SELECT lsn FROM pg_create_logical_replication_slot($1, 'pgoutput')";
    // The server waits here for every transaction that is open, for as long as they take.
    connection.set_answer_timeout(CREATE_SLOT_TIMEOUT)?;
    match connection.query(sql, &[&settings.slot]) {
        // Another of us was first.
        Err(e) if e.sqlstate.as_deref() == Some("42710") => {}
        made => drop(made?),
    }
    let lsn = find_slot(&mut connection, settings)?;
    Ok((publication, Made::Created, lsn.unwrap_or_default()))
}

const CREATE_SLOT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(600);

fn create_publication(connection: &mut Connection, settings: &Settings) -> Result<(), Error> {
    // Names cannot be parameters of a statement; format's %I quotes them, on the server, from parameters.
    let sql = "SELECT format('CREATE PUBLICATION %I FOR TABLE %I.%I WITH (publish = ''insert'')', $1::text, $2::text, $3::text)";
    let rows = connection
        .query(sql, &[&settings.publication, &settings.source.table.schema, &settings.source.table.name])?;
    let statement = rows.into_iter().flatten().flatten().next().unwrap_or_default();
    connection.simple_query(&statement).map(drop).map_err(|e| {
        let hint = format!("let the table's owner run: {statement};");
        Error { kind: if e.kind == Kind::PostgresAway { e.kind } else { Kind::Refused }, ..e }.hint(hint)
    })
}

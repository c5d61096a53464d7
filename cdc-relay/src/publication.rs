//! The publication: what it must publish, found out before every session, because the server tells nobody what it
//! leaves out of a stream.

use std::collections::HashSet;

use relay_core::outbox::{Outbox, Updates};

use crate::{
    config::Settings,
    error::{Error, Kind},
    replication::connection::Connection,
};

/// Whether `init` found a thing or made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Made {
    Existed,
    Created,
}

/// A publication's own settings.
struct Publication {
    inserts: bool,
    updates: bool,
    via_root: bool,
}

/// Makes the publication where it is missing, and checks it.
pub(crate) fn make(connection: &mut Connection, settings: &Settings) -> Result<Made, Error> {
    let made = if find(connection, &settings.publication)?.is_some() {
        Made::Existed
    } else {
        create(connection, settings)?;
        Made::Created
    };
    verify(connection, settings)?;
    Ok(made)
}

/// Checks that the publication publishes what the configuration uses: with another, everything would be confirmed
/// and not everything published.
///
/// # Errors
/// Halted with the remedy, where it does not.
pub(crate) fn verify(connection: &mut Connection, settings: &Settings) -> Result<(), Error> {
    let name = &settings.publication;
    let outboxes = &settings.source.outboxes;
    let Some(publication) = find(connection, name)? else {
        return halted(
            format!("publication {name:?} does not exist"),
            "`cdc-relay init` creates it. Had it existed before, events written while it was gone are not in the stream",
        );
    };
    let alter = |what: &str| format!("let its owner run: ALTER PUBLICATION \"{name}\" SET ({what})");
    if !outboxes.is_empty() && !publication.inserts {
        let what = format!("publication {name:?} does not publish inserts");
        return halted(what, alter(publish(outboxes)));
    }
    if wants_updates(outboxes) && !publication.updates {
        let what = format!("publication {name:?} does not publish updates, and an outbox is to halt at them");
        return halted(what, alter(publish(outboxes)));
    }
    for outbox in outboxes {
        verify_table(connection, settings, &publication, outbox)?;
    }
    Ok(())
}

fn halted(what: String, hint: impl Into<String>) -> Result<(), Error> {
    Err(Error::new(Kind::Halted, what).hint(hint))
}

fn wants_updates(outboxes: &[Outbox]) -> bool {
    outboxes.iter().any(|outbox| outbox.updates() == Updates::Halt)
}

fn publish(outboxes: &[Outbox]) -> &'static str {
    if wants_updates(outboxes) { "publish = 'insert, update'" } else { "publish = 'insert'" }
}

fn find(connection: &mut Connection, name: &str) -> Result<Option<Publication>, Error> {
    let sql =
        "SELECT pubinsert::text, pubupdate::text, pubviaroot::text FROM pg_publication WHERE pubname = $1";
    let rows = connection.query(sql, &[name])?;
    let is = |value: Option<&Option<String>>| value.is_some_and(|v| v.as_deref() == Some("true"));
    let publication = |row: &Vec<Option<String>>| Publication {
        inserts: is(row.first()),
        updates: is(row.get(1)),
        via_root: is(row.get(2)),
    };
    Ok(rows.first().map(publication))
}

/// An outbox's table in the catalog.
struct Table {
    /// As text.
    oid: String,
    is_partitioned: bool,
}

fn find_table(connection: &mut Connection, outbox: &Outbox) -> Result<Table, Error> {
    let sql = "SELECT c.oid::text, c.relkind::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
               WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p')";
    let (schema, name) = outbox.name();
    let rows = connection.query(sql, &[schema, name])?;
    let Some([Some(oid), Some(kind)]) = rows.first().map(Vec::as_slice) else {
        let what = format!("there is no table {} in this database", outbox.label());
        return Err(Error::new(Kind::Halted, what).hint("mend outbox.table, or the database in postgres.url"));
    };
    Ok(Table { oid: oid.clone(), is_partitioned: kind == "p" })
}

fn verify_table(
    connection: &mut Connection,
    settings: &Settings,
    publication: &Publication,
    outbox: &Outbox,
) -> Result<(), Error> {
    let (name, label) = (&settings.publication, outbox.label());
    let table = find_table(connection, outbox)?;
    if table.is_partitioned && !publication.via_root {
        return halted(
            format!("publication {name:?} publishes rows of {label} under the names of its partitions"),
            format!(
                "let its owner run: ALTER PUBLICATION \"{name}\" SET (publish_via_partition_root = true)"
            ),
        );
    }
    // Where it is a partition itself, it may be published as another.
    let sql = "SELECT t.schemaname || '.' || t.tablename, coalesce(t.rowfilter, '') \
               FROM (SELECT $2::text::oid AS relid UNION SELECT relid FROM pg_partition_ancestors($2::text::oid)) a \
               JOIN pg_class c ON c.oid = a.relid JOIN pg_namespace n ON n.oid = c.relnamespace \
               JOIN pg_publication_tables t ON (t.schemaname, t.tablename) = (n.nspname, c.relname) \
               WHERE t.pubname = $1";
    let rows = connection.query(sql, &[name, &table.oid])?;
    let Some([Some(published_as), Some(filter)]) = rows.first().map(Vec::as_slice) else {
        let (schema, table) = outbox.name();
        return halted(
            format!("publication {name:?} does not have the table {label}"),
            format!(
                "let the publication's owner run: ALTER PUBLICATION \"{name}\" ADD TABLE \"{schema}\".\"{table}\""
            ),
        );
    };
    if published_as != label {
        // Beside its root, it is there for rows that were written while the root was not published.
        if settings.source.outboxes.iter().any(|other| other.label() == published_as) {
            return Ok(());
        }
        return halted(
            format!("publication {name:?} publishes rows of {label} as those of {published_as}"),
            format!("set the outbox's table to {published_as:?} in the configuration"),
        );
    }
    if !filter.is_empty() {
        let (schema, table) = outbox.name();
        return halted(
            format!("publication {name:?} leaves rows of {label} out by a row filter: {filter}"),
            format!(
                "let the publication's owner run: ALTER PUBLICATION \"{name}\" DROP TABLE \"{schema}\".\"{table}\", and ADD \
                 TABLE without WHERE; no row must be written in between. Where only some events are to be published, \
                 write the others elsewhere"
            ),
        );
    }
    verify_columns(connection, settings, &table, outbox)
}

fn verify_columns(
    connection: &mut Connection,
    settings: &Settings,
    table: &Table,
    outbox: &Outbox,
) -> Result<(), Error> {
    let (name, label) = (&settings.publication, outbox.label());
    let (schema, relation) = outbox.name();
    let set = |rows: Vec<Vec<Option<String>>>| rows.into_iter().flatten().flatten().collect::<HashSet<_>>();
    let sql = "SELECT attname::text FROM pg_attribute WHERE attrelid = $1::text::oid AND attnum > 0 AND NOT attisdropped";
    let there = set(connection.query(sql, &[&table.oid])?);
    // Before version 18 generated columns are listed, and never sent.
    let sql = "SELECT attname::text FROM pg_publication_tables JOIN pg_attribute ON attrelid = $4::text::oid AND attname = ANY (attnames) \
               WHERE pubname = $1 AND schemaname = $2 AND tablename = $3 \
               AND (attgenerated = '' OR current_setting('server_version_num')::int >= 180000)";
    let published = set(connection.query(sql, &[name, schema, relation, &table.oid])?);
    for column in outbox.required_columns() {
        if !there.contains(column) {
            return halted(
                format!("the outbox {label} has no column {column:?}"),
                "mend the column's name in the configuration (the outbox's keys, its header_columns, or the topic \
                 template), or add it to the table",
            );
        }
    }
    let used = outbox.required_columns().chain(outbox.optional_columns().filter(|c| there.contains(*c)));
    for column in used {
        if !published.contains(column) {
            return halted(
                format!("publication {name:?} does not publish the column {column:?} of {label}"),
                format!(
                    "it has a column list, or the column is generated. Let the publication's owner add the column to the \
                     list, or take the list away: ALTER PUBLICATION \"{name}\" SET TABLE \"{schema}\".\"{relation}\" \
                     (with all its other tables)"
                ),
            );
        }
    }
    Ok(())
}

/// The partitions of the outboxes, or tables that inherit from one, by schema and name: rows that come under such a
/// name would not be known for the outbox's.
pub(crate) fn partitions(
    connection: &mut Connection,
    settings: &Settings,
) -> Result<HashSet<(String, String)>, Error> {
    let sql = "WITH RECURSIVE tree AS (SELECT $1::text::oid AS relid \
               UNION SELECT i.inhrelid FROM pg_inherits i JOIN tree ON i.inhparent = tree.relid) \
               SELECT n.nspname, c.relname FROM tree JOIN pg_class c ON c.oid = tree.relid \
               JOIN pg_namespace n ON n.oid = c.relnamespace WHERE tree.relid <> $1::text::oid";
    let mut found = HashSet::new();
    for outbox in &settings.source.outboxes {
        let table = find_table(connection, outbox)?;
        for row in connection.query(sql, &[&table.oid])? {
            if let [Some(schema), Some(name)] = row.as_slice() {
                found.insert((schema.clone(), name.clone()));
            }
        }
    }
    Ok(found)
}

/// Makes the publication.
///
/// # Errors
/// Refused with the statement, where the role may not.
fn create(connection: &mut Connection, settings: &Settings) -> Result<(), Error> {
    let outboxes = &settings.source.outboxes;
    // Names cannot be parameters of a statement; format's %I quotes them, on the server, from parameters.
    let mut quoted = |format: &str, parameters: &[&str]| -> Result<String, Error> {
        let rows = connection.query(&format!("SELECT format({format})"), parameters)?;
        Ok(rows.into_iter().flatten().flatten().next().unwrap_or_default())
    };
    let mut statement = quoted("'CREATE PUBLICATION %I', $1::text", &[&settings.publication])?;
    for (i, outbox) in outboxes.iter().enumerate() {
        let (schema, name) = outbox.name();
        statement.push_str(if i == 0 { " FOR TABLE " } else { ", " });
        statement.push_str(&quoted("'%I.%I', $1::text, $2::text", &[schema, name])?);
    }
    let mut is_partitioned = false;
    for outbox in outboxes {
        is_partitioned |= find_table(connection, outbox)?.is_partitioned;
    }
    let via_root = if is_partitioned { ", publish_via_partition_root = true" } else { "" };
    let statement = format!("{statement} WITH ({}{via_root})", publish(outboxes));
    connection.simple_query(&statement).map(drop).map_err(|e| {
        let hint = format!("let the table's owner run: {statement};");
        Error { kind: if e.kind == Kind::PostgresAway { e.kind } else { Kind::Refused }, ..e }.hint(hint)
    })
}

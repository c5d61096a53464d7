//! The publication: what it must publish, found out before every session, because the server tells nobody what it
//! leaves out of a stream.

mod excess;

use std::collections::HashSet;

use relay_core::outbox::{Outbox, Updates};

use crate::{
    config::{Retention, Settings},
    error::{Error, Kind},
    replication::{connection::Connection, stream::quote_identifier},
};

pub(crate) use self::excess::excess;

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
    /// Deletes or truncates.
    removals: bool,
    via_root: bool,
    /// Every table of the database, also those that are yet to come.
    is_of_all: bool,
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

/// Something that keeps a publication from publishing what the configuration uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    /// For programs: words with hyphens.
    pub(crate) name: &'static str,
    pub(crate) what: String,
    /// What mends it, in a sentence.
    hint: String,
    /// The same as statements, commands and comments alone.
    pub(crate) mend: Vec<String>,
}

impl Problem {
    fn new(name: &'static str, what: String, hint: impl Into<String>, mend: &[&str]) -> Self {
        Self { name, what, hint: hint.into(), mend: mend.iter().map(|line| (*line).to_owned()).collect() }
    }

    /// One that this statement mends.
    fn of_owner(name: &'static str, what: String, sql: &str) -> Self {
        Self::new(name, what, format!("let its owner run: {sql}"), &[&format!("{sql};")])
    }
}

/// Checks that the publication publishes what the configuration uses: with another, everything would be confirmed
/// and not everything published.
///
/// # Errors
/// Halted with the remedy, where it does not.
pub(crate) fn verify(connection: &mut Connection, settings: &Settings) -> Result<(), Error> {
    match problems(connection, settings)?.into_iter().next() {
        None => Ok(()),
        Some(Problem { what, hint, .. }) => Err(Error::new(Kind::Halted, what).hint(hint)),
    }
}

/// All that keeps it from that, of each outbox the first thing.
pub(crate) fn problems(connection: &mut Connection, settings: &Settings) -> Result<Vec<Problem>, Error> {
    let name = &settings.publication;
    let outboxes = &settings.source.outboxes;
    let Some(publication) = find(connection, name)? else {
        return Ok(vec![Problem::new(
            "publication-missing",
            format!("publication {name:?} does not exist"),
            "`cdc-relay init` creates it. Had it existed before, events written while it was gone are not in the stream",
            &["cdc-relay init"],
        )]);
    };
    let mut problems = Vec::new();
    let alter = format!("ALTER PUBLICATION {} SET ({})", quote_identifier(name), publish(outboxes));
    if !outboxes.is_empty() && !publication.inserts {
        let what = format!("publication {name:?} does not publish inserts");
        problems.push(Problem::of_owner("publication-no-inserts", what, &alter));
    }
    if wants_updates(outboxes) && !publication.updates {
        let what = format!("publication {name:?} does not publish updates, and an outbox is to halt at them");
        problems.push(Problem::of_owner("publication-no-updates", what, &alter));
    }
    if settings.retention != Retention::Keep && publication.removals {
        let what = format!(
            "publication {name:?} publishes deletes or truncates, and retention.mode is not \"keep\": what leaves the outbox \
             would be sent to every reader of it"
        );
        problems.push(Problem::of_owner("publication-removals", what, &alter));
    }
    for outbox in outboxes {
        problems.extend(of_table(connection, settings, &publication, outbox)?);
    }
    Ok(problems)
}

fn wants_updates(outboxes: &[Outbox]) -> bool {
    outboxes.iter().any(|outbox| outbox.updates() == Updates::Halt)
}

fn publish(outboxes: &[Outbox]) -> &'static str {
    if wants_updates(outboxes) { "publish = 'insert, update'" } else { "publish = 'insert'" }
}

fn find(connection: &mut Connection, name: &str) -> Result<Option<Publication>, Error> {
    let sql = "SELECT pubinsert::text, pubupdate::text, pubviaroot::text, (pubdelete OR pubtruncate)::text, puballtables::text \
         FROM pg_publication WHERE pubname = $1";
    let rows = connection.query(sql, &[name])?;
    let is = |value: Option<&Option<String>>| value.is_some_and(|v| v.as_deref() == Some("true"));
    let publication = |row: &Vec<Option<String>>| Publication {
        inserts: is(row.first()),
        updates: is(row.get(1)),
        via_root: is(row.get(2)),
        removals: is(row.get(3)),
        is_of_all: is(row.get(4)),
    };
    Ok(rows.first().map(publication))
}

/// An outbox's table in the catalog.
struct Table {
    /// As text.
    oid: String,
    is_partitioned: bool,
}

fn find_table(connection: &mut Connection, outbox: &Outbox) -> Result<Option<Table>, Error> {
    let sql = "SELECT c.oid::text, c.relkind::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
               WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p')";
    let (schema, name) = outbox.name();
    let rows = connection.query(sql, &[schema, name])?;
    let Some([Some(oid), Some(kind)]) = rows.first().map(Vec::as_slice) else { return Ok(None) };
    Ok(Some(Table { oid: oid.clone(), is_partitioned: kind == "p" }))
}

/// The outbox's table, by its number as text; None where there is none.
pub(crate) fn table_oid(connection: &mut Connection, outbox: &Outbox) -> Result<Option<String>, Error> {
    Ok(find_table(connection, outbox)?.map(|table| table.oid))
}

fn no_table(outbox: &Outbox) -> Problem {
    let hint = "mend outbox.table, or the database in postgres.url";
    Problem::new(
        "outbox-missing",
        format!("there is no table {} in this database", outbox.label()),
        hint,
        &[&format!("# {hint}")],
    )
}

fn of_table(
    connection: &mut Connection,
    settings: &Settings,
    publication: &Publication,
    outbox: &Outbox,
) -> Result<Option<Problem>, Error> {
    let (name, label) = (&settings.publication, outbox.label());
    let (schema, relation) = outbox.name();
    let alter = format!("ALTER PUBLICATION {}", quote_identifier(name));
    let relation = format!("{}.{}", quote_identifier(schema), quote_identifier(relation));
    let Some(table) = find_table(connection, outbox)? else { return Ok(Some(no_table(outbox))) };
    if table.is_partitioned && !publication.via_root {
        return Ok(Some(Problem::of_owner(
            "publication-partitions",
            format!("publication {name:?} publishes rows of {label} under the names of its partitions"),
            &format!("{alter} SET (publish_via_partition_root = true)"),
        )));
    }
    // Where it is a partition itself, it may be published as another.
    let sql = "SELECT t.schemaname || '.' || t.tablename, coalesce(t.rowfilter, '') \
               FROM (SELECT $2::text::oid AS relid UNION SELECT relid FROM pg_partition_ancestors($2::text::oid)) a \
               JOIN pg_class c ON c.oid = a.relid JOIN pg_namespace n ON n.oid = c.relnamespace \
               JOIN pg_publication_tables t ON (t.schemaname, t.tablename) = (n.nspname, c.relname) \
               WHERE t.pubname = $1";
    let rows = connection.query(sql, &[name, &table.oid])?;
    let Some([Some(published_as), Some(filter)]) = rows.first().map(Vec::as_slice) else {
        return Ok(Some(Problem::of_owner(
            "publication-no-table",
            format!("publication {name:?} does not have the table {label}"),
            &format!("{alter} ADD TABLE {relation}"),
        )));
    };
    if published_as != label {
        // Beside its root, it is there for rows that were written while the root was not published.
        if settings.source.outboxes.iter().any(|other| other.label() == published_as) {
            return Ok(None);
        }
        let hint = format!("set the outbox's table to {published_as:?} in the configuration");
        return Ok(Some(Problem::new(
            "publication-other-table",
            format!("publication {name:?} publishes rows of {label} as those of {published_as}"),
            hint.as_str(),
            &[&format!("# {hint}")],
        )));
    }
    if !filter.is_empty() {
        let mend = add_again(name, &relation);
        return Ok(Some(Problem::new(
            "publication-filter",
            format!("publication {name:?} leaves rows of {label} out by a row filter: {filter}"),
            format!(
                "let the publication's owner run: {} Where only some events are to be published, write the others elsewhere",
                mend.join(" ")
            ),
            &mend.each_ref().map(String::as_str),
        )));
    }
    of_columns(connection, settings, &table, outbox)
}

/// Takes a table out of a publication and adds it without filter and column list, in one transaction: no row is committed while
/// it is not published.
fn add_again(publication: &str, relation: &str) -> [String; 4] {
    let alter = format!("ALTER PUBLICATION {}", quote_identifier(publication));
    [
        "BEGIN;".into(),
        format!("{alter} DROP TABLE {relation};"),
        format!("{alter} ADD TABLE {relation};"),
        "COMMIT;".into(),
    ]
}

fn of_columns(
    connection: &mut Connection,
    settings: &Settings,
    table: &Table,
    outbox: &Outbox,
) -> Result<Option<Problem>, Error> {
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
            let hint = "mend the column's name in the configuration (the outbox's keys, its header_columns, or the topic \
                        template), or add it to the table";
            return Ok(Some(Problem::new(
                "column-missing",
                format!("the outbox {label} has no column {column:?}"),
                hint,
                &[&format!("# {hint}")],
            )));
        }
    }
    let used = outbox.required_columns().chain(outbox.optional_columns().filter(|c| there.contains(*c)));
    for column in used {
        if !published.contains(column) {
            let relation = format!("{}.{}", quote_identifier(schema), quote_identifier(relation));
            let [begin, drop, add, commit] = add_again(name, &relation);
            return Ok(Some(Problem::new(
                "publication-no-column",
                format!("publication {name:?} does not publish the column {column:?} of {label}"),
                format!(
                    "it has a column list, or the column is generated, and has to become an ordinary one. Let the publication's owner add \
                     the column to the list, or take the list away: {begin} {drop} {add} {commit}"
                ),
                &["-- a generated column has to become an ordinary one; else:", &begin, &drop, &add, &commit],
            )));
        }
    }
    Ok(None)
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
        let Some(table) = find_table(connection, outbox)? else { continue };
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
        let Some(table) = find_table(connection, outbox)? else {
            let Problem { what, hint, .. } = no_table(outbox);
            return Err(Error::new(Kind::Halted, what).hint(hint));
        };
        is_partitioned |= table.is_partitioned;
    }
    let via_root = if is_partitioned { ", publish_via_partition_root = true" } else { "" };
    let statement = format!("{statement} WITH ({}{via_root})", publish(outboxes));
    connection.simple_query(&statement).map(drop).map_err(|e| {
        let hint = format!("let the table's owner run: {statement};");
        Error { kind: if e.kind == Kind::PostgresAway { e.kind } else { Kind::Refused }, ..e }.hint(hint)
    })
}

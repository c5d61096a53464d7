//! What the publication has and nobody needs: it costs the server and the network, and nothing else.

use relay_core::outbox::Outbox;

use super::{Problem, Publication, find, find_table, publish};
use crate::{
    config::{Retention, Settings},
    error::Error,
    replication::{connection::Connection, stream::quote_identifier},
};

/// So many other tables are named.
const NAMED_LIMIT: usize = 3;

/// All of that.
pub(crate) fn excess(connection: &mut Connection, settings: &Settings) -> Result<Vec<Problem>, Error> {
    let Some(publication) = find(connection, &settings.publication)? else { return Ok(Vec::new()) };
    let operations = operations(&publication, settings);
    Ok(operations.into_iter().chain(tables(connection, &publication, settings)?).collect())
}

fn operations(publication: &Publication, settings: &Settings) -> Option<Problem> {
    let (name, outboxes) = (&settings.publication, &settings.source.outboxes);
    let mut more = Vec::new();
    if publication.updates && !super::wants_updates(outboxes) {
        more.push("updates");
    }
    if publication.removals && settings.retention == Retention::Keep {
        more.push("deletes or truncates");
    }
    if more.is_empty() {
        return None;
    }
    let what =
        format!("publication {name:?} publishes {}, too, which the relay passes over", more.join(" and "));
    let alter = format!("ALTER PUBLICATION {} SET ({})", quote_identifier(name), publish(outboxes));
    Some(Problem::of_owner("publication-more", what, &alter))
}

/// Other tables than the outboxes.
fn tables(
    connection: &mut Connection,
    publication: &Publication,
    settings: &Settings,
) -> Result<Option<Problem>, Error> {
    let (name, outboxes) = (&settings.publication, &settings.source.outboxes);
    let (mut oids, mut is_partitioned) = (Vec::new(), false);
    for outbox in outboxes {
        // One that is missing is a problem of its own.
        let Some(table) = find_table(connection, outbox)? else { return Ok(None) };
        oids.push(table.oid);
        is_partitioned |= table.is_partitioned;
    }
    let others = others(connection, name, &oids)?;
    if outboxes.is_empty() || others.is_empty() && !publication.is_of_all {
        return Ok(None);
    }
    let tables: Vec<_> = outboxes.iter().map(relation).collect();
    let (tables, quoted) = (tables.join(", "), quote_identifier(name));
    let shared = "-- unless somebody else uses it: then make one of the relay's own, and name it in postgres.publication";
    if publication.is_of_all {
        let what = format!(
            "publication {name:?} is FOR ALL TABLES: every change of the database is decoded and sent to the relay, which passes over it"
        );
        let via_root = if is_partitioned { ", publish_via_partition_root = true" } else { "" };
        let create =
            format!("CREATE PUBLICATION {quoted} FOR TABLE {tables} WITH ({}{via_root});", publish(outboxes));
        let (hint, drop) = ("make it again for the outbox alone", format!("DROP PUBLICATION {quoted};"));
        let mend = [shared, "BEGIN;", &drop, &create, "COMMIT;"];
        return Ok(Some(Problem::new("publication-all-tables", what, hint, &mend)));
    }
    let more = others.len().saturating_sub(NAMED_LIMIT);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let named = others[..others.len().min(NAMED_LIMIT)].join(", ");
    let what = format!(
        "publication {name:?} has other tables, too: {named}{more}. Their changes are sent to the relay, which passes over them"
    );
    let set = format!("ALTER PUBLICATION {quoted} SET TABLE {tables};");
    Ok(Some(Problem::new("publication-more-tables", what, set.as_str(), &[shared, &set])))
}

fn relation(outbox: &Outbox) -> String {
    let (schema, table) = outbox.name();
    format!("{}.{}", quote_identifier(schema), quote_identifier(table))
}

/// The tables of a publication that are neither these nor partitions or roots of these.
fn others(connection: &mut Connection, publication: &str, oids: &[String]) -> Result<Vec<String>, Error> {
    let sql = "WITH RECURSIVE ours AS (SELECT unnest(string_to_array($2, ' ')::oid[]) AS relid \
               UNION SELECT i.inhrelid FROM pg_inherits i JOIN ours ON i.inhparent = ours.relid) \
               SELECT t.schemaname || '.' || t.tablename FROM pg_publication_tables t \
               JOIN pg_namespace n ON n.nspname = t.schemaname JOIN pg_class c ON (c.relnamespace, c.relname) = (n.oid, t.tablename) \
               WHERE t.pubname = $1 AND c.oid NOT IN (SELECT relid FROM ours) \
               AND c.oid NOT IN (SELECT a.relid FROM ours, pg_partition_ancestors(ours.relid) a) ORDER BY 1";
    let rows = connection.query(sql, &[publication, &oids.join(" ")])?;
    Ok(rows.into_iter().flatten().flatten().collect())
}

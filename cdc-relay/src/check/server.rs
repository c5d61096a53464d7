//! What Postgres needs to be for the relay: its settings, the role's rights, the publication, the slot, and the outbox's
//! retention.

use relay_core::outbox::Outbox;

use super::Report;
use crate::{
    config::{Retention, Settings},
    error::{Error, Kind},
    publication,
    replication::{
        connection::Connection,
        handshake::{APPLICATION_NAME, Purpose},
        stream::{quote_identifier, quote_literal},
    },
    slot::{self, Slot},
};

const RELOAD: &str = "SELECT pg_reload_conf();";

/// Looks at the server that the relay would stream from.
pub(super) fn examine(
    connection: &mut Connection,
    settings: &Settings,
    report: &mut Report,
) -> Result<(), Error> {
    if connection.is_in_recovery()? {
        report.note(format!(
            "Postgres at {} is a standby: what only a primary can tell was not looked at",
            connection.place()
        ));
        return Ok(());
    }
    let place = connection.place().clone();
    examine_settings(connection, report)?;
    examine_role(connection, settings, report)?;
    let problems = publication::problems(connection, settings)?;
    for problem in problems.into_iter().chain(publication::excess(connection, settings)?) {
        let mend: Vec<&str> = problem.mend.iter().map(String::as_str).collect();
        report.finding(problem.name, &place, problem.what, &mend);
    }
    examine_slot(connection, settings, report)?;
    for outbox in &settings.source.outboxes {
        examine_retention(connection, settings, outbox, report)?;
    }
    Ok(())
}

fn setting(connection: &mut Connection, name: &str) -> Result<String, Error> {
    let value = connection.value("SELECT setting FROM pg_settings WHERE name = $1", &[name])?;
    Ok(value.unwrap_or_default())
}

/// The statement that limits the log that slots keep, to more than they keep now.
fn set_log_limit(connection: &mut Connection) -> Result<String, Error> {
    // It limits all that is kept, so what is kept now has to fit.
    let sql = "SELECT CASE WHEN NOT pg_is_in_recovery() THEN (SELECT ceil(max(pg_wal_lsn_diff(pg_current_wal_lsn(), \
               restart_lsn)) / (1 << 30))::int8 FROM pg_replication_slots) END";
    let kept_gib: u64 = connection.value(sql, &[])?.and_then(|n| n.parse().ok()).unwrap_or(0);
    Ok(format!("ALTER SYSTEM SET max_slot_wal_keep_size = '{}GB';", (2 * kept_gib).max(10)))
}

fn examine_settings(connection: &mut Connection, report: &mut Report) -> Result<(), Error> {
    let place = connection.place().clone();
    let level = setting(connection, "wal_level")?;
    if level != "logical" {
        report.finding(
            "wal-level",
            &place,
            format!("wal_level is {level}: the log has not what logical decoding needs"),
            &["ALTER SYSTEM SET wal_level = 'logical';", "-- and restart the server"],
        );
    }
    if setting(connection, "max_slot_wal_keep_size")? == "-1" {
        let limit = set_log_limit(connection)?;
        report.finding(
            "log-without-limit",
            &place,
            "max_slot_wal_keep_size is -1: while the relay or Kafka is away, the log that the slot needs grows until the disk is \
             full and the database stops",
            &[
                "-- more than the slots keep now, and no more than that and what the disk has left; beyond it a slot is lost, and the database lives:",
                &limit,
                RELOAD,
            ],
        );
    }
    match slot::check_synchronous(connection) {
        Err(e) if e.kind == Kind::Halted => {
            let sql = "SELECT DISTINCT application_name FROM pg_stat_replication WHERE application_name <> '' \
                       AND application_name NOT LIKE $1 || '%' ORDER BY 1";
            let others = connection.query(sql, &[APPLICATION_NAME])?;
            let others: Vec<String> =
                others.into_iter().flatten().flatten().map(|name| quote_identifier(&name)).collect();
            let set = format!(
                "ALTER SYSTEM SET synchronous_standby_names = {};",
                quote_literal(&others.join(", "))
            );
            report.finding(
                "synchronous-relay",
                &place,
                e.message,
                &["-- the standbys that are connected now, or empty for none:", &set, RELOAD],
            );
        }
        other => other?,
    }
    if setting(connection, "fsync")? == "off" {
        report.finding(
            "fsync-off",
            &place,
            "fsync is off: after a crash of the machine the database may be damaged, or lack what is in Kafka already",
            &["ALTER SYSTEM SET fsync = 'on';", RELOAD],
        );
    }
    Ok(())
}

fn examine_role(connection: &mut Connection, settings: &Settings, report: &mut Report) -> Result<(), Error> {
    let (place, role) = (connection.place().clone(), quote_identifier(&settings.postgres.user));
    // Nothing tells better whether the role may than that it does.
    match connection.beside(&settings.postgres, Purpose::Replication, settings.connect_timeout) {
        Ok(_) => {}
        Err(e) if matches!(e.sqlstate.as_deref(), Some("42501" | "28000")) => {
            let found = format!("role {role} may not replicate: {}", e.message);
            report.finding("no-replication", &place, found, &[&format!("ALTER ROLE {role} REPLICATION;")]);
        }
        Err(e) => return Err(e),
    }
    Ok(())
}

fn examine_slot(connection: &mut Connection, settings: &Settings, report: &mut Report) -> Result<(), Error> {
    let (place, name) = (connection.place().clone(), &settings.slot);
    let Some(slot) = Slot::look(connection, name)? else {
        report.finding(
            "slot-missing",
            &place,
            format!("there is no slot {name:?}"),
            &[
                "cdc-relay init         # where it never was",
                "cdc-relay accept-gap   # where it was: says what would be given up",
            ],
        );
        return Ok(());
    };
    if let Err(e) = slot.check_kind(name) {
        let mend = format!("# {}", e.hint.as_deref().unwrap_or_default());
        report.finding("slot-of-others", &place, e.message, &[&mend]);
        return Ok(());
    }
    if slot.is_lost {
        report.finding(
            "slot-lost",
            &place,
            format!("slot {name:?} is lost: the server has removed log that it needed"),
            &[
                "# what was committed since, and is not in Kafka, is told by:",
                "cdc-relay audit",
                "# to publish it first, where the table tells the time: OPERATING.md, Slot lost. To go on without it:",
                "cdc-relay accept-gap --yes",
            ],
        );
        return Ok(());
    }
    if slot.is_unreserved {
        tell_unreserved(connection, name, report)?;
    }
    let Some(pid) = &slot.active_pid else {
        let sql = "SELECT pg_size_pretty(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)) \
                   FROM pg_replication_slots WHERE slot_name = $1";
        let kept = connection.value(sql, &[name])?.unwrap_or_else(|| "log".to_owned());
        report
            .note(format!("nobody streams from slot {name:?}, for which the server keeps {kept} of its log"));
        return Ok(());
    };
    // Another role's application is told to members of pg_read_all_stats only.
    let sql = "SELECT coalesce(application_name, ''), coalesce(usename, ''), coalesce(host(client_addr), '') \
               FROM pg_stat_activity WHERE pid = $1::text::int";
    let rows = connection.query(sql, &[pid])?;
    if let Some([Some(application), Some(user), Some(client)]) = rows.first().map(Vec::as_slice)
        && !application.starts_with(APPLICATION_NAME)
        && (!application.is_empty() || *user == settings.postgres.user)
    {
        let found = format!(
            "slot {name:?} is held by {application:?}, of role {user:?} from {client:?}, which is no cdc-relay"
        );
        report.finding(
            "slot-held",
            &place,
            found,
            &["-- once that program may be stopped:", &format!("SELECT pg_terminate_backend({pid});")],
        );
    }
    Ok(())
}

fn tell_unreserved(connection: &mut Connection, name: &str, report: &mut Report) -> Result<(), Error> {
    let place = connection.place().clone();
    let limit = set_log_limit(connection)?;
    report.finding(
        "slot-unreserved",
        &place,
        format!(
            "slot {name:?} needs more log than max_slot_wal_keep_size lets it keep: the server's next checkpoint may remove that, and \
             the slot is lost then"
        ),
        &[
            "-- at once; less than the disk has left. Then see why the slot lags: cdc-relay status",
            &limit,
            RELOAD,
        ],
    );
    Ok(())
}

fn examine_retention(
    connection: &mut Connection,
    settings: &Settings,
    outbox: &Outbox,
    report: &mut Report,
) -> Result<(), Error> {
    let (schema, table) = outbox.name();
    let (place, role) = (connection.place().clone(), quote_identifier(&settings.postgres.user));
    let name = format!("{}.{}", quote_identifier(schema), quote_identifier(table));
    let ask = |connection: &mut Connection, sql: &str, parameters: &[&str]| {
        Ok::<bool, Error>(connection.value(sql, parameters)?.as_deref() == Some("true"))
    };
    if matches!(settings.retention, Retention::Keep) {
        return Ok(());
    }
    // Not by its name, for which the role would need the schema.
    let Some(oid) = publication::table_oid(connection, outbox)? else { return Ok(()) };
    match &settings.retention {
        Retention::Keep => {}
        Retention::Delete { column, .. } => {
            let may = "SELECT (has_schema_privilege($2, 'USAGE') AND has_table_privilege($1::text::oid, 'SELECT') \
                 AND has_table_privilege($1::text::oid, 'DELETE'))::text";
            if !ask(connection, may, &[&oid, schema])? {
                let found =
                    format!("role {role} may not delete rows of {}, as retention.mode says", outbox.label());
                let usage = format!("GRANT USAGE ON SCHEMA {} TO {role};", quote_identifier(schema));
                let grant = format!("GRANT SELECT, DELETE ON {name} TO {role};");
                report.finding("retention-no-right", &place, found, &[&usage, &grant]);
            }
            let there = "SELECT EXISTS (SELECT FROM pg_attribute WHERE attrelid = $1::text::oid AND attname = $2 \
                         AND attnum > 0 AND NOT attisdropped)::text";
            if !ask(connection, there, &[&oid, column])? {
                let found =
                    format!("the outbox {} has no column {column:?} (retention.column)", outbox.label());
                let add = format!(
                    "ALTER TABLE {name} ADD COLUMN {} timestamptz NOT NULL DEFAULT now();",
                    quote_identifier(column)
                );
                report.finding("retention-no-column", &place, found, &[&add]);
                return Ok(());
            }
            let indexed = "SELECT EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid \
                           AND a.attnum = i.indkey[0] WHERE i.indrelid = $1::text::oid AND a.attname = $2 \
                           AND i.indisvalid)::text";
            if !ask(connection, indexed, &[&oid, column])? {
                let found = format!(
                    "no index of {} begins with {column:?}: each look for old rows reads the whole table",
                    outbox.label()
                );
                let create = format!("CREATE INDEX CONCURRENTLY ON {name} ({});", quote_identifier(column));
                report.finding("retention-no-index", &place, found, &[&create]);
            }
        }
        Retention::DropPartitions { .. } => {
            let owner = connection.query(
                "SELECT format('%I', r.rolname), pg_has_role(c.relowner, 'USAGE')::text FROM pg_class c \
                 JOIN pg_roles r ON r.oid = c.relowner WHERE c.oid = $1::text::oid",
                &[&oid],
            )?;
            if let Some([Some(owner), Some(is_member)]) = owner.first().map(Vec::as_slice)
                && is_member != "true"
            {
                let found =
                    format!("role {role} may not drop partitions of {}, which {owner} owns", outbox.label());
                report.finding("retention-no-right", &place, found, &[&format!("GRANT {owner} TO {role};")]);
            }
        }
    }
    Ok(())
}

//! What the synchronisation of slots to standbys still needs, without which the slot does not survive a promotion
//! (<https://www.postgresql.org/docs/current/logicaldecoding-explanation.html#LOGICALDECODING-REPLICATION-SLOTS-SYNCHRONIZATION>).

use std::collections::BTreeMap;

use super::Report;
use crate::{
    config::Settings,
    error::Error,
    replication::{
        connection::{Connection, TextRow},
        handshake::Purpose,
        place::Place,
    },
    slot::{self, FAILOVER_MAJOR, Slot},
};

/// The finding that no host takes writes.
pub(super) const NO_PRIMARY: &str = "no-primary";

const RELOAD: &str = "SELECT pg_reload_conf();";

/// A server that answers.
struct Server {
    connection: Connection,
    place: Place,
    is_standby: bool,
}

pub(super) fn examine(settings: &Settings, report: &mut Report) -> Result<(), Error> {
    if !settings.failover && settings.postgres.hosts.len() == 1 {
        report.note(
            "postgres.failover is false and postgres.url names one host: whether the slot would survive a promotion was not \
             looked at",
        );
        return Ok(());
    }
    let mut servers = find_servers(settings, report)?;
    let (mut primaries, mut standbys) = (Vec::new(), 0);
    for server in &mut servers {
        let (major, version) = slot::server_version(&mut server.connection)?;
        if major < FAILOVER_MAJOR {
            let found = format!("the server is PostgreSQL {version}, which does not synchronise slots");
            let mend = format!("-- upgrade to PostgreSQL {FAILOVER_MAJOR} or later");
            report.finding("server-too-old", &server.place, found, &[&mend]);
        } else if server.is_standby {
            examine_standby(server, settings, report)?;
        } else {
            examine_primary(server, settings, report)?;
        }
        if server.is_standby {
            standbys += 1;
        } else {
            primaries.push(server.place.to_string());
        }
    }
    if primaries.is_empty() {
        report.finding(
            NO_PRIMARY,
            &"",
            "no host of postgres.url takes writes",
            &["-- on the standby that is to take over:", "SELECT pg_promote();"],
        );
    }
    if primaries.len() > 1 {
        let found = format!(
            "{} all take writes: what is written to the old primary is lost",
            primaries.join(" and ")
        );
        report.finding(
            "several-primaries",
            &"",
            found,
            &["-- stop the old primary, and make it a standby of the new one with pg_rewind"],
        );
    }
    if standbys == 0 {
        report.note(
            "no standby among the hosts of postgres.url answers: whether one would have the slot after its promotion is not known",
        );
    }
    Ok(())
}

/// Every server that answers, once; a note of each that does not.
fn find_servers(settings: &Settings, report: &mut Report) -> Result<Vec<Server>, Error> {
    let mut servers: BTreeMap<Vec<TextRow>, Server> = BTreeMap::new();
    let mut failed = None;
    for host in &settings.postgres.hosts {
        let places = Place::of(host).map_err(|e| Error::postgres_io(&format!("cannot look up {host}"), &e));
        let mut failures = Vec::new();
        let mut answers = false;
        for place in places.map_or_else(|e| vec![Err(e)], |places| places.into_iter().map(Ok).collect()) {
            let look = |place: Place| -> Result<_, Error> {
                let timeout = settings.connect_timeout;
                let mut connection =
                    Connection::connect_to(&settings.postgres, place.clone(), Purpose::Sql, timeout)?;
                let is_standby = connection.is_in_recovery()?;
                Ok((connection.server()?, Server { connection, place, is_standby }))
            };
            match place.and_then(look) {
                Ok((key, server)) => {
                    answers = true;
                    servers.entry(key).or_insert(server);
                }
                Err(e) => failures.push(e),
            }
        }
        // One address of a name is enough.
        if !answers {
            for e in &failures {
                report.note(e.message.clone());
            }
            failed = failures.pop().or(failed);
        }
    }
    match failed {
        Some(error) if servers.is_empty() => Err(error),
        _ => Ok(servers.into_values().collect()),
    }
}

/// Settings by their names; without those that the role may not see.
fn read_settings(connection: &mut Connection, names: &str) -> Result<BTreeMap<String, String>, Error> {
    let sql = "SELECT name, setting FROM pg_settings WHERE name = ANY (string_to_array($1, ' '))";
    let rows = connection.query(sql, &[names])?;
    let pair = |row: TextRow| {
        let mut row = row.into_iter();
        Some((row.next()??, row.next()?.unwrap_or_default()))
    };
    Ok(rows.into_iter().filter_map(pair).collect())
}

fn examine_primary(server: &mut Server, settings: &Settings, report: &mut Report) -> Result<(), Error> {
    let (connection, place) = (&mut server.connection, &server.place);
    let name = &settings.slot;
    if Slot::look(connection, name)?.is_some_and(|slot| !slot.is_failover) {
        let found = format!("slot {name:?} is not synchronised to standbys");
        report.finding(
            "slot-not-failover",
            place,
            found,
            &[
                "# stop every relay of this slot, then, with the relay's configuration:",
                "CDC_RELAY_POSTGRES__FAILOVER=true cdc-relay init",
            ],
        );
    }
    examine_standby_slots(connection, place, report)
}

/// The physical slots that the relay's slot waits for.
fn examine_standby_slots(
    connection: &mut Connection,
    place: &Place,
    report: &mut Report,
) -> Result<(), Error> {
    let sql = "SELECT slot_name::text, active::text FROM pg_replication_slots WHERE slot_type = 'physical' ORDER BY slot_name";
    let physical: BTreeMap<String, bool> = connection
        .query(sql, &[])?
        .into_iter()
        .filter_map(|row| Some((row.first()?.clone()?, row.get(1)?.as_deref() == Some("true"))))
        .collect();
    let list =
        read_settings(connection, "synchronized_standby_slots")?.into_values().next().unwrap_or_default();
    let listed = slot_names(&list);
    if listed.is_empty() {
        let found = "synchronized_standby_slots is empty: the relay may publish what no standby has, and a promotion would lose it";
        let (create, set) = (
            "SELECT pg_create_physical_replication_slot('standby1');   -- and primary_slot_name = 'standby1' on the standby",
            set_standby_slots(physical.keys().map(String::as_str)),
        );
        match &set {
            Some(set) => report.finding("standby-slots-not-set", place, found, &[set, RELOAD]),
            None => report.finding(
                "standby-slots-not-set",
                place,
                found,
                &[create, "ALTER SYSTEM SET synchronized_standby_slots = 'standby1';", RELOAD],
            ),
        }
    }
    for name in listed {
        match physical.get(&name) {
            None => {
                let found = format!(
                    "synchronized_standby_slots names {name:?}, which is no physical slot here: the relay gets nothing"
                );
                let create = format!(
                    "SELECT pg_create_physical_replication_slot('{name}');   -- or take it out of the setting"
                );
                report.finding("standby-slot-missing", place, found, &[&create]);
            }
            Some(false) => {
                let found = format!(
                    "no standby uses the slot {name:?} of synchronized_standby_slots: the relay gets nothing meanwhile"
                );
                let mend = format!(
                    "-- start the standby with primary_slot_name = '{name}', or take the slot out of the setting"
                );
                report.finding("standby-slot-inactive", place, found, &[&mend]);
            }
            Some(true) => {}
        }
    }
    Ok(())
}

fn examine_standby(server: &mut Server, settings: &Settings, report: &mut Report) -> Result<(), Error> {
    let (connection, place) = (&mut server.connection, &server.place);
    let found = read_settings(
        connection,
        "sync_replication_slots hot_standby_feedback primary_slot_name primary_conninfo wal_level",
    )?;
    let is = |name: &str, value: &str| found.get(name).is_some_and(|v| v == value);
    if !is("sync_replication_slots", "on") {
        let set = "ALTER SYSTEM SET sync_replication_slots = on;";
        report.finding("slots-not-synchronised", place, "sync_replication_slots is off", &[set, RELOAD]);
    }
    if !is("hot_standby_feedback", "on") {
        let set = "ALTER SYSTEM SET hot_standby_feedback = on;";
        report.finding(
            "no-feedback",
            place,
            "hot_standby_feedback is off, and slots are not synchronised without it",
            &[set, RELOAD],
        );
    }
    if is("primary_slot_name", "") {
        report.finding(
            "no-primary-slot",
            place,
            "primary_slot_name is empty, and slots are not synchronised without it",
            &[
                "-- on the primary: SELECT pg_create_physical_replication_slot('standby1');",
                "ALTER SYSTEM SET primary_slot_name = 'standby1';",
                RELOAD,
            ],
        );
    }
    if !is("wal_level", "logical") {
        report.finding(
            "wal-level",
            place,
            "wal_level is not logical: logical slots are lost with the promotion",
            &["ALTER SYSTEM SET wal_level = logical;", "-- then restart it"],
        );
    }
    match found.get("primary_conninfo") {
        None => report.note(format!(
            "{place}: role {:?} may not see primary_conninfo, which has to have a dbname (GRANT pg_read_all_settings TO …)",
            settings.postgres.user
        )),
        Some(conninfo) if !conninfo.contains("dbname") => {
            report.finding("no-dbname", place, "primary_conninfo has no dbname, and slots are not synchronised without it", &[
                "-- ALTER SYSTEM SET primary_conninfo = '… dbname=postgres';",
                RELOAD,
            ]);
        }
        Some(_) => {}
    }
    examine_copy(connection, place, settings, report)
}

/// The slot as the standby has it.
fn examine_copy(
    connection: &mut Connection,
    place: &Place,
    settings: &Settings,
    report: &mut Report,
) -> Result<(), Error> {
    let name = &settings.slot;
    let sql = "SELECT synced::text, temporary::text, coalesce(invalidation_reason, '') FROM pg_replication_slots WHERE slot_name = $1";
    let rows = connection.query(sql, &[name])?;
    let text = |n: usize| rows.first().and_then(|row| row.get(n)?.as_deref()).unwrap_or_default();
    let is_temporary = text(1) == "true";
    if !rows.is_empty() && text(0) != "true" {
        let found = format!("there is a slot {name:?} that is not the primary's, in the place of its copy");
        let mend = format!("SELECT pg_drop_replication_slot('{name}');");
        report.finding("slot-not-synced", place, found, &[&mend]);
    } else if !text(2).is_empty() {
        let found = format!("its copy of slot {name:?} is of no use: {}", text(2));
        report.finding(
            "slot-not-synced",
            place,
            found,
            &["-- the server drops it and makes it again once the primary's is good"],
        );
    } else if rows.is_empty() || is_temporary {
        let how = if is_temporary { "only a temporary copy" } else { "no copy" };
        let found = format!("it has {how} of slot {name:?}: after a promotion the slot would not be there");
        report.finding("slot-not-synced", place, found, &[
            "-- once the rest is mended, and while a relay streams: it comes within seconds with sync_replication_slots = on, or by",
            "SELECT pg_sync_replication_slots();",
        ]);
    }
    Ok(())
}

/// The names in a list of slots.
fn slot_names(list: &str) -> Vec<String> {
    let name = |name: &str| name.trim().trim_matches('"').to_owned();
    list.split(',').map(name).filter(|name| !name.is_empty()).collect()
}

/// The statement that names them all; None where there are none.
fn set_standby_slots<'a>(names: impl Iterator<Item = &'a str>) -> Option<String> {
    // Slots have names of [a-z0-9_].
    let list: Vec<_> = names.map(|name| format!("'{name}'")).collect();
    (!list.is_empty()).then(|| format!("ALTER SYSTEM SET synchronized_standby_slots = {};", list.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_slots_are_read_and_written_as_postgres_has_them() {
        assert_eq!(slot_names("a, \"b_1\",c"), ["a", "b_1", "c"]);
        assert!(slot_names(" ").is_empty());
        let set = set_standby_slots(["a", "b"].into_iter());
        assert_eq!(set.unwrap(), "ALTER SYSTEM SET synchronized_standby_slots = 'a', 'b';");
        assert_eq!(set_standby_slots([].into_iter()), None);
    }
}

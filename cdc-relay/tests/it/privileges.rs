//! What the relay's role may do in the orders database, by `postgres/init.sql`.

use sqlx::{
    AssertSqlSafe, Connection as _, Executor as _, PgConnection, Row as _, postgres::PgConnectOptions,
};

use crate::{
    database::Database,
    relay::{Relay, command},
    topics::Topic,
};

const INSUFFICIENT_PRIVILEGE: &str = "42501";

/// What would write, read elsewhere, or make something. `init.sql` grants none of it.
const FORBIDDEN: [&str; 24] = [
    "INSERT INTO outbox (id, aggregatetype, aggregateid, type) VALUES (gen_random_uuid(), 'a', 'b', 'c')",
    "UPDATE outbox SET payload = NULL",
    "DELETE FROM outbox",
    "TRUNCATE outbox",
    "DO $$ BEGIN LOCK TABLE outbox IN SHARE MODE; END $$",
    "ALTER TABLE outbox ADD another int",
    "SELECT FROM orders",
    "SELECT FROM order_items",
    "SELECT FROM order_events",
    "INSERT INTO orders SELECT FROM orders WHERE false",
    "CREATE TABLE public.mine (n int)",
    "CREATE TEMPORARY TABLE mine (n int)",
    "CREATE SCHEMA mine",
    "CREATE PUBLICATION mine",
    "ALTER PUBLICATION cdc_relay SET (publish = 'update')",
    "DROP PUBLICATION cdc_relay",
    "CREATE ROLE mine",
    "CREATE DATABASE mine",
    "ALTER ROLE order_api PASSWORD 'mine'",
    "SET ROLE orders_owner",
    "ALTER SYSTEM SET work_mem = '1MB'",
    "SELECT FROM pg_authid",
    "SELECT pg_read_file('postgresql.conf')",
    "COPY (SELECT 1) TO PROGRAM 'true'",
];

/// Every privilege on a table, view or sequence outside the system's own schemas, and on each schema and database.
const GRANTED: &str = "\
    SELECT kind || ' ' || name || ' ' || privilege FROM (
        SELECT 'table' AS kind, oid::regclass::text AS name, p AS privilege
        FROM pg_class, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) p
        WHERE relkind IN ('r', 'p', 'v', 'm', 'f') AND relnamespace::regnamespace::text NOT IN ('pg_catalog', 'information_schema')
          AND relnamespace::regnamespace::text NOT LIKE 'pg\\_%' AND has_table_privilege('cdc_relay', oid, p)
        UNION ALL
        SELECT 'schema', nspname, p FROM pg_namespace, unnest(ARRAY['USAGE', 'CREATE']) p
        WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' AND has_schema_privilege('cdc_relay', oid, p)
        UNION ALL
        SELECT 'database', datname, p FROM pg_database, unnest(ARRAY['CONNECT', 'CREATE', 'TEMPORARY']) p
        WHERE datname = current_database() AND has_database_privilege('cdc_relay', oid, p)
        UNION ALL
        SELECT 'member of', roleid::regrole::text, '' FROM pg_auth_members WHERE member = 'cdc_relay'::regrole
    ) all_of_them ORDER BY 1";

fn connect(database: &Database, role: Option<&str>) -> PgConnection {
    let superuser: PgConnectOptions = database.servers.postgres.parse().unwrap();
    let options = superuser.database("orders");
    let options = role.map_or(options.clone(), |role| options.username(role).password(role));
    database.runtime.block_on(PgConnection::connect_with(&options)).unwrap()
}

#[test]
fn the_relays_role_can_read_the_outbox_and_replicate_and_nothing_more() {
    // The database is the order system's own; the slot's name is this test's.
    let (database, topic) = (Database::new(), Topic::new(1, &[]));
    let (mut superuser, mut relays) = (connect(&database, None), connect(&database, Some("cdc_relay")));
    let on = |connection: &mut PgConnection, sql: &str| {
        database.runtime.block_on(connection.fetch_all(AssertSqlSafe(sql.to_owned())))
    };
    for forbidden in FORBIDDEN {
        let refused = on(&mut relays, forbidden).expect_err(forbidden);
        let code = refused.as_database_error().and_then(|e| e.code().map(|c| c.to_string()));
        assert_eq!(code.as_deref(), Some(INSUFFICIENT_PRIVILEGE), "{forbidden}: {refused}");
    }
    let granted = on(&mut superuser, GRANTED).unwrap();
    let granted: Vec<String> = granted.iter().map(|row| row.get(0)).collect();
    assert_eq!(granted, ["database orders CONNECT", "schema public USAGE", "table outbox SELECT"]);
    on(&mut relays, "SELECT FROM outbox").unwrap();

    // And that is enough.
    let options: PgConnectOptions = database.servers.postgres.parse().unwrap();
    let url = format!("postgres://cdc_relay:cdc_relay@{}:{}/orders", options.get_host(), options.get_port());
    let environment = [("CDC_RELAY_POSTGRES__URL", url.as_str())];
    let made = command(&database).arg("init").envs(environment).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let relay = Relay::start(&database, &environment);
    let kind = &topic.kind;
    let row = format!("(gen_random_uuid(), '{kind}', 'a', 'T', '{{\"n\": 0}}')");
    let columns = "id, aggregatetype, aggregateid, type, payload";
    on(&mut superuser, &format!("INSERT INTO outbox ({columns}) VALUES {row}")).unwrap();
    on(&mut superuser, &format!("DELETE FROM outbox WHERE aggregatetype = '{kind}'")).unwrap();
    topic.read(1);
    relay.stop();
}

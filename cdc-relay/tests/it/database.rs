//! A database of a test's own, with an outbox table and a role that may only replicate and read it.

use std::time::{Duration, Instant};

use sqlx::{
    Connection as _, Executor as _, PgConnection, Row as _,
    postgres::{PgConnectOptions, PgRow},
};
use tokio::runtime::Runtime;

/// The server of the test run.
pub(crate) fn server(variable: &str) -> String {
    std::env::var(variable)
        .unwrap_or_else(|_| panic!("{variable} is not set: run the tests by `cargo xtask test`"))
}

/// Where a test's Postgres and Kafka are.
#[derive(Debug, Clone)]
pub(crate) struct Servers {
    /// Connection string of the superuser.
    pub(crate) postgres: String,
    /// Bootstrap servers.
    pub(crate) kafka: String,
}

impl Servers {
    /// Those of the test run, which all tests share.
    pub(crate) fn shared() -> Self {
        Self { postgres: server("TEST_POSTGRES_URL"), kafka: server("TEST_KAFKA_BROKERS") }
    }
}

/// Waits for a condition, and says what it was if it never comes true.
pub(crate) fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited for 60 s in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A short name that no other test has.
pub(crate) fn unique() -> String {
    uuid::Uuid::now_v7().simple().to_string().split_off(12)
}

/// What inserts `count` rows as [`Database::insert`] says.
pub(crate) fn counted(kind: &str, first: usize, count: usize) -> String {
    format!(
        "DO $$ BEGIN FOR n IN {first}..{} LOOP INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'a' || n % 10, \
         'Counted', json_build_object('n', n)); COMMIT; END LOOP; END $$",
        first + count - 1
    )
}

pub(crate) struct Database {
    pub(crate) runtime: Runtime,
    connection: PgConnection,
    pub(crate) options: PgConnectOptions,
    pub(crate) servers: Servers,
    /// The database's and the role's name, and the role's password.
    pub(crate) name: String,
    /// The slot's name.
    pub(crate) slot: String,
}

/// Debezium's outbox table as its documentation gives it.
const DEBEZIUM_OUTBOX: &str = "CREATE TABLE outbox (id uuid PRIMARY KEY, aggregatetype varchar(255) NOT NULL, \
     aggregateid varchar(255) NOT NULL, type varchar(255) NOT NULL, payload jsonb)";

impl Database {
    pub(crate) fn new() -> Self {
        Self::on(&Servers::shared())
    }

    pub(crate) fn on(servers: &Servers) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let server: PgConnectOptions = servers.postgres.parse().unwrap();
        let name = format!("relay_{}", unique());
        let options = server.clone().database(&name);
        let connection = runtime.block_on(async {
            let mut admin = PgConnection::connect_with(&server).await.unwrap();
            admin.execute(sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"))).await.unwrap();
            let role = format!("CREATE ROLE {name} LOGIN REPLICATION PASSWORD '{name}'");
            admin.execute(sqlx::AssertSqlSafe(role)).await.unwrap();
            PgConnection::connect_with(&options).await.unwrap()
        });
        let slot = name.clone();
        let servers = servers.clone();
        let mut database = Self { runtime, connection, options, servers, name, slot };
        database.run(DEBEZIUM_OUTBOX);
        database.run("CREATE PUBLICATION cdc_relay FOR TABLE outbox WITH (publish = 'insert')");
        database
    }

    /// A connection string of the relay's role.
    pub(crate) fn url(&self) -> String {
        let name = &self.name;
        format!("postgres://{name}:{name}@{}:{}/{name}", self.options.get_host(), self.options.get_port())
    }

    /// Connects again after the server was restarted, once it is back.
    pub(crate) fn reconnect(&mut self) {
        self.connection = eventually("Postgres is back", || {
            self.runtime.block_on(PgConnection::connect_with(&self.options)).ok()
        });
    }

    /// Goes on at another server that has this database, too.
    pub(crate) fn move_to(&mut self, port: u16) {
        self.options = self.options.clone().port(port);
        self.reconnect();
    }

    pub(crate) fn run(&mut self, sql: &str) {
        self.runtime.block_on(self.connection.execute(sqlx::AssertSqlSafe(sql.to_owned()))).unwrap();
    }

    pub(crate) fn row(&mut self, sql: &str) -> PgRow {
        self.runtime.block_on(self.connection.fetch_one(sqlx::AssertSqlSafe(sql.to_owned()))).unwrap()
    }

    pub(crate) fn rows(&mut self, sql: &str) -> Vec<PgRow> {
        self.runtime.block_on(self.connection.fetch_all(sqlx::AssertSqlSafe(sql.to_owned()))).unwrap()
    }

    pub(crate) fn text(&mut self, sql: &str) -> String {
        self.row(sql).get(0)
    }

    pub(crate) fn number(&mut self, sql: &str) -> i64 {
        self.row(sql).get(0)
    }

    /// Inserts `count` rows of aggregate type `kind`, each its own transaction, over ten aggregates; the payload
    /// counts them from `first`.
    pub(crate) fn insert(&mut self, kind: &str, first: usize, count: usize) {
        self.run(&counted(kind, first, count));
    }

    /// Log from the slot's confirmed LSN up to `lsn`, in bytes; not positive when it is confirmed.
    pub(crate) fn unconfirmed_bytes(&mut self, lsn: &str) -> i64 {
        let slot = self.slot.clone();
        self.number(&format!(
            "SELECT pg_wal_lsn_diff('{lsn}', confirmed_flush_lsn)::int8 FROM pg_replication_slots WHERE slot_name = '{slot}'"
        ))
    }

    pub(crate) fn current_lsn(&mut self) -> String {
        self.text("SELECT pg_current_wal_lsn()::text")
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let server = self.options.clone().database("postgres");
        let (slot, name) = (self.slot.clone(), self.name.clone());
        self.runtime.block_on(async {
            let Ok(mut admin) = PgConnection::connect_with(&server).await else { return };
            let end = format!("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{slot}'");
            let _ = admin.execute(sqlx::AssertSqlSafe(end)).await;
            let drop_slot = format!("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '{slot}'");
            // The walsender takes a moment to let go.
            for _ in 0..100 {
                if admin.execute(sqlx::AssertSqlSafe(drop_slot.clone())).await.is_ok() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            let _ = admin.execute(sqlx::AssertSqlSafe(format!("DROP DATABASE {name} WITH (FORCE)"))).await;
            let _ = admin.execute(sqlx::AssertSqlSafe(format!("DROP ROLE {name}"))).await;
        });
    }
}

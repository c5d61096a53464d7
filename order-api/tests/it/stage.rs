//! What a test stands on: a database, the service, an HTTP client.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use order_api::{app, config::Config};
use serde_json::{Value, json};
use service::{
    Secret,
    shutdown::{Shutdown, Trigger},
};
use sqlx::{AssertSqlSafe, Connection, PgConnection, postgres::PgConnectOptions};
use tokio::{runtime::Runtime, task::JoinHandle};

use crate::documented;

pub(crate) const INIT: &str = include_str!("../../../postgres/init.sql");
pub(crate) const LOCAL: &str = include_str!("../../../postgres/local.sql");

/// How long anything may take before the test says that it never happens.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A database of the test's own, dropped with it, and the runtime everything of the test runs on.
pub(crate) struct Stage {
    pub(crate) runtime: Runtime,
    server: PgConnectOptions,
    pub(crate) database: String,
}

impl Stage {
    /// A database with the schema.
    pub(crate) fn new() -> Self {
        let stage = Self::empty();
        stage.apply_schema();
        stage
    }

    /// A database with nothing in it.
    pub(crate) fn empty() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let url = std::env::var("TEST_POSTGRES_URL").expect(
            "TEST_POSTGRES_URL is not set: these tests need a real Postgres; run them with `cargo xtask test`",
        );
        let server: PgConnectOptions = url.parse().expect("TEST_POSTGRES_URL is a postgres:// url");
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let database = format!("order_api_test_{}_{number}_{:x}", std::process::id(), fastrand::u32(..));
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(run(&server, format!("CREATE DATABASE {database}")));
        Self { runtime, server, database }
    }

    /// As the stack does at every start.
    pub(crate) fn apply_schema(&self) {
        self.sql(INIT);
        self.sql(LOCAL);
    }

    /// The database as the superuser.
    pub(crate) fn superuser(&self) -> PgConnectOptions {
        self.server.clone().database(&self.database)
    }

    /// The database as one of the roles, whose password is its name.
    pub(crate) fn role(&self, name: &str) -> PgConnectOptions {
        self.superuser().username(name).password(name)
    }

    /// Runs statements as the superuser.
    pub(crate) fn sql(&self, text: &str) {
        self.runtime.block_on(run(&self.superuser(), text.to_owned()));
    }

    /// The one value a query of the superuser answers, as text.
    pub(crate) fn value(&self, query: &str) -> String {
        let query = format!("SELECT ({query})::text");
        let options = self.superuser();
        self.runtime.block_on(async {
            let mut connection = PgConnection::connect_with(&options).await.unwrap();
            let value: Option<String> =
                sqlx::query_scalar(AssertSqlSafe(query)).fetch_one(&mut connection).await.unwrap();
            value.unwrap_or_default()
        })
    }

    pub(crate) fn count(&self, table: &str) -> usize {
        self.value(&format!("SELECT count(*) FROM {table}")).parse().unwrap()
    }

    /// Rows of orders, items, events and outbox.
    pub(crate) fn counts(&self) -> [usize; 4] {
        ["orders", "order_items", "order_events", "outbox"].map(|table| self.count(table))
    }

    pub(crate) fn postgres(&self) -> SocketAddr {
        let host = self.server.get_host();
        let host = if host == "localhost" { "127.0.0.1" } else { host };
        SocketAddr::new(host.parse().expect("TEST_POSTGRES_URL names an IP address"), self.server.get_port())
    }

    /// A configuration for the service that reaches the database at `postgres`.
    pub(crate) fn config(&self, postgres: SocketAddr) -> Config {
        let mut config = Config::default();
        config.http.listen = "127.0.0.1:0".into();
        config.postgres.url = Secret::new(format!("postgres://order_api@{postgres}/{}", self.database));
        config.postgres.password = Secret::new("order_api");
        config.postgres.check_interval_ms = 20;
        // Its statements would come between those that a test counts or loses.
        config.fleet.interval_seconds = 0;
        config.messages.topics = vec!["notifications".into(), "prices".into()];
        // Some tests count round trips, some have one connection.
        config.messages.redeliver_interval_ms = 60_000;
        config
    }

    /// The service, ready.
    pub(crate) fn service(&self) -> Service {
        self.service_with(|_| ())
    }

    pub(crate) fn service_with(&self, change: impl FnOnce(&mut Config)) -> Service {
        let mut config = self.config(self.postgres());
        change(&mut config);
        let service = self.service_of(&config);
        service.wait_ready();
        service
    }

    /// The service, perhaps not ready.
    pub(crate) fn service_of(&self, config: &Config) -> Service {
        let app = self.runtime.block_on(app::build(config)).unwrap();
        let client = Client::new(app.address());
        let (trigger, shutdown) = Shutdown::manual();
        let running = self.runtime.spawn(app.run_until_stopped(shutdown));
        Service { client, trigger, running }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let drop = format!("DROP DATABASE {} WITH (FORCE)", self.database);
        self.runtime.block_on(run(&self.server, drop));
    }
}

pub(crate) async fn run(options: &PgConnectOptions, sql: String) {
    try_run(options, sql).await.unwrap();
}

pub(crate) async fn try_run(options: &PgConnectOptions, sql: String) -> Result<(), sqlx::Error> {
    let mut connection = PgConnection::connect_with(options).await?;
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await?;
    connection.close().await
}

/// Waits for a condition, and fails the test if it never comes.
pub(crate) fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A running service and a client of it.
pub(crate) struct Service {
    pub(crate) client: Client,
    pub(crate) trigger: Trigger,
    pub(crate) running: JoinHandle<()>,
}

impl Service {
    pub(crate) fn wait_ready(&self) {
        wait_for("the service to be ready", || self.client.get("/health/ready").status == 200);
    }
}

impl std::ops::Deref for Service {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

/// What a client sees of an answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: ureq::http::HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }

    /// Checks that this is a problem of the status and the kind, and gives its body.
    #[track_caller]
    pub(crate) fn problem(&self, status: u16, slug: &str) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.header("content-type"), "application/problem+json", "{self:?}");
        let body = self.json();
        assert_eq!(body["type"], format!("/problems/{slug}"));
        assert_eq!(body["status"], status);
        body
    }

    /// The pointers of a 422.
    #[track_caller]
    pub(crate) fn wrong_fields(&self) -> Vec<String> {
        let body = self.problem(422, "invalid-request");
        body["errors"].as_array().unwrap().iter().map(|e| e["pointer"].as_str().unwrap().to_owned()).collect()
    }
}

/// Talks to one service. Cloning shares the connections.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) address: SocketAddr,
    agent: ureq::Agent,
}

impl Client {
    pub(crate) fn new(address: SocketAddr) -> Self {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            .max_idle_connections_per_host(64)
            .allow_non_standard_methods(true)
            .build()
            .into();
        Self { address, agent }
    }

    pub(crate) fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        self.try_send(method, path, headers, body).unwrap_or_else(|e| panic!("{method} {path}: {e}"))
    }

    pub(crate) fn try_send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Result<Answer, ureq::Error> {
        let mut request =
            ureq::http::Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut answer = if body.is_empty() {
            self.agent.run(request.body(()).unwrap())?
        } else {
            self.agent.run(request.body(body.to_owned()).unwrap())?
        };
        let answer = Answer {
            status: answer.status().as_u16(),
            headers: answer.headers().clone(),
            text: answer.body_mut().read_to_string()?,
        };
        documented::check(method, path, &answer);
        Ok(answer)
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], "")
    }

    pub(crate) fn post(&self, body: &Value) -> Answer {
        self.post_text(&body.to_string())
    }

    pub(crate) fn post_text(&self, body: &str) -> Answer {
        self.send("POST", "/api/orders", &[("content-type", "application/json")], body)
    }
}

/// An order that is right.
pub(crate) fn order() -> Value {
    json!({
        "customerId": "customer-1",
        "restaurantId": "restaurant-1",
        "items": [
            {"menuItemId": "paracetamol-500", "name": "Paracetamol 500 mg", "price": 6.25, "quantity": 2},
            {"menuItemId": "vitamin-c", "name": "Vitamin C, 20 tablets", "price": "3.9", "quantity": 1},
        ],
    })
}

//! What can be configured. `config.example.toml` beside this file is the reference; a test holds it equal.

use std::{str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};
use service::{Failure, Secret, logs::LogConfig};
use sqlx::{ConnectOptions, postgres::PgConnectOptions};

/// Every key with its default and what it means, as TOML.
pub const EXAMPLE: &str = include_str!("config.example.toml");

/// The whole configuration.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How log lines look and which are written.
    pub log: LogConfig,
    /// The HTTP server.
    pub http: HttpConfig,
    /// The orders database.
    pub postgres: PostgresConfig,
    /// Requests that are done once.
    pub idempotency: IdempotencyConfig,
}

/// The `[idempotency]` section.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct IdempotencyConfig {
    /// For how long an answer is remembered at least, in hours (1 to 720).
    pub keep_hours: u64,
    /// How often what is older is cleaned up, in milliseconds (10 to 3,600,000).
    pub clean_interval_ms: u64,
}

impl Default for IdempotencyConfig {
    fn default() -> Self {
        Self { keep_hours: 24, clean_interval_ms: 60_000 }
    }
}

impl IdempotencyConfig {
    pub(crate) fn keep(&self) -> Duration {
        Duration::from_hours(self.keep_hours)
    }

    pub(crate) fn clean_interval(&self) -> Duration {
        Duration::from_millis(self.clean_interval_ms)
    }
}

/// The `[http]` section.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpConfig {
    /// `address:port` to listen on; port 0 takes a free one.
    pub listen: String,
    /// The largest request body, in bytes (1 KiB to 16 MiB).
    pub body_limit_bytes: usize,
    /// A request is answered by then, in milliseconds (100 to 600,000).
    pub request_timeout_ms: u64,
    /// How long requests under way may take after SIGTERM, in milliseconds; at least the request timeout.
    pub drain_timeout_ms: u64,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8080".into(),
            body_limit_bytes: 256 * 1024,
            request_timeout_ms: 10_000,
            drain_timeout_ms: 15_000,
        }
    }
}

/// The `[postgres]` section.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct PostgresConfig {
    /// `postgres://role@host:port/database`; secret because it may hold the password.
    pub url: Secret,
    /// Wins over a password in the url.
    pub password: Secret,
    /// Connections for requests (1 to 1,000), besides the one that watches the database.
    pub max_connections: u32,
    /// How long a request waits for a connection, in milliseconds (10 to 60,000).
    pub acquire_timeout_ms: u64,
    /// The longest a statement may run, in milliseconds (10 to 60,000).
    pub statement_timeout_ms: u64,
    /// How often the database is looked at, in milliseconds (10 to 60,000).
    pub check_interval_ms: u64,
}

impl Default for PostgresConfig {
    fn default() -> Self {
        Self {
            url: Secret::new("postgres://order_api@127.0.0.1:15432/orders"),
            password: Secret::default(),
            max_connections: 16,
            acquire_timeout_ms: 2_000,
            statement_timeout_ms: 5_000,
            check_interval_ms: 1_000,
        }
    }
}

impl Config {
    /// Checks what the types cannot say.
    ///
    /// # Errors
    /// 64 with the first key that is wrong.
    pub fn check(&self) -> Result<(), Failure> {
        let within = |key: &str, value: u64, low: u64, high: u64| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(Failure::configuration(format!("{key} is {value}, but must be between {low} and {high}")))
        };
        let (http, postgres) = (&self.http, &self.postgres);
        within("http.body_limit_bytes", http.body_limit_bytes as u64, 1024, 16 * 1024 * 1024)?;
        within("http.request_timeout_ms", http.request_timeout_ms, 100, 600_000)?;
        within("http.drain_timeout_ms", http.drain_timeout_ms, http.request_timeout_ms, 3_600_000)?;
        within("postgres.max_connections", postgres.max_connections.into(), 1, 1_000)?;
        within("postgres.acquire_timeout_ms", postgres.acquire_timeout_ms, 10, 60_000)?;
        within("postgres.statement_timeout_ms", postgres.statement_timeout_ms, 10, 60_000)?;
        within("postgres.check_interval_ms", postgres.check_interval_ms, 10, 60_000)?;
        within("idempotency.keep_hours", self.idempotency.keep_hours, 1, 720)?;
        within("idempotency.clean_interval_ms", self.idempotency.clean_interval_ms, 10, 3_600_000)?;
        postgres.connect_options().map(drop)
    }
}

impl HttpConfig {
    pub(crate) fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.request_timeout_ms)
    }

    pub(crate) fn drain_timeout(&self) -> Duration {
        Duration::from_millis(self.drain_timeout_ms)
    }
}

impl PostgresConfig {
    pub(crate) fn acquire_timeout(&self) -> Duration {
        Duration::from_millis(self.acquire_timeout_ms)
    }

    pub(crate) fn check_interval(&self) -> Duration {
        Duration::from_millis(self.check_interval_ms)
    }

    /// How long we wait for a statement's answer: the server's own limit and a second for the way, so that
    /// a server that is gone without a word does not hold us.
    pub(crate) fn answer_timeout(&self) -> Duration {
        Duration::from_millis(self.statement_timeout_ms) + Duration::from_secs(1)
    }

    /// How to connect, with the bounds the server keeps for us.
    pub(crate) fn connect_options(&self) -> Result<PgConnectOptions, Failure> {
        // The library's messages may quote the url, and the url may hold the password.
        let wrong = || {
            Failure::configuration(
                "postgres.url is not a url such as postgres://order_api@127.0.0.1:15432/orders",
            )
            .hint("percent-encode what is special in it, or give the password as postgres.password")
        };
        let url = self.url.expose();
        if !(url.starts_with("postgres://") || url.starts_with("postgresql://")) {
            return Err(wrong());
        }
        let mut options = PgConnectOptions::from_str(url).map_err(|_| wrong())?;
        if !self.password.is_empty() {
            options = options.password(self.password.expose());
        }
        let limit_ms = self.statement_timeout_ms;
        Ok(options
            .application_name("order-api")
            .options([
                ("statement_timeout", limit_ms),
                ("lock_timeout", limit_ms),
                ("idle_in_transaction_session_timeout", limit_ms),
            ])
            .disable_statement_logging())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(change: impl Fn(&mut Config)) -> Result<(), Failure> {
        let mut config = Config::default();
        change(&mut config);
        config.check()
    }

    #[test]
    fn the_example_is_the_defaults_and_has_every_key() {
        let mut example: toml::Table = toml::from_str(EXAMPLE).unwrap();
        let parsed: Config = toml::from_str(EXAMPLE).unwrap();
        let defaults = Config::default();
        assert_eq!(parsed.postgres.url, defaults.postgres.url);
        assert_eq!(parsed.postgres.password, defaults.postgres.password);
        // Secrets serialise as stars, so that the rest can be compared as a table.
        for key in ["url", "password"] {
            example["postgres"].as_table_mut().unwrap().insert(key.into(), "***".into());
        }
        assert_eq!(example, toml::Table::try_from(&defaults).unwrap());
        defaults.check().unwrap();
    }

    #[test]
    fn each_limit_names_its_key() {
        for (key, result) in [
            ("http.body_limit_bytes", changed(|c| c.http.body_limit_bytes = 1023)),
            ("http.request_timeout_ms", changed(|c| c.http.request_timeout_ms = 99)),
            ("http.drain_timeout_ms", changed(|c| c.http.drain_timeout_ms = c.http.request_timeout_ms - 1)),
            ("postgres.max_connections", changed(|c| c.postgres.max_connections = 0)),
            ("postgres.acquire_timeout_ms", changed(|c| c.postgres.acquire_timeout_ms = 0)),
            ("postgres.statement_timeout_ms", changed(|c| c.postgres.statement_timeout_ms = 60_001)),
            ("postgres.check_interval_ms", changed(|c| c.postgres.check_interval_ms = 9)),
            ("idempotency.keep_hours", changed(|c| c.idempotency.keep_hours = 0)),
            ("idempotency.clean_interval_ms", changed(|c| c.idempotency.clean_interval_ms = 9)),
            ("postgres.url", changed(|c| c.postgres.url = Secret::new("mysql://x:hunter2@y/z"))),
            ("postgres.url", changed(|c| c.postgres.url = Secret::new("postgres://x:hunter2@y:port/z"))),
        ] {
            let failure = result.unwrap_err();
            assert_eq!(failure.kind.code(), 64);
            assert!(failure.message.contains(key), "{failure}");
            assert!(!failure.to_string().contains("hunter2"), "{failure}");
        }
    }

    #[test]
    fn no_secret_is_printed() {
        let mut config = Config::default();
        config.postgres.url = Secret::new("postgres://order_api:hunter2@127.0.0.1/orders");
        config.postgres.password = Secret::new("hunter3");
        let printed = format!("{config:?} {}", toml::to_string(&config).unwrap());
        assert!(!printed.contains("hunter"), "{printed}");
    }
}

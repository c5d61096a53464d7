//! What can be configured. `config.example.toml` beside this file is the reference; a test holds it equal.

use std::{net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};
use service::{Failure, Secret, fleet::instance_name, logs::LogConfig};
use sqlx::{ConnectOptions, postgres::PgConnectOptions};

use crate::{
    auth::Tokens,
    domain::{KafkaName, MAX_ACK_TIMEOUT_SECONDS},
};

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
    /// Who may ask.
    pub auth: AuthConfig,
    /// Requests that are done once.
    pub idempotency: IdempotencyConfig,
    /// The instances of every service.
    pub fleet: FleetConfig,
    /// Messages of clients.
    pub messages: MessagesConfig,
}

/// The `[messages]` section.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct MessagesConfig {
    /// The topics that clients may send to; none: no message is taken.
    #[serde(deserialize_with = "service::config::list")]
    pub topics: Vec<String>,
    /// How long a message waits for acknowledgements if its client does not say, in seconds (1 to 86,400).
    pub ack_timeout_seconds: i32,
    /// How often a message is tried before it is given up (1 to 100).
    pub max_attempts: i32,
    /// How often we look for messages whose time is up, in milliseconds (10 to 60,000).
    pub redeliver_interval_ms: u64,
}

impl Default for MessagesConfig {
    fn default() -> Self {
        Self { topics: Vec::new(), ack_timeout_seconds: 30, max_attempts: 5, redeliver_interval_ms: 1_000 }
    }
}

impl MessagesConfig {
    pub(crate) fn redeliver_interval(&self) -> Duration {
        Duration::from_millis(self.redeliver_interval_ms)
    }

    fn check_topics(&self) -> Result<(), Failure> {
        for topic in &self.topics {
            let wrong = |what: &str| {
                Failure::configuration(format!("messages.topics holds {topic:?}, but a topic {what}"))
            };
            KafkaName::parse(topic).map_err(|what| wrong(&what))?;
            if topic.chars().all(|c| c == '.') {
                return Err(wrong("must not be of dots alone"));
            }
        }
        Ok(())
    }
}

/// The `[fleet]` section.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct FleetConfig {
    /// What this instance is called; empty: host name and process id.
    pub instance: String,
    /// How often this instance writes its own heartbeat down, in seconds (up to 3,600); 0: never.
    pub interval_seconds: u64,
    /// An instance that was not heard of for longer is stale, in seconds (1 to 86,400).
    pub stale_after_seconds: u64,
    /// An instance that was not heard of for longer is forgotten, in hours (1 to 720).
    pub forget_after_hours: u64,
}

impl Default for FleetConfig {
    fn default() -> Self {
        Self {
            instance: String::new(),
            interval_seconds: 10,
            stale_after_seconds: 30,
            forget_after_hours: 24,
        }
    }
}

impl FleetConfig {
    /// Nothing where this instance is not to register.
    pub(crate) fn interval(&self) -> Option<Duration> {
        (self.interval_seconds > 0).then(|| Duration::from_secs(self.interval_seconds))
    }

    pub(crate) fn stale_after(&self) -> Duration {
        Duration::from_secs(self.stale_after_seconds)
    }

    pub(crate) fn forget_after(&self) -> Duration {
        Duration::from_hours(self.forget_after_hours)
    }
}

/// The `[auth]` section.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthConfig {
    /// The file of the tokens' hashes; empty: nobody is asked for a token.
    pub tokens_path: PathBuf,
    /// Whether the service may do without tokens.
    pub required: Required,
}

/// When tokens are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Required {
    /// Where others than this machine can reach the service.
    #[default]
    BeyondLoopback,
    /// Never: somebody before the service asks for them.
    Never,
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
    /// The largest request line with all header fields, in bytes (1 KiB to 60 KiB).
    pub header_limit_bytes: usize,
    /// The most requests to the API under way at once (1 to 1,000).
    pub max_in_flight: usize,
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
            header_limit_bytes: 16 * 1024,
            max_in_flight: 512,
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
        // The server's own bounds (`service::http`) are just above these.
        within("http.header_limit_bytes", http.header_limit_bytes as u64, 1024, 60 * 1024)?;
        within("http.max_in_flight", http.max_in_flight as u64, 1, 1_000)?;
        within("http.request_timeout_ms", http.request_timeout_ms, 100, 600_000)?;
        within("http.drain_timeout_ms", http.drain_timeout_ms, http.request_timeout_ms, 3_600_000)?;
        within("postgres.max_connections", postgres.max_connections.into(), 1, 1_000)?;
        within("postgres.acquire_timeout_ms", postgres.acquire_timeout_ms, 10, 60_000)?;
        within("postgres.statement_timeout_ms", postgres.statement_timeout_ms, 10, 60_000)?;
        within("postgres.check_interval_ms", postgres.check_interval_ms, 10, 60_000)?;
        within("idempotency.keep_hours", self.idempotency.keep_hours, 1, 720)?;
        within("idempotency.clean_interval_ms", self.idempotency.clean_interval_ms, 10, 3_600_000)?;
        let messages = &self.messages;
        // What is negative is below 1, too.
        let count = |value: i32| u64::try_from(value).unwrap_or_default();
        let longest = count(MAX_ACK_TIMEOUT_SECONDS);
        within("messages.ack_timeout_seconds", count(messages.ack_timeout_seconds), 1, longest)?;
        within("messages.max_attempts", count(messages.max_attempts), 1, 100)?;
        within("messages.redeliver_interval_ms", messages.redeliver_interval_ms, 10, 60_000)?;
        messages.check_topics()?;
        let fleet = &self.fleet;
        within("fleet.interval_seconds", fleet.interval_seconds, 0, 3_600)?;
        within("fleet.stale_after_seconds", fleet.stale_after_seconds, 1, 86_400)?;
        within("fleet.forget_after_hours", fleet.forget_after_hours, 1, 720)?;
        instance_name(&fleet.instance)?;
        postgres.connect_options().map(drop)?;
        self.tokens().map(drop)
    }

    /// The tokens that open the API; nothing where nobody is asked for one.
    ///
    /// # Errors
    /// 64: the file is wrong, or others can reach the service and there is none.
    pub(crate) fn tokens(&self) -> Result<Option<Tokens>, Failure> {
        let (file, required) = (&self.auth.tokens_path, self.auth.required);
        let none = file.as_os_str().is_empty();
        if required == Required::Never && !none {
            let why = "auth.tokens_path is set, but auth.required is \"never\"";
            return Err(Failure::configuration(why).hint("leave one of them out"));
        }
        if none && required != Required::Never && !is_loopback(&self.http.listen) {
            let why = format!(
                "http.listen is {}, which other machines can reach, and auth.tokens_path is not set",
                self.http.listen
            );
            return Err(Failure::configuration(why).hint(
                "make a token (`order-api token new --name NAME --scopes read,write >> tokens.toml`) and set \
                 auth.tokens_path; or listen on 127.0.0.1; or, where a gateway before it asks for tokens, set \
                 auth.required = \"never\"",
            ));
        }
        if none { Ok(None) } else { Tokens::load(file).map(Some) }
    }
}

/// Whether only this machine can reach what listens there.
fn is_loopback(listen: &str) -> bool {
    match listen.parse::<SocketAddr>() {
        Ok(address) => address.ip().is_loopback(),
        Err(_) => listen.rsplit_once(':').is_some_and(|(host, _)| host == "localhost"),
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
            ("http.header_limit_bytes", changed(|c| c.http.header_limit_bytes = 60 * 1024 + 1)),
            ("http.max_in_flight", changed(|c| c.http.max_in_flight = 0)),
            ("fleet.interval_seconds", changed(|c| c.fleet.interval_seconds = 3_601)),
            ("fleet.stale_after_seconds", changed(|c| c.fleet.stale_after_seconds = 0)),
            ("fleet.forget_after_hours", changed(|c| c.fleet.forget_after_hours = 0)),
            ("fleet.instance", changed(|c| c.fleet.instance = "a b".into())),
            ("auth.tokens_path", changed(|c| c.auth.tokens_path = "/none".into())),
            ("auth.tokens_path", changed(|c| c.http.listen = "0.0.0.0:8080".into())),
            ("auth.tokens_path", changed(|c| c.http.listen = "[::]:8080".into())),
            ("auth.tokens_path", changed(|c| c.http.listen = "order-api.internal:8080".into())),
            (
                "auth.required",
                changed(|c| {
                    c.auth.tokens_path = "/none".into();
                    c.auth.required = Required::Never;
                }),
            ),
            ("http.request_timeout_ms", changed(|c| c.http.request_timeout_ms = 99)),
            ("http.drain_timeout_ms", changed(|c| c.http.drain_timeout_ms = c.http.request_timeout_ms - 1)),
            ("postgres.max_connections", changed(|c| c.postgres.max_connections = 0)),
            ("postgres.acquire_timeout_ms", changed(|c| c.postgres.acquire_timeout_ms = 0)),
            ("postgres.statement_timeout_ms", changed(|c| c.postgres.statement_timeout_ms = 60_001)),
            ("postgres.check_interval_ms", changed(|c| c.postgres.check_interval_ms = 9)),
            ("idempotency.keep_hours", changed(|c| c.idempotency.keep_hours = 0)),
            ("idempotency.clean_interval_ms", changed(|c| c.idempotency.clean_interval_ms = 9)),
            ("messages.topics", changed(|c| c.messages.topics = vec!["a".into(), "b c".into()])),
            ("messages.topics", changed(|c| c.messages.topics = vec!["..".into()])),
            ("messages.ack_timeout_seconds", changed(|c| c.messages.ack_timeout_seconds = 86_401)),
            ("messages.max_attempts", changed(|c| c.messages.max_attempts = 0)),
            ("messages.redeliver_interval_ms", changed(|c| c.messages.redeliver_interval_ms = 9)),
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
    fn without_tokens_only_this_machine_may_reach_the_service_unless_it_is_said() {
        for listen in ["127.0.0.1:8080", "127.1.2.3:0", "[::1]:8080", "localhost:8080"] {
            changed(|c| c.http.listen = listen.into()).unwrap();
        }
        changed(|c| {
            c.http.listen = "0.0.0.0:8080".into();
            c.auth.required = Required::Never;
        })
        .unwrap();
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

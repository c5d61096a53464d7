//! The configuration: as written (one struct for each section, unknown keys refused), then checked.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::Deserialize;
use service::{
    Failure, Secret,
    config::HttpConfig,
    fleet::{self, FleetConfig},
    logs::LogConfig,
};
use sqlx::postgres::PgConnectOptions;

use crate::{database::Database, decide::Backoff, handler::Tables, offer::Offer};

/// Every key with its default, as `config example` prints it.
pub(crate) const EXAMPLE: &str = include_str!("config.example.toml");

/// The configuration as written.
#[derive(Debug, Clone, Default, Deserialize)]
#[cfg_attr(test, derive(PartialEq))]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    pub(crate) consumer: ConsumerConfig,
    pub(crate) kafka: KafkaConfig,
    pub(crate) postgres: PostgresConfig,
    pub(crate) notify: NotifyConfig,
    pub(crate) http: Http,
    pub(crate) fleet: FleetConfig,
    pub(crate) log: Log,
}

/// `[consumer]`; the units are in the names.
#[derive(Debug, Clone, Deserialize)]
#[cfg_attr(test, derive(PartialEq))]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ConsumerConfig {
    pub(crate) handler: String,
    pub(crate) batch_records_max: usize,
    pub(crate) batch_bytes_max: usize,
    pub(crate) apply_timeout_seconds: u64,
    pub(crate) retry_first_ms: u64,
    pub(crate) retry_max_ms: u64,
    pub(crate) retries_max: u32,
    pub(crate) on_failure: String,
    pub(crate) on_gap: String,
    pub(crate) gap_wait_seconds: u64,
    pub(crate) gap_url: String,
    pub(crate) drain_timeout_seconds: u64,
}

impl Default for ConsumerConfig {
    fn default() -> Self {
        Self {
            handler: String::new(),
            batch_records_max: 500,
            batch_bytes_max: 1_048_576,
            apply_timeout_seconds: 30,
            retry_first_ms: 1000,
            retry_max_ms: 10_000,
            retries_max: 3,
            on_failure: String::new(),
            on_gap: "accept".into(),
            gap_wait_seconds: 30,
            gap_url: String::new(),
            drain_timeout_seconds: 15,
        }
    }
}

/// `[kafka]`.
#[derive(Clone, Deserialize)]
#[cfg_attr(test, derive(PartialEq))]
#[serde(deny_unknown_fields, default)]
pub(crate) struct KafkaConfig {
    pub(crate) brokers: String,
    pub(crate) group: String,
    #[serde(deserialize_with = "service::config::list")]
    pub(crate) topics: Vec<String>,
    pub(crate) commit_interval_ms: u64,
    pub(crate) properties: BTreeMap<String, String>,
}

impl Default for KafkaConfig {
    fn default() -> Self {
        Self {
            brokers: "127.0.0.1:19092".into(),
            group: String::new(),
            topics: Vec::new(),
            commit_interval_ms: 500,
            properties: BTreeMap::new(),
        }
    }
}

impl fmt::Debug for KafkaConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Properties may hold passwords: their names only.
        f.debug_struct("KafkaConfig")
            .field("brokers", &self.brokers)
            .field("group", &self.group)
            .field("topics", &self.topics)
            .field("commit_interval_ms", &self.commit_interval_ms)
            .field("properties", &self.properties.keys())
            .finish()
    }
}

/// `[postgres]`. The URL may hold a password, so it is a secret as a whole.
#[derive(Debug, Clone, Deserialize)]
#[cfg_attr(test, derive(PartialEq))]
#[serde(deny_unknown_fields, default)]
pub(crate) struct PostgresConfig {
    pub(crate) url: Secret,
    pub(crate) password: Secret,
    pub(crate) connections_max: u32,
    pub(crate) start_timeout_seconds: u64,
}

impl Default for PostgresConfig {
    fn default() -> Self {
        Self {
            url: Secret::new("postgres://consumer@127.0.0.1:15432/consumers"),
            password: Secret::default(),
            connections_max: 6,
            start_timeout_seconds: 60,
        }
    }
}

/// `[notify]`; the handler of that name checks it. The URL's path may be as good as a password, so it is a secret.
#[derive(Debug, Clone, Deserialize)]
#[cfg_attr(test, derive(PartialEq))]
#[serde(deny_unknown_fields, default)]
pub(crate) struct NotifyConfig {
    pub(crate) url: Secret,
    pub(crate) secret: Secret,
    pub(crate) timeout_ms: u64,
}

impl Default for NotifyConfig {
    fn default() -> Self {
        Self { url: Secret::default(), secret: Secret::default(), timeout_ms: 5000 }
    }
}

/// `[http]` with this service's default.
#[derive(Debug, Clone, Deserialize)]
#[serde(transparent)]
pub(crate) struct Http(pub(crate) HttpConfig);

impl Default for Http {
    fn default() -> Self {
        Self(HttpConfig { listen: "127.0.0.1:8090".into() })
    }
}

/// `[log]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(transparent)]
pub(crate) struct Log(pub(crate) LogConfig);

/// The configuration, checked: what the rest of the program takes.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) handler: &'static str,
    pub(crate) limits: Limits,
    pub(crate) policy: Policy,
    pub(crate) kafka: KafkaConfig,
    pub(crate) database: Database,
    pub(crate) notify: NotifyConfig,
    pub(crate) listen: String,
    /// Who is told of this instance.
    pub(crate) fleet: Option<fleet::Settings>,
}

/// What becomes of an aggregate whose events are not as they should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Policy {
    /// Later records of a dead letter's key wait behind it.
    pub(crate) park_key: bool,
    pub(crate) gap: Gap,
}

impl Policy {
    /// Whether an event may be applied whose predecessor was not.
    pub(crate) fn accepts_gaps(&self) -> bool {
        self.gap == Gap::Accept
    }
}

/// What to do about an event whose predecessor has not been applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Gap {
    /// Apply it all the same.
    Accept,
    /// The partition waits so long for the missing ones; then the event is dead-lettered.
    Wait(Duration),
    /// Get the missing ones from here: `{aggregate}` and `{after}` (a version) are filled in.
    Fetch(String),
}

/// Every bound of the data path.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) batch_records_max: usize,
    pub(crate) batch_bytes_max: usize,
    pub(crate) apply_timeout: Duration,
    pub(crate) backoff: Backoff,
    /// How often an event that fails for a reason that may pass is tried again.
    pub(crate) retries_max: u32,
    pub(crate) drain_timeout: Duration,
    pub(crate) commit_interval: Duration,
}

impl Config {
    /// Checks everything that can be checked without a server.
    ///
    /// # Errors
    /// 64, naming the key.
    pub(crate) fn check(self, offer: &Offer) -> Result<Settings, Failure> {
        let c = &self.consumer;
        range("consumer.batch_records_max", c.batch_records_max as u64, 1, 10_000)?;
        range("consumer.batch_bytes_max", c.batch_bytes_max as u64, 1024, 64 << 20)?;
        range("consumer.apply_timeout_seconds", c.apply_timeout_seconds, 1, 300)?;
        range("consumer.retry_first_ms", c.retry_first_ms, 1, 60_000)?;
        range("consumer.retry_max_ms", c.retry_max_ms, c.retry_first_ms, 600_000)?;
        range("consumer.retries_max", c.retries_max.into(), 0, 100)?;
        range("consumer.gap_wait_seconds", c.gap_wait_seconds, 1, 86_400)?;
        range("consumer.drain_timeout_seconds", c.drain_timeout_seconds, 1, 120)?;
        range("notify.timeout_ms", self.notify.timeout_ms, 10, 60_000)?;
        range("kafka.commit_interval_ms", self.kafka.commit_interval_ms, 10, 60_000)?;
        let limits = Limits {
            batch_records_max: c.batch_records_max,
            batch_bytes_max: c.batch_bytes_max,
            apply_timeout: Duration::from_secs(c.apply_timeout_seconds),
            backoff: Backoff {
                first: Duration::from_millis(c.retry_first_ms),
                max: Duration::from_millis(c.retry_max_ms),
            },
            retries_max: c.retries_max,
            drain_timeout: Duration::from_secs(c.drain_timeout_seconds),
            commit_interval: Duration::from_millis(self.kafka.commit_interval_ms),
        };
        let settings = Settings {
            handler: offer.name(),
            limits,
            policy: self.consumer.policy(offer)?,
            kafka: check_kafka(self.kafka, offer)?,
            database: self.postgres.check()?,
            notify: self.notify,
            listen: self.http.0.listen,
            fleet: self.fleet.check()?,
        };
        offer.check(&settings)?;
        Ok(settings)
    }
}

impl ConsumerConfig {
    fn policy(&self, offer: &Offer) -> Result<Policy, Failure> {
        let traits = offer.traits();
        let own = matches!(traits.tables, Tables::Ours);
        let park_key = match self.on_failure.as_str() {
            "" => traits.versioned && own,
            "park-key" if own => true,
            "park-key" => {
                let why = format!(
                    "consumer.on_failure is park-key, and {} has no database of its own",
                    offer.name()
                );
                return Err(Failure::configuration(why).hint("leave it out, or write skip"));
            }
            "skip" => false,
            other => {
                let why = format!("consumer.on_failure is {other:?}");
                return Err(Failure::configuration(why).hint("write park-key or skip, or leave it empty"));
            }
        };
        let gap = match self.on_gap.as_str() {
            "accept" => Gap::Accept,
            "wait" => Gap::Wait(Duration::from_secs(self.gap_wait_seconds)),
            "fetch" if ["http://", "https://"].iter().any(|s| self.gap_url.starts_with(s)) => {
                Gap::Fetch(self.gap_url.clone())
            }
            "fetch" => {
                return Err(Failure::configuration(format!("consumer.gap_url is {:?}", self.gap_url)).hint(
                    "consumer.on_gap = fetch needs where: http://127.0.0.1:8080/api/orders/{aggregate}/events?after={after}",
                ));
            }
            other => {
                let why = format!("consumer.on_gap is {other:?}");
                return Err(Failure::configuration(why).hint("write accept, wait or fetch"));
            }
        };
        Ok(Policy { park_key, gap })
    }
}

fn range(key: &str, value: u64, min: u64, max: u64) -> Result<(), Failure> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(Failure::configuration(format!("{key} is {value}; it must be from {min} to {max}")))
}

impl PostgresConfig {
    /// Checks everything that can be checked without the server.
    ///
    /// # Errors
    /// 64, naming the key.
    pub(crate) fn check(&self) -> Result<Database, Failure> {
        range("postgres.connections_max", self.connections_max.into(), 2, 100)?;
        range("postgres.start_timeout_seconds", self.start_timeout_seconds, 1, 3600)?;
        Ok(Database {
            options: self.options()?,
            connections_max: self.connections_max,
            start_timeout: Duration::from_secs(self.start_timeout_seconds),
        })
    }

    fn options(&self) -> Result<PgConnectOptions, Failure> {
        let bad = |why: String| {
            Failure::configuration(format!("postgres.url is not a Postgres URL: {why}")).hint(
                "write it as postgres://USER@HOST:PORT/DATABASE; the password belongs into postgres.password",
            )
        };
        let url = self.url.expose();
        // sqlx takes any scheme.
        if !["postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme)) {
            return Err(bad("it does not begin with postgres://".into()));
        }
        let options: PgConnectOptions = url.parse().map_err(|e: sqlx::Error| bad(e.to_string()))?;
        Ok(if self.password.is_empty() { options } else { options.password(self.password.expose()) })
    }
}

fn check_kafka(mut kafka: KafkaConfig, offer: &Offer) -> Result<KafkaConfig, Failure> {
    if kafka.group.is_empty() {
        offer.name().clone_into(&mut kafka.group);
    }
    if kafka.topics.is_empty() {
        let topic = offer.topic().ok_or_else(|| {
            let why = format!("kafka.topics is empty, and the handler {} takes any topic", offer.name());
            Failure::configuration(why).hint("name at least one: --topics notifications")
        })?;
        kafka.topics.push(topic.to_owned());
    }
    if kafka.brokers.trim().is_empty() {
        return Err(Failure::configuration("kafka.brokers is empty").hint("write it as HOST:PORT,HOST:PORT"));
    }
    for topic in &kafka.topics {
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        // `-dlq` is appended, and Kafka's limit is 249.
        if topic.is_empty() || topic.len() > 245 || !topic.chars().all(legal) {
            return Err(Failure::configuration(format!(
                "kafka.topics holds {topic:?}; a topic is 1 to 245 of A-Z a-z 0-9 . _ -"
            )));
        }
    }
    for name in kafka.properties.keys() {
        if let Some(why) = refused(name) {
            return Err(Failure::configuration(format!("kafka.properties may not set {name}: {why}")));
        }
    }
    Ok(kafka)
}

/// Why a librdkafka setting is not the user's to make: it would break what the consumer promises.
fn refused(name: &str) -> Option<&'static str> {
    Some(match name {
        "bootstrap.servers" | "metadata.broker.list" => "use kafka.brokers",
        "group.id" => "use kafka.group",
        "enable.auto.commit" | "auto.commit.enable" | "enable.auto.offset.store" => {
            "an offset moves only after the database transaction; otherwise a crash would lose events"
        }
        "auto.commit.interval.ms" => "use kafka.commit_interval_ms",
        "auto.offset.reset" => "a new group begins with the first event, or it would miss some",
        "isolation.level" => "only committed records are read, or aborted ones would be applied",
        "partition.assignment.strategy" | "group.protocol" | "group.remote.assignor" => {
            "partitions are taken and given away one by one (cooperative-sticky)"
        }
        "enable.partition.eof" => "the lag is computed from it",
        "check.crcs" => "a damaged record must not be applied",
        "acks"
        | "request.required.acks"
        | "enable.idempotence"
        | "transactional.id"
        | "message.timeout.ms"
        | "delivery.timeout.ms"
        | "enable.gapless.guarantee"
        | "delivery.report.only.error"
        | "partitioner" => "a dead letter counts only when all replicas in sync hold it",
        "allow.auto.create.topics" => {
            "topics are made by whoever runs the cluster, with the right partitions"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    impl PartialEq for Http {
        fn eq(&self, other: &Self) -> bool {
            self.0.listen == other.0.listen
        }
    }

    impl PartialEq for Log {
        fn eq(&self, other: &Self) -> bool {
            (&self.0.level, self.0.format) == (&other.0.level, other.0.format)
        }
    }

    fn check(config: Config) -> Result<Settings, Failure> {
        let offer = Offer::choose(crate::handlers::all(), &config.consumer.handler)?;
        config.check(&offer)
    }

    fn valid() -> Config {
        let mut config = Config::default();
        config.consumer.handler = "pharmacy".into();
        config
    }

    #[test]
    fn the_example_holds_every_key_with_its_default() {
        let example: Config = toml::from_str(EXAMPLE).unwrap();
        assert_eq!(example, Config::default());
        // Every key is in it: one that is not would not be found by a reader.
        let keys: toml::Table = toml::from_str(EXAMPLE).unwrap();
        let count: usize = keys.values().filter_map(toml::Value::as_table).map(toml::Table::len).sum();
        assert_eq!(count, 12 + 5 + 4 + 3 + 1 + 4 + 2);
    }

    #[test]
    fn the_group_is_the_handlers_name_unless_told() {
        assert_eq!(check(valid()).unwrap().kafka.group, "pharmacy");
        let mut config = valid();
        config.kafka.group = "mine".into();
        assert_eq!(check(config).unwrap().kafka.group, "mine");
    }

    #[test]
    fn the_topics_are_the_handlers_own_unless_told() {
        let with = |handler: &str| {
            let mut config = Config::default();
            config.consumer.handler = handler.into();
            check(config).map(|settings| settings.kafka.topics)
        };
        assert_eq!(with("fulfillment").unwrap(), ["order-events"]);
        assert_eq!(with("acks").unwrap(), ["order-acks"]);
        assert!(with("messages").unwrap_err().to_string().contains("--topics"));
        let mut config = valid();
        config.kafka.topics = vec!["a".into(), "b".into()];
        assert_eq!(check(config).unwrap().kafka.topics, ["a", "b"]);
    }

    #[test]
    fn a_missing_or_unknown_handler_names_the_choices() {
        for handler in ["", "pharmacie"] {
            let mut config = valid();
            config.consumer.handler = handler.into();
            let failure = check(config).unwrap_err();
            assert_eq!(failure.kind.code(), 64);
            assert!(failure.to_string().contains("fulfillment"), "{failure}");
        }
    }

    #[test]
    fn a_property_that_would_break_a_promise_is_refused_by_name() {
        for name in ["enable.auto.commit", "group.id", "isolation.level", "acks", "auto.offset.reset"] {
            let mut config = valid();
            config.kafka.properties.insert(name.into(), "x".into());
            let failure = check(config).unwrap_err();
            assert_eq!(failure.kind.code(), 64);
            assert!(failure.message.contains(name), "{failure}");
        }
        let mut config = valid();
        config.kafka.properties.insert("security.protocol".into(), "ssl".into());
        check(config).unwrap();
    }

    #[test]
    fn numbers_out_of_range_name_the_key() {
        let mut config = valid();
        config.consumer.batch_records_max = 0;
        assert!(check(config).unwrap_err().message.contains("consumer.batch_records_max"));
        let mut config = valid();
        config.consumer.retry_max_ms = 1;
        assert!(check(config).unwrap_err().message.contains("consumer.retry_max_ms"));
    }

    #[test]
    fn topics_may_come_as_one_text() {
        let kafka: KafkaConfig = toml::from_str("topics = 'a, b'").unwrap();
        assert_eq!(kafka.topics, ["a", "b"]);
    }

    #[test]
    fn no_secret_is_printed() {
        let mut config = valid();
        config.postgres.url = Secret::new("postgres://u:hush@h/d");
        config.postgres.password = Secret::new("hush");
        config.kafka.properties.insert("sasl.password".into(), "hush".into());
        assert!(!format!("{config:?}").contains("hush"));
    }
}

//! The relay's configuration: parsed, checked and turned into what the parts need before anything starts.

mod delivery;
mod outbox;
mod retention;

use std::{collections::BTreeMap, time::Duration};

use relay_core::{
    poison::{self, Policies, Policy},
    relay::Delivery,
    route::is_legal_topic,
    source,
};
use serde::Deserialize;
use service::{
    Failure, Secret,
    fleet::{self, FleetConfig},
    logs::LogConfig,
};

pub(crate) use self::retention::Retention;
use self::{
    delivery::{DeliveryName, TransactionsConfig},
    outbox::{CloudEventsConfig, MessagesConfig, OutboxConfig, RouteConfig},
    retention::RetentionConfig,
};
use crate::replication::conninfo::ConnInfo;

/// `config example` prints this; a test holds it equal to the defaults.
pub(crate) const EXAMPLE: &str = include_str!("../config.example.toml");
pub(crate) const ENV_PREFIX: &str = "CDC_RELAY";

/// The file as it is written.
#[derive(Debug, Clone, Deserialize, PartialEq, Default)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    pub(crate) postgres: PostgresConfig,
    pub(crate) outbox: OutboxConfig,
    /// Further tables.
    pub(crate) outboxes: Vec<OutboxConfig>,
    pub(crate) messages: MessagesConfig,
    pub(crate) route: RouteConfig,
    pub(crate) cloudevents: CloudEventsConfig,
    pub(crate) kafka: KafkaConfig,
    pub(crate) transactions: TransactionsConfig,
    pub(crate) poison: PoisonConfig,
    pub(crate) retention: RetentionConfig,
    pub(crate) limits: LimitsConfig,
    pub(crate) http: HttpConfig,
    pub(crate) fleet: FleetConfig,
    pub(crate) log: LogConfig,
}

#[derive(Debug, Clone, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct PostgresConfig {
    pub(crate) url: Secret,
    pub(crate) password: Secret,
    pub(crate) slot: String,
    pub(crate) publication: String,
    pub(crate) create_slot: bool,
    pub(crate) failover: bool,
    pub(crate) connect_timeout_seconds: u64,
    pub(crate) silence_timeout_seconds: u64,
    pub(crate) give_up_seconds: u64,
}

#[derive(Debug, Clone, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct KafkaConfig {
    pub(crate) brokers: String,
    pub(crate) delivery: DeliveryName,
    pub(crate) checkpoint_topic: String,
    /// Some of them are secrets, such as `sasl.password`.
    pub(crate) properties: BTreeMap<String, Secret>,
}

#[derive(Debug, Clone, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct PoisonConfig {
    pub(crate) undecodable: PolicyName,
    pub(crate) missing_column: PolicyName,
    pub(crate) unroutable: PolicyName,
    pub(crate) too_large: PolicyName,
    pub(crate) unauthorized: PolicyName,
    pub(crate) invalid_header: PolicyName,
    pub(crate) refused: PolicyName,
    pub(crate) dead_letter_topic: String,
    pub(crate) parked_keys_topic: String,
}

/// A policy as the configuration spells it.
#[derive(Debug, Clone, Copy, Deserialize, PartialEq, Default)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PolicyName {
    #[default]
    Halt,
    DeadLetter,
    ParkKey,
    Skip,
}

#[derive(Debug, Clone, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct HttpConfig {
    pub(crate) listen: String,
    pub(crate) unready_after_seconds: u64,
    pub(crate) admin_token: Secret,
}

#[derive(Debug, Clone, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct LimitsConfig {
    pub(crate) in_flight_bytes: usize,
    pub(crate) drain_seconds: u64,
}

impl Default for PostgresConfig {
    fn default() -> Self {
        Self {
            url: Secret::new("postgres://cdc_relay@127.0.0.1:5432/orders"),
            password: Secret::default(),
            slot: "cdc_relay".into(),
            publication: "cdc_relay".into(),
            create_slot: false,
            failover: false,
            connect_timeout_seconds: 10,
            silence_timeout_seconds: 60,
            give_up_seconds: 0,
        }
    }
}

impl Default for KafkaConfig {
    fn default() -> Self {
        Self {
            brokers: "127.0.0.1:9092".into(),
            delivery: DeliveryName::default(),
            checkpoint_topic: "cdc-relay-checkpoints".into(),
            properties: BTreeMap::new(),
        }
    }
}

impl Default for PoisonConfig {
    fn default() -> Self {
        let halt = PolicyName::Halt;
        Self {
            undecodable: halt,
            missing_column: halt,
            unroutable: halt,
            too_large: halt,
            unauthorized: halt,
            invalid_header: halt,
            refused: halt,
            dead_letter_topic: "cdc-relay-dlq".into(),
            parked_keys_topic: "cdc-relay-parked-keys".into(),
        }
    }
}

impl PoisonConfig {
    fn policies(&self) -> Policies {
        let policy = |name| match name {
            PolicyName::Halt => Policy::Halt,
            PolicyName::DeadLetter => Policy::DeadLetter,
            PolicyName::ParkKey => Policy::ParkKey,
            PolicyName::Skip => Policy::Skip,
        };
        Policies::default()
            .with(poison::Kind::Undecodable, policy(self.undecodable))
            .with(poison::Kind::MissingColumn, policy(self.missing_column))
            .with(poison::Kind::Unroutable, policy(self.unroutable))
            .with(poison::Kind::TooLarge, policy(self.too_large))
            .with(poison::Kind::Unauthorized, policy(self.unauthorized))
            .with(poison::Kind::InvalidHeader, policy(self.invalid_header))
            .with(poison::Kind::Refused, policy(self.refused))
    }
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self { listen: "127.0.0.1:8081".into(), unready_after_seconds: 60, admin_token: Secret::default() }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self { in_flight_bytes: 16 * 1024 * 1024, drain_seconds: 10 }
    }
}

/// The configuration as the parts use it: checked.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) postgres: ConnInfo,
    pub(crate) slot: String,
    pub(crate) publication: String,
    pub(crate) create_slot: bool,
    /// Slots that we make are to be synchronised to standbys.
    pub(crate) failover: bool,
    pub(crate) connect_timeout: Duration,
    pub(crate) silence_limit: Duration,
    /// None: try for ever, visibly.
    pub(crate) give_up_after: Option<Duration>,
    pub(crate) delivery: Delivery,
    /// Kafka ends a transaction by itself that is open for so long.
    pub(crate) transaction_timeout: Duration,
    pub(crate) source: source::Options,
    pub(crate) policies: Policies,
    pub(crate) retention: Retention,
    pub(crate) dead_letter_topic: String,
    pub(crate) parked_keys_topic: String,
    pub(crate) kafka: KafkaConfig,
    pub(crate) in_flight_limit_bytes: usize,
    pub(crate) drain_grace: Duration,
    pub(crate) listen: String,
    /// Not ready while a record has waited for Kafka for so long.
    pub(crate) unready_after: Duration,
    pub(crate) admin_token: Secret,
    /// Who is told of this instance.
    pub(crate) fleet: Option<fleet::Settings>,
    pub(crate) log: LogConfig,
}

impl Settings {
    /// Whether any policy parks aggregates.
    pub(crate) fn may_park(&self) -> bool {
        self.policies.any(Policy::ParkKey)
    }

    /// Whether any policy sends rows to the dead-letter topic.
    pub(crate) fn may_dead_letter(&self) -> bool {
        self.may_park() || self.policies.any(Policy::DeadLetter)
    }
}

impl Config {
    /// Checks everything that can be checked without a server.
    pub(crate) fn check(self) -> Result<Settings, Failure> {
        let bad = |key: &str, why: String| Failure::configuration(format!("bad configuration: {key} {why}"));
        let PostgresConfig { url, password, slot, publication, .. } = self.postgres;
        let postgres = ConnInfo::parse(url.expose(), &password).map_err(|e| bad("postgres.url", e))?;
        check_slot_name(&slot).map_err(|e| bad("postgres.slot", e))?;
        if !(1..=NAME_MAX_BYTES).contains(&publication.len()) || publication.contains('\0') {
            return Err(bad("postgres.publication", format!("must have 1 to {NAME_MAX_BYTES} bytes")));
        }
        let tables = std::iter::once(self.outbox).chain(self.outboxes).collect();
        let source = outbox::source_options(tables, self.messages, self.route, self.cloudevents);
        let source = source.map_err(|(key, why)| bad(&key, why))?;
        let seconds = |key: &str, value: u64, least: u64| {
            let range = least..=86_400;
            range
                .contains(&value)
                .then(|| Duration::from_secs(value))
                .ok_or_else(|| bad(key, format!("must be {least} to 86400")))
        };
        let give_up = seconds("postgres.give_up_seconds", self.postgres.give_up_seconds, 0)?;
        if !(64 * 1024..=1 << 30).contains(&self.limits.in_flight_bytes) {
            return Err(bad("limits.in_flight_bytes", "must be 65536 (64 KiB) to 1073741824 (1 GiB)".into()));
        }
        let delivery = self.transactions.check(self.kafka.delivery);
        let (delivery, transaction_timeout) = delivery.map_err(|(key, why)| bad(key, why))?;
        let retention = self.retention.check().map_err(|(key, why)| bad(key, why))?;
        check_properties(&self.kafka.properties)?;
        for (key, topic) in [
            ("kafka.checkpoint_topic", &self.kafka.checkpoint_topic),
            ("poison.dead_letter_topic", &self.poison.dead_letter_topic),
            ("poison.parked_keys_topic", &self.poison.parked_keys_topic),
        ] {
            if !is_legal_topic(topic) {
                return Err(bad(key, format!("is {topic:?}, which is not a legal name of a Kafka topic")));
            }
        }
        Ok(Settings {
            postgres,
            slot,
            publication,
            create_slot: self.postgres.create_slot,
            failover: self.postgres.failover,
            connect_timeout: seconds(
                "postgres.connect_timeout_seconds",
                self.postgres.connect_timeout_seconds,
                1,
            )?,
            silence_limit: seconds(
                "postgres.silence_timeout_seconds",
                self.postgres.silence_timeout_seconds,
                1,
            )?,
            give_up_after: (!give_up.is_zero()).then_some(give_up),
            delivery,
            transaction_timeout,
            source,
            policies: self.poison.policies(),
            retention,
            dead_letter_topic: self.poison.dead_letter_topic,
            parked_keys_topic: self.poison.parked_keys_topic,
            kafka: self.kafka,
            in_flight_limit_bytes: self.limits.in_flight_bytes,
            drain_grace: seconds("limits.drain_seconds", self.limits.drain_seconds, 0)?,
            listen: self.http.listen,
            unready_after: seconds("http.unready_after_seconds", self.http.unready_after_seconds, 1)?,
            admin_token: self.http.admin_token,
            fleet: self.fleet.check()?,
            log: self.log,
        })
    }
}

/// Postgres' limit on a name, in bytes (`NAMEDATALEN` - 1).
const NAME_MAX_BYTES: usize = 63;

fn check_slot_name(name: &str) -> Result<(), String> {
    let legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    if (1..=NAME_MAX_BYTES).contains(&name.len()) && name.bytes().all(legal) {
        return Ok(());
    }
    Err(format!("{name:?} must be 1 to {NAME_MAX_BYTES} of [a-z0-9_], as Postgres demands of a slot's name"))
}

/// Settings of librdkafka that would break a promise, and which.
const REFUSED_PROPERTIES: [(&str, &str); 20] = [
    ("bootstrap.servers", "set kafka.brokers"),
    ("metadata.broker.list", "set kafka.brokers"),
    ("acks", "the relay confirms only what all in-sync replicas have"),
    ("request.required.acks", "the relay confirms only what all in-sync replicas have"),
    ("enable.idempotence", "retries would duplicate and reorder records"),
    ("enable.gapless.guarantee", "records behind a failed one would be published before it"),
    ("message.timeout.ms", "records do not expire; an expired one would be a gap"),
    ("delivery.timeout.ms", "records do not expire; an expired one would be a gap"),
    ("message.send.max.retries", "a record that is given up would be a gap"),
    ("retries", "a record that is given up would be a gap"),
    ("max.in.flight", "the idempotent producer keeps order with its own bound"),
    ("max.in.flight.requests.per.connection", "the idempotent producer keeps order with its own bound"),
    ("queue.buffering.max.messages", "set limits.in_flight_bytes"),
    ("queue.buffering.max.kbytes", "set limits.in_flight_bytes"),
    ("delivery.report.only.error", "without reports nothing could be confirmed"),
    ("transactional.id", "the delivery mode decides it"),
    ("transaction.timeout.ms", "set transactions.timeout_seconds"),
    ("queuing.strategy", "records are sent in commit order"),
    ("test.mock.num.brokers", "nothing would reach a real broker"),
    ("allow.auto.create.topics", "topics are created on purpose, with their partitions and replication"),
];

fn check_properties(properties: &BTreeMap<String, Secret>) -> Result<(), Failure> {
    for (name, why) in REFUSED_PROPERTIES {
        if properties.contains_key(name) {
            return Err(Failure::configuration(format!(
                "bad configuration: kafka.properties must not set {name}: {why}"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_the_defaults() {
        let example: Config = toml::from_str(EXAMPLE).unwrap();
        assert_eq!(example, Config::default());
        Config::default().check().unwrap();
    }

    /// serde names every key that a table has where it is given another.
    #[test]
    fn every_key_is_in_the_example() {
        let example: toml::Table = toml::from_str(EXAMPLE).unwrap();
        let expected = |text: &str| -> Vec<String> {
            let error = toml::from_str::<Config>(text).unwrap_err().to_string();
            let (_, keys) = error.split_once("expected").unwrap_or_else(|| panic!("{error}"));
            keys.split('`').skip(1).step_by(2).map(str::to_owned).collect()
        };
        let sections = expected("no_such_key = 1");
        assert!(sections.len() > 10, "{sections:?}");
        for section in sections {
            if section == "outboxes" {
                assert!(EXAMPLE.contains("#   [[outboxes]]"));
                continue;
            }
            let there = example[&section].as_table().unwrap();
            for key in expected(&format!("[{section}]\nno_such_key = 1")) {
                assert!(there.contains_key(&key), "{section}.{key} is not in config.example.toml");
            }
        }
    }

    #[test]
    fn what_cannot_work_names_its_key() {
        let check = |change: fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            config.check().map(drop).unwrap_err().message
        };
        assert!(check(|c| c.postgres.slot = "Bad-Slot".into()).contains("postgres.slot"));
        assert!(check(|c| c.postgres.url = Secret::new("nonsense")).contains("postgres.url"));
        assert!(check(|c| c.limits.in_flight_bytes = 1).contains("limits.in_flight_bytes"));
        assert!(check(|c| drop(c.kafka.properties.insert("acks".into(), Secret::new("1")))).contains("acks"));
    }
}

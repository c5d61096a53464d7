//! What Kafka says of itself, for whoever looks whether it is as it should be.

use std::{collections::BTreeMap, time::Duration};

use rdkafka::{
    admin::{AdminClient, AdminOptions, ResourceSpecifier},
    metadata::{MetadataBroker, MetadataPartition},
    types::RDKafkaRespErr,
};

use super::{
    client::{Quiet, client_config, not_taken},
    create::refusal,
};
use crate::{
    config::KafkaConfig,
    error::{Error, Kind},
};

/// How long to wait for a broker's answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Which brokers are to have a partition, and which have all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Partition {
    pub(crate) replicas: Vec<i32>,
    pub(crate) in_sync: Vec<i32>,
}

/// A topic as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Surveyed {
    Topic {
        partitions: Vec<Partition>,
        /// Empty where we may not ask.
        settings: BTreeMap<String, String>,
    },
    Missing,
    Unauthorized,
    /// For the moment.
    NoAnswer,
}

/// A client that asks.
pub(crate) struct Survey {
    admin: AdminClient<Quiet>,
    /// Where each broker listens: `HOST:PORT`.
    pub(crate) brokers: Vec<String>,
    any_broker: i32,
}

impl Survey {
    /// # Errors
    /// No broker answers, or none lets us in.
    pub(crate) fn begin(config: &KafkaConfig) -> Result<Self, Error> {
        let admin: AdminClient<Quiet> =
            client_config(config).create_with_context(Quiet).map_err(|e| not_taken(&e))?;
        let metadata = admin.inner().fetch_metadata(Some(&config.checkpoint_topic), TIMEOUT);
        let metadata = metadata.map_err(|e| {
            refusal(config, &config.checkpoint_topic).unwrap_or_else(|| {
                Error::new(Kind::GaveUp, format!("no answer from Kafka at {}: {e}", config.brokers))
                    .hint("check kafka.brokers and kafka.properties, and whether Kafka runs")
            })
        })?;
        let brokers = metadata.brokers().iter().map(|b| format!("{}:{}", b.host(), b.port())).collect();
        let any_broker = metadata.brokers().first().map_or(0, MetadataBroker::id);
        Ok(Self { admin, brokers, any_broker })
    }

    pub(crate) fn topic(&self, name: &str) -> Surveyed {
        let Ok(metadata) = self.admin.inner().fetch_metadata(Some(name), TIMEOUT) else {
            return Surveyed::NoAnswer;
        };
        let Some(topic) = metadata.topics().iter().find(|topic| topic.name() == name) else {
            return Surveyed::NoAnswer;
        };
        match topic.error() {
            None => {
                let partition = |p: &MetadataPartition| Partition {
                    replicas: p.replicas().to_vec(),
                    in_sync: p.isr().to_vec(),
                };
                Surveyed::Topic {
                    partitions: topic.partitions().iter().map(partition).collect(),
                    settings: settings(&self.admin, &ResourceSpecifier::Topic(name)),
                }
            }
            Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART) => Surveyed::Missing,
            Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED) => Surveyed::Unauthorized,
            Some(_) => Surveyed::NoAnswer,
        }
    }

    /// A broker's setting; None where we may not ask.
    pub(crate) fn broker_setting(&self, name: &str) -> Option<String> {
        settings(&self.admin, &ResourceSpecifier::Broker(self.any_broker)).remove(name)
    }
}

/// The settings of a topic or a broker; empty where we may not ask.
pub(super) fn settings(admin: &AdminClient<Quiet>, of: &ResourceSpecifier<'_>) -> BTreeMap<String, String> {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().build() else {
        return BTreeMap::new();
    };
    let options = AdminOptions::new().request_timeout(Some(TIMEOUT));
    let described = runtime.block_on(admin.describe_configs([of], &options));
    let described = described.ok().and_then(|all| all.into_iter().next()?.ok());
    let entries = described.into_iter().flat_map(|resource| resource.entries);
    entries.filter_map(|entry| Some((entry.name, entry.value?))).collect()
}

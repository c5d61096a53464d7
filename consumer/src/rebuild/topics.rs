//! How far the rebuild is in its topics.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rdkafka::{
    admin::{AdminClient, AdminOptions},
    client::DefaultClientContext,
    config::FromClientConfig as _,
    error::KafkaResult,
};
use service::{Failure, exit::Kind};

use crate::{
    cluster::Cluster,
    config::KafkaConfig,
    group::{self, PartitionId},
};

/// How long deleting a group may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// So near the end it is looked whether anything is left but aborted records and the markers of transactions.
const NEAR_RECORDS: i64 = 5000;

/// Asks Kafka about the topics and the rebuild's group.
pub(super) struct Topics {
    cluster: Mutex<Cluster>,
    kafka: KafkaConfig,
}

/// Where partitions begin and end.
#[derive(Clone)]
pub(super) struct Ends(BTreeMap<PartitionId, (i64, i64)>);

impl Ends {
    /// How many records there are.
    pub(super) fn records(&self) -> i64 {
        self.0.values().map(|(low, high)| high - low).sum()
    }

    /// How many there were before the first that is there.
    pub(super) fn missing(&self) -> i64 {
        self.0.values().map(|(low, _)| low).sum()
    }
}

impl Topics {
    /// For the rebuild's group.
    pub(super) fn new(kafka: &KafkaConfig, group: &str) -> Result<Self, Failure> {
        let kafka = KafkaConfig { group: group.to_owned(), ..kafka.clone() };
        Ok(Self { cluster: Mutex::new(Cluster::new(&kafka)?), kafka })
    }

    /// Where the partitions end now.
    pub(super) async fn ends(self: &Arc<Self>) -> Result<Ends, Failure> {
        self.ask(|topics, cluster| {
            let mut ends = BTreeMap::new();
            for name in &topics.kafka.topics {
                let partitions = cluster.topic(name)?.map_or(0, |topic| topic.partitions);
                for id in (0..partitions).map(|partition| (name.clone(), partition)) {
                    let bounds = cluster.bounds(&id)?;
                    ends.insert(id, bounds);
                }
            }
            Ok(Ends(ends))
        })
        .await
    }

    /// How many records the rebuild's group has still to settle up to these ends.
    pub(super) async fn left(self: &Arc<Self>, ends: &Ends) -> Result<i64, Failure> {
        let ends = ends.clone();
        self.ask(move |_, cluster| {
            let ids: Vec<PartitionId> = ends.0.keys().cloned().collect();
            let committed = cluster.committed(&ids)?;
            let mut left = 0;
            for (id, (low, high)) in &ends.0 {
                let position = committed.get(id).map_or(*low, |offset| *offset.max(low));
                let difference = (high - position).max(0);
                let nothing =
                    (1..=NEAR_RECORDS).contains(&difference) && cluster.first(id, position)?.is_none();
                left += if nothing { 0 } else { difference };
            }
            Ok(left)
        })
        .await
    }

    /// Deletes the rebuild's group; best effort, because Kafka forgets it by itself.
    pub(super) async fn forget(&self) {
        let client: KafkaResult<AdminClient<DefaultClientContext>> =
            AdminClient::from_config(&group::connection(&self.kafka));
        let Ok(client) = client else { return };
        let options = AdminOptions::new().request_timeout(Some(TIMEOUT));
        drop(client.delete_groups(&[&self.kafka.group], &options).await);
    }

    /// The client blocks.
    async fn ask<T: Send + 'static>(
        self: &Arc<Self>,
        question: impl FnOnce(&Self, &mut Cluster) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let topics = self.clone();
        let ask = move || {
            let mut cluster = topics.cluster.lock().unwrap_or_else(PoisonError::into_inner);
            question(&topics, &mut cluster)
        };
        let answer = tokio::task::spawn_blocking(ask).await;
        answer.map_err(|e| Failure::new(Kind::Internal, format!("cannot ask Kafka: {e}")))?
    }
}

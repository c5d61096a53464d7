//! Whoever brings the outbox to Kafka, as a process of a bench: on a slot that is there, to a topic of its own.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use rustix::process::Signal;
use tokio::process::{Child, Command};

use super::{contents::PARTITIONS, debezium::Debezium, relay::Relay, servers::Servers};
use crate::{
    cli::Delivery,
    ending,
    failure::{Explain, Failure, Result},
    identity, kafka, logs,
    topics::{self, Topic},
};

/// How long a reader that is done may take to end.
pub(super) const END_LIMIT: Duration = Duration::from_secs(30);
const ASK_TIMEOUT: Duration = Duration::from_secs(5);

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Publisher {
    Relay(Relay),
    Debezium(Debezium),
}

/// One whose topic, and what else it needs, is there.
pub(super) struct Ready {
    pub(super) command: Command,
    pub(super) topic: String,
    pub(super) listen: String,
    pub(super) log: PathBuf,
    /// Whether it is to end with exit code 0 when asked to.
    pub(super) ends_well: bool,
}

/// One that runs.
pub(super) struct Running {
    pub(super) child: Child,
    listen: String,
    log: PathBuf,
    ends_well: bool,
}

impl Publisher {
    /// What a consumer has to expect of it.
    pub(super) fn delivery(&self) -> Delivery {
        match self {
            Self::Relay(relay) => relay.delivery,
            Self::Debezium(_) => Delivery::AtLeastOnce,
        }
    }

    /// Makes the topic of measurement `number`, and what else it needs.
    pub(super) async fn init(&self, servers: &Servers, slot: &str, number: usize) -> Result<Ready> {
        let topic = format!("bench-{number}");
        let new = Topic { name: topic.clone(), partitions: PARTITIONS, settings: BTreeMap::new() };
        topics::create(&servers.kafka, vec![new], kafka::replication(1)).await?;
        match self {
            Self::Relay(relay) => relay.init(servers, slot, topic, number).await,
            Self::Debezium(debezium) => debezium.init(servers, slot, topic, number),
        }
    }
}

impl Ready {
    /// Starts it; once more, if the one before has been killed.
    pub(super) fn run(&mut self) -> Result<Running> {
        let child = self.command.spawn().explain(|| "start a publisher".to_owned())?;
        let (listen, log) = (self.listen.clone(), self.log.clone());
        Ok(Running { child, listen, log, ends_well: self.ends_well })
    }
}

impl Running {
    /// # Errors
    /// It has ended.
    pub(super) fn look(&mut self) -> Result<()> {
        match self.child.try_wait().explain(|| "wait for a publisher".to_owned())? {
            Some(status) => Err(self.failed(format!("the publisher ended: {}", ending::describe(status)))),
            None => Ok(()),
        }
    }

    /// How many records Kafka has acknowledged to a relay, committed or not; none before it answers.
    pub(super) async fn acknowledged(&self) -> u64 {
        let url = format!("http://{}/metrics", self.listen);
        let asked = tokio::task::spawn_blocking(move || {
            let agent = ureq::Agent::config_builder().timeout_global(Some(ASK_TIMEOUT)).build().new_agent();
            let text = agent.get(&url).call().ok()?.body_mut().read_to_string().ok()?;
            let name = "cdc_relay_records_acknowledged_total ";
            text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
        });
        asked.await.ok().flatten().unwrap_or(0)
    }

    /// Stops it in the usual way.
    pub(super) async fn end(&mut self) -> Result<()> {
        if let Some(pid) = self.child.id() {
            identity::send(pid, Signal::TERM);
        }
        match tokio::time::timeout(END_LIMIT, self.child.wait()).await {
            Ok(Ok(status)) if status.success() || !self.ends_well => Ok(()),
            Ok(Ok(status)) => Err(self.failed(format!("the publisher's end: {}", ending::describe(status)))),
            Ok(Err(error)) => Err(self.failed(format!("the publisher's end: {error}"))),
            Err(_) => Err(self.failed(format!("the publisher did not end within {} s", END_LIMIT.as_secs()))),
        }
    }

    pub(super) fn failed(&self, why: String) -> Failure {
        logs::with_tail(Failure::new(why), &self.log)
    }
}

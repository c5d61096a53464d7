//! The whole relay as a process of a bench: on a slot that is there, to a topic of its own.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use rustix::process::Signal;
use tokio::process::{Child, Command};

use super::{contents::PARTITIONS, servers::Servers};
use crate::{
    cli::Delivery,
    ending,
    failure::{Explain, Failure, Result},
    identity, kafka, logs, ports,
    topics::{self, Topic},
};

/// How long a reader that is done may take to end.
pub(super) const END_LIMIT: Duration = Duration::from_secs(30);
const ASK_TIMEOUT: Duration = Duration::from_secs(5);

/// A build of it, and what it is to promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Relay {
    pub(super) binary: PathBuf,
    pub(super) delivery: Delivery,
}

/// A relay whose topic and checkpoint are there.
pub(super) struct Ready {
    command: Command,
    pub(super) topic: String,
    listen: String,
    log: PathBuf,
}

/// A relay that runs.
pub(super) struct Running {
    pub(super) child: Child,
    listen: String,
    log: PathBuf,
}

impl Relay {
    /// Makes the topic of measurement `number`, and what else the relay needs.
    pub(super) async fn init(&self, servers: &Servers, slot: &str, number: usize) -> Result<Ready> {
        let (topic, log) = (format!("bench-{number}"), reader_log(servers, number));
        let new = Topic { name: topic.clone(), partitions: PARTITIONS, settings: BTreeMap::new() };
        topics::create(&servers.kafka, vec![new], kafka::replication(1)).await?;
        let listen = ports::free()?.to_string();
        let command = |word: &str| -> Result<Command> {
            let mut command = servers.command(&self.binary, &log)?;
            relay_env(&mut command, servers, slot);
            command.env("CDC_RELAY_KAFKA__DELIVERY", self.delivery.name());
            command.arg(word).env("CDC_RELAY_HTTP__LISTEN", &listen).env("CDC_RELAY_ROUTE__TOPIC", &topic);
            Ok(command)
        };
        let status = command("init")?.status().await.explain(|| "start cdc-relay init".to_owned())?;
        if !status.success() {
            let why = format!("cdc-relay init: {}", ending::describe(status));
            return Err(logs::with_tail(Failure::new(why), &log));
        }
        Ok(Ready { command: command("run")?, topic, listen, log })
    }
}

impl Ready {
    /// Starts it.
    pub(super) fn run(mut self) -> Result<Running> {
        let child = self.command.spawn().explain(|| "start the relay".to_owned())?;
        Ok(Running { child, listen: self.listen, log: self.log })
    }
}

impl Running {
    /// # Errors
    /// It has ended.
    pub(super) fn look(&mut self) -> Result<()> {
        match self.child.try_wait().explain(|| "wait for the relay".to_owned())? {
            Some(status) => Err(self.failed(format!("the relay ended: {}", ending::describe(status)))),
            None => Ok(()),
        }
    }

    /// How many records Kafka has acknowledged, committed or not; none before the relay answers.
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
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(self.failed(format!("the relay's end: {}", ending::describe(status)))),
            Ok(Err(error)) => Err(self.failed(format!("the relay's end: {error}"))),
            Err(_) => Err(self.failed(format!("the relay did not end within {} s", END_LIMIT.as_secs()))),
        }
    }

    pub(super) fn failed(&self, why: String) -> Failure {
        logs::with_tail(Failure::new(why), &self.log)
    }
}

/// Where the reader of measurement `number` writes.
pub(super) fn reader_log(servers: &Servers, number: usize) -> PathBuf {
    servers.layout.log(&format!("reader-{number}"))
}

/// The relay at its defaults, but for where things are.
pub(super) fn relay_env(command: &mut Command, servers: &Servers, slot: &str) {
    command.env("CDC_RELAY_POSTGRES__URL", &servers.url).env("CDC_RELAY_POSTGRES__SLOT", slot);
    command.env("CDC_RELAY_KAFKA__BROKERS", &servers.kafka);
}

/// The arm of a relay with this delivery.
pub(super) const fn arm_name(delivery: Delivery, is_against: bool) -> &'static str {
    match (delivery, is_against) {
        (Delivery::AtLeastOnce, false) => "relay",
        (Delivery::ExactlyOnce, false) => "relay, exactly-once",
        (Delivery::AtLeastOnce, true) => "relay (against)",
        (Delivery::ExactlyOnce, true) => "relay, exactly-once (against)",
    }
}

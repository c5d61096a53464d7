//! The whole relay as a publisher.

use std::path::PathBuf;

use tokio::process::Command;

use super::{publisher::Ready, servers::Servers};
use crate::{
    cli::Delivery,
    ending,
    failure::{Explain, Failure, Result},
    logs, ports,
};

/// A build of it, and what it is to promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Relay {
    pub(super) binary: PathBuf,
    pub(super) delivery: Delivery,
    /// Whether it tells at its end, in its log, what jemalloc has counted.
    pub(super) count_allocations: bool,
}

impl Relay {
    /// Makes what it needs beside the topic.
    pub(super) async fn init(
        &self,
        servers: &Servers,
        slot: &str,
        topic: String,
        number: usize,
    ) -> Result<Ready> {
        let log = reader_log(servers, number);
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
        let mut run = command("run")?;
        if self.count_allocations {
            // As JSON, the sum over all arenas alone.
            run.env("MALLOC_CONF", "stats_print:true,stats_print_opts:Jgdablxeh");
        }
        Ok(Ready { command: run, topic, listen, log, ends_well: true })
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

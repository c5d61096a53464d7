//! Debezium Server with its outbox event router, as a process of a bench: on a slot that is there, to a topic of its own.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::PathBuf};

use super::{
    publisher::Ready,
    relay::reader_log,
    servers::{DATABASE, Servers},
};
use crate::{
    failure::{Explain, Failure, Result},
    layout::Layout,
    maven, ports, prerequisites,
    progress::Progress,
};

/// Its own minimum.
const JAVA_AT_LEAST: u32 = 21;

/// An installation, and how it is set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Debezium {
    home: PathBuf,
    java: PathBuf,
    pub(super) tuning: Tuning,
}

/// Its settings, but for where things are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tuning {
    Defaults,
    /// For throughput and latency, at the cost of processor time when idle.
    Tuned,
}

impl Tuning {
    /// The name of the arm.
    pub(super) const fn arm_name(self) -> &'static str {
        match self {
            Self::Defaults => "debezium",
            Self::Tuned => "debezium, tuned",
        }
    }

    fn settings(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Defaults => &[],
            Self::Tuned => &[
                ("debezium.source.poll.interval.ms", "5"),
                ("debezium.source.offset.flush.interval.ms", "0"),
                ("debezium.source.max.batch.size", "8192"),
                ("debezium.source.max.queue.size", "32768"),
                ("debezium.sink.kafka.producer.linger.ms", "2"),
                ("debezium.sink.kafka.producer.batch.size", "262144"),
            ],
        }
    }
}

/// Fetches it, once, and says which version it is, and of which Java.
pub(super) fn install(layout: &Layout, progress: &Progress) -> Result<[Debezium; 2]> {
    let java = prerequisites::java_at_least(JAVA_AT_LEAST)?;
    let home = maven::debezium(layout, progress)?;
    Ok([Tuning::Defaults, Tuning::Tuned].map(|tuning| Debezium {
        home: home.clone(),
        java: java.clone(),
        tuning,
    }))
}

impl Debezium {
    pub(super) fn arm_name(&self) -> &'static str {
        self.tuning.arm_name()
    }

    /// The version, by the name of the jar that runs it, and Java's.
    pub(super) fn version(&self) -> Result<String> {
        let java = prerequisites::java_version(&self.java)?;
        let runner = self.runner()?;
        let name = runner.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let version =
            name.strip_prefix("debezium-server-dist-").and_then(|rest| rest.strip_suffix("-runner.jar"));
        Ok(format!("{} on Java {java}", version.unwrap_or(&name)))
    }

    fn runner(&self) -> Result<PathBuf> {
        let entries = fs::read_dir(&self.home).explain(|| format!("read {}", self.home.display()))?;
        let mut jars = entries.flatten().map(|entry| entry.path());
        jars.find(|path| path.to_string_lossy().ends_with("runner.jar"))
            .ok_or_else(|| Failure::new(format!("{} has no runner.jar", self.home.display())))
    }

    /// Writes its configuration for the topic of measurement `number`, which is there.
    pub(super) fn init(&self, servers: &Servers, slot: &str, topic: String, number: usize) -> Result<Ready> {
        self.init_with(servers, slot, topic, number, &[])
    }

    /// The same with other settings.
    pub(super) fn init_with(
        &self,
        servers: &Servers,
        slot: &str,
        topic: String,
        number: usize,
        others: &[(&str, &str)],
    ) -> Result<Ready> {
        let folder = servers.layout.dir.join(format!("debezium-{number}"));
        let config = folder.join("config");
        for dir in [&config, &folder.join("data")] {
            fs::create_dir_all(dir).explain(|| format!("create {}", dir.display()))?;
        }
        let listen = ports::free()?;
        let file = config.join("application.properties");
        let text = self.properties(servers, slot, &topic, listen.port(), others);
        fs::write(&file, text).explain(|| format!("write {}", file.display()))?;
        let log = reader_log(servers, number);
        let mut command = servers.command(&self.java, &log)?;
        let home = self.home.display();
        command.current_dir(&folder);
        command.arg("-Dquarkus.config.locations=config/application.properties").arg("-cp");
        command.arg(format!("{}:config:{home}/config/lib:{home}/lib/*", self.runner()?.display()));
        command.arg("io.debezium.server.Main");
        Ok(Ready { command, topic, listen: listen.to_string(), log, ends_well: false })
    }

    fn properties(
        &self,
        servers: &Servers,
        slot: &str,
        topic: &str,
        port: u16,
        others: &[(&str, &str)],
    ) -> String {
        let string = "org.apache.kafka.common.serialization.StringSerializer";
        let postgres_port = servers.postgres_port.to_string();
        let port = port.to_string();
        let mut settings: BTreeMap<&str, &str> = BTreeMap::from([
            ("quarkus.http.port", port.as_str()),
            ("debezium.sink.type", "kafka"),
            ("debezium.sink.kafka.producer.bootstrap.servers", servers.kafka.as_str()),
            ("debezium.sink.kafka.producer.acks", "all"),
            ("debezium.sink.kafka.producer.key.serializer", string),
            ("debezium.sink.kafka.producer.value.serializer", string),
            ("debezium.source.connector.class", "io.debezium.connector.postgresql.PostgresConnector"),
            ("debezium.source.plugin.name", "pgoutput"),
            ("debezium.source.slot.name", slot),
            ("debezium.source.publication.name", "cdc_relay"),
            ("debezium.source.publication.autocreate.mode", "disabled"),
            ("debezium.source.database.hostname", "127.0.0.1"),
            ("debezium.source.database.port", &postgres_port),
            ("debezium.source.database.user", "postgres"),
            ("debezium.source.database.password", "postgres"),
            ("debezium.source.database.dbname", DATABASE),
            ("debezium.source.topic.prefix", "bench"),
            ("debezium.source.table.include.list", "public.outbox"),
            ("debezium.source.snapshot.mode", "no_data"),
            ("debezium.source.tombstones.on.delete", "false"),
            ("debezium.source.extended.headers.enabled", "false"),
            ("debezium.source.offset.storage", "org.apache.kafka.connect.storage.FileOffsetBackingStore"),
            ("debezium.source.offset.storage.file.filename", "data/offsets.dat"),
            ("debezium.format.key", "simplestring"),
            ("debezium.format.value", "simplestring"),
            ("debezium.format.header.schemas.enable", "false"),
            ("debezium.transforms", "outbox"),
            ("debezium.transforms.outbox.type", "io.debezium.transforms.outbox.EventRouter"),
            ("debezium.transforms.outbox.table.fields.additional.placement", "type:header:eventType"),
            ("debezium.transforms.outbox.route.topic.replacement", topic),
        ]);
        settings.extend(self.tuning.settings().iter().chain(others).copied());
        settings.iter().fold(String::new(), |mut text, (key, value)| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{key}={value}");
            text
        })
    }
}

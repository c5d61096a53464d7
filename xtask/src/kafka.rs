//! Kafka: brokers in `KRaft` combined mode (each is broker and controller).

use std::{
    fmt::Write as _,
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::process::Command;

use crate::{
    ending,
    failure::{Explain, Failure, Result},
    layout::Layout,
    logs,
    ports::Ports,
    spec::{Layer, Probe, Spec, open_log},
};

/// Everything goes to the process's output, which is its log file.
const LOG4J2: &str = "\
status = error
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{yyyy-MM-dd'T'HH:mm:ss.SSSXXX} %-5p %c{1}: %m%n
rootLogger.level = info
rootLogger.appenderRef.out.ref = out
# These print every configuration value, several hundred lines at each start.
logger.config.name = org.apache.kafka.common.config
logger.config.level = warn
logger.server.name = kafka.server.KafkaConfig
logger.server.level = warn
";

/// What it takes to run the brokers of one stack.
#[derive(Debug)]
pub(crate) struct Kafka<'a> {
    pub layout: &'a Layout,
    pub java: PathBuf,
    pub jars: PathBuf,
    pub ports: &'a Ports,
    /// Further settings of every broker; a name that ends with `+` adds to a list.
    pub settings: &'a [(String, String)],
    /// A second listener of each broker's, for clients that come by a proxy; none where this is empty.
    pub proxied: &'a [Proxied],
}

/// A listener behind a proxy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Proxied {
    pub port: u16,
    /// The proxy's port, which the broker tells its clients.
    pub advertised: u16,
}

impl Kafka<'_> {
    fn brokers(&self) -> usize {
        self.ports.kafka.len()
    }

    /// One folder per number of brokers: the data of one cannot become the data of three.
    fn data(&self) -> PathBuf {
        self.layout.data().join(format!("kafka-{}", self.brokers()))
    }

    /// The working folder of broker `id`; its log folder in it is named by a relative path, so that no character
    /// of the way to it can upset the properties file.
    fn folder(&self, id: usize) -> PathBuf {
        self.data().join(id.to_string())
    }

    fn conf(&self, id: usize) -> PathBuf {
        self.layout.conf().join(format!("kafka-{id}.properties"))
    }

    /// Numbers of the brokers, from 1.
    pub(crate) fn ids(&self) -> std::ops::RangeInclusive<usize> {
        1..=self.brokers()
    }

    /// Writes the configurations and formats the storage of brokers that have none.
    pub(crate) async fn prepare(&self) -> Result<()> {
        let log4j2 = self.layout.conf().join("log4j2.properties");
        fs::write(&log4j2, LOG4J2).explain(|| format!("write {}", log4j2.display()))?;
        fs::create_dir_all(self.data()).explain(|| format!("create {}", self.data().display()))?;
        let cluster = cluster_id(&self.data().join("cluster-id"))?;
        let mut formatting = Vec::new();
        for id in self.ids() {
            let folder = self.folder(id);
            fs::create_dir_all(&folder).explain(|| format!("create {}", folder.display()))?;
            let conf = self.conf(id);
            let own: Vec<_> =
                self.proxied.get(id - 1).into_iter().flat_map(|proxied| proxied.settings()).collect();
            let text = with_settings(with_settings(properties(self.ports, id), &own), self.settings);
            fs::write(&conf, text).explain(|| format!("write {}", conf.display()))?;
            if !folder.join("log/meta.properties").is_file() {
                formatting.push((id, self.format(id, &cluster)?));
            }
        }
        for (id, mut child) in formatting {
            let status = child.wait().await.explain(|| "wait for Kafka's storage tool".to_owned())?;
            if !status.success() {
                let why = format!("Kafka's storage tool could not format: {}", ending::describe(status));
                return Err(logs::with_tail(Failure::new(why), &self.layout.log(&format!("kafka-{id}"))));
            }
        }
        Ok(())
    }

    fn format(&self, id: usize, cluster: &str) -> Result<tokio::process::Child> {
        let log = open_log(&self.layout.log(&format!("kafka-{id}")))?;
        let errors = log.try_clone().explain(|| "write Kafka's log".to_owned())?;
        // What an interrupted format left is not a storage.
        let _ = fs::remove_dir_all(self.folder(id).join("log"));
        Command::new(&self.java)
            .args(self.jvm("128m"))
            .args(["kafka.tools.StorageTool", "format", "-t", cluster, "-c"])
            .arg(self.conf(id))
            .current_dir(self.folder(id))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .kill_on_drop(true)
            .spawn()
            .explain(|| format!("start {}", self.java.display()))
    }

    fn jvm(&self, heap: &str) -> Vec<std::ffi::OsString> {
        let mut log4j2 = std::ffi::OsString::from("-Dlog4j2.configurationFile=");
        log4j2.push(self.layout.conf().join("log4j2.properties"));
        let classes = self.jars.join("*").into_os_string();
        let heap = format!("-Xmx{heap}");
        [heap.as_str(), "-XX:+ExitOnOutOfMemoryError", "-XX:-UsePerfData", "-Djava.awt.headless=true"]
            .iter()
            .map(std::ffi::OsString::from)
            .chain([log4j2, "-cp".into(), classes])
            .collect()
    }

    /// How to run broker `id`.
    pub(crate) fn spec(&self, id: usize) -> Spec {
        let heap = if self.brokers() == 1 { "512m" } else { "256m" };
        let mut args = self.jvm(heap);
        args.push("kafka.Kafka".into());
        args.push(self.conf(id).into());
        let port = self.ports.kafka[id - 1];
        Spec {
            name: format!("kafka-{id}"),
            service: "kafka".to_owned(),
            layer: Layer::Kafka,
            program: self.java.clone(),
            args,
            env: Vec::new(),
            cwd: self.folder(id),
            user: None,
            log: self.layout.log(&format!("kafka-{id}")),
            port,
            probe: Probe::Kafka { port },
            grace: Duration::from_secs(20),
        }
    }
}

impl Proxied {
    fn settings(self) -> [(String, String); 3] {
        let set = |name: &str, value: String| (name.to_owned(), value);
        [
            set("listeners+", format!("PROXIED://127.0.0.1:{}", self.port)),
            set("advertised.listeners+", format!("PROXIED://127.0.0.1:{}", self.advertised)),
            set("listener.security.protocol.map+", "PROXIED:PLAINTEXT".to_owned()),
        ]
    }
}

/// The version, from the name of Kafka's own jar.
pub(crate) fn version(jars: &Path) -> String {
    let names = fs::read_dir(jars).into_iter().flatten().filter_map(std::result::Result::ok);
    let mut names = names.filter_map(|entry| entry.file_name().into_string().ok());
    names
        .find_map(|name| Some(name.strip_prefix("kafka_2.13-")?.strip_suffix(".jar")?.to_owned()))
        .unwrap_or_default()
}

/// How often each partition is replicated.
pub(crate) fn replication(brokers: usize) -> i32 {
    if brokers < 3 { 1 } else { 3 }
}

fn properties(ports: &Ports, id: usize) -> String {
    let voters: Vec<String> = (1..)
        .zip(&ports.controllers)
        .map(|(voter, port): (usize, _)| format!("{voter}@127.0.0.1:{port}"))
        .collect();
    let (port, controller) = (ports.kafka[id - 1], ports.controllers[id - 1]);
    let replicas = replication(ports.kafka.len());
    let in_sync = if replicas == 1 { 1 } else { 2 };
    format!(
        "\
process.roles=broker,controller
node.id={id}
controller.quorum.voters={voters}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
log.dirs=log
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
default.replication.factor={replicas}
min.insync.replicas={in_sync}
offsets.topic.replication.factor={replicas}
transaction.state.log.replication.factor={replicas}
transaction.state.log.min.isr={in_sync}
share.coordinator.state.topic.replication.factor={replicas}
share.coordinator.state.topic.min.isr={in_sync}
",
        voters = voters.join(",")
    )
}

/// Adds settings to a properties file: what comes later in one counts.
fn with_settings(mut text: String, settings: &[(String, String)]) -> String {
    for (name, value) in settings {
        let mut value = escape(value);
        let name = match name.strip_suffix('+') {
            None => name,
            Some(list) => {
                let before =
                    text.lines().filter_map(|line| line.strip_prefix(list)?.strip_prefix('=')).next_back();
                if let Some(before) = before.filter(|before| !before.is_empty()) {
                    value = format!("{before},{value}");
                }
                list
            }
        };
        // Nothing can fail in writing to memory.
        let _ = writeln!(text, "{name}={value}");
    }
    text
}

/// Java reads properties files as Latin-1, with backslash escapes.
fn escape(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    for unit in value.encode_utf16() {
        match u8::try_from(unit) {
            Ok(b'\\') => escaped.push_str("\\\\"),
            Ok(ascii @ 0..=0x7f) => escaped.push(char::from(ascii)),
            _ => drop(write!(escaped, "\\u{unit:04x}")),
        }
    }
    escaped
}

/// The cluster's id, made once: 16 random bytes in URL-safe base64, as Kafka's own `random-uuid` prints it.
fn cluster_id(path: &Path) -> Result<String> {
    if let Ok(id) = fs::read_to_string(path) {
        return Ok(id.trim().to_owned());
    }
    let mut random = [0; 16];
    let mut source = fs::File::open("/dev/urandom").explain(|| "open /dev/urandom".to_owned())?;
    source.read_exact(&mut random).explain(|| "read /dev/urandom".to_owned())?;
    let id = base64(random);
    fs::write(path, format!("{id}\n")).explain(|| format!("write {}", path.display()))?;
    Ok(id)
}

fn base64(bytes: [u8; 16]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let number = u128::from_be_bytes(bytes);
    // 21 digits of 6 bits, and one with the last 2 bits.
    let digit = |value: u128| char::from(DIGITS[usize::try_from(value & 63).unwrap_or(0)]);
    let mut id: String = (0..21).map(|place| digit(number >> (122 - 6 * place))).collect();
    id.push(digit(number << 4));
    // The storage tool would take a leading dash for an option.
    if id.starts_with('-') { id.replacen('-', "A", 1) } else { id }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(brokers: u16) -> Ports {
        Ports {
            kafka: (0..brokers).map(|n| 19092 + n).collect(),
            controllers: (0..brokers).map(|n| 19192 + n).collect(),
            ..Ports::default()
        }
    }

    #[test]
    fn one_broker_replicates_nothing() {
        let text = properties(&ports(1), 1);
        assert!(text.contains("controller.quorum.voters=1@127.0.0.1:19192\n"));
        assert!(
            text.contains("offsets.topic.replication.factor=1\n") && text.contains("min.insync.replicas=1\n")
        );
        assert!(text.contains("auto.create.topics.enable=false\n"));
    }

    #[test]
    fn three_brokers_know_each_other_and_replicate() {
        let text = properties(&ports(3), 2);
        assert!(text.contains("node.id=2\n"));
        assert!(text.contains("voters=1@127.0.0.1:19192,2@127.0.0.1:19193,3@127.0.0.1:19194\n"));
        assert!(text.contains("listeners=PLAINTEXT://127.0.0.1:19093,CONTROLLER://127.0.0.1:19193\n"));
        assert!(
            text.contains("default.replication.factor=3\n") && text.contains("\nmin.insync.replicas=2\n")
        );
        assert!(text.contains("transaction.state.log.min.isr=2\n"));
    }

    #[test]
    fn settings_come_last_and_lists_grow() {
        let set = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let given = [
            set("listeners+", "S://localhost:1"),
            set("listeners+", "T://:2"),
            set("a", "1"),
            set("b+", "ä\\"),
        ];
        let text = with_settings("listeners=P://127.0.0.1:9\na=0\n".to_owned(), &given);
        assert!(text.contains("\nlisteners=P://127.0.0.1:9,S://localhost:1,T://:2\na=1\n"), "{text}");
        assert!(text.ends_with("b=\\u00e4\\\\\n"), "{text}");
    }

    #[test]
    fn ids_are_url_safe_base64() {
        assert_eq!(base64([0; 16]), "AAAAAAAAAAAAAAAAAAAAAA");
        assert_eq!(base64([0xff; 16]), "_____________________w");
        assert_eq!(base64(*b"0123456789abcdef"), "MDEyMzQ1Njc4OWFiY2RlZg");
        let dash = [0xf8; 16];
        assert!(!base64(dash).starts_with('-'));
    }
}

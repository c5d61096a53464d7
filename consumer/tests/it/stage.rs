//! A test's own database, topics and group, and the consumers it runs on them.

use std::{
    fs::File,
    future::Future,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    message::{Header, Headers, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use serde_json::Value;
use sqlx::{AssertSqlSafe, ConnectOptions, PgPool, postgres::PgConnectOptions};
use uuid::Uuid;

use crate::records::Record;

/// How long anything may take that a test waits for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

pub(crate) struct Stage {
    /// Unique; the group and the database are called like this.
    pub(crate) name: String,
    pub(crate) topic: String,
    pub(crate) partitions: i32,
    pub(crate) brokers: String,
    /// The superuser in the test's own database.
    pub(crate) pool: PgPool,
    /// The superuser in the maintenance database.
    pub(crate) server: PgPool,
    options: PgConnectOptions,
    consumers_started: AtomicU32,
}

fn environment(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!(
            "{name} is not set: this test needs real servers; run it with `cargo xtask test -- -p consumer`"
        )
    })
}

/// Runs `test` on a stage of its own and clears it away, whatever the outcome.
pub(crate) fn on_stage<F, T>(partitions: i32, test: F)
where
    F: FnOnce(Arc<Stage>) -> T,
    T: Future<Output = ()>,
{
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let stage = Arc::new(runtime.block_on(Stage::new(partitions)));
    // A failed test unwinds to here, killing its children on the way.
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| runtime.block_on(test(stage.clone()))));
    runtime.block_on(stage.clear());
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

impl Stage {
    async fn new(partitions: i32) -> Self {
        let brokers = environment("TEST_KAFKA_BROKERS");
        let server: PgConnectOptions = environment("TEST_POSTGRES_URL").parse().unwrap();
        let name = format!("consumer_{}", Uuid::new_v4().simple());
        let options = server.clone().database(&name);
        let server = PgPool::connect_with(server)
            .await
            .expect("Postgres must answer; run `cargo xtask test -- -p consumer`");
        sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {name}"))).execute(&server).await.unwrap();
        let stage = Self {
            topic: format!("{name}-events"),
            partitions,
            pool: PgPool::connect_lazy_with(options.clone()),
            name,
            brokers,
            server,
            options,
            consumers_started: AtomicU32::new(0),
        };
        stage.create_topic(&stage.topic).await;
        stage
    }

    async fn clear(&self) {
        self.pool.close().await;
        let drop_database = format!("DROP DATABASE {} WITH (FORCE)", self.name);
        sqlx::query(AssertSqlSafe(drop_database)).execute(&self.server).await.unwrap();
        let admin = self.admin();
        drop(admin.delete_topics(&[&self.topic, &self.dlq(), &self.redrive()], &AdminOptions::new()).await);
        drop(admin.delete_groups(&[&self.name], &AdminOptions::new()).await);
    }

    pub(crate) fn dlq(&self) -> String {
        format!("{}-dlq", self.topic)
    }

    pub(crate) fn redrive(&self) -> String {
        format!("{}-redrive", self.name)
    }

    pub(crate) fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.brokers);
        config
    }

    pub(crate) fn admin(&self) -> AdminClient<DefaultClientContext> {
        self.client().create().unwrap()
    }

    pub(crate) async fn create_topic(&self, topic: &str) {
        self.create_topic_with(topic, &[]).await;
    }

    /// The same with settings.
    pub(crate) async fn create_topic_with(&self, topic: &str, settings: &[(&str, &str)]) {
        let new = NewTopic::new(topic, self.partitions, TopicReplication::Fixed(1));
        let new = settings.iter().fold(new, |new, (name, value)| new.set(name, value));
        let options = AdminOptions::new().operation_timeout(Some(Duration::from_secs(30)));
        let results = self.admin().create_topics(&[new], &options).await.unwrap();
        results[0].as_ref().expect("Kafka must answer; run `cargo xtask test -- -p consumer`");
        // A broker that is busy serves it a little later.
        eventually(&format!("the topic {topic} is served"), async || {
            let (config, topic) = (self.client(), topic.to_owned());
            let ask = move || {
                let consumer: BaseConsumer = config.create().unwrap();
                consumer.fetch_watermarks(&topic, 0, PATIENCE).ok()
            };
            tokio::task::spawn_blocking(ask).await.unwrap()
        })
        .await;
    }

    /// The database's URL for a user and password (the superuser's without).
    pub(crate) fn url(&self) -> String {
        self.options.to_url_lossy().to_string()
    }

    pub(crate) fn options(&self) -> PgConnectOptions {
        self.options.clone()
    }

    /// A consumer with this stage's settings, not started yet.
    pub(crate) fn command(&self, handler: &str) -> Command {
        self.command_on(handler, &self.topic)
    }

    /// The same on another topic.
    pub(crate) fn command_on(&self, handler: &str, topic: &str) -> Command {
        self.command_of(Path::new(env!("CARGO_BIN_EXE_consumer")), handler, topic)
    }

    /// The same of another program.
    pub(crate) fn command_of(&self, program: &Path, handler: &str, topic: &str) -> Command {
        let mut command = Command::new(program);
        command
            .args(["--handler", handler, "--listen", "127.0.0.1:0", "--group", &self.name])
            .args(["--brokers", &self.brokers, "--topics", topic])
            .env("CONSUMER_POSTGRES__URL", self.url())
            .env("CONSUMER_CONSUMER__RETRY_FIRST_MS", "50")
            .env("CONSUMER_CONSUMER__RETRY_MAX_MS", "500")
            // The least that brokers allow, so that a killed member is missed soon.
            .env("CONSUMER_KAFKA__PROPERTIES__SESSION_TIMEOUT_MS", "6000");
        command
    }

    /// Starts a consumer and waits until it is ready.
    pub(crate) async fn start(&self, handler: &str) -> Running {
        let running = self.spawn(self.command(handler)).await;
        running.until_ready().await;
        running
    }

    /// Starts a consumer and waits until it has its port.
    pub(crate) async fn spawn(&self, mut command: Command) -> Running {
        let number = self.consumers_started.fetch_add(1, Ordering::SeqCst);
        let log = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{number}.log", self.name));
        let child = command.stdout(Stdio::null()).stderr(File::create(&log).unwrap()).spawn().unwrap();
        let mut running = Running { child, log, address: String::new() };
        running.address = eventually("the consumer takes a port", async || {
            let log = running.log();
            Some(log.split_once("address=")?.1.split_whitespace().next()?.to_owned())
        })
        .await;
        running
    }

    /// Writes records and waits until all are acknowledged.
    pub(crate) async fn produce(&self, records: impl IntoIterator<Item = Record>) {
        self.produce_to(&self.topic, records).await;
    }

    /// The same on another topic.
    pub(crate) async fn produce_to(&self, topic: &str, records: impl IntoIterator<Item = Record>) {
        let producer: FutureProducer = self
            .client()
            .set("acks", "all")
            .set("partitioner", "murmur2_random")
            .set("message.max.bytes", "10000000")
            .set("linger.ms", "5")
            .create()
            .unwrap();
        let mut sent = Vec::new();
        for record in records {
            let mut future_record: FutureRecord<'_, [u8], [u8]> = FutureRecord::to(topic);
            future_record.key = record.key.as_deref();
            future_record.payload = record.value.as_deref();
            future_record.partition = record.partition;
            future_record.headers =
                Some(record.headers.iter().fold(OwnedHeaders::new(), |h, (key, value)| {
                    h.insert(Header { key, value: Some(value) })
                }));
            sent.push(producer.send_result(future_record).map_err(|(e, _)| e).unwrap());
        }
        for delivery in sent {
            delivery.await.unwrap().map_err(|(e, _)| e).unwrap();
        }
    }

    /// Reads `count` records of the dead-letter topic, in the order of their offsets at the source.
    pub(crate) async fn dead_letters(&self, count: usize) -> Vec<Letter> {
        self.dead_letters_of(&self.topic, count).await
    }

    /// The same of another topic.
    pub(crate) async fn dead_letters_of(&self, topic: &str, count: usize) -> Vec<Letter> {
        let (config, topic, partitions) = (self.client(), format!("{topic}-dlq"), self.partitions);
        tokio::task::spawn_blocking(move || read(config, &topic, partitions, count)).await.unwrap()
    }

    /// How many records the dead-letter topic holds.
    pub(crate) async fn dead_letter_count(&self) -> i64 {
        let (config, topic, partitions) = (self.client(), self.dlq(), self.partitions);
        tokio::task::spawn_blocking(move || {
            let consumer: BaseConsumer = config.create().unwrap();
            (0..partitions).map(|p| consumer.fetch_watermarks(&topic, p, PATIENCE).unwrap().1).sum()
        })
        .await
        .unwrap()
    }

    /// The sum of the group's committed offsets.
    pub(crate) async fn committed(&self) -> i64 {
        let (mut config, topic, partitions) = (self.client(), self.topic.clone(), self.partitions);
        config.set("group.id", &self.name);
        tokio::task::spawn_blocking(move || {
            let consumer: BaseConsumer = config.create().unwrap();
            let mut list = TopicPartitionList::new();
            list.add_partition_range(&topic, 0, partitions - 1);
            let committed = consumer.committed_offsets(list, PATIENCE).unwrap();
            committed.elements().iter().filter_map(|e| e.offset().to_raw()).filter(|o| *o >= 0).sum()
        })
        .await
        .unwrap()
    }

    /// What an operator's command says, and its exit code.
    pub(crate) async fn operate(&self, handler: &str, arguments: &[&str]) -> Said {
        let mut command = self.command(handler);
        command.args(arguments);
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        Said {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Makes the consumer's tables, by its own command.
    pub(crate) async fn migrate(&self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_consumer"));
        command.arg("migrate").env("CONSUMER_POSTGRES__URL", self.url());
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Runs statements, as the superuser in the test's own database.
    pub(crate) async fn run(&self, sql: &str) {
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&self.pool).await.unwrap();
    }

    /// The first column of a query, as text.
    pub(crate) async fn texts(&self, sql: &str) -> Vec<String> {
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(&self.pool).await.unwrap()
    }

    /// One number from the database.
    pub(crate) async fn number(&self, sql: &str) -> i64 {
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&self.pool).await.unwrap()
    }

    /// Waits until a query gives this number; a table that is not there yet gives none.
    pub(crate) async fn until_number(&self, sql: &str, wanted: i64) {
        eventually(&format!("{sql} gives {wanted}"), async || {
            let found: Result<i64, _> = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&self.pool).await;
            found.ok().filter(|n| *n == wanted)
        })
        .await;
    }
}

fn read(mut config: ClientConfig, topic: &str, partitions: i32, count: usize) -> Vec<Letter> {
    let consumer: BaseConsumer =
        config.set("group.id", "reader").set("enable.auto.commit", "false").create().unwrap();
    let mut list = TopicPartitionList::new();
    for partition in 0..partitions {
        list.add_partition_offset(topic, partition, Offset::Beginning).unwrap();
    }
    consumer.assign(&list).unwrap();
    let (mut letters, start) = (Vec::new(), Instant::now());
    while letters.len() < count {
        assert!(start.elapsed() < PATIENCE, "{} of {count} dead letters came: {letters:#?}", letters.len());
        let Some(Ok(record)) = consumer.poll(Duration::from_millis(100)) else { continue };
        let headers = record
            .headers()
            .map(|h| h.iter().map(|h| (h.key.to_owned(), h.value.unwrap_or_default().to_vec())).collect());
        letters.push(Letter {
            key: record.key().map(<[u8]>::to_vec),
            value: record.payload().map(<[u8]>::to_vec),
            headers: headers.unwrap_or_default(),
        });
    }
    letters.sort_by_key(|l| (l.header("dlq.partition"), l.header("dlq.offset").parse::<i64>().unwrap()));
    letters
}

/// What a command said before it ended.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Said {
    /// What it printed, where it ended well.
    pub(crate) fn well(&self) -> &str {
        assert_eq!(self.code, Some(0), "{self:?}");
        &self.out
    }

    /// The JSON objects that it printed, whatever its end.
    pub(crate) fn objects(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// A dead letter as read.
pub(crate) struct Letter {
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: Option<Vec<u8>>,
    pub(crate) headers: Vec<(String, Vec<u8>)>,
}

impl std::fmt::Debug for Letter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = ["dlq.reason", "dlq.error", "dlq.partition", "dlq.offset"];
        f.debug_map().entries(names.map(|name| (name, self.header(name)))).finish()
    }
}

impl Letter {
    /// A header's text; empty without.
    pub(crate) fn header(&self, name: &str) -> String {
        let found = self.headers.iter().find(|(key, _)| key == name);
        found.map_or(String::new(), |(_, value)| String::from_utf8_lossy(value).into_owned())
    }
}

/// A consumer's process; killed when dropped.
pub(crate) struct Running {
    child: Child,
    log: PathBuf,
    address: String,
}

impl Running {
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) async fn get(&self, path: &str) -> Option<(u16, String)> {
        let url = self.url(path);
        let get = move || {
            let agent: ureq::Agent = ureq::Agent::config_builder()
                .http_status_as_error(false)
                .timeout_global(Some(Duration::from_secs(5)))
                .build()
                .into();
            let mut answer = agent.get(&url).call().ok()?;
            Some((answer.status().as_u16(), answer.body_mut().read_to_string().ok()?))
        };
        tokio::task::spawn_blocking(get).await.unwrap()
    }

    pub(crate) async fn until_ready(&self) {
        eventually(&format!("ready; log:\n{}", self.log()), async || {
            self.get("/health/ready").await.filter(|(status, _)| *status == 200)
        })
        .await;
    }

    /// Waits until it says that it is not ready in this state, and gives back why.
    pub(crate) async fn until_state(&self, state: &str) -> String {
        eventually(&format!("state {state}"), async || {
            let (status, body) = self.get("/health/ready").await?;
            let body: Value = serde_json::from_str(&body).ok()?;
            (body["state"] == state && status == 503)
                .then(|| body["detail"].as_str().unwrap_or_default().to_owned())
        })
        .await
    }

    /// The sum of a metric's samples whose line begins with `name` (and labels, if given).
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.get("/metrics").await.unwrap();
        let values = text.lines().filter(|l| l.starts_with(name)).filter_map(|l| l.rsplit_once(' '));
        values.map(|(_, value)| value.parse::<f64>().unwrap()).sum()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to stop and waits for its end.
    pub(crate) async fn terminate(&mut self) -> ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.until_exit().await
    }

    pub(crate) async fn until_exit(&mut self) -> ExitStatus {
        let child = &mut self.child;
        let start = Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "the consumer did not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.log.display(), self.log());
        } else {
            drop(std::fs::remove_file(&self.log));
        }
    }
}

/// Waits until `condition` gives something.
pub(crate) async fn eventually<T>(what: &str, condition: impl AsyncFn() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = condition().await {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "waited {} s in vain until: {what}", PATIENCE.as_secs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

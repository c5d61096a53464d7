//! docker-compose.yml held against what it starts. No container engine is needed: the services' own configuration
//! check is run with exactly the environments that compose gives them, and ports, topics, roles and files are
//! compared with where they really come from.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use service::{Health, health, http, metrics, shutdown::Shutdown};

/// Our services in compose, and the binary of each.
const SERVICES: [(&str, &str); 11] = [
    ("order-api", "order-api"),
    ("cdc-relay-init", "cdc-relay"),
    ("cdc-relay", "cdc-relay"),
    ("consumers-migrate", "consumer"),
    ("consumers-relay-init", "cdc-relay"),
    ("consumers-relay", "cdc-relay"),
    ("pharmacy", "consumer"),
    ("fulfillment", "consumer"),
    ("messages", "consumer"),
    ("acks", "consumer"),
    ("order-view", "consumer"),
];
/// Those of them that do one thing and end.
const ONE_SHOT: [&str; 3] = ["cdc-relay-init", "consumers-migrate", "consumers-relay-init"];
/// Consumers and the topics they read.
const CONSUMERS: [(&str, &str); 5] = [
    ("pharmacy", "order-events"),
    ("fulfillment", "order-events"),
    ("messages", "notifications"),
    ("acks", "order-acks"),
    ("order-view", "order-events"),
];
const BROKERS: [&str; 3] = ["kafka-1", "kafka-2", "kafka-3"];
const PREFIXES: [&str; 3] = ["ORDER_API_", "CDC_RELAY_", "CONSUMER_"];

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn read(path: &str) -> String {
    let path = repository().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The file with anchors and merges resolved, and `$$` as what it means.
fn compose() -> Value {
    fn unescape(value: &mut Value) {
        match value {
            Value::String(text) => {
                let plain = text.replace("$$", "\0");
                assert!(
                    !plain.contains('$'),
                    "{text:?} takes a value from whoever runs it: this test cannot"
                );
                *text = plain.replace('\0', "$");
            }
            Value::Array(items) => items.iter_mut().for_each(unescape),
            Value::Object(entries) => entries.values_mut().for_each(unescape),
            _ => {}
        }
    }
    let mut model: Value = serde_saphyr::from_str(&read("docker-compose.yml")).unwrap();
    unescape(&mut model);
    model
}

fn services(model: &Value) -> impl Iterator<Item = (&str, &Value)> {
    model["services"].as_object().unwrap().iter().map(|(name, service)| (name.as_str(), service))
}

fn environment(service: &Value) -> Vec<(&str, String)> {
    let entries = service["environment"].as_object().into_iter().flatten();
    entries.map(|(key, value)| (key.as_str(), text(value))).collect()
}

fn variable(service: &Value, key: &str) -> String {
    let value = &service["environment"][key];
    assert!(!value.is_null(), "{key} is not set");
    text(value)
}

/// A scalar as a container sees it.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().map(text).collect()
}

fn binary(name: &str) -> PathBuf {
    // This test's binary is target/release/deps/…
    let path = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join(name);
    assert!(path.exists(), "{} is missing: run the tests by `cargo xtask test`", path.display());
    path
}

/// What `config example` prints: every key with its default.
fn defaults(name: &str) -> toml::Table {
    let output = Command::new(binary(name)).args(["config", "example"]).env_clear().output().unwrap();
    assert!(output.status.success());
    toml::from_str(&String::from_utf8(output.stdout).unwrap()).unwrap()
}

/// The port at the end of the first of several addresses, or of a URL's address.
fn port(address: &str) -> u16 {
    let address = address.split("://").last().unwrap().rsplit('@').next().unwrap();
    let address = address.split(['/', ',']).next().unwrap();
    address.rsplit(':').next().unwrap().parse().unwrap_or_else(|_| panic!("no port in {address:?}"))
}

/// `127.0.0.1:8080-8089:8080` as (8080, 8089, 8080).
fn published(mapping: &str) -> (u16, u16, u16) {
    let rest = mapping.strip_prefix("127.0.0.1:");
    let rest = rest.unwrap_or_else(|| panic!("{mapping} can be reached from other machines"));
    let (host, container) = rest.split_once(':').unwrap();
    let (first, last) = host.split_once('-').unwrap_or((host, host));
    (first.parse().unwrap(), last.parse().unwrap(), container.parse().unwrap())
}

fn check_config(name: &str, args: &[String], environment: &[(&str, String)]) -> (Option<i32>, String) {
    let mut command = Command::new(binary(name));
    command.arg("--check-config").args(args).env_clear().envs(environment.iter().map(|(k, v)| (k, v)));
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn every_environment_passes_its_services_own_check() {
    let model = compose();
    for (service, name) in SERVICES {
        let mut environment = environment(&model["services"][service]);
        let command = texts(&model["services"][service]["command"]);
        assert_eq!(check_config(name, &command, &environment), (Some(0), String::new()), "{service}");
        // A variable of another service's prefix would be ignored, not refused.
        let prefix = format!("{}_", name.replace('-', "_").to_uppercase());
        for (key, _) in &environment {
            assert!(key.starts_with(&prefix), "{service}: {key}");
        }
        // And the check would say so if a key were renamed.
        let unknown = format!("{prefix}POSTGRES__NO_SUCH_KEY");
        environment.push((&unknown, String::new()));
        assert_eq!(check_config(name, &command, &environment).0, Some(64), "{service}");
    }
    let ours: BTreeSet<&str> = SERVICES.iter().map(|(service, _)| *service).collect();
    for (service, value) in services(&model).filter(|(service, _)| !ours.contains(service)) {
        for (key, _) in environment(value) {
            assert!(
                !PREFIXES.iter().any(|prefix| key.starts_with(prefix)),
                "{service} is not checked: {key}"
            );
        }
    }
}

#[test]
fn a_service_listens_where_its_port_and_its_health_check_look() {
    let model = compose();
    let dockerfile = read("docker/Dockerfile");
    for (service, name) in SERVICES {
        let value = &model["services"][service];
        let listen = variable(value, &format!("{}_HTTP__LISTEN", name.replace('-', "_").to_uppercase()));
        let inside = port(&listen);
        assert_eq!(listen, format!("0.0.0.0:{inside}"), "{service}: reachable from outside its container");
        assert_eq!(value["build"]["dockerfile"], "docker/Dockerfile");
        assert_eq!(value["build"]["target"], name);
        let stage = dockerfile.split(&format!("FROM runtime AS {name}\n")).nth(1).unwrap();
        let stage = stage.split("\nFROM ").next().unwrap();
        assert!(stage.contains(&format!("EXPOSE {inside}\n")), "{name}: {stage}");
        assert!(stage.contains(&format!("CMD [\"ready\", \"{inside}\"]")), "{name}: {stage}");
        assert!(stage.contains(&format!("ENTRYPOINT [\"/usr/local/bin/{name}\"]")), "{name}: {stage}");
        if ONE_SHOT.contains(&service) {
            assert_eq!(value["restart"], "no", "{service}");
            continue;
        }
        assert_eq!(texts(&value["healthcheck"]["test"]), ["CMD", "ready", &inside.to_string()], "{service}");
        let mappings = texts(&value["ports"]);
        let [(first, last, container)] = mappings.iter().map(|m| published(m)).collect::<Vec<_>>()[..] else {
            panic!("{service} publishes {mappings:?}");
        };
        assert_eq!(container, inside, "{service}");
        assert!(last > first, "{service} cannot be scaled");
        // Outside as without containers, where the port is the default of `http.listen`.
        let usual = port(defaults(name)["http"]["listen"].as_str().unwrap());
        let further = match service {
            "consumers-relay" | "fulfillment" => 1,
            "messages" => 2,
            "acks" => 3,
            "order-view" => 4,
            _ => 0,
        };
        assert_eq!(first, usual + further, "{service}");
    }
}

#[test]
fn ports_are_those_of_the_local_stack_and_on_loopback_alone() {
    let model = compose();
    for (_, service) in services(&model) {
        for mapping in texts(&service["ports"]) {
            published(&mapping);
        }
        assert!(service["network_mode"].is_null());
    }
    let postgres = port(defaults("order-api")["postgres"]["url"].as_str().unwrap());
    assert_eq!(texts(&model["services"]["postgres"]["ports"]), [format!("127.0.0.1:{postgres}:5432")]);
    assert_eq!(port(defaults("consumer")["postgres"]["url"].as_str().unwrap()), postgres);
    let kafka = port(defaults("consumer")["kafka"]["brokers"].as_str().unwrap());
    for (broker, outside) in BROKERS.iter().zip(kafka..) {
        let value = &model["services"][broker];
        assert_eq!(texts(&value["ports"]), [format!("127.0.0.1:{outside}:{outside}")]);
        assert_eq!(
            variable(value, "KAFKA_ADVERTISED_LISTENERS"),
            format!("INTERNAL://{broker}:9092,EXTERNAL://127.0.0.1:{outside}")
        );
        assert_eq!(
            variable(value, "KAFKA_LISTENERS"),
            format!("INTERNAL://0.0.0.0:9092,CONTROLLER://0.0.0.0:9093,EXTERNAL://0.0.0.0:{outside}")
        );
    }
}

#[test]
fn three_brokers_hold_three_replicas_of_which_two_acknowledge() {
    let model = compose();
    let mut volumes = BTreeSet::new();
    for (broker, id) in BROKERS.iter().zip(1..) {
        let value = &model["services"][broker];
        for (key, wanted) in [
            ("KAFKA_PROCESS_ROLES", "broker,controller"),
            ("KAFKA_CONTROLLER_QUORUM_VOTERS", "1@kafka-1:9093,2@kafka-2:9093,3@kafka-3:9093"),
            ("KAFKA_DEFAULT_REPLICATION_FACTOR", "3"),
            ("KAFKA_MIN_INSYNC_REPLICAS", "2"),
            ("KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR", "3"),
            ("KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR", "3"),
            ("KAFKA_TRANSACTION_STATE_LOG_MIN_ISR", "2"),
            ("KAFKA_AUTO_CREATE_TOPICS_ENABLE", "false"),
        ] {
            assert_eq!(variable(value, key), wanted, "{broker}: {key}");
        }
        assert_eq!(variable(value, "KAFKA_NODE_ID"), id.to_string());
        let logs = variable(value, "KAFKA_LOG_DIRS");
        let volume = texts(&value["volumes"]).into_iter().find(|v| v.ends_with(&format!(":{logs}")));
        volumes.insert(volume.unwrap_or_else(|| panic!("{broker} does not keep {logs}")));
    }
    assert_eq!(volumes.len(), 3);
    let internal = BROKERS.map(|broker| format!("{broker}:9092")).join(",");
    let relays = ["cdc-relay", "consumers-relay"].map(|relay| (relay, "CDC_RELAY_KAFKA__BROKERS"));
    let consumers = CONSUMERS.map(|(consumer, _)| (consumer, "CONSUMER_KAFKA__BROKERS"));
    let clients = relays.into_iter().chain(consumers).chain([("topics", "BOOTSTRAP_SERVERS")]);
    for (service, key) in clients {
        assert_eq!(variable(&model["services"][service], key), internal, "{service}");
    }
    assert!(variable(&model["services"]["akhq"], "AKHQ_CONFIGURATION").contains(&internal));
}

#[test]
fn topics_come_from_the_contract_and_hold_what_is_sent_and_read() {
    let model = compose();
    let topics = &model["services"]["topics"];
    assert_eq!(variable(topics, "REPLICATION_FACTOR"), "3");
    assert!(
        texts(&topics["volumes"]).contains(&"./contracts/topics.txt:/contracts/topics.txt:ro".to_owned())
    );
    let file = read("contracts/topics.txt");
    let lines = file.lines().map(|line| line.split('#').next().unwrap().trim());
    let known: BTreeSet<&str> = lines.filter_map(|line| line.split_whitespace().next()).collect();
    let template = variable(&model["services"]["cdc-relay"], "CDC_RELAY_ROUTE__TOPIC");
    let sent = template.replace("${aggregatetype}", "order");
    assert!(known.contains(sent.as_str()), "{sent} is not among {known:?}");
    assert_eq!(sent, "order-events");
    for (consumer, read) in CONSUMERS {
        let value = &model["services"][consumer];
        assert_eq!(variable(value, "CONSUMER_CONSUMER__HANDLER"), consumer);
        assert_eq!(variable(value, "CONSUMER_KAFKA__TOPICS"), read);
        assert!(known.contains(read) && known.contains(format!("{read}-dlq").as_str()), "{read}");
    }
}

#[test]
fn every_role_and_database_is_made_by_the_scripts_that_run_first() {
    let model = compose();
    let (init, local) = (read("postgres/init.sql"), read("postgres/local.sql"));
    let script = read("docker/databases.sh");
    for (service, name) in SERVICES {
        let value = &model["services"][service];
        let prefix = name.replace('-', "_").to_uppercase();
        let url = variable(value, &format!("{prefix}_POSTGRES__URL"));
        let password = variable(value, &format!("{prefix}_POSTGRES__PASSWORD"));
        let (role, rest) = url.strip_prefix("postgres://").unwrap().split_once('@').unwrap();
        let database = rest.strip_prefix("postgres:5432/").unwrap_or_else(|| panic!("{service}: {url}"));
        assert!(
            init.contains(&format!("ALTER ROLE {role} LOGIN"))
                || local.contains(&format!("CREATE ROLE {role};"))
        );
        let given = local.lines().any(|line| {
            line.starts_with(&format!("ALTER ROLE {role} "))
                && line.ends_with(&format!("PASSWORD '{password}';"))
        });
        assert!(given, "{service}: postgres/local.sql gives {role} another password");
        assert!(script.contains(&format!("ensure {database} ")), "{service}: nothing makes {database}");
        let waits = texts_of_depends_on(value, "service_completed_successfully");
        let waits_for = ["databases", "cdc-relay-init", "consumers-migrate", "consumers-relay-init"];
        assert!(waits.iter().any(|w| waits_for.contains(&w.as_str())), "{service}: {waits:?}");
    }
    let databases = &model["services"]["databases"];
    assert_eq!(databases["image"], model["services"]["postgres"]["image"]);
    assert!(text(&databases["image"]).starts_with("postgres:18"));
    assert!(texts(&databases["volumes"]).contains(&"./postgres:/postgres:ro".to_owned()));
    assert!(texts(&model["services"]["postgres"]["command"]).contains(&"wal_level=logical".to_owned()));
    // Not set in compose, so the relay's defaults are what init.sql has to make.
    let relay = defaults("cdc-relay");
    let publication = relay["postgres"]["publication"].as_str().unwrap();
    let table = relay["outbox"]["table"].as_str().unwrap();
    assert!(init.contains(&format!("CREATE PUBLICATION {publication} FOR TABLE {table} ")));
    assert!(["SLOT", "PUBLICATION"].iter().all(|key| {
        model["services"]["cdc-relay"]["environment"][format!("CDC_RELAY_POSTGRES__{key}")].is_null()
    }));
    // The second relay's is made by a migration of the consumers', in their database.
    let publication = variable(&model["services"]["consumers-relay"], "CDC_RELAY_POSTGRES__PUBLICATION");
    let table = table.strip_prefix("public.").unwrap();
    let migration = read("consumer/migrations/0002_messages_and_outbox.sql");
    assert!(migration.contains(&format!("CREATE PUBLICATION {publication} FOR TABLE {table} ")));
    assert!(migration.contains(&format!("CREATE TABLE {table} ")));
    assert!(script.contains("sql --dbname=consumers --file=\"$scripts/consumers.sql\""));
    assert!(
        read("postgres/consumers.sql").contains("GRANT CONNECT ON DATABASE consumers TO consumers_relay;")
    );
}

fn texts_of_depends_on(service: &Value, condition: &str) -> Vec<String> {
    let entries = service["depends_on"].as_object().into_iter().flatten();
    entries.filter(|(_, on)| on["condition"] == condition).map(|(name, _)| name.clone()).collect()
}

#[test]
fn what_is_waited_for_can_come_true_and_what_is_mounted_exists() {
    let model = compose();
    for (name, service) in services(&model) {
        for healthy in texts_of_depends_on(service, "service_healthy") {
            assert!(
                model["services"][&healthy]["healthcheck"]["test"].is_array(),
                "{name} waits for {healthy}"
            );
        }
        for done in texts_of_depends_on(service, "service_completed_successfully") {
            let restart = &model["services"][&done]["restart"];
            assert!(restart.is_null() || restart == "no", "{name} waits for the end of {done}");
        }
        let restart = text(&service["restart"]);
        assert!(
            ["null", "no"].contains(&restart.as_str()) || restart.starts_with("on-failure:"),
            "{name}: {restart}"
        );
        let entrypoint = texts(&service["entrypoint"]);
        let mounts = texts(&service["volumes"]);
        for mount in &mounts {
            let source = mount.split(':').next().unwrap();
            if source.starts_with('.') {
                assert!(repository().join(source).exists(), "{name} mounts {source}");
            } else {
                assert!(model["volumes"].as_object().unwrap().contains_key(source), "{name}: {source}");
            }
        }
        for script in entrypoint.iter().filter(|word| word.starts_with('/')) {
            assert!(mounts.contains(&format!(".{script}:{script}:ro")), "{name} has no {script}");
        }
    }
    // An order that is written before there is a slot would never be published.
    let waits = texts_of_depends_on(&model["services"]["order-api"], "service_completed_successfully");
    assert!(waits.contains(&"cdc-relay-init".to_owned()));
    // The same for an acknowledgement; and there is no slot before there is a publication.
    let waits =
        |service: &str| texts_of_depends_on(&model["services"][service], "service_completed_successfully");
    assert!(waits("messages").contains(&"consumers-relay-init".to_owned()));
    assert!(waits("consumers-relay-init").contains(&"consumers-migrate".to_owned()));
}

/// The images' health check against the router that every service has.
#[tokio::test(flavor = "multi_thread")]
async fn the_health_check_follows_readiness() {
    let state = Health::default();
    let listener = http::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let router = health::router(state.clone(), metrics::registry("e2e").into());
    let (trigger, shutdown) = Shutdown::manual();
    let server = tokio::spawn(http::serve(listener, router, http::Limits::default(), shutdown));
    let ready = move || async move {
        let check = tokio::process::Command::new("bash")
            .arg(repository().join("docker/ready"))
            .arg(port.to_string())
            .output();
        let output = check.await.unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (success, said) = ready().await;
    assert!(!success && said.contains("503") && said.contains("starting"), "{said}");
    state.ready("serving");
    assert_eq!(ready().await, (true, String::new()));
    state.not_ready("waiting", "the database is away");
    let (success, said) = ready().await;
    assert!(!success && said.contains("the database is away"), "{said}");
    trigger.request();
    server.await.unwrap();
    assert!(!ready().await.0, "nothing listens any more");
}

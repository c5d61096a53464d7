//! TLS, SCRAM and permissions of a real broker. One test, because its servers cost seconds; what it refuses is
//! tried at the same time, because each refusal has a grace.

use crate::{
    certificates::{Authority, Certificate},
    database::{Database, eventually},
    kafka_admin::{Operation, add_user, allow, allow_transactions},
    network::free_ports,
    relay::{Relay, command, init},
    stack::{Stack, folder},
    topics::{Topic, assert_complete_and_ordered},
};

const PASSWORD: &str = "the relay's password";
/// Topics of the relay's own.
const OWN_TOPICS: [&str; 3] = ["cdc-relay-checkpoints", "cdc-relay-dlq", "cdc-relay-parked-keys"];

/// librdkafka's settings.
type Properties<'a> = Vec<(&'a str, &'a str)>;

/// A broker with three secure listeners beside the plain one, by which tests make topics and look on.
struct Secure {
    stack: Stack,
    ours: Authority,
    another: Authority,
    /// TLS and SCRAM-SHA-512.
    scram: String,
    /// TLS, and the client needs a certificate.
    mutual: String,
    /// TLS with a certificate that has expired.
    expired: String,
}

impl Secure {
    fn start() -> Self {
        let dir = folder("secure");
        let (ours, another) = (Authority::new(&dir, "ours"), Authority::new(&dir, "another"));
        let (server, old) = (ours.certificate("localhost", 2099), ours.certificate("localhost", 2021));
        let [scram, mutual, expired] = free_ports().map(|port| format!("localhost:{port}"));
        let listeners = format!("SCRAM://{scram},MUTUAL://{mutual},EXPIRED://{expired}");
        let settings = [
            format!("listeners+={listeners}"),
            format!("advertised.listeners+={listeners}"),
            "listener.security.protocol.map+=SCRAM:SASL_SSL,MUTUAL:SSL,EXPIRED:SSL".into(),
            "ssl.keystore.type=PEM".into(),
            "ssl.truststore.type=PEM".into(),
            format!("ssl.keystore.location={}", server.both.display()),
            format!("ssl.truststore.location={}", ours.path.display()),
            "listener.name.mutual.ssl.client.auth=required".into(),
            format!("listener.name.expired.ssl.keystore.location={}", old.both.display()),
            "listener.name.scram.sasl.enabled.mechanisms=SCRAM-SHA-512".into(),
            "listener.name.scram.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;".into(),
            "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer".into(),
            // Whoever comes by the plain listener.
            "super.users=User:ANONYMOUS".into(),
        ];
        let options: Vec<&str> = settings.iter().flat_map(|s| ["--kafka-set", s.as_str()]).collect();
        let stack = Stack::start_in(dir, &options);
        add_user(&stack.servers.kafka, "relay", PASSWORD);
        let secure = Self { stack, ours, another, scram, mutual, expired };
        for principal in ["User:relay", "User:late", "User:CN=relay"] {
            for topic in OWN_TOPICS {
                secure.allow(
                    principal,
                    &[Operation::Read, Operation::Write, Operation::DescribeConfigs],
                    topic,
                );
            }
        }
        secure
    }

    fn allow(&self, principal: &str, operations: &[Operation], topic: &str) {
        for operation in operations {
            allow(&self.stack.servers.kafka, principal, *operation, topic);
        }
    }

    fn topic(&self, principals: &[&str], operations: &[Operation]) -> Topic {
        let topic = Topic::on(&self.stack.servers, 2, &[]);
        for principal in principals {
            self.allow(principal, operations, &topic.name);
        }
        topic
    }

    fn database(&self) -> Database {
        let database = Database::on(&self.stack.servers);
        init(&database);
        database
    }

    fn tls(&self) -> Properties<'_> {
        vec![("security.protocol", "SSL"), ("ssl.ca.location", self.ours.path.to_str().unwrap())]
    }

    fn sasl<'a>(&'a self, user: &'a str, password: &'a str) -> Properties<'a> {
        let scram = [
            ("security.protocol", "SASL_SSL"),
            ("sasl.mechanism", "SCRAM-SHA-512"),
            ("sasl.username", user),
            ("sasl.password", password),
        ];
        [self.tls(), scram.to_vec()].concat()
    }
}

fn with<'a>(mut properties: Properties<'a>, more: &[(&'a str, &'a str)]) -> Properties<'a> {
    properties.extend(more);
    properties
}

fn client_certificate(files: &Certificate) -> [(&str, &str); 2] {
    [
        ("ssl.certificate.location", files.cert.to_str().unwrap()),
        ("ssl.key.location", files.key.to_str().unwrap()),
    ]
}

/// The environment of a relay that goes to `brokers` with these settings; the last of a name counts.
fn environment(brokers: &str, properties: &Properties<'_>) -> Vec<(String, String)> {
    // The listeners are on 127.0.0.1 alone.
    let properties = properties.iter().chain(&[("broker.address.family", "v4")]);
    let variable = |(name, value): &(&str, &str)| {
        let name = name.to_uppercase().replace('.', "_");
        (format!("CDC_RELAY_KAFKA__PROPERTIES__{name}"), (*value).to_owned())
    };
    properties.map(variable).chain([("CDC_RELAY_KAFKA__BROKERS".into(), brokers.into())]).collect()
}

fn relay(database: &Database, brokers: &str, properties: &Properties<'_>) -> Relay {
    let environment = environment(brokers, properties);
    let environment: Vec<_> =
        environment.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    Relay::spawn(database, &environment)
}

/// What `cdc-relay init` says: its exit code, its output and its errors.
fn init_by(database: &Database, brokers: &str, properties: &Properties<'_>) -> (Option<i32>, String) {
    let environment = environment(brokers, properties);
    let output = command(database).arg("init").envs(environment).output().unwrap();
    (output.status.code(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

/// A relay that has a row to publish ends by itself, and says why.
fn assert_ends(secure: &Secure, brokers: &str, properties: &Properties<'_>, code: i32, said: &[&str]) {
    let topic = secure.topic(&["User:relay"], &[Operation::Write]);
    let mut database = secure.database();
    database.insert(&topic.kind, 0, 1);
    let mut relay = relay(&database, brokers, properties);
    let status = relay.wait();
    let log = relay.log();
    assert_eq!(status.code(), Some(code), "{said:?}: {log}");
    for said in said {
        assert!(log.contains(said), "{said:?} is not in: {log}");
    }
    assert!(!log.contains(PASSWORD), "the password is told: {log}");
    assert_eq!(topic.size(), 0);
}

#[test]
fn kafkas_certificates_passwords_and_permissions_are_held_and_a_refusal_says_what_to_do() {
    let secure = &Secure::start();
    let sasl = secure.sasl("relay", PASSWORD);
    let (scram, mutual, plain) = (&*secure.scram, &*secure.mutual, &*secure.stack.servers.kafka);
    let another = secure.another.path.to_str().unwrap();
    let [theirs, old] = [secure.another.certificate("relay", 2099), secure.ours.certificate("relay", 2021)];
    let by_address = scram.replace("localhost", "127.0.0.1");
    let plaintext = vec![("security.protocol", "PLAINTEXT")];
    let refused: [(&str, Properties<'_>, i32, &[&str]); 14] = [
        (
            scram,
            with(sasl.clone(), &[("ssl.ca.location", another)]),
            69,
            &["UnknownIssuer", "ssl.ca.location"],
        ),
        (&by_address, sasl.clone(), 69, &["not valid for name \"127.0.0.1\"", "ssl.ca.location"]),
        (&secure.expired, secure.tls(), 69, &["certificate expired", "ssl.ca.location"]),
        (mutual, secure.tls(), 69, &["ssl.certificate.location", "alert bad certificate"]),
        (mutual, with(secure.tls(), &client_certificate(&theirs)), 69, &["ssl.certificate.location"]),
        (mutual, with(secure.tls(), &client_certificate(&old)), 69, &["ssl.certificate.location", "alert"]),
        (scram, secure.sasl("relay", "another password"), 69, &["invalid credentials", "sasl.password"]),
        (scram, secure.sasl("nobody", PASSWORD), 69, &["invalid credentials", "sasl.username"]),
        (scram, with(sasl.clone(), &[("sasl.mechanism", "PLAIN")]), 69, &["SCRAM-SHA-512", "sasl.mechanism"]),
        (scram, plaintext, 69, &["security.protocol\" is PLAINTEXT", "listener.security.protocol.map"]),
        (scram, secure.tls(), 69, &["security.protocol\" is SSL", "listener.security.protocol.map"]),
        (plain, secure.tls(), 69, &["security.protocol\" is SSL", "listener.security.protocol.map"]),
        (
            scram,
            with(sasl.clone(), &[("ssl.ca.location", "/nowhere")]),
            64,
            &["\"ssl.ca.location\": cannot read /nowhere"],
        ),
        (mutual, with(secure.tls(), &[("ssl.key.location", another)]), 64, &["ssl.key.location"]),
    ];
    std::thread::scope(|scope| {
        for (brokers, properties, code, said) in &refused {
            scope.spawn(|| assert_ends(secure, brokers, properties, *code, said));
        }
        scope.spawn(|| publishes(secure, scram, &sasl));
        scope.spawn(|| permissions(secure));
        scope.spawn(|| permissions_of_transactions(secure));
        scope.spawn(|| without_permissions(secure));
        scope.spawn(|| a_refusal_that_heals_is_forgotten(secure));
        scope.spawn(|| what_is_refused_is_found(secure));
        scope.spawn(|| a_certificate_that_is_over_is_told(secure));
        let certificate = secure.ours.certificate("relay", 2099);
        publishes(secure, mutual, &with(secure.tls(), &client_certificate(&certificate)));
    });
}

fn publishes(secure: &Secure, brokers: &str, properties: &Properties<'_>) {
    let topic = secure.topic(&["User:relay", "User:CN=relay"], &[Operation::Write]);
    let mut database = secure.database();
    // The topics are there, so that nothing has to be made, which these may not.
    let (code, said) = init_by(&database, brokers, properties);
    assert_eq!(code, Some(0), "{said}");
    let relay = relay(&database, brokers, properties);
    database.insert(&topic.kind, 0, 1000);
    assert_eq!(assert_complete_and_ordered(&topic.read(1000), 1000), 0);
    relay.stop();
}

/// WRITE on the topics is all that publishing needs; what is missing is told with the topic.
fn permissions(secure: &Secure) {
    let sasl = secure.sasl("relay", PASSWORD);
    for operations in [&[][..], &[Operation::Describe]] {
        let topic = secure.topic(&["User:relay"], operations);
        let mut database = secure.database();
        database.insert(&topic.kind, 0, 1);
        let mut relay = relay(&database, &secure.scram, &sasl);
        assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
        assert!(relay.log().contains("kafka-acls.sh --add --producer --topic"), "{}", relay.log());
        assert!(relay.log().contains(&topic.name), "{}", relay.log());
        // Granted, it is published.
        secure.allow("User:relay", &[Operation::Write], &topic.name);
        let relay = self::relay(&database, &secure.scram, &sasl);
        assert_complete_and_ordered(&topic.read(1), 1);
        relay.stop();
    }
}

/// The same in transactions, where Kafka tells of it before any record is sent; and the transactional id has to be allowed.
fn permissions_of_transactions(secure: &Secure) {
    let sasl = secure.sasl("relay", PASSWORD);
    let topic = secure.topic(&["User:relay"], &[Operation::Describe]);
    let mut database = secure.database();
    database.insert(&topic.kind, 0, 1);
    let mut environment = environment(&secure.scram, &sasl);
    environment.push(("CDC_RELAY_KAFKA__DELIVERY".to_owned(), "exactly-once".to_owned()));
    let environment: Vec<_> =
        environment.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let mut relay = Relay::spawn(&database, &environment);
    assert_eq!(relay.wait().code(), Some(69), "{}", relay.log());
    assert!(
        relay.log().contains("kafka-acls.sh --add --producer --transactional-id cdc-relay-"),
        "{}",
        relay.log()
    );
    for operation in [Operation::Write, Operation::Describe] {
        allow_transactions(&secure.stack.servers.kafka, "User:relay", operation, "cdc-relay-");
    }
    let mut relay = Relay::spawn(&database, &environment);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(relay.log().contains("kafka-acls.sh --add --producer --topic"), "{}", relay.log());
    assert!(relay.log().contains(&topic.name), "{}", relay.log());
    secure.allow("User:relay", &[Operation::Write], &topic.name);
    let relay = Relay::spawn(&database, &environment);
    assert_complete_and_ordered(&topic.read(1), 1);
    relay.stop();
}

/// A user who may do nothing, then only read.
fn without_permissions(secure: &Secure) {
    add_user(&secure.stack.servers.kafka, "guest", PASSWORD);
    let database = secure.database();
    let (code, said) = init_by(&database, &secure.scram, &secure.sasl("guest", PASSWORD));
    assert_eq!(code, Some(69), "{said}");
    assert!(said.contains("kafka-topics.sh --create --topic cdc-relay-checkpoints"), "{said}");
    let (code, said) = init_by(&database, &secure.scram, &secure.sasl("guest", "another password"));
    assert_eq!(code, Some(69), "{said}");
    assert!(said.contains("sasl.password"), "{said}");
    // No topic that it may write to: the producer gets no id.
    secure.allow("User:guest", &[Operation::Read], OWN_TOPICS[0]);
    let mut relay = relay(&database, &secure.scram, &secure.sasl("guest", PASSWORD));
    assert_eq!(relay.wait().code(), Some(69), "{}", relay.log());
    assert!(relay.log().contains("kafka-acls.sh --add --producer"), "{}", relay.log());
}

/// By `cdc-relay check`, whether or not anybody minds; also where the broker wants one of ours first.
fn a_certificate_that_is_over_is_told(secure: &Secure) {
    let database = secure.database();
    let check = |brokers: &str, properties: &Properties<'_>| {
        let environment = environment(brokers, properties);
        let output = command(&database).args(["check", "--json"]).envs(environment).output().unwrap();
        let report = String::from_utf8(output.stdout).unwrap();
        assert!(!report.contains("was not seen"), "{report}");
        report
    };
    let over = "the broker's certificate is over since 2021-12-31";
    let unchecked = with(secure.tls(), &[("enable.ssl.certificate.verification", "false")]);
    let report = check(&secure.expired, &unchecked);
    assert!(report.contains(over), "{report}");
    // Where it is checked, nobody gets in, and it is told why.
    let report = check(&secure.expired, &secure.tls());
    assert!(report.contains(over) && report.contains("kafka-"), "{report}");
    let certificate = secure.ours.certificate("looks", 2099);
    let report = check(&secure.mutual, &with(secure.tls(), &client_certificate(&certificate)));
    assert!(!report.contains(over), "{report}");
}

/// By `cdc-relay check`, and no more once it is granted.
fn what_is_refused_is_found(secure: &Secure) {
    let mut database = secure.database();
    let name = database.name.clone();
    database.run(&format!("GRANT SELECT ON outbox TO {name}"));
    let topic = secure.topic(&[], &[]);
    database.insert(&topic.kind, 0, 1);
    let find = |password: &str, finding: &str| {
        let environment = environment(&secure.scram, &secure.sasl("relay", password));
        let output = command(&database).args(["check", "--json"]).envs(environment).output().unwrap();
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let findings = report["findings"].as_array().unwrap();
        findings.iter().find(|found| found["name"] == finding).map(|found| found["mend"][0].to_string())
    };
    let mend = find("another password", "kafka-refused").unwrap();
    assert!(mend.contains("sasl.password"), "{mend}");
    assert_eq!(find(PASSWORD, "kafka-refused"), None);
    let mend = find(PASSWORD, "topic-not-allowed").unwrap();
    assert!(mend.contains(&format!("kafka-acls.sh --add --producer --topic {}", topic.name)), "{mend}");
    secure.allow("User:relay", &[Operation::Write], &topic.name);
    assert_eq!(find(PASSWORD, "topic-not-allowed"), None);
}

fn a_refusal_that_heals_is_forgotten(secure: &Secure) {
    let topic = secure.topic(&["User:late"], &[Operation::Write]);
    let mut database = secure.database();
    database.insert(&topic.kind, 0, 10);
    let relay = relay(&database, &secure.scram, &secure.sasl("late", PASSWORD));
    eventually("it is refused", || relay.log().contains("Kafka refuses the connection").then_some(()));
    add_user(&secure.stack.servers.kafka, "late", PASSWORD);
    assert_complete_and_ordered(&topic.read(10), 10);
    relay.stop();
}

//! `cdc-relay dlq`: dead letters are looked at, and published after all.

use std::{
    ffi::{OsStr, OsString},
    process::{Command, Output},
};

use rdkafka::{Message as _, message::OwnedMessage};
use serde_json::Value;

use crate::{
    database::{Database, eventually},
    poison::{Morgue, header},
    relay::{Relay, command, init},
    topics::{Topic, assert_complete_and_ordered, headers},
};

/// What `cdc-relay dlq` needs.
struct Clerk {
    program: OsString,
    environment: Vec<(OsString, Option<OsString>)>,
    /// Where the relay is.
    url: String,
}

impl Clerk {
    fn new(database: &Database, morgue: &Morgue, relay: &Relay) -> Self {
        let mut command = command(database);
        command.envs(morgue.environment());
        let environment = command.get_envs().map(|(k, v)| (k.to_owned(), v.map(OsStr::to_owned))).collect();
        Self { program: command.get_program().to_owned(), environment, url: relay.url().unwrap() }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        let environment = self.environment.iter().filter_map(|(k, v)| Some((k, v.as_ref()?)));
        command.envs(environment).arg("dlq").args(arguments);
        if ["redrive", "discard"].contains(&arguments[0]) {
            command.args(["--relay", &self.url]);
        }
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// What a command prints that ends with `code`.
    fn says(&self, arguments: &[&str], code: i32) -> String {
        let output = self.run(arguments);
        let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{arguments:?}\n{out}\n{error}");
        format!("{out}{error}")
    }

    /// The letters that `list` lists.
    fn list(&self, arguments: &[&str]) -> Vec<Value> {
        let out = self.says(&[&["list", "--json"], arguments].concat(), 0);
        out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// What a redrive reports, which ends with `code`.
    fn redrive(&self, arguments: &[&str], code: i32) -> Value {
        let output = self.run(&[&["redrive", "--json"], arguments].concat());
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {error}"))
    }
}

/// The outcome of each letter of a report.
fn outcomes(report: &Value) -> Vec<&str> {
    report["letters"].as_array().unwrap().iter().map(|line| line["outcome"].as_str().unwrap()).collect()
}

/// The rows' numbers, in order.
fn numbers(messages: &[OwnedMessage]) -> Vec<i64> {
    let number =
        |m: &OwnedMessage| serde_json::from_slice::<Value>(m.payload().unwrap()).unwrap()["n"].as_i64();
    messages.iter().map(|m| number(m).unwrap()).collect()
}

/// A row whose number is `n`, and as many bytes beside as wanted.
fn insert(database: &mut Database, kind: &str, aggregate: &str, n: i64, bytes: usize) {
    database.run(&format!(
        "INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', '{aggregate}', 'Counted', \
         json_build_object('n', {n}, 'pad', repeat('x', {bytes})))"
    ));
}

/// The record is what the letter was to be.
fn assert_redriven(record: &OwnedMessage, letter: &OwnedMessage) {
    assert_eq!((record.key(), record.payload()), (letter.key(), letter.payload()));
    let timestamp = record.timestamp().to_millis().map(|ms| ms.to_string());
    assert!(headers(letter).contains(&("dlq.timestamp".into(), timestamp)));
    let mut wanted = headers(letter);
    wanted.retain(|(name, _)| !name.starts_with("dlq."));
    wanted.push(("redriven".into(), Some("1".into())));
    assert_eq!(headers(record), wanted);
}

#[test]
fn letters_are_listed_shown_and_redriven_once_their_topic_is_there() {
    let (mut database, topic) = (Database::new(), Topic::missing(1));
    let morgue = Morgue::new(&[("unroutable", "dead-letter")]);
    init(&database);
    let relay = Relay::start(&database, &morgue.environment());
    for n in 0..3 {
        insert(&mut database, &topic.kind, &format!("a{n}"), n, 0);
    }
    let letters = morgue.letters.read(3);
    let clerk = Clerk::new(&database, &morgue, &relay);

    let listed = clerk.list(&[]);
    assert_eq!(
        listed.iter().map(|l| l["letter"].as_str().unwrap()).collect::<Vec<_>>(),
        ["0/0", "0/1", "0/2"]
    );
    assert_eq!(listed[1]["topic"], topic.name.as_str());
    assert_eq!(listed[1]["reason"], "unroutable");
    assert_eq!(listed[1]["table"], "public.outbox");
    let aggregate = format!("{}/a2", topic.kind);
    for (filter, count) in [
        (["--aggregate", aggregate.as_str()], 1),
        (["--key", "a1"], 1),
        (["--reason", "too_large"], 0),
        (["--type", "Counted"], 3),
        (["--since", "2020-01-01T00:00:00Z"], 3),
        (["--since", "2999-01-01T00:00:00Z"], 0),
        (["--source", "1/another"], 0),
        (["--state", "redriven"], 0),
        (["--limit", "2"], 2),
    ] {
        assert_eq!(clerk.list(&filter).len(), count, "{filter:?}");
    }
    let table = clerk.says(&["list"], 0);
    assert!(
        table.contains("REASON") && table.contains(&aggregate) && table.contains("does not exist"),
        "{table}"
    );
    let shown = clerk.says(&["show", "0/1"], 0);
    for part in ["aggregatetype: ", &topic.name, "\"n\": 1", "public.outbox", "open"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }

    // Nothing has been mended.
    let report = clerk.redrive(&["--all"], 65);
    assert_eq!(outcomes(&report), ["refused"; 3], "{report}");
    assert_eq!(clerk.list(&[]).len(), 3);

    topic.create(&[]);
    let dry = clerk.redrive(&["--all", "--dry-run"], 0);
    assert_eq!(outcomes(&dry), ["redriven"; 3]);
    assert_eq!((morgue.letters.size(), topic.size()), (3, 0), "a dry run changes nothing");
    let report = clerk.redrive(&["--all"], 0);
    assert_eq!(outcomes(&report), ["redriven"; 3]);
    let published = topic.read(3);
    assert_eq!(numbers(&published), [0, 1, 2]);
    for (record, letter) in published.iter().zip(&letters) {
        assert_redriven(record, letter);
    }
    assert_eq!(clerk.list(&[]).len(), 0);
    assert_eq!(clerk.list(&["--state", "redriven"]).len(), 3);

    let report = clerk.redrive(&["0/1", "0/99"], 65);
    assert_eq!(outcomes(&report), ["already-done", "not-found"]);
    assert_eq!(topic.size(), 3);
    clerk.redrive(&["0/1", "--again"], 0);
    assert_eq!(header(&topic.read(4)[3], "redriven").as_deref(), Some("2"));
    assert_eq!(relay.metric("cdc_relay_redriven_rows_total"), Some(4.0));
    insert(&mut database, &topic.kind, "a0", 9, 0);
    assert_eq!(numbers(&topic.read(5))[4], 9, "the relay goes on");
    relay.stop();
}

#[test]
fn a_parked_aggregate_keeps_its_order_through_a_redrive() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[("max.message.bytes", "2000")]));
    let morgue = Morgue::new(&[("too_large", "park-key")]);
    init(&database);
    let relay = Relay::start(&database, &morgue.environment());
    let kind = topic.kind.clone();
    // Row 1 is too large; 2 and 3 are behind it, 4 is another aggregate's.
    for (n, aggregate, bytes) in [(0, "a", 0), (1, "a", 3000), (2, "a", 0), (3, "a", 0), (4, "b", 0)] {
        insert(&mut database, &kind, aggregate, n, bytes);
    }
    assert_eq!(numbers(&topic.read(2)), [0, 4]);
    morgue.letters.read(3);
    let clerk = Clerk::new(&database, &morgue, &relay);

    let report = clerk.redrive(&["0/1", "0/2"], 65);
    assert_eq!(outcomes(&report), ["behind", "behind"], "the first is not among them");
    let report = clerk.redrive(&["--all"], 65);
    assert_eq!(outcomes(&report), ["refused", "behind", "behind"], "its topic still refuses the first");
    assert_eq!(topic.size(), 2);

    topic.configure("max.message.bytes", "1000000");
    let report = clerk.redrive(&["0/0"], 0);
    assert_eq!(report["stillParked"][0]["openLetters"], 2);
    insert(&mut database, &kind, "a", 5, 0);
    eventually("row 5 is behind the others", || (clerk.list(&[]).len() == 3).then_some(()));
    let aggregate = format!("{kind}/a");
    let report = clerk.redrive(&["--aggregate", &aggregate], 0);
    assert_eq!(outcomes(&report), ["redriven"; 3]);
    assert_eq!(report["freed"][0]["aggregateId"], "a");
    insert(&mut database, &kind, "a", 6, 0);
    assert_eq!(numbers(&topic.read(7)), [0, 4, 1, 2, 3, 5, 6]);
    assert_eq!(relay.metric("cdc_relay_parked_aggregates"), Some(0.0));
    // What is free stays free.
    relay.stop();
    let relay = Relay::start(&database, &morgue.environment());
    insert(&mut database, &kind, "a", 7, 0);
    assert_eq!(numbers(&topic.read(8))[7], 7);
    relay.stop();
}

#[test]
fn a_relay_that_is_killed_in_a_redrive_loses_nothing_and_keeps_order() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[("max.message.bytes", "2000")]));
    let morgue = Morgue::new(&[("too_large", "park-key")]);
    init(&database);
    let relay = Relay::start(&database, &morgue.environment());
    let kind = topic.kind.clone();
    let (count, each) = (20_000, "json_build_object('n', n)");
    insert(&mut database, &kind, "a", 0, 3000);
    let many = |from: usize, to: usize| {
        format!(
            "INSERT INTO outbox SELECT gen_random_uuid(), '{kind}', 'a', 'Counted', {each} FROM generate_series({from}, {to}) n"
        )
    };
    database.run(&many(1, count - 1));
    let all_there = || (morgue.letters.size() == i64::try_from(count).unwrap()).then_some(());
    eventually("all of them are parked", all_there);
    topic.configure("max.message.bytes", "1000000");

    let clerk = Clerk::new(&database, &morgue, &relay);
    let mut redrive = clerk.command(&["redrive", "--all", "--json"]).spawn().unwrap();
    eventually("the redrive is under way", || (topic.size() > 0).then_some(()));
    relay.kill();
    assert!(!redrive.wait().unwrap().success(), "the relay was killed in the middle");
    database.run(&many(count, count + 9));

    let relay = Relay::start(&database, &morgue.environment());
    let clerk = Clerk::new(&database, &morgue, &relay);
    eventually("what came meanwhile is behind", || {
        let open = clerk.list(&["--limit", "1"]);
        let payload = clerk.says(&["show", open.first()?["letter"].as_str()?], 0);
        payload.contains(&format!("\"n\": {}", count + 9)).then_some(())
    });
    clerk.says(&["redrive", "--all"], 0);
    database.run(&many(count + 10, count + 19));
    let records = topic.read(count + 20);
    let repeated = assert_complete_and_ordered(&records, count + 20);
    println!("{count} letters, {repeated} of them published twice after a kill");
    assert!(repeated <= 1000, "{repeated}: what was marked is not repeated");
    relay.stop();
}

#[test]
fn a_value_that_is_cut_is_told_as_such_and_its_letter_can_be_discarded() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    let morgue = Morgue::new(&[("too_large", "park-key")]);
    init(&database);
    let relay = Relay::start(&database, &morgue.environment());
    insert(&mut database, &topic.kind, "a", 1, 2_000_000);
    insert(&mut database, &topic.kind, "a", 2, 0);
    morgue.letters.read(2);
    let clerk = Clerk::new(&database, &morgue, &relay);
    let shown: Value = serde_json::from_str(&clerk.says(&["show", "0/0", "--json"], 0)).unwrap();
    let length =
        database.number("SELECT octet_length(payload::text)::int8 FROM outbox ORDER BY 1 DESC LIMIT 1");
    let digest = "SELECT encode(sha256(convert_to(payload::text, 'UTF8')), 'hex') FROM outbox \
                  ORDER BY octet_length(payload::text) DESC LIMIT 1";
    assert_eq!(shown["length"].as_i64(), Some(length));
    assert_eq!(shown["sha256"], database.text(digest).as_str());
    assert!(shown["valueBytes"].as_i64().unwrap() < 1_048_588);
    assert!(clerk.says(&["show", "0/0"], 0).contains("it is cut"));

    let report = clerk.redrive(&["--all"], 65);
    assert_eq!(outcomes(&report), ["cut", "behind"]);
    let detail = report["letters"][0]["detail"].as_str().unwrap();
    assert!(detail.contains("from the outbox table by its id"), "{detail}");
    clerk.says(&["discard", "0/0"], 0);
    assert_eq!(clerk.list(&["--state", "discarded"]).len(), 1);
    assert_eq!(outcomes(&clerk.redrive(&["--all"], 0)), ["redriven"]);
    assert_eq!(numbers(&topic.read(1)), [2]);
    assert_eq!(relay.metric("cdc_relay_parked_aggregates"), Some(0.0));
    relay.stop();
}

#[test]
fn what_could_not_be_read_whole_is_published_only_as_it_is() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    let morgue = Morgue::new(&[("missing_column", "dead-letter")]);
    init(&database);
    let relay = Relay::start(&database, &morgue.environment());
    database.run("ALTER TABLE outbox ALTER type DROP NOT NULL");
    let kind = &topic.kind;
    database
        .run(&format!("INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'a', NULL, '{{\"n\": 1}}')"));
    morgue.letters.read(1);
    let clerk = Clerk::new(&database, &morgue, &relay);
    assert_eq!(outcomes(&clerk.redrive(&["0/0"], 65)), ["not-whole"]);
    let elsewhere = Topic::new(1, &[]);
    let report = clerk.redrive(&["0/0", "--as-is", "--to-topic", &elsewhere.name], 0);
    assert_eq!(outcomes(&report), ["redriven"]);
    assert_eq!(numbers(&elsewhere.read(1)), [1]);
    assert_eq!(topic.size(), 0);
    relay.stop();
}

#[test]
fn one_redrive_at_a_time_and_only_by_the_relay_that_streams() {
    let (mut database, topic) = (Database::new(), Topic::missing(1));
    let morgue = Morgue::new(&[("unroutable", "dead-letter")]);
    init(&database);
    let relay = Relay::start(&database, &morgue.environment());
    insert(&mut database, &topic.kind, "a", 1, 0);
    morgue.letters.read(1);
    let clerk = Clerk::new(&database, &morgue, &relay);
    // It takes some seconds until it is believed that a topic is missing.
    let mut first = clerk.command(&["redrive", "--all"]).spawn().unwrap();
    eventually("the first is under way", || relay.log().contains("redrive: reading").then_some(()));
    let refused = clerk.says(&["redrive", "--all"], 75);
    assert!(refused.contains("A redrive is under way"), "{refused}");
    assert_eq!(first.wait().unwrap().code(), Some(65));

    let mut standby = Relay::spawn(&database, &morgue.environment());
    standby.wait_for_state("standby");
    let refused = Clerk::new(&database, &morgue, &standby).says(&["redrive", "--all"], 75);
    assert!(refused.contains("ask the one that streams"), "{refused}");
    standby.stop();
    relay.stop();
}

/// The status and the body of an answer to a redrive.
fn post(url: &str, token: Option<&str>, kind: &str, body: &str) -> (u16, String) {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut request = agent.post(format!("{url}/dlq/redrive")).header("content-type", kind);
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let mut response = request.send(body).unwrap();
    let text = response.body_mut().read_to_string().unwrap();
    if !response.status().is_success() {
        assert_eq!(response.headers()["content-type"], "application/problem+json", "{text}");
    }
    (response.status().as_u16(), text)
}

/// On all interfaces.
const OPEN: (&str, &str) = ("CDC_RELAY_HTTP__LISTEN", "0.0.0.0:0");

#[test]
fn whoever_has_no_token_cannot_redrive_over_the_network() {
    let database = Database::new();
    let morgue = Morgue::new(&[("unroutable", "dead-letter")]);
    init(&database);
    let json = "application/json";
    let environment = morgue.environment();
    let relay = Relay::start(&database, &[&environment[..], &[OPEN]].concat());
    let url = relay.url().unwrap();
    let (status, why) = post(&url, None, json, r#"{"letters": []}"#);
    assert_eq!(status, 403);
    assert!(why.contains("http.admin_token is not set"), "{why}");
    relay.stop();

    let further = [OPEN, ("CDC_RELAY_HTTP__ADMIN_TOKEN", "s3cret")];
    let relay = Relay::start(&database, &[&environment[..], &further[..]].concat());
    let url = relay.url().unwrap();
    assert_eq!(post(&url, None, json, r#"{"letters": []}"#).0, 401);
    assert_eq!(post(&url, Some("wrong"), json, r#"{"letters": []}"#).0, 401);
    let (status, report) = post(&url, Some("s3cret"), json, r#"{"letters": []}"#);
    assert_eq!(status, 200, "{report}");
    for (kind, body, status) in [
        ("text/plain", r#"{"letters": []}"#, 415),
        (json, "{", 400),
        (json, r#"{"letters": [], "surprise": 1}"#, 400),
        (json, r#"{"letters": ["0/x"]}"#, 422),
        (json, r#"{"letters": [], "topic": "not a topic"}"#, 422),
        (json, r#"{"letters": [], "source": "1/another"}"#, 409),
    ] {
        assert_eq!(post(&url, Some("s3cret"), kind, body).0, status, "{body}");
    }
    let many: Vec<_> = (0..10_001).map(|n| format!("0/{n}")).collect();
    assert_eq!(post(&url, Some("s3cret"), json, &serde_json::json!({ "letters": many }).to_string()).0, 422);
    assert_eq!(post(&url, Some("s3cret"), json, &" ".repeat((1 << 20) + 1)).0, 413);
    // The command takes the token from its configuration, and the log has it nowhere.
    let clerk = Clerk::new(&database, &morgue, &relay);
    let refused = clerk.says(&["redrive", "--all"], 69);
    assert!(refused.contains("CDC_RELAY_HTTP__ADMIN_TOKEN"), "{refused}");
    let mut allowed = clerk.command(&["redrive", "--all"]);
    let output = allowed.env("CDC_RELAY_HTTP__ADMIN_TOKEN", "s3cret").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!relay.log().contains("s3cret"));
    relay.stop();
}

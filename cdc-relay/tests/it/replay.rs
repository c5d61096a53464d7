//! `cdc-relay replay`: what is asked for is published once more, and nothing else.

use std::{
    collections::HashMap,
    process::{Command, Output, Stdio},
};

use rdkafka::{Message as _, message::OwnedMessage};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    audit::{audit, counts},
    database::{Database, eventually},
    exactly_once::EXACTLY_ONCE,
    load::Load,
    poison::{Morgue, header},
    relay::{Relay, command, init},
    topics::{Topic, assert_complete_and_ordered, headers},
};

/// A database whose outbox tells each row's time, and may be read by the relay.
fn with_times() -> Database {
    let mut database = Database::new();
    let name = database.name.clone();
    database.run("ALTER TABLE outbox ADD created_at timestamptz NOT NULL DEFAULT clock_timestamp()");
    database.run(&format!("GRANT SELECT ON outbox TO {name}"));
    database
}

fn replay_by(database: &Database, relay: &Relay, arguments: &[&str]) -> Command {
    let mut command = command(database);
    command.arg("replay").args(["--relay", &relay.url().unwrap()]).args(arguments);
    command
}

/// What it reports with `--json`, and that it ends with this code.
fn report(output: &Output, code: i32) -> Value {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {said}"))
}

fn replay(database: &Database, relay: &Relay, arguments: &[&str], code: i32) -> Value {
    let output = replay_by(database, relay, &[&["--json", "--yes"], arguments].concat()).output().unwrap();
    report(&output, code)
}

/// What it says that ends with this code, without carrying anything out unless told to.
fn says(database: &Database, relay: &Relay, arguments: &[&str], code: i32) -> String {
    let output = replay_by(database, relay, arguments).output().unwrap();
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{arguments:?}\n{out}\n{error}");
    format!("{out}{error}")
}

fn is_replayed(message: &OwnedMessage) -> bool {
    header(message, "replayed").is_some()
}

fn replayed(messages: &[OwnedMessage]) -> Vec<&OwnedMessage> {
    messages.iter().filter(|m| is_replayed(m)).collect()
}

fn ids(messages: &[&OwnedMessage]) -> Vec<String> {
    messages.iter().map(|m| header(m, "id").unwrap()).collect()
}

#[test]
fn rows_are_published_once_more_in_the_order_in_which_they_are_named() {
    let (mut database, topic) = (with_times(), Topic::new(1, &[]));
    init(&database);
    let relay = Relay::start(&database, &[]);
    database.insert(&topic.kind, 0, 6);
    let first = topic.read(6);
    let all = ids(&first.iter().collect::<Vec<_>>());
    let none = "00000000-0000-0000-0000-000000000000";
    // However an id is written.
    let third = all[3].replace('-', "").to_uppercase();
    let named = ["--id", &third, "--id", &all[0], "--id", none];

    let looked = says(&database, &relay, &named, 65);
    for part in [&all[3], &all[0], none, "2 records would be published once more", "--yes does it"] {
        assert!(looked.contains(part), "{part}: {looked}");
    }
    assert_eq!(topic.size(), 6, "a look publishes nothing");
    let told = replay(&database, &relay, &named, 65);
    assert_eq!(counts(&told, ["found", "published", "refused", "missing"]), [2, 2, 0, 1], "{told}");
    assert_eq!(told["missingIds"], serde_json::json!([none]));

    let messages = topic.read(8);
    let again = replayed(&messages);
    assert_eq!(ids(&again), [all[3].clone(), all[0].clone()]);
    for (record, original) in again.into_iter().zip([&first[3], &first[0]]) {
        assert_eq!((record.key(), record.payload()), (original.key(), original.payload()));
        let mut wanted = headers(original);
        wanted.retain(|(name, _)| name != "lsn" && name != "seq");
        let mut found = headers(record);
        let (name, at) = found.pop().unwrap();
        assert_eq!((name.as_str(), found), ("replayed", wanted));
        assert!(chrono::DateTime::parse_from_rfc3339(&at.unwrap()).is_ok());
    }
    assert_eq!(relay.metric("cdc_relay_replayed_records_total"), Some(2.0));
    let (code, audited) = audit(&database, &[], &[]);
    let names = ["published", "missing", "duplicates", "out_of_order", "replayed"];
    assert_eq!((code, counts(&audited, names)), (0, [6, 0, 0, 0, 2]), "{audited}");
    relay.stop();
}

/// Rows by their time while others are written: each comes after its first occurrence, the first occurrences are in order,
/// and whoever is killed in between loses nothing.
fn while_rows_are_written(environment: &[(&str, &str)]) {
    let (mut database, topic) = (with_times(), Topic::new(3, &[]));
    init(&database);
    let relay = Relay::start(&database, environment);
    let first = 30_000;
    database.run(&format!(
        "INSERT INTO outbox SELECT gen_random_uuid(), '{}', 'a' || n % 10, 'Counted', json_build_object('n', n) \
         FROM generate_series(0, {first} - 1) n",
        topic.kind
    ));
    let load = Load::start(&database, &topic.kind, first);
    // What is written at this moment is among them: it may not be confirmed yet.
    let told = replay(&database, &relay, &["--since", "2020-01-01T00:00:00Z"], 0);
    let [found, published] = counts(&told, ["found", "published"]);
    assert!(found == published && found >= 30_000, "{told}");

    let before = relay.metric("cdc_relay_replayed_records_total").unwrap();
    // Killed in the midst: whoever asked hears of it, and asks again.
    let mut cut = replay_by(&database, &relay, &["--yes", "--since", "2020-01-01T00:00:00Z"]);
    let cut = cut.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    eventually("the second one has begun", || {
        (relay.metric("cdc_relay_replayed_records_total")? > before).then_some(())
    });
    relay.kill();
    let cut = cut.wait_with_output().unwrap();
    assert_eq!(cut.status.code(), Some(75), "{}", String::from_utf8_lossy(&cut.stderr));
    let relay = Relay::start(&database, environment);
    let aggregate = format!("{}/a3", topic.kind);
    let told = replay(&database, &relay, &["--aggregate", &aggregate], 0);
    assert!(counts(&told, ["published"]) >= [3000], "{told}");
    let count = load.stop();

    let (code, audited) = audit(&database, &[], environment);
    let names = ["rows", "published", "missing", "out_of_order"];
    let rows = count as u64;
    assert_eq!(counts(&audited, names), [rows, rows, 0, 0], "{audited}");
    let duplicates = counts(&audited, ["duplicates"])[0];
    assert_eq!(code, if duplicates == 0 { 0 } else { 65 });
    assert!(duplicates == 0 || environment.is_empty(), "exactly once: {audited}");
    let records = usize::try_from(counts(&audited, ["records"])[0]).unwrap();
    let messages = topic.read(records);
    assert_complete_and_ordered(&messages, count);
    let mut firsts: HashMap<String, i64> = HashMap::new();
    for message in &messages {
        let id = header(message, "id").unwrap();
        let is_first = firsts.insert(id.clone(), message.offset()).is_none();
        assert!(!(is_first && is_replayed(message)), "{id} was replayed before it was published");
    }
    // The last one is of one aggregate, in the order of its rows.
    let at = messages.iter().filter_map(|m| header(m, "replayed")).max().unwrap();
    let last: Vec<_> = messages.iter().filter(|m| header(m, "replayed").as_ref() == Some(&at)).collect();
    assert!(last.iter().all(|m| m.key() == Some(b"a3")));
    let n = |m: &&OwnedMessage| serde_json::from_slice::<Value>(m.payload().unwrap()).unwrap()["n"].as_i64();
    assert!(last.is_sorted_by_key(n), "in the order of their time");
    relay.stop();
}

#[test]
fn what_is_replayed_while_rows_are_written_was_published_before_and_disturbs_no_order() {
    while_rows_are_written(&[]);
}

#[test]
fn what_is_replayed_while_rows_are_written_was_published_before_exactly_once_delivery() {
    while_rows_are_written(&[EXACTLY_ONCE]);
}

#[test]
fn records_are_published_once_more_by_their_lsn_each_once() {
    let (mut database, topic) = (Database::new(), Topic::new(2, &[]));
    init(&database);
    let relay = Relay::start(&database, &[]);
    database.insert(&topic.kind, 0, 40);
    let published = topic.read(40);
    let mut by_lsn: Vec<_> = published.iter().collect();
    let lsn = |m: &OwnedMessage| header(m, "lsn").unwrap().parse::<relay_core::Lsn>().unwrap();
    by_lsn.sort_by_key(|m| lsn(m));
    let range = [lsn(by_lsn[10]).to_string(), lsn(by_lsn[29]).to_string()];
    let which = ["--from-topic", &topic.name, "--from-lsn", &range[0], "--through-lsn", &range[1]];

    let looked = says(&database, &relay, &which, 0);
    assert!(looked.contains("20 records would be published once more"), "{looked}");
    for round in 1..=2 {
        // What was replayed is not replayed.
        let told = replay(&database, &relay, &which, 0);
        assert_eq!(counts(&told, ["found", "published"]), [20, 20], "round {round}: {told}");
    }
    let messages = topic.read(80);
    let again = replayed(&messages);
    assert_eq!(again.len(), 40);
    for record in &again {
        let of = |m: &&OwnedMessage| header(m, "id") == header(record, "id");
        let original = published.iter().find(|m| of(m)).unwrap();
        assert_eq!((record.key(), record.payload()), (original.key(), original.payload()));
        assert_eq!(record.partition(), original.partition());
        assert_eq!(record.timestamp().to_millis(), original.timestamp().to_millis());
        assert!((lsn(by_lsn[10])..=lsn(by_lsn[29])).contains(&lsn(record)));
        assert_eq!(&headers(record)[..headers(original).len()], headers(original));
    }
    for partition in 0..2 {
        let once: Vec<_> = again.iter().filter(|m| m.partition() == partition).collect();
        let (one, two) = once.split_at(once.len() / 2);
        assert!(one.is_sorted_by_key(|m| lsn(m)) && two.is_sorted_by_key(|m| lsn(m)), "in their order");
    }

    // A topic that takes no record of that time any more: Kafka refuses it once it is on its way, and that is the end
    // of the replay and not of the relay.
    topic.configure("message.timestamp.before.max.ms", "1000");
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let failed = says(&database, &relay, &[&["--yes"], &which[..]].concat(), 75);
    assert!(failed.contains("a record of a replay"), "{failed}");
    topic.configure("message.timestamp.before.max.ms", &i64::MAX.to_string());
    database.insert(&topic.kind, 40, 1);
    topic.read(81);
    relay.stop();
}

#[test]
fn what_cannot_be_published_is_told_and_keeps_nothing_else() {
    let (mut database, topic) = (with_times(), Topic::new(1, &[("max.message.bytes", "2000")]));
    let morgue = Morgue::new(&[("too_large", "park-key"), ("unroutable", "skip")]);
    init(&database);
    let relay = Relay::start(&database, &morgue.environment());
    let row = |aggregate: &str, kind: &str, bytes: usize| {
        format!(
            "INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', '{aggregate}', 'T', \
             json_build_object('pad', repeat('x', {bytes}))) RETURNING id::text"
        )
    };
    let before = database.text(&row("parked", &topic.kind, 1));
    let large = database.text(&row("parked", &topic.kind, 4000));
    let behind = database.text(&row("parked", &topic.kind, 1));
    let nowhere = database.text(&row("lost", "no such topic", 1));
    let good = database.text(&row("free", &topic.kind, 1));
    morgue.letters.read(2);
    topic.read(2);
    let named: Vec<&str> = [&before, &large, &behind, &nowhere, &good]
        .into_iter()
        .flat_map(|id| ["--id", id.as_str()])
        .collect();
    let told = replay(&database, &relay, &named, 65);
    assert_eq!(counts(&told, ["found", "published", "refused"]), [5, 1, 4], "{told}");
    let why = |id: &str| {
        let refusals = told["refusals"].as_array().unwrap().iter();
        refusals.filter(|r| r["id"] == id).map(|r| r["why"].as_str().unwrap().to_owned()).next().unwrap()
    };
    for id in [&before, &large, &behind] {
        assert!(why(id).contains("its aggregate is parked"), "{told}");
    }
    assert!(why(&nowhere).contains("not a legal name"), "{told}");
    let messages = topic.read(3);
    assert_eq!(ids(&replayed(&messages)), std::slice::from_ref(&good));
    // A redrive that is asked for while a replay asks about a topic, which takes seconds where that is missing.
    let missing = database.text(&row("free", "no-such-topic", 1));
    let mut asking = replay_by(&database, &relay, &["--yes", "--id", &missing]);
    let mut asking = asking.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut redrive = command(&database);
    redrive.envs(morgue.environment()).args(["dlq", "redrive", "--all", "--relay", &relay.url().unwrap()]);
    let redriven = redrive.output().unwrap();
    let said = String::from_utf8_lossy(&redriven.stdout).into_owned();
    assert!(said.contains("refused") && redriven.status.code() == Some(65), "{said}");
    assert_eq!(asking.wait().unwrap().code(), Some(65));
    let text = says(&database, &relay, &[&["--yes"], &named[..]].concat(), 65);
    assert!(text.contains("1 of 5 records published once more") && text.contains(&large), "{text}");
    relay.stop();
}

#[test]
fn whoever_hangs_up_ends_it_and_there_is_one_at_a_time() {
    let (mut database, topic) = (with_times(), Topic::new(1, &[]));
    init(&database);
    let relay = Relay::start(&database, &[]);
    database.run(&format!(
        "INSERT INTO outbox SELECT gen_random_uuid(), '{}', 'a', 'T', json_build_object('n', n, 'pad', repeat('x', 500)) \
         FROM generate_series(1, 150000) n",
        topic.kind
    ));
    eventually("all is published", || (topic.size() == 150_000).then_some(()));
    let count = || relay.metric("cdc_relay_replayed_records_total").unwrap();
    let all = ["--since", "2020-01-01T00:00:00Z", "--yes"];
    let mut asking = replay_by(&database, &relay, &all).stderr(Stdio::null()).spawn().unwrap();
    eventually("it is under way", || (count() > 0.0).then_some(()));
    let refused = says(&database, &relay, &all, 75);
    assert!(refused.contains("A replay is under way"), "{refused}");
    kill_process(Pid::from_child(&asking), Signal::INT).unwrap();
    asking.wait().unwrap();
    let standing = "it is over";
    eventually(standing, || relay.log().contains("nobody waits for it").then_some(()));
    assert!(count() < 150_000.0, "before its end");

    let mut standby = Relay::spawn(&database, &[]);
    standby.wait_for_state("standby");
    let refused = says(&database, &standby, &all, 75);
    assert!(refused.contains("ask the one that streams"), "{refused}");
    standby.stop();
    relay.stop();
}

#[test]
fn what_is_no_replay_is_refused_with_what_to_do() {
    let database = with_times();
    init(&database);
    let relay = Relay::start(&database, &[]);
    for (arguments, code, part) in [
        (&[][..], 64, "all rows are never meant"),
        (&["--id", "no uuid"], 64, "invalid input syntax for type uuid"),
        (&["--since", "yesterday"], 64, "--since"),
        (&["--aggregate", "order"], 64, "is not TYPE/ID"),
        (&["--since", "2026-01-01T00:00:00Z", "--time-column", "written_at"], 64, "--time-column"),
        (&["--since", "2026-01-01T00:00:00Z", "--order-by", "a b c"], 64, "is not a column"),
        (
            &["--from-topic", "no-such-topic", "--from-lsn", "0/1", "--through-lsn", "0/2"],
            64,
            "does not exist",
        ),
        (
            &["--from-topic", "cdc-relay-dlq", "--from-lsn", "0/1", "--through-lsn", "0/2"],
            64,
            "the relay's own",
        ),
        (&["--from-topic", "a", "--from-lsn", "0/1"], 64, "--through-lsn"),
        (&["--aggregate", "order/no-such"], 0, "0 records would be published"),
    ] {
        let said = says(&database, &relay, arguments, code);
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
    let bad = says(&database, &relay, &["--id", "no uuid", "--yes"], 64);
    assert!(bad.contains("invalid input syntax for type uuid"), "{bad}");
    let url = relay.url().unwrap();
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let post = |kind: &str, body: &str| {
        let mut answer = agent.post(format!("{url}/replay")).header("content-type", kind).send(body).unwrap();
        (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap())
    };
    let json = "application/json";
    for (kind, body, status) in [
        ("text/plain", "{}", 415),
        (json, "{", 400),
        (json, r#"{"rows": {"ids": ["a"], "where": "true"}}"#, 400),
        (json, "{}", 422),
        (json, r#"{"rows": {}, "records": {"topics": ["a"], "fromLsn": "0/1", "throughLsn": "0/2"}}"#, 422),
        (json, r#"{"records": {"topics": [], "fromLsn": "x", "throughLsn": "0/2"}}"#, 422),
    ] {
        let (found, text) = post(kind, body);
        assert_eq!(found, status, "{body}: {text}");
    }
    assert_eq!(post(json, &" ".repeat((1 << 20) + 1)).0, 413);
    let mut how_far = agent.get(format!("{url}/replay")).call().unwrap();
    assert_eq!(how_far.body_mut().read_to_string().unwrap(), r#"{"underWay":false,"published":0}"#);
    // What it may not read.
    let name = database.name.clone();
    let mut database = database;
    database.run(&format!("REVOKE SELECT ON outbox FROM {name}"));
    let refused = says(&database, &relay, &["--aggregate", "order/1"], 69);
    assert!(refused.contains("GRANT SELECT ON"), "{refused}");
    let refused = says(&database, &relay, &["--aggregate", "order/1", "--yes"], 69);
    assert!(refused.contains("GRANT SELECT ON"), "{refused}");
    relay.stop();
}

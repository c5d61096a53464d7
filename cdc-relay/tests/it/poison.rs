//! Rows that cannot be published, under each policy.

use rdkafka::{Message as _, message::OwnedMessage};

use crate::{
    database::{Database, eventually},
    relay::{Relay, init},
    topics::{Topic, assert_complete_and_ordered, headers},
};

/// A topic for dead letters, one for parked keys, and the configuration that names them.
pub(crate) struct Morgue {
    pub(crate) letters: Topic,
    parked: Topic,
    policies: Vec<(String, String)>,
}

impl Morgue {
    pub(crate) fn new(policies: &[(&str, &str)]) -> Self {
        let (letters, parked) = (Topic::new(1, &[]), Topic::new(1, &[("cleanup.policy", "compact")]));
        let variable = |name: &str| format!("CDC_RELAY_POISON__{}", name.to_uppercase());
        let mut policies: Vec<_> =
            policies.iter().map(|(kind, policy)| (variable(kind), (*policy).to_owned())).collect();
        policies.push((variable("dead_letter_topic"), letters.name.clone()));
        policies.push((variable("parked_keys_topic"), parked.name.clone()));
        Self { letters, parked, policies }
    }

    pub(crate) fn environment(&self) -> Vec<(&str, &str)> {
        self.policies.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |out, byte| format!("{out}{byte:02x}"))
}

pub(crate) fn header(message: &OwnedMessage, name: &str) -> Option<String> {
    headers(message).into_iter().find(|(n, _)| n == name).and_then(|(_, v)| v)
}

/// A row of every kind that can be found in the row itself or asked of its topic; the table lets it.
fn insert_poison(database: &mut Database, kind: &str) {
    database.run(
        "ALTER TABLE outbox ALTER type DROP NOT NULL, ADD partition text, ADD headers jsonb, ADD topic text",
    );
    let row = |values: &str| format!("INSERT INTO outbox VALUES (gen_random_uuid(), {values})");
    for values in [
        format!("'{kind}', 'undecodable', 'T', '{{}}', 'x'"),
        format!("'{kind}', 'missing_column', NULL, '{{}}'"),
        format!("'no-such-{kind}', 'unroutable', 'T', '{{}}'"),
        format!("'{kind}', 'unroutable', 'T', '{{}}', NULL, NULL, 'not a topic'"),
        format!("'{kind}', 'unroutable', 'T', '{{}}', '7'"),
        format!("'{kind}', 'too_large', 'T', to_jsonb(repeat('x', 2000000))"),
        format!("'{kind}', 'invalid_header', 'T', '{{}}', NULL, '[]'"),
    ] {
        database.run(&row(&values));
    }
}

const KINDS: [&str; 5] = ["undecodable", "missing_column", "unroutable", "too_large", "invalid_header"];

#[test]
fn dead_letters_say_what_they_were_and_why_and_everything_else_goes_on() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    let morgue = Morgue::new(&KINDS.map(|kind| (kind, "dead-letter")));
    init(&database);
    let relay = Relay::start(&database, &morgue.environment());
    database.insert(&topic.kind, 0, 50);
    insert_poison(&mut database, &topic.kind);
    database.insert(&topic.kind, 50, 50);
    assert_eq!(assert_complete_and_ordered(&topic.read(100), 100), 0);
    let letters = morgue.letters.read(7);
    assert_eq!(letters.len(), 7);
    for letter in &letters {
        // Each row's aggregate is named like the kind of its poison.
        let reason = header(letter, "dlq.reason").unwrap();
        assert_eq!(letter.key(), Some(reason.as_bytes()), "{:?}", headers(letter));
        assert_eq!(header(letter, "dlq.lsn"), header(letter, "lsn"));
        assert_eq!(header(letter, "dlq.seq").as_deref(), Some("0"));
        assert!(header(letter, "dlq.at").unwrap().ends_with('Z'));
        assert!(!header(letter, "dlq.error").unwrap().is_empty());
        assert_eq!(header(letter, "id").unwrap().len(), 36);
    }
    let large = letters.iter().find(|l| l.key() == Some(b"too_large")).unwrap();
    assert_eq!(header(large, "dlq.topic").as_deref(), Some(topic.name.as_str()));
    assert_eq!(header(large, "dlq.length").as_deref(), Some("2000002"));
    let whole = format!("\"{}\"", "x".repeat(2_000_000));
    let digest = ring::digest::digest(&ring::digest::SHA256, whole.as_bytes());
    assert_eq!(header(large, "dlq.sha256"), Some(hex(digest.as_ref())));
    let kept = large.payload().unwrap().len();
    assert!((1_000_000..1_048_588).contains(&kept), "as much as the topic takes: {kept}");
    assert_eq!(relay.sum("cdc_relay_diverted_rows_total"), Some(7));
    let lsn = database.current_lsn();
    eventually("all of it is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    relay.stop();
}

#[test]
fn rows_that_are_skipped_are_counted_and_told_once() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    let morgue = Morgue::new(&KINDS.map(|kind| (kind, "skip")));
    init(&database);
    let relay = Relay::start(&database, &morgue.environment());
    insert_poison(&mut database, &topic.kind);
    database.insert(&topic.kind, 0, 50);
    assert_eq!(assert_complete_and_ordered(&topic.read(50), 50), 0);
    assert_eq!(relay.sum("cdc_relay_diverted_rows_total"), Some(7));
    assert_eq!(relay.log().matches("left out").count(), 5, "once a kind: {}", relay.log());
    let lsn = database.current_lsn();
    eventually("all of it is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    assert_eq!(morgue.letters.size(), 0);
    relay.stop();
}

#[test]
fn an_aggregate_is_parked_with_all_that_follows_and_stays_so_after_a_kill() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    let morgue = Morgue::new(&[("too_large", "park-key")]);
    init(&database);
    let kind = topic.kind.clone();
    let relay = Relay::start(&database, &morgue.environment());
    // Ten aggregates, a0 to a9, in turn.
    database.insert(&kind, 0, 100);
    database.run(&format!(
        "INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'a3', 'T', to_jsonb(repeat('x', 2000000)))"
    ));
    database.insert(&kind, 100, 100);
    // Its own letter, and ten of the hundred rows after it.
    let letters = morgue.letters.read(11);
    relay.kill();
    let relay = Relay::start(&database, &morgue.environment());
    assert_eq!(relay.metric("cdc_relay_parked_aggregates"), Some(1.0));
    database.insert(&kind, 200, 100);
    let first = topic.read(280);
    eventually("the last of a3 is parked", || (morgue.letters.size() >= 21).then_some(()));
    let all = morgue.letters.read(21);
    let lsn = |m: &OwnedMessage| header(m, "lsn").unwrap();
    assert_eq!(header(&letters[0], "dlq.reason").as_deref(), Some("too_large"));
    let mut parked: Vec<i64> = Vec::new();
    for letter in &all {
        assert_eq!(letter.key(), Some(&b"a3"[..]));
        if header(letter, "dlq.reason").as_deref() == Some("parked") {
            let body: serde_json::Value = serde_json::from_slice(letter.payload().unwrap()).unwrap();
            let n = body["n"].as_i64().unwrap();
            if parked.last().is_none_or(|last| *last < n) {
                parked.push(n);
            }
        }
    }
    let expected: Vec<i64> = (0..20).map(|i| 103 + 10 * i).collect();
    assert_eq!(parked, expected, "in order, none missing; the first was at {}", lsn(&all[0]));
    for message in &first {
        let n: serde_json::Value = serde_json::from_slice(message.payload().unwrap()).unwrap();
        let is_a3 = message.key() == Some(&b"a3"[..]);
        assert!(!is_a3 || n["n"].as_i64().unwrap() < 100, "{n} of a parked aggregate is published");
    }
    assert!(morgue.parked.size() >= 1);
    relay.stop();
}

#[test]
fn what_a_broker_refuses_after_it_was_enqueued_goes_by_its_policy_too() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    let old = Topic::new(1, &[("message.timestamp.before.max.ms", "1")]);
    let morgue = Morgue::new(&[("refused", "dead-letter")]);
    init(&database);
    let relay = Relay::start(&database, &morgue.environment());
    database.insert(&topic.kind, 0, 50);
    database.insert(&old.kind, 0, 3);
    database.insert(&topic.kind, 50, 50);
    let lsn = database.current_lsn();
    eventually("all of it is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    // Not before: what the refusal makes the relay repeat would be counted for what is still to come.
    assert_complete_and_ordered(&topic.read(100), 100);
    for letter in morgue.letters.read(3) {
        assert_eq!(header(&letter, "dlq.reason").as_deref(), Some("refused"));
        assert_eq!(header(&letter, "dlq.topic").as_deref(), Some(old.name.as_str()));
        // What was wrong with the row's own timestamp is not wrong with the letter's.
        let (own, rows) =
            (letter.timestamp().to_millis().unwrap(), header(&letter, "dlq.timestamp").unwrap());
        assert!(own > rows.parse().unwrap(), "{own} {rows}");
    }
    assert_eq!(old.size(), 0);
    relay.stop();
}

#[test]
fn one_record_that_a_broker_refuses_takes_none_of_its_batch_with_it() {
    let (mut database, topic) =
        (Database::new(), Topic::new(1, &[("message.timestamp.before.max.ms", "3600000")]));
    let morgue = Morgue::new(&[("refused", "dead-letter")]);
    init(&database);
    database.run("ALTER TABLE outbox ADD at timestamptz");
    let kind = &topic.kind;
    // One transaction, and time enough for it to be one batch; the record in its midst is a day old.
    database.run(&format!(
        "INSERT INTO outbox SELECT gen_random_uuid(), '{kind}', 'a' || n % 10, 'Counted', json_build_object('n', n), \
         CASE n WHEN 150 THEN now() - interval '1 day' END FROM generate_series(0, 300) n"
    ));
    let batch = [("CDC_RELAY_OUTBOX__TIMESTAMP", "at"), ("CDC_RELAY_KAFKA__PROPERTIES__LINGER_MS", "200")];
    let relay = Relay::start(&database, &[morgue.environment(), batch.to_vec()].concat());
    let lsn = database.current_lsn();
    eventually("all of it is confirmed", || (database.unconfirmed_bytes(&lsn) <= 0).then_some(()));
    let number = |m: &OwnedMessage| {
        let body: serde_json::Value = serde_json::from_slice(m.payload().unwrap()).unwrap();
        body["n"].as_i64().unwrap()
    };
    let mut first: Vec<i64> = Vec::new();
    for message in &topic.read(300) {
        if !first.contains(&number(message)) {
            first.push(number(message));
        }
    }
    assert_eq!(first, (0..=300).filter(|n| *n != 150).collect::<Vec<_>>(), "in order, and all but the one");
    let letters = morgue.letters.read(1);
    assert!(letters.iter().all(|letter| number(letter) == 150));
    assert_eq!(header(&letters[0], "dlq.reason").as_deref(), Some("refused"));
    relay.stop();
}

#[test]
fn the_size_at_which_a_topic_refuses_is_known_to_the_byte() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[("max.message.bytes", "10000")]));
    let morgue = Morgue::new(&[("too_large", "dead-letter")]);
    init(&database);
    let batch = ("CDC_RELAY_KAFKA__PROPERTIES__BATCH_NUM_MESSAGES", "1");
    let relay = Relay::start(&database, &[morgue.environment(), vec![batch]].concat());
    let kind = &topic.kind;
    let (from, to) = (9600, 9900);
    database.run("ALTER TABLE outbox ALTER payload TYPE text");
    database.run(&format!(
        "DO $$ BEGIN FOR n IN {from}..{to} LOOP INSERT INTO outbox VALUES \
         (gen_random_uuid(), '{kind}', 'k', 'T', repeat('x', n)); COMMIT; END LOOP; END $$"
    ));
    let all = to - from + 1;
    let arrived = || usize::try_from(topic.size() + morgue.letters.size()).unwrap();
    eventually("all have arrived", || (arrived() >= all).then_some(()));
    let count = usize::try_from(topic.size()).unwrap();
    assert!(count > 0 && count < all, "the limit is not among the sizes tried: {count} fit");
    let sizes: Vec<_> = topic.read(count).iter().map(|m| m.payload().unwrap().len()).collect();
    assert_eq!(sizes, (from..from + count).collect::<Vec<_>>(), "the smaller ones fit");
    // Had the broker refused one, or we one that it would take, there would be another session or another limit.
    assert_eq!(relay.metric("cdc_relay_sessions_total"), Some(1.0), "{}", relay.log());
    let letters = morgue.letters.read(all - count);
    let error = header(&letters[0], "dlq.error").unwrap();
    assert!(error.contains("size in bytes: 10001, limit: 10000"), "{error}");
    relay.stop();
}

#[test]
fn a_dead_letter_topic_that_is_missing_halts() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let missing = ("CDC_RELAY_POISON__DEAD_LETTER_TOPIC", "no-such-dlq");
    let mut relay = Relay::start(&database, &[("CDC_RELAY_POISON__UNROUTABLE", "dead-letter"), missing]);
    database.insert("no such", 0, 1);
    database.insert(&topic.kind, 0, 1);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(relay.log().contains("no-such-dlq"), "{}", relay.log());
    let relay = Relay::start(&database, &[("CDC_RELAY_POISON__UNROUTABLE", "skip")]);
    assert_complete_and_ordered(&topic.read(1), 1);
    relay.stop();
}

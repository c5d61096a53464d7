//! Messages of any kind: taken, followed, put in the outbox again until they are acknowledged or given up.

use std::collections::HashSet;

use order_api::{config::Config, domain::MAX_PAYLOAD_BYTES};
use proptest::{prelude::*, strategy::ValueTree as _, test_runner::TestRunner};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    gate::{Gate, Mode},
    stage::{Answer, Client, Service, Stage, run, wait_for},
};

const JSON: (&str, &str) = ("content-type", "application/json");
const PATH: &str = "/api/messages";

/// Lets a service look often for messages whose time is up; the others of these tests do not look at all.
fn busy(config: &mut Config) {
    config.messages.redeliver_interval_ms = 10;
}

fn post(client: &Client, path: &str, body: &Value) -> Answer {
    client.send("POST", path, &[JSON], &body.to_string())
}

fn message() -> Value {
    json!({"topic": "notifications", "payload": {"text": "Hello"}})
}

/// One that these groups have to acknowledge; gives back its place.
fn sent(service: &Service, groups: &[&str]) -> String {
    let mut body = message();
    body["requireAck"] = json!(groups);
    let answer = post(service, PATH, &body);
    assert_eq!(answer.status, 201, "{answer:?}");
    answer.header("location").to_owned()
}

fn id(place: &str) -> &str {
    place.rsplit('/').next().unwrap()
}

/// What the consumer's handler `acks` does with an acknowledgement.
fn acknowledge(stage: &Stage, place: &str, group: &str, attempt: i32, lsn: &str) {
    let id = id(place);
    let sql = format!(
        "INSERT INTO message_acks (message_id, consumer_group, attempt, applied_at, lsn)
         VALUES ('{id}', '{group}', {attempt}, '2026-11-21T12:00:00.123456Z', '{lsn}') ON CONFLICT DO NOTHING;
         UPDATE messages SET acknowledged_at = now(), due_at = NULL, undelivered_at = NULL
         WHERE message_id = '{id}' AND acknowledged_at IS NULL AND NOT EXISTS (
             SELECT FROM unnest(require_ack) AS wanted (consumer_group)
             WHERE NOT EXISTS (SELECT FROM message_acks AS ack WHERE ack.message_id = messages.message_id
                               AND ack.consumer_group = wanted.consumer_group))"
    );
    stage.runtime.block_on(run(&stage.role("order_acks"), sql));
}

/// Lets the time of the present attempt be up.
fn time_is_up(stage: &Stage, place: &str) {
    stage.sql(&format!(
        "UPDATE messages SET due_at = now() WHERE message_id = '{}' AND due_at IS NOT NULL",
        id(place)
    ));
}

/// How often the message is in the outbox, and its highest attempt there.
fn attempts(stage: &Stage, place: &str) -> (usize, usize) {
    let of = |what: &str| {
        let id = id(place);
        stage
            .value(&format!("SELECT {what} FROM outbox WHERE headers->>'message-id' = '{id}'"))
            .parse()
            .unwrap()
    };
    (of("count(*)"), of("max((headers->>'attempt')::int)"))
}

/// How long the present attempt waits: of the database's own time, which its transaction has only one of.
fn wait_of(stage: &Stage, place: &str) -> String {
    stage.value(&format!(
        "SELECT due_at - outbox.created_at FROM messages JOIN outbox
         ON outbox.headers->>'message-id' = message_id::text AND outbox.headers->>'attempt' = attempt::text
         WHERE message_id = '{}'",
        id(place)
    ))
}

#[test]
fn a_message_is_taken_and_read_back() {
    let stage = Stage::new();
    let service = stage.service_with(busy);
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let body = json!({
        "topic": "notifications", "key": "customer 1", "payload": {"n": 1.50, "list": [1, "ä", null]},
        "headers": {"tenant": "acme", "empty": ""}, "requireAck": ["mail", "push.v2"], "ackTimeout": 60,
    });
    let answer = service.send("POST", PATH, &[JSON, ("traceparent", trace)], &body.to_string());
    assert_eq!(answer.status, 201, "{answer:?}");
    let told = answer.json();
    assert_eq!(answer.header("location"), format!("{PATH}/{}", told["messageId"].as_str().unwrap()));
    let id = Uuid::parse_str(told["messageId"].as_str().unwrap()).unwrap();
    assert_eq!(id.get_version_num(), 7);
    for field in ["topic", "key", "payload", "headers", "requireAck", "ackTimeout"] {
        assert_eq!(told[field], body[field], "{field}");
    }
    let waiting = |group: &str| json!({"state": "waiting", "consumerGroup": group});
    assert_eq!(told["acknowledgements"], json!([waiting("mail"), waiting("push.v2")]));
    assert_eq!(
        (&told["state"], &told["attempt"], &told["redeliveries"]),
        (&json!("committed"), &json!(1), &json!(0))
    );
    let read = service.get(answer.header("location"));
    assert_eq!((read.status, read.json()), (200, told));

    let row: Value = serde_json::from_str(&stage.value("SELECT to_jsonb(outbox) FROM outbox")).unwrap();
    for (column, value) in [
        ("topic", json!("notifications")),
        ("aggregatetype", json!("message")),
        ("aggregateid", json!("customer 1")),
        ("type", json!("Message")),
        ("traceparent", json!(trace)),
        ("payload", body["payload"].clone()),
        (
            "headers",
            json!({
                "tenant": "acme", "empty": "", "message-id": id, "attempt": "1", "require-ack": "mail,push.v2",
            }),
        ),
    ] {
        assert_eq!(row[column], value, "{column}");
    }
    assert_ne!(row["id"], json!(id), "each attempt has an id of its own");
    assert_eq!(
        stage.value("SELECT (SELECT xmin FROM messages)::text = (SELECT xmin FROM outbox)::text"),
        "true"
    );
    assert_eq!(stage.value("SELECT due_at - created_at FROM messages"), "00:01:00");
}

#[test]
fn what_is_not_given_has_a_default() {
    let stage = Stage::new();
    let service = stage.service_with(|c| {
        busy(c);
        c.messages.ack_timeout_seconds = 7;
    });
    let bare = post(&service, PATH, &message()).json();
    let row: Value = serde_json::from_str(&stage.value("SELECT to_jsonb(outbox) FROM outbox")).unwrap();
    assert_eq!(row["aggregateid"], bare["messageId"]);
    assert_eq!(row["headers"], json!({"message-id": bare["messageId"], "attempt": "1"}));
    assert_eq!(row["traceparent"], Value::Null);
    for (field, value) in [("ackTimeout", json!(7)), ("requireAck", json!([])), ("headers", json!({}))] {
        assert_eq!(bare[field], value, "{field}");
    }
    for absent in ["key", "nextAttemptAt", "lsn", "acknowledgedAt", "undeliveredAt"] {
        assert_eq!(bare.get(absent), None, "{absent}");
    }
    assert_eq!(stage.value("SELECT due_at IS NULL FROM messages"), "true");

    let body = json!({"topic": "prices", "message": ["x"], "consumerGroup": "shop"});
    let answer = post(&service, "/api/messages/send", &body);
    assert_eq!(answer.status, 201, "{answer:?}");
    let short = answer.json();
    for (field, value) in [
        ("topic", json!("prices")),
        ("payload", json!(["x"])),
        ("requireAck", json!(["shop"])),
        ("ackTimeout", json!(7)),
    ] {
        assert_eq!(short[field], value, "{field}");
    }
    assert_eq!(service.get(answer.header("location")).json(), short);
    let empty = post(&service, "/api/messages/send", &json!({})).wrong_fields();
    assert_eq!(empty, ["/topic", "/message", "/consumerGroup"]);
}

#[test]
fn each_limit_holds_just_over_and_not_just_under() {
    let stage = Stage::new();
    let service = stage.service_with(busy);
    let groups = |n: usize| (0..n).map(|n| format!("g{n}")).collect::<Value>();
    let headers = |n: usize| {
        json!((0..n).map(|n| (format!("h{n}"), "x")).collect::<std::collections::BTreeMap<_, _>>())
    };
    let header = |name: &str, value: &str| json!({name: value});
    let nested = |depth: usize| (0..depth).fold(json!(1), |inner, _| json!([inner]));
    let cases = [
        ("/key", json!("é".repeat(512)), json!("é".repeat(513)), "/key"),
        ("/key", json!("k"), json!(""), "/key"),
        ("/key", json!("a b"), json!("a\tb"), "/key"),
        ("/key", json!("\u{a0}x"), json!("\u{85}x"), "/key"),
        ("/requireAck", groups(16), groups(17), "/requireAck"),
        ("/requireAck", groups(1), groups(0), "/requireAck"),
        ("/requireAck", json!(["a", "A"]), json!(["a", "a"]), "/requireAck/1"),
        ("/requireAck", json!(["g".repeat(249)]), json!(["g".repeat(250)]), "/requireAck/0"),
        ("/requireAck", json!(["A.z_0-9"]), json!(["a,b"]), "/requireAck/0"),
        ("/ackTimeout", json!(1), json!(0), "/ackTimeout"),
        ("/ackTimeout", json!(86_400.0), json!(86_401), "/ackTimeout"),
        ("/ackTimeout", json!(2), json!("2"), "/ackTimeout"),
        ("/headers", headers(32), headers(33), "/headers"),
        ("/headers", header("A.z_0-9", ""), header("a b", ""), "/headers/a b"),
        (
            "/headers",
            header(&"h".repeat(100), ""),
            header(&"h".repeat(101), ""),
            &format!("/headers/{}", "h".repeat(100)),
        ),
        ("/headers", header("h", &"é".repeat(1024)), header("h", &"é".repeat(1025)), "/headers/h"),
        ("/headers", header("h", "a b"), header("h", "a\nb"), "/headers/h"),
        ("/headers", header("h", "1"), json!({"h": 1}), "/headers/h"),
        ("/headers", header("ids", ""), header("id", ""), "/headers/id"),
        ("/headers", header("message", ""), header("Message-Id", ""), "/headers/Message-Id"),
        ("/headers", header("ce", ""), header("ce_id", ""), "/headers/ce_id"),
        ("/headers", header("dlq", ""), header("dlq.x", ""), "/headers/dlq.x"),
        ("/payload", nested(100), nested(101), "/payload"),
        ("/payload", json!(false), json!(null), "/payload"),
        ("/topic", json!("prices"), json!("price"), "/topic"),
    ];
    for (field, under, over, pointer) in cases {
        let with = |value: Value| {
            let mut body = message();
            body[&field[1..]] = value;
            post(&service, PATH, &body)
        };
        let taken = with(under);
        assert_eq!(taken.status, 201, "{field} {taken:?}");
        assert_eq!(service.get(taken.header("location")).json(), taken.json());
        assert_eq!(with(over).wrong_fields(), [pointer]);
    }
    for reserved in
        ["type", "aggregatetype", "lsn", "seq", "traceparent", "attempt", "require-ack", "ce_x", "DLQ.reason"]
    {
        let mut body = message();
        body["headers"] = json!({reserved: "x"});
        assert_eq!(post(&service, PATH, &body).wrong_fields(), [format!("/headers/{reserved}")]);
    }
    assert_eq!(stage.count("messages"), 25, "nothing of what was refused");
    assert_eq!(stage.count("outbox"), 25);
}

#[test]
fn every_wrong_field_is_in_one_answer() {
    let stage = Stage::new();
    let service = stage.service_with(busy);
    let body = r#"{"topic": 1, "key": [], "payload": "\u0000", "headers": {"a": "x", "a": "y", "id": "", "b/": ""},
                   "requireAck": ["", 2], "ackTimeout": 1.5, "extra": 1}"#;
    let mut found = service.send("POST", PATH, &[JSON], body).wrong_fields();
    found.sort_unstable();
    let expected = [
        "/ackTimeout",
        "/extra",
        "/headers/a",
        "/headers/b~1",
        "/headers/id",
        "/key",
        "/payload",
        "/requireAck/0",
        "/requireAck/1",
        "/topic",
    ];
    assert_eq!(found, expected);
    assert_eq!(stage.count("messages"), 0);
}

#[test]
fn topics_that_are_not_listed_are_closed() {
    let stage = Stage::new();
    let detail = |service: &Service| {
        let problem = post(service, PATH, &message()).problem(422, "invalid-request");
        assert_eq!(problem["errors"][0]["pointer"], "/topic");
        problem["errors"][0]["detail"].as_str().unwrap().to_owned()
    };
    let closed = detail(&stage.service_with(|c| c.messages.topics.clear()));
    assert!(closed.contains("ORDER_API_MESSAGES__TOPICS"), "{closed}");
    let others = detail(&stage.service_with(|c| c.messages.topics = vec!["a".into(), "b".into()]));
    assert!(others.contains("must be one of a, b, which messages.topics"), "{others}");
    assert_eq!(stage.count("messages"), 0);
}

#[test]
fn a_payload_is_never_more_than_a_topic_takes() {
    let stage = Stage::new();
    let service = stage.service_with(|c| c.http.body_limit_bytes = 4 << 20);
    let with = |bytes: usize| {
        let mut body = message();
        // With its quotes.
        body["payload"] = json!("x".repeat(bytes - 2));
        post(&service, PATH, &body)
    };
    assert_eq!(with(MAX_PAYLOAD_BYTES).status, 201);
    assert_eq!(with(MAX_PAYLOAD_BYTES + 1).wrong_fields(), ["/payload"]);
    assert_eq!(stage.count("outbox"), 1);
}

#[test]
fn payloads_that_postgres_would_refuse_or_blow_up_are_told() {
    let stage = Stage::new();
    let service = stage.service_with(|c| {
        busy(c);
        c.http.body_limit_bytes = 2048;
    });
    let with = |payload: &str| {
        let body = format!(r#"{{"topic":"notifications","payload":{payload}}}"#);
        service.send("POST", PATH, &[JSON], &body)
    };
    let numbers = |n: usize| format!("[{}]", vec!["1e97"; n].join(","));
    for refused in [
        r#""\u0000""#,
        r#"{"a":[{"b":"x\u0000"}]}"#,
        r#"{"\u0000":1}"#,
        r#"["\ud800"]"#,
        r#"{"a":{"b":1,"b":2}}"#,
        "1e309",
        "-1e-400",
        "[1e131071]",
        "1e999999999999",
        "0e-99999",
        &numbers(21),
        &format!("{}1{}", "[".repeat(500), "]".repeat(500)),
    ] {
        assert_eq!(with(refused).wrong_fields(), ["/payload"], "{refused}");
    }
    for taken in [
        r#""\\u0000""#,
        r#"{"":{"a":[{"b":"\ud83d\ude00\u0001"}]}}"#,
        "0",
        "true",
        "\"\"",
        "{}",
        "1e308",
        "1e-399",
        "123456789.1234567890123456789012345678901234567890",
        &numbers(20),
    ] {
        let answer = with(taken);
        assert_eq!(answer.status, 201, "{taken} {answer:?}");
        assert_eq!(service.get(answer.header("location")).status, 200);
    }
    // To the last digit.
    let exact = "SELECT count(*) FROM outbox WHERE payload::text = '123456789.1234567890123456789012345678901234567890'";
    assert_eq!(stage.value(exact), "1");
}

/// JSON texts of all kinds, the nasty ones among them.
fn any_json() -> impl Strategy<Value = String> {
    let text = prop_oneof![
        "\\PC{0,8}".prop_map(|text| Value::from(text).to_string()),
        Just(r#""\ud83d\ude00""#.to_owned()),
        "\"(\\\\u[0-9a-f]{4}|\\\\[bfnrt/\\\\\"]|[a-z]){0,4}\"",
    ];
    let leaf = prop_oneof![
        text.clone(),
        "-?(0|[1-9][0-9]{0,30})(\\.[0-9]{1,30})?([eE][-+]?[0-9]{1,3})?",
        prop::sample::select(vec!["null", "true", "false", "{}", "[]", " 1 "]).prop_map(str::to_owned),
    ];
    leaf.prop_recursive(6, 40, 5, move |inner| {
        let member = (text.clone(), inner.clone()).prop_map(|(name, value)| format!("{name} : {value}"));
        prop_oneof![
            prop::collection::vec(inner, 0..5).prop_map(|all| format!("[{}]", all.join(","))),
            prop::collection::vec(member, 0..5).prop_map(|all| format!("{{{}}}", all.join(","))),
        ]
    })
}

/// The same with every number as a float, however it was written.
fn in_floats(json: &Value) -> Value {
    match json {
        Value::Number(number) => json!(number.as_f64()),
        Value::Array(all) => all.iter().map(in_floats).collect(),
        Value::Object(all) => Value::Object(all.iter().map(|(k, v)| (k.clone(), in_floats(v))).collect()),
        other => other.clone(),
    }
}

#[test]
fn any_payload_is_taken_as_it_is_or_told_to_be_wrong() {
    const LIMIT_BYTES: usize = 4096;
    let stage = Stage::new();
    let service = stage.service_with(|c| {
        busy(c);
        c.http.body_limit_bytes = LIMIT_BYTES;
    });
    let (mut taken, mut refused) = (0, 0);
    let mut runner = TestRunner::new(ProptestConfig { cases: 500, ..ProptestConfig::default() });
    for _ in 0..500 {
        let payload = any_json().new_tree(&mut runner).unwrap().current();
        let body = format!(r#"{{"topic":"notifications","payload":{payload}}}"#);
        let answer = service.send("POST", PATH, &[JSON], &body);
        match answer.status {
            201 => {
                taken += 1;
                let read = service.get(answer.header("location")).json();
                assert_eq!(in_floats(&read["payload"]), in_floats(&answer.json()["payload"]), "{payload}");
            }
            413 => {}
            _ => {
                refused += 1;
                assert_eq!(answer.wrong_fields(), ["/payload"], "{payload}");
            }
        }
    }
    assert!(taken > 100 && refused > 20, "{taken} taken, {refused} refused");
    let longest: usize = stage.value("SELECT max(octet_length(payload::text)) FROM outbox").parse().unwrap();
    assert!(longest <= LIMIT_BYTES, "{longest}");
    assert_eq!(
        stage.value("SELECT count(*) FROM outbox JOIN messages USING (payload)"),
        stage.value("SELECT count(*) FROM messages a JOIN messages b USING (payload)")
    );
}

#[test]
fn a_message_is_followed_to_its_acknowledgement() {
    let stage = Stage::new();
    let service = stage.service();
    let place = sent(&service, &["mail", "push"]);
    let state = || service.get(&place).json();
    assert_eq!(state()["state"], "committed");
    acknowledge(&stage, &place, "push", 1, "0/1A2B3C8");
    let published = state();
    assert_eq!((&published["state"], &published["lsn"]), (&json!("published"), &json!("0/1A2B3C8")));
    let push = json!({
        "state": "acknowledged", "consumerGroup": "push", "attempt": 1,
        "appliedAt": "2026-11-21T12:00:00.123456Z", "lsn": "0/1A2B3C8",
    });
    assert_eq!(published["acknowledgements"], json!([{"state": "waiting", "consumerGroup": "mail"}, push]));
    assert!(published["nextAttemptAt"].is_string(), "{published}");
    acknowledge(&stage, &place, "mail", 1, "0/1A2B400");
    let done = state();
    assert_eq!((&done["state"], &done["lsn"]), (&json!("acknowledged"), &json!("0/1A2B3C8")));
    assert_eq!(done["acknowledgements"][0]["lsn"], "0/1A2B400");
    assert!(done["acknowledgedAt"].is_string() && done.get("nextAttemptAt").is_none(), "{done}");
    let settled =
        service.send("POST", &format!("{place}/redeliver"), &[], "").problem(409, "message-settled");
    assert!(settled["detail"].as_str().unwrap().contains("has acknowledged"), "{settled}");
    assert_eq!(attempts(&stage, &place), (1, 1));
}

#[test]
fn what_is_not_acknowledged_is_tried_again_ever_later_and_then_given_up() {
    let stage = Stage::new();
    let service = stage.service_with(|c| {
        busy(c);
        c.messages.max_attempts = 3;
    });
    let first = sent(&service, &["mail", "push"]);
    let second = sent(&service, &["mail"]);
    acknowledge(&stage, &first, "push", 1, "0/1");
    let state = |place: &str| service.get(place).json();
    for (attempt, wait) in [(2, "00:01:00"), (3, "00:02:00")] {
        time_is_up(&stage, &first);
        wait_for("the next attempt", || state(&first)["attempt"] == attempt);
        assert_eq!(wait_of(&stage, &first), wait);
        assert_eq!(state(&first)["redeliveries"], attempt - 1);
        assert_eq!(state(&first)["state"], "published");
    }
    time_is_up(&stage, &first);
    wait_for("it to be given up", || state(&first)["state"] == "undelivered");
    let given_up = state(&first);
    assert!(given_up["undeliveredAt"].is_string() && given_up.get("nextAttemptAt").is_none(), "{given_up}");
    assert_eq!(attempts(&stage, &first), (3, 3));
    assert_eq!(attempts(&stage, &second), (1, 1), "whose time is not up");
    let ids = "SELECT count(DISTINCT id) || ' ' || count(DISTINCT payload) || ' ' || count(DISTINCT headers->>'require-ack')
               FROM outbox WHERE headers->>'message-id' = ";
    assert_eq!(stage.value(&format!("{ids} '{}'", id(&first))), "3 1 1");

    let listed = service.get("/api/messages?state=undelivered").json();
    assert_eq!(listed["messages"].as_array().unwrap().len(), 1);
    assert_eq!(listed["messages"][0]["messageId"], id(&first));

    // A person tries once more, and a consumer that was asleep acknowledges an earlier attempt.
    let again = service.send("POST", &format!("{first}/redeliver"), &[], "");
    assert_eq!(again.status, 200, "{again:?}");
    let told = again.json();
    assert_eq!((&told["attempt"], &told["state"]), (&json!(4), &json!("published")));
    assert_eq!(state(&first), told);
    assert_eq!(wait_of(&stage, &first), "00:04:00");
    acknowledge(&stage, &first, "mail", 3, "0/2");
    assert_eq!(state(&first)["state"], "acknowledged");
    assert_eq!(state(&first)["acknowledgements"][0]["attempt"], 3);
    assert_eq!(attempts(&stage, &first), (4, 4));
}

#[test]
fn what_is_given_up_is_given_up_again_and_may_be_acknowledged_after_all() {
    let stage = Stage::new();
    let service = stage.service_with(|c| {
        busy(c);
        c.messages.max_attempts = 1;
    });
    let place = sent(&service, &["mail"]);
    let undelivered = || service.get(&place).json()["state"] == "undelivered";
    for attempt in 1..=3 {
        time_is_up(&stage, &place);
        wait_for("it to be given up", undelivered);
        assert_eq!(attempts(&stage, &place), (attempt, attempt));
        assert_eq!(service.send("POST", &format!("{place}/redeliver"), &[JSON], "{}").status, 200);
        assert_eq!(service.get(&place).json()["state"], "committed");
    }
    time_is_up(&stage, &place);
    wait_for("it to be given up", undelivered);
    acknowledge(&stage, &place, "mail", 1, "0/1");
    assert_eq!(service.get(&place).json()["state"], "acknowledged");
}

#[test]
fn the_wait_has_a_bound() {
    let stage = Stage::new();
    let service = stage.service();
    let place = sent(&service, &["mail"]);
    for (attempt, wait) in [(12, "17:04:00"), (13, "1 day"), (1_000_000, "1 day")] {
        stage.sql(&format!("UPDATE messages SET attempt = {attempt} - 1"));
        let told = service.send("POST", &format!("{place}/redeliver"), &[], "").json();
        assert_eq!(told["attempt"], attempt);
        assert_eq!(wait_of(&stage, &place), wait);
    }
}

#[test]
fn two_instances_never_make_the_same_attempt() {
    const MESSAGES: usize = 250;
    let stage = Stage::new();
    let services = [stage.service_with(busy), stage.service_with(busy), stage.service_with(busy)];
    let places: Vec<_> = (0..MESSAGES).map(|n| sent(&services[n % 3], &["mail"])).collect();
    // Some are acknowledged, some are being acknowledged, while all become due again and again.
    for place in &places[..50] {
        acknowledge(&stage, place, "mail", 1, "0/1");
    }
    for round in 1..=4 {
        stage.sql("UPDATE messages SET due_at = now() WHERE due_at IS NOT NULL");
        for place in &places[50 * round..50 * round + 10] {
            acknowledge(&stage, place, "mail", 1, "0/1");
        }
        wait_for("all to be tried again", || {
            stage.value("SELECT count(*) FROM messages WHERE due_at <= now()") == "0"
        });
    }
    let twice =
        "SELECT count(*) FROM (SELECT FROM outbox GROUP BY headers->>'message-id', headers->>'attempt'
                 HAVING count(*) > 1) AS twice";
    assert_eq!(stage.value(twice), "0");
    let gaps = "SELECT count(*) FROM messages WHERE attempt <> (
                SELECT count(*) FROM outbox WHERE headers->>'message-id' = message_id::text)";
    assert_eq!(stage.value(gaps), "0");
    let never = "SELECT max(attempt) FROM messages WHERE message_id = ANY (ARRAY[";
    let ids: Vec<_> = places[..50].iter().map(|place| format!("'{}'::uuid", id(place))).collect();
    assert_eq!(
        stage.value(&format!("{never}{}])", ids.join(","))),
        "1",
        "what is acknowledged is left alone"
    );
    assert_eq!(stage.value("SELECT min(attempt) FROM messages WHERE acknowledged_at IS NULL"), "5");
    let metric = |name: &str| -> usize {
        let of = |service: &Service| {
            let text = service.get("/metrics").text;
            let line = text.lines().find(|line| line.starts_with(&format!("order_api_messages_{name} ")));
            line.unwrap().rsplit(' ').next().unwrap().parse::<usize>().unwrap()
        };
        services.iter().map(of).sum()
    };
    assert_eq!(metric("sent_total"), MESSAGES);
    assert_eq!(metric("redelivered_total"), stage.count("outbox") - MESSAGES);
}

#[test]
fn redelivery_goes_on_after_a_restart_and_after_lost_connections() {
    let stage = Stage::new();
    let service = stage.service_with(busy);
    let place = sent(&service, &["mail"]);
    service.trigger.request();
    stage.runtime.block_on(service.running).unwrap();
    time_is_up(&stage, &place);
    assert_eq!(attempts(&stage, &place), (1, 1));
    let service = stage.service_with(busy);
    wait_for("the next attempt", || attempts(&stage, &place) == (2, 2));
    for attempt in 3..=5 {
        stage.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'order_api'
             AND datname = current_database()",
        );
        time_is_up(&stage, &place);
        wait_for("the next attempt", || attempts(&stage, &place) == (attempt, attempt));
    }
    assert_eq!(service.get(&place).json()["attempt"], 5);
}

#[test]
fn a_request_with_a_key_is_done_once() {
    let stage = Stage::new();
    let service = stage.service();
    let mut body = message();
    body["requireAck"] = json!(["mail"]);
    let with = |path: &str, key: &str, body: &str| {
        service.send("POST", path, &[JSON, ("idempotency-key", key)], body)
    };
    let first = with(PATH, "k1", &body.to_string());
    let again = with(PATH, "k1", &body.to_string());
    assert_eq!((first.status, again.status), (201, 201));
    assert_eq!((&first.text, first.header("location")), (&again.text, again.header("location")));
    assert_eq!((first.header("idempotency-replayed"), again.header("idempotency-replayed")), ("", "true"));
    body["key"] = "x".into();
    with(PATH, "k1", &body.to_string()).problem(422, "idempotency-key-reused");
    assert_eq!((stage.count("messages"), stage.count("outbox")), (1, 1));

    let answers: HashSet<String> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..8).map(|_| scope.spawn(|| with(PATH, "k2", &body.to_string()).text)).collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert_eq!(answers.len(), 1, "{answers:?}");
    assert_eq!((stage.count("messages"), stage.count("outbox")), (2, 2));

    let place = first.header("location");
    let redeliver = format!("{place}/redeliver");
    let answers: HashSet<String> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..8).map(|_| scope.spawn(|| with(&redeliver, "k3", "").text)).collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert_eq!(answers.len(), 1, "{answers:?}");
    assert_eq!(attempts(&stage, place), (2, 2));
    with(&redeliver, "k1", "").problem(422, "idempotency-key-reused");
    with(&redeliver, "k3", "{}").problem(422, "idempotency-key-reused");
    assert_eq!(attempts(&stage, place), (2, 2));
    // What was answered stays so, whatever has become of the message.
    acknowledge(&stage, place, "mail", 2, "0/1");
    assert_eq!(with(&redeliver, "k3", "").text, *answers.iter().next().unwrap());
    with(&redeliver, "k4", "").problem(409, "message-settled");
}

#[test]
fn a_commit_whose_answer_is_lost_is_found_by_the_retry() {
    let stage = Stage::new();
    let gate = Gate::new(&stage.runtime, "127.0.0.1:0".parse().unwrap(), stage.postgres());
    let service = {
        let mut config = stage.config(gate.address);
        config.postgres.check_interval_ms = 60_000;
        stage.service_of(&config)
    };
    service.wait_ready();
    let place = sent(&service, &["mail"]);
    gate.lose_answers(1, Mode::Open);
    let answer = post(&service, PATH, &message());
    assert_eq!(answer.status, 201, "{answer:?}");
    assert_eq!(service.get(answer.header("location")).json(), answer.json());
    assert_eq!((stage.count("messages"), stage.count("outbox")), (2, 2));
    // A redelivery is several round trips: whichever of them is lost, up to the commit's, it is done once.
    for (passed, key) in
        (0..=5).flat_map(|passed| [(passed, None), (passed, Some(format!("\"key-{passed}\"")))])
    {
        let redeliver = |headers: &[(&str, &str)]| {
            let again = service.send("POST", &format!("{place}/redeliver"), headers, "");
            assert_eq!(again.status, 200, "{passed} {key:?} {again:?}");
            again.json()["attempt"].clone()
        };
        // With all statements prepared.
        redeliver(&[]);
        let before = attempts(&stage, &place).0;
        gate.lose_answer_after(passed);
        let headers: Vec<_> = key.iter().map(|key| ("idempotency-key", key.as_str())).collect();
        assert_eq!(redeliver(&headers), before + 1);
        gate.set(Mode::Open);
        assert_eq!(attempts(&stage, &place), (before + 1, before + 1), "{passed} {key:?}");
    }
    let retries = service.get("/metrics").text;
    let lost = retries.lines().find_map(|l| l.strip_prefix("order_api_database_retries_total ")).unwrap();
    assert!(lost.parse::<u32>().unwrap() >= 10, "{lost}");
}

#[test]
fn messages_are_listed_page_by_page() {
    let stage = Stage::new();
    let service = stage.service();
    let places: Vec<_> = (0..7).map(|_| sent(&service, &["mail", "push"])).collect();
    acknowledge(&stage, &places[1], "mail", 1, "0/1");
    acknowledge(&stage, &places[2], "mail", 1, "0/1");
    acknowledge(&stage, &places[2], "push", 1, "0/1");
    for place in &places[3..5] {
        stage.sql(&format!(
            "UPDATE messages SET due_at = NULL, undelivered_at = now() WHERE message_id = '{}'",
            id(place)
        ));
    }
    let pages = |query: &str| -> Vec<String> {
        let (mut found, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = service.get(&format!("{PATH}?{query}limit=2{cursor}")).json();
            let messages = page["messages"].as_array().unwrap();
            assert!(messages.len() <= 2);
            for message in messages {
                assert!(message.get("payload").is_none() && message.get("headers").is_none(), "{message}");
                let place = format!("{PATH}/{}", message["messageId"].as_str().unwrap());
                assert_eq!(service.get(&place).json()["state"], message["state"]);
                found.push(place);
            }
            // What comes meanwhile is in front of all pages.
            match page["nextCursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return found,
            }
        }
    };
    let newest_first =
        |indexes: &[usize]| indexes.iter().rev().map(|n| places[*n].clone()).collect::<Vec<_>>();
    assert_eq!(pages(""), newest_first(&[0, 1, 2, 3, 4, 5, 6]));
    assert_eq!(pages("state=committed&"), newest_first(&[0, 5, 6]));
    assert_eq!(pages("state=published&"), newest_first(&[1]));
    assert_eq!(pages("state=acknowledged&"), newest_first(&[2]));
    assert_eq!(pages("state=undelivered&"), newest_first(&[3, 4]));
    assert_eq!(pages("state=undelivered&state=published&"), newest_first(&[1, 3, 4]));
    let cursor = service.get(&format!("{PATH}?limit=2")).json()["nextCursor"].as_str().unwrap().to_owned();
    for query in [
        "state=lost".to_owned(),
        "states=committed".into(),
        "limit=0".into(),
        "limit=101".into(),
        "cursor=x".into(),
        format!("state=committed&cursor={cursor}"),
    ] {
        service.get(&format!("{PATH}?{query}")).problem(400, "invalid-query");
    }
    assert_eq!(service.get(&format!("{PATH}?limit=100")).status, 200);
}

#[test]
fn what_cannot_be_found_or_redelivered_is_told() {
    let stage = Stage::new();
    let service = stage.service();
    let redeliver = |place: &str, headers: &[(&str, &str)], body: &str| {
        service.send("POST", &format!("{place}/redeliver"), headers, body)
    };
    let nobody = format!("{PATH}/{}", Uuid::now_v7());
    service.get(&nobody).problem(404, "message-not-found");
    redeliver(&nobody, &[], "").problem(404, "message-not-found");
    for bad in
        ["x", "01936d2e7bff7c31b0aa5d6e7f809101", "%7B01936d2e-7bff-7c31-b0aa-5d6e7f809101%7D", "%00", "%ff"]
    {
        service.get(&format!("{PATH}/{bad}")).problem(400, "invalid-id");
        redeliver(&format!("{PATH}/{bad}"), &[], "").problem(400, "invalid-id");
    }
    let place = post(&service, PATH, &message()).header("location").to_owned();
    let settled = redeliver(&place, &[], "").problem(409, "message-settled");
    assert!(settled["detail"].as_str().unwrap().contains("waits for no acknowledgement"), "{settled}");
    let place = sent(&service, &["mail"]);
    redeliver(&place, &[], "{}").problem(415, "unsupported-media-type");
    redeliver(&place, &[JSON], "{").problem(400, "malformed-json");
    assert_eq!(redeliver(&place, &[JSON], r#"{"why":1}"#).wrong_fields(), ["/why"]);
    assert_eq!(redeliver(&place, &[JSON], "[]").wrong_fields(), [""]);
    assert_eq!(redeliver(&place, &[JSON], " null ").json()["attempt"], 2);
    assert_eq!(attempts(&stage, &place), (2, 2));
    assert_eq!(redeliver(&place, &[JSON], "").status, 200);
    service.send("DELETE", &place, &[], "").problem(405, "method-not-allowed");
    service.get("/api/messages/send").problem(405, "method-not-allowed");
}

#[test]
fn what_waits_and_what_is_undelivered_is_counted() {
    let stage = Stage::new();
    let service = stage.service_with(|c| {
        busy(c);
        c.messages.max_attempts = 1;
    });
    let places: Vec<_> = (0..3).map(|_| sent(&service, &["mail"])).collect();
    post(&service, PATH, &message());
    let shows = |line: &str| service.get("/metrics").text.lines().any(|l| l == line);
    wait_for("three to wait", || shows("order_api_messages_waiting 3"));
    time_is_up(&stage, &places[0]);
    wait_for("one to be undelivered", || shows("order_api_messages_undelivered 1"));
    assert!(shows("order_api_messages_waiting 2"));
    assert!(shows("order_api_messages_given_up_total 1"));
    assert!(shows("order_api_messages_sent_total 4"));
    assert!(shows("order_api_messages_redelivered_total 0"));
    assert_eq!(service.send("POST", &format!("{}/redeliver", places[0]), &[], "").status, 200);
    wait_for("none to be undelivered", || shows("order_api_messages_undelivered 0"));
    assert!(shows("order_api_messages_redelivered_total 1"));
    assert!(shows("order_api_messages_waiting 3"));
}

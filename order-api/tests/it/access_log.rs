//! What the binary writes about each request, and what it does not.

use serde_json::Value;

use crate::{
    process::{Process, on},
    stage::{Stage, order},
    tokens::{TokensFile, token},
};

/// The lines about requests.
fn answered(log: &[String]) -> Vec<Value> {
    let lines = log.iter().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["message"] == "answered").collect()
}

#[test]
fn each_request_is_a_line_that_names_who_and_what_but_no_secret() {
    let stage = Stage::new();
    let (token, entry) = token("shop", "read,write");
    let file = TokensFile::of(&[&entry]);
    let process = Process::start(
        on(&stage, "127.0.0.1:0")
            .env("ORDER_API_AUTH__TOKENS_PATH", &file.0)
            .env("ORDER_API_LOG__LEVEL", "debug,access=info"),
    );
    let bearer = format!("Bearer {token}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/json"),
        ("x-request-id", "mine-1"),
    ];
    let created = process.client.send("POST", "/api/orders", &headers, &order().to_string());
    assert_eq!((created.status, created.header("x-request-id")), (201, "mine-1"));
    let path = created.header("location");
    let found = process.client.send("GET", &format!("{path}?hush=hush"), &headers[..1], "");
    process.client.send("GET", path, &[("authorization", &format!("Bearer {}", &token[1..]))], "");
    process.client.get("/health/live");
    let (_, log) = process.stop();

    let lines = answered(&log);
    assert_eq!(lines.len(), 3, "no probes: {lines:?}");
    let [post, get, refused] = [&lines[0], &lines[1], &lines[2]];
    for (key, value) in [
        ("level", "INFO".into()),
        ("method", "POST".into()),
        ("route", "/api/orders".into()),
        ("path", "/api/orders".into()),
        ("status", 201.into()),
        ("request_id", "mine-1".into()),
        ("client", "shop".into()),
        ("bytes", Value::from(created.text.len())),
    ] {
        assert_eq!(post[key], value, "{post}");
    }
    assert!(post["elapsed_us"].as_u64().is_some_and(|us| us > 0), "{post}");
    assert!(post["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{post}");
    assert_eq!(get["path"], path, "without the query");
    assert_eq!(get["request_id"], found.header("x-request-id"));
    assert_eq!((&refused["status"], &refused["client"]), (&401.into(), &Value::Null));
    let all = log.concat();
    for secret in [&token["oat_".len()..], "hush", "order_api:order_api"] {
        assert!(!all.contains(secret), "{all}");
    }
}

#[test]
fn it_can_be_silenced_alone_and_failures_are_still_told() {
    let stage = Stage::new();
    let process = Process::start(on(&stage, "127.0.0.1:0").env("ORDER_API_LOG__LEVEL", "info,access=warn"));
    assert_eq!(process.client.post(&order()).status, 201);
    stage.sql("ALTER TABLE outbox ADD CONSTRAINT refused CHECK (aggregateid IS NULL) NOT VALID");
    let failed = process.client.post(&order());
    failed.problem(500, "internal-error");
    let (_, log) = process.stop();
    let lines = answered(&log);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!((&lines[0]["level"], &lines[0]["status"]), (&"WARN".into(), &500.into()));
    // What went wrong is found by the id that the client was given.
    let id = failed.header("x-request-id");
    assert!(log.iter().any(|line| line.contains("a statement failed") && line.contains(id)), "{log:?}");
}

//! Which instances there are: heartbeats, the list, and the client that other services use.

use std::net::TcpListener;

use serde_json::{Value, json};
use service::{
    Health, Secret,
    fleet::{Fleet, FleetConfig},
};

use crate::{
    process::{Process, on},
    stage::{Answer, Client, Stage, wait_for},
    tokens::{TokensFile, token},
};

fn body() -> Value {
    json!({"service": "cdc-relay", "version": "0.1.0", "started": "2026-01-31T12:00:00Z", "state": "streaming"})
}

fn beat(client: &Client, id: &str, body: &Value) -> Answer {
    let path = format!("/api/instances/{id}/heartbeat");
    client.send("POST", &path, &[("content-type", "application/json")], &body.to_string())
}

fn instances(client: &Client) -> Vec<Value> {
    let answer = client.get("/api/instances");
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["instances"].as_array().unwrap().clone()
}

fn ids(client: &Client) -> Vec<String> {
    instances(client).iter().map(|instance| instance["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_heartbeat_is_listed_until_it_is_stale_and_then_forgotten() {
    let stage = Stage::new();
    let service = stage.service_with(|c| c.fleet.stale_after_seconds = 600);
    assert_eq!(instances(&service), Vec::<Value>::new());
    let stored = beat(&service, "relay-2", &body());
    assert_eq!(stored.status, 200, "{stored:?}");
    let stored = stored.json();
    for (key, value) in body().as_object().unwrap() {
        assert_eq!(&stored[key], value);
    }
    assert_eq!((&stored["id"], &stored["stale"]), (&json!("relay-2"), &json!(false)));
    assert_eq!(instances(&service), [stored]);
    let mut other = body();
    other["service"] = json!("a-service");
    beat(&service, "z", &other);
    beat(&service, "relay-1", &body());
    assert_eq!(ids(&service), ["z", "relay-1", "relay-2"], "by service, then by id");
    other["state"] = json!("stopped");
    assert_eq!(beat(&service, "z", &other).json()["state"], "stopped");
    assert_eq!(instances(&service)[0]["state"], "stopped", "the same instance");

    let age = |id: &str, age: &str| {
        stage.sql(&format!(
            "UPDATE instances SET heartbeat_at = now() - interval '{age}' WHERE instance_id = '{id}'"
        ));
    };
    let stale = || instances(&service).iter().map(|i| i["stale"] == true).collect::<Vec<_>>();
    age("z", "9 minutes");
    age("relay-1", "10 minutes");
    assert_eq!(stale(), [false, true, false]);
    age("z", "23 hours 50 minutes");
    age("relay-1", "24 hours");
    assert_eq!(ids(&service), ["z", "relay-2"]);
    assert_eq!(stage.count("instances"), 3, "until the next heartbeat");
    beat(&service, "relay-2", &body());
    assert_eq!(stage.count("instances"), 2);
    // One that comes back after so long is as new.
    age("z", "2 days");
    assert_eq!(beat(&service, "z", &other).status, 200);
    assert_eq!(ids(&service), ["z", "relay-2"]);
}

#[test]
fn what_is_refused_is_told_and_the_last_thing_before_it_is_not() {
    let stage = Stage::new();
    let service = stage.service();
    let longest = "i".repeat(64);
    for id in [longest.as_str(), "a.B_c-1"] {
        assert_eq!(beat(&service, id, &body()).status, 200);
    }
    for id in ["i".repeat(65).as_str(), "a%20b", "%00", "a%2Fb"] {
        beat(&service, id, &body()).problem(400, "invalid-id");
    }
    let mut wrong = body();
    wrong["version"] = json!("v".repeat(65));
    wrong["state"] = json!("\u{0}");
    wrong["started"] = json!("yesterday");
    wrong["extra"] = json!(1);
    let mut fields = beat(&service, "x", &wrong).wrong_fields();
    fields.sort_unstable();
    assert_eq!(fields, ["/extra", "/started", "/state", "/version"]);

    stage.sql(
        "INSERT INTO instances (instance_id, service, version, started_at, state)
         SELECT 'more-' || n, 's', '1', now(), 'x' FROM generate_series(1, 997) AS n",
    );
    assert_eq!(beat(&service, "the-last", &body()).status, 200);
    beat(&service, "one-more", &body()).problem(409, "too-many-instances");
    assert_eq!(beat(&service, "the-last", &body()).status, 200, "who is there stays");
    assert_eq!(instances(&service).len(), 1000);
    stage.sql("UPDATE instances SET heartbeat_at = now() - interval '2 days' WHERE instance_id = 'more-1'");
    // Forgets the silent one, which makes room.
    beat(&service, "the-last", &body());
    assert_eq!(beat(&service, "one-more", &body()).status, 200);
}

#[test]
fn many_at_once_do_not_hold_each_other_up() {
    let stage = Stage::new();
    let service = stage.service();
    std::thread::scope(|scope| {
        for client in 0..8 {
            let (service, stage) = (&service, &stage);
            scope.spawn(move || {
                for round in 0..20 {
                    // Each finds what another wrote to be forgotten.
                    let answer = beat(service, &format!("i-{}", (client + round) % 8), &body());
                    assert_eq!(answer.status, 200, "{answer:?}");
                    stage.sql(&format!(
                        "UPDATE instances SET heartbeat_at = now() - interval '2 days' \
                         WHERE instance_id = 'i-{client}'"
                    ));
                }
            });
        }
    });
}

#[test]
fn the_api_registers_itself_and_says_when_it_stops() {
    let stage = Stage::new();
    let service = stage.service_with(|c| {
        c.fleet.interval_seconds = 1;
        c.fleet.instance = "api-1".into();
    });
    wait_for("the instance to be listed", || ids(&service) == ["api-1"]);
    let listed = &instances(&service)[0];
    assert_eq!((&listed["service"], &listed["state"]), (&json!("order-api"), &json!("serving")));
    service.trigger.request();
    stage.runtime.block_on(service.running).unwrap();
    assert_eq!(stage.value("SELECT state FROM instances"), "stopped");
}

#[test]
fn the_client_outlives_an_api_that_is_killed_and_returns() {
    let stage = Stage::new();
    let (token, entry) = token("relays", "write");
    let file = TokensFile::of(&[&entry]);
    let start = |listen: &str| {
        let mut command = on(&stage, listen);
        command.env("ORDER_API_FLEET__INTERVAL_SECONDS", "0").env("ORDER_API_AUTH__TOKENS_PATH", &file.0);
        Process::start(&mut command)
    };
    let api = start("127.0.0.1:0");
    let address = api.client.address.to_string();
    let config = FleetConfig {
        url: format!("http://{address}"),
        instance: "relay-1".into(),
        token: Secret::new(token),
        interval_seconds: 1,
    };
    let health = Health::default();
    let state = || {
        stage.value("SELECT string_agg(instance_id || ' ' || service || ' ' || state, ',') FROM instances")
    };
    let fleet = Fleet::join(config.check().unwrap(), "cdc-relay", "1.2.3", &health);
    wait_for("the first heartbeat", || state() == "relay-1 cdc-relay starting");
    health.ready("streaming");
    wait_for("another state", || state() == "relay-1 cdc-relay streaming");
    drop(api);
    health.ready("standby");
    let _api = start(&address);
    wait_for("a heartbeat after the API has returned", || state() == "relay-1 cdc-relay standby");
    assert_eq!(stage.value("SELECT version FROM instances"), "1.2.3");
    fleet.leave();
    assert_eq!(state(), "relay-1 cdc-relay stopped");
}

#[test]
fn a_client_whom_nobody_hears_leaves_all_the_same() {
    // It takes connections and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let config = FleetConfig { url, ..FleetConfig::default() };
    let fleet = Fleet::join(config.check().unwrap(), "cdc-relay", "1.2.3", &Health::default());
    silent.accept().unwrap();
    fleet.leave();
    Fleet::join(None, "cdc-relay", "1.2.3", &Health::default()).leave();
}

#[test]
fn a_heartbeat_with_a_key_counts_once() {
    let stage = Stage::new();
    let service = stage.service();
    let keyed = |state: &str| {
        let mut body = body();
        body["state"] = json!(state);
        let headers = [("content-type", "application/json"), ("idempotency-key", "k")];
        service.send("POST", "/api/instances/relay/heartbeat", &headers, &body.to_string())
    };
    let first = keyed("streaming");
    assert_eq!((first.status, first.header("idempotency-replayed")), (200, ""));
    stage.sql("UPDATE instances SET heartbeat_at = now() - interval '1 hour'");
    let again = keyed("streaming");
    assert_eq!((&again.text, again.header("idempotency-replayed")), (&first.text, "true"));
    assert_eq!(stage.value("SELECT heartbeat_at < now() - interval '59 minutes' FROM instances"), "true");
    keyed("standby").problem(422, "idempotency-key-reused");
}

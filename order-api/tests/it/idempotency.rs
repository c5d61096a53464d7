//! Requests with an Idempotency-Key: done once, answered alike.

use serde_json::{Value, json};

use crate::{
    gate::{Gate, Mode},
    stage::{Answer, Client, Stage, order, wait_for},
};

fn post(client: &Client, key: &str, body: &Value) -> Answer {
    let headers = [("content-type", "application/json"), ("idempotency-key", key)];
    client.send("POST", "/api/orders", &headers, &body.to_string())
}

fn confirm(client: &Client, place: &str, key: &str, payment: &str) -> Answer {
    let headers = [("content-type", "application/json"), ("idempotency-key", key)];
    client.send("POST", &format!("{place}/confirm"), &headers, &json!({"paymentId": payment}).to_string())
}

#[test]
fn the_same_request_is_done_once_and_answered_alike() {
    let stage = Stage::new();
    let service = stage.service();
    let first = post(&service, "k-1", &order());
    assert_eq!((first.status, first.header("idempotency-replayed")), (201, ""));
    // The draft's quotes are not part of the key.
    for key in ["k-1", "\"k-1\""] {
        let again = post(&service, key, &order());
        assert_eq!((again.status, &again.text), (201, &first.text));
        assert_eq!(again.header("location"), first.header("location"));
        assert_eq!((again.header("etag"), again.header("idempotency-replayed")), ("\"1\"", "true"));
    }
    assert_eq!(stage.counts(), [1, 2, 1, 1]);
    let place = first.header("location");
    let confirmed = confirm(&service, place, "k-2", "p-1");
    assert_eq!(confirmed.status, 200);
    // What was answered then, whatever has become of the order.
    let cancel = [("content-type", "application/json")];
    assert_eq!(service.send("POST", &format!("{place}/cancel"), &cancel, "{\"reason\": \"r\"}").status, 200);
    let again = confirm(&service, place, "k-2", "p-1");
    assert_eq!((again.status, &again.text), (200, &confirmed.text));
    assert_eq!(stage.count("order_events"), 3);
    let metrics = service.get("/metrics").text;
    assert!(metrics.contains("order_api_orders_created_total 1\n"), "{metrics}");
}

#[test]
fn a_key_stands_for_one_request() {
    let stage = Stage::new();
    let service = stage.service();
    let place = post(&service, "k", &order()).header("location").to_owned();
    let mut other = order();
    other["customerId"] = json!("somebody-else");
    post(&service, "k", &other).problem(422, "idempotency-key-reused");
    // Another route is another request, whether or not it would be allowed.
    confirm(&service, &place, "k", "p").problem(422, "idempotency-key-reused");
    assert_eq!(service.get(&place).json()["status"], "created");
    assert_eq!(stage.counts(), [1, 2, 1, 1]);
    for key in ["", "\"\"", "a\"b", &"k".repeat(256)] {
        post(&service, key, &order()).problem(400, "invalid-header");
    }
    assert_eq!(post(&service, &"k".repeat(255), &order()).status, 201);
    let twice = [("content-type", "application/json"), ("idempotency-key", "a"), ("idempotency-key", "b")];
    service.send("POST", "/api/orders", &twice, &order().to_string()).problem(400, "invalid-header");
}

#[test]
fn what_had_no_effect_is_not_remembered() {
    let stage = Stage::new();
    let service = stage.service();
    assert_eq!(post(&service, "k", &json!({})).status, 422);
    assert_eq!(post(&service, "k", &order()).status, 201);
    let place = service.post(&order()).header("location").to_owned();
    let deliver = |key: &str| {
        let headers = [("content-type", "application/json"), ("idempotency-key", key)];
        service.send("POST", &format!("{place}/cancel"), &headers, "{\"reason\": \"r\"}")
    };
    stage.sql("UPDATE orders SET status = 'ready'");
    deliver("c").problem(409, "order-state");
    stage.sql("UPDATE orders SET status = 'created'");
    assert_eq!(deliver("c").status, 200);
}

/// Many at once with the same key: one does it, all get its answer.
#[test]
fn those_who_arrive_at_once_get_one_answer() {
    let stage = Stage::new();
    let service = stage.service();
    let at_once = |send: &(dyn Fn() -> Answer + Sync)| {
        let answers: Vec<Answer> = std::thread::scope(|scope| {
            let clients: Vec<_> = (0..12).map(|_| scope.spawn(send)).collect();
            clients.into_iter().map(|c| c.join().unwrap()).collect()
        });
        for answer in &answers {
            assert_eq!((answer.status / 100, &answer.text), (2, &answers[0].text), "{answer:?}");
        }
        let done = answers.iter().filter(|a| a.header("idempotency-replayed").is_empty()).count();
        assert_eq!(done, 1);
    };
    for round in 0..10 {
        let key = format!("create-{round}");
        at_once(&|| post(&service, &key, &order()));
        let place = service.post(&order()).header("location").to_owned();
        let key = format!("confirm-{round}");
        at_once(&|| confirm(&service, &place, &key, "p"));
    }
    assert_eq!(stage.counts(), [20, 40, 30, 30]);
}

#[test]
fn an_answer_that_was_lost_is_given_to_the_one_who_asks_again() {
    let stage = Stage::new();
    let gate = Gate::new(&stage.runtime, "127.0.0.1:0".parse().unwrap(), stage.postgres());
    let mut config = stage.config(gate.address);
    config.postgres.check_interval_ms = 60_000;
    config.idempotency.clean_interval_ms = 3_600_000;
    config.postgres.acquire_timeout_ms = 300;
    let service = stage.service_of(&config);
    service.wait_ready();
    let place = service.post(&order()).header("location").to_owned();
    for (n, after) in [(0, Mode::Open), (1, Mode::Shut)] {
        let key = format!("k-{n}");
        gate.lose_answers(1, after);
        let first = post(&service, &key, &order());
        assert_eq!(first.status, if after == Mode::Open { 201 } else { 503 }, "{first:?}");
        gate.set(Mode::Open);
        wait_for("the commit that nobody heard of", || stage.count("orders") == n + 2);
        let again = post(&service, &key, &order());
        assert_eq!((again.status, again.header("idempotency-replayed")), (201, "true"));
        assert_eq!(stage.count("orders"), n + 2);
    }
    // The same for a change, of which the client did not say that it wants it done once.
    let headers = [("content-type", "application/json")];
    let notes = |notes: &str| service.send("PATCH", &place, &headers, &json!({"notes": notes}).to_string());
    assert_eq!(notes("prepared").status, 200);
    gate.lose_answers(1, Mode::Open);
    let answer = notes("lost");
    assert_eq!((answer.status, &answer.json()["version"]), (200, &json!(3)), "{answer:?}");
    assert_eq!(service.get(&place).json(), answer.json());
}

/// A change that is done cannot be done again: asked once more, it would be refused. But it is ours.
#[test]
fn a_change_whose_commit_was_lost_is_not_refused_as_somebody_elses() {
    let stage = Stage::new();
    let gate = Gate::new(&stage.runtime, "127.0.0.1:0".parse().unwrap(), stage.postgres());
    let mut config = stage.config(gate.address);
    config.postgres.check_interval_ms = 60_000;
    config.idempotency.clean_interval_ms = 3_600_000;
    let service = stage.service_of(&config);
    service.wait_ready();
    let json = ("content-type", "application/json");
    let mut written = 0;
    // Of the read and the write, whose answer is the commit's.
    for (lost, if_match) in [(0, None), (1, None), (0, Some("\"2\"")), (1, Some("\"2\""))] {
        let place = service.post(&order()).header("location").to_owned();
        // With both statements prepared.
        assert_eq!(service.send("PATCH", &place, &[json], "{\"notes\": \"prepared\"}").status, 200);
        let headers: Vec<_> = [json].into_iter().chain(if_match.map(|tag| ("if-match", tag))).collect();
        gate.lose_answer_after(lost);
        let answer = service.send("POST", &format!("{place}/confirm"), &headers, "{\"paymentId\": \"p\"}");
        assert_eq!((answer.status, answer.header("etag")), (200, "\"3\""), "{lost} {if_match:?} {answer:?}");
        assert_eq!(service.get(&place).json(), answer.json());
        written += 3;
        assert_eq!(stage.count("order_events"), written);
        // The answer was lost indeed.
        let retries = format!("order_api_database_retries_total {}\n", written / 3);
        assert!(service.get("/metrics").text.contains(&retries), "{lost} {if_match:?}");
    }
}

#[test]
fn keys_are_forgotten_when_their_time_is_over() {
    let stage = Stage::new();
    let service = stage.service_with(|c| {
        c.idempotency.keep_hours = 1;
        c.idempotency.clean_interval_ms = 20;
    });
    for n in 0..3 {
        assert_eq!(post(&service, &format!("k-{n}"), &order()).status, 201);
    }
    stage.sql("UPDATE idempotency_keys SET created_at = now() - interval '59 minutes' WHERE key = 'k-1'");
    stage.sql("UPDATE idempotency_keys SET created_at = now() - interval '61 minutes' WHERE key = 'k-2'");
    wait_for("the old one to go", || stage.count("idempotency_keys") == 2);
    assert_eq!(post(&service, "k-1", &order()).header("idempotency-replayed"), "true");
    assert_eq!(post(&service, "k-2", &order()).header("idempotency-replayed"), "");
}

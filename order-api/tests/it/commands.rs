//! What may be done with an order, and what is not allowed.

use serde_json::{Value, json};

use crate::{
    gate::Gate,
    stage::{Answer, Client, Stage, order},
};

const JSON: (&str, &str) = ("content-type", "application/json");

/// A client that knows one order.
struct Known<'a> {
    client: &'a Client,
    place: String,
}

impl<'a> Known<'a> {
    fn place(client: &'a Client) -> Self {
        Self { client, place: client.post(&order()).header("location").to_owned() }
    }

    fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &Value) -> Answer {
        let headers = [&[JSON], headers].concat();
        self.client.send(method, &format!("{}{path}", self.place), &headers, &body.to_string())
    }

    fn patch(&self, body: &Value) -> Answer {
        self.send("PATCH", "", &[], body)
    }

    fn put(&self, status: &str) -> Answer {
        self.send("PUT", "/status", &[], &json!({"status": status}))
    }

    fn confirm(&self) -> Answer {
        self.send("POST", "/confirm", &[], &json!({"paymentId": "payment-1"}))
    }

    fn cancel(&self) -> Answer {
        self.send("POST", "/cancel", &[], &json!({"reason": "Out of stock"}))
    }

    fn get(&self) -> Value {
        self.client.get(&self.place).json()
    }
}

#[test]
fn an_order_goes_its_way_and_every_step_is_an_event() {
    let stage = Stage::new();
    let service = stage.service();
    let known = Known::place(&service);
    let items = json!([{"menuItemId": "tea", "name": "Tea", "price": "1.10", "quantity": 3}]);
    assert_eq!(known.patch(&json!({"items": items, "notes": "Ring\ntwice"})).json()["totalAmount"], "3.30");
    assert_eq!(known.confirm().json()["paymentId"], "payment-1");
    for status in ["preparing", "ready", "delivered"] {
        let answer = known.put(status);
        assert_eq!((answer.status, &answer.json()["status"]), (200, &json!(status)));
        assert_eq!(answer.header("etag"), format!("\"{}\"", answer.json()["version"]));
    }
    let now = known.get();
    assert_eq!((&now["version"], &now["notes"]), (&json!(6), &json!("Ring\ntwice")));
    assert_eq!(now["items"], items);

    let page = service.get(&format!("{}/events", known.place)).json();
    assert_eq!(page["nextCursor"], Value::Null);
    let events = page["events"].as_array().unwrap();
    let told: Vec<_> =
        events.iter().map(|e| (e["version"].as_i64().unwrap(), e["eventType"].as_str().unwrap())).collect();
    let types =
        ["OrderCreated", "OrderUpdated", "OrderConfirmed", "OrderUpdated", "OrderUpdated", "OrderUpdated"];
    assert_eq!(told, (1..).zip(types).collect::<Vec<_>>());
    let outbox = "SELECT jsonb_agg(payload ORDER BY payload->'version') FROM outbox";
    assert_eq!(stage.value(outbox).parse::<Value>().unwrap(), json!(events));
    assert_eq!(stage.count("order_items"), 1, "lines that went are gone");
}

#[test]
fn an_order_is_shown_as_it_was() {
    let stage = Stage::new();
    let service = stage.service();
    let known = Known::place(&service);
    let first = known.get();
    known.patch(&json!({"notes": "x"}));
    let second = known.get();
    known.cancel();
    let at = |version: u32| service.get(&format!("{}?at_version={version}", known.place));
    assert_eq!((at(1).json(), at(2).json(), at(3).json()), (first, second, known.get()));
    assert_eq!(at(3).json()["cancellationReason"], "Out of stock");
    assert_eq!(at(4).problem(404, "version-not-found")["currentVersion"], 3);
    service.get("/api/orders/none?at_version=1").problem(404, "order-not-found");
    for bad in ["0", "-1", "1001", "x", "", "1&at_version=2"] {
        service.get(&format!("{}?at_version={bad}", known.place)).problem(400, "invalid-query");
    }
    let events = |query: &str| service.get(&format!("{}/events?{query}", known.place));
    let page = events("limit=2").json();
    assert_eq!(page["events"].as_array().unwrap().len(), 2);
    let rest = events(&format!("limit=2&cursor={}", page["nextCursor"].as_str().unwrap())).json();
    assert_eq!((&rest["events"][0]["version"], &rest["nextCursor"]), (&json!(3), &Value::Null));
    for bad in ["limit=0", "limit=101", "cursor=x", "cursor=dmVyc2lvbiAtMQ", "page=1"] {
        events(bad).problem(400, "invalid-query");
    }
    service.get("/api/orders/none/events").problem(404, "order-not-found");
}

/// From each state, what is refused: with the reason, the state, and nothing written.
#[test]
fn the_state_decides_what_is_allowed() {
    let stage = Stage::new();
    let service = stage.service();
    // The way to a state, and where one may go from there.
    let ways: [(&str, &[&str], &[&str]); 6] = [
        ("created", &[], &["confirmed", "cancelled"]),
        ("confirmed", &["confirmed"], &["preparing", "cancelled"]),
        ("preparing", &["confirmed", "preparing"], &["ready"]),
        ("ready", &["confirmed", "preparing", "ready"], &["delivered"]),
        ("delivered", &["confirmed", "preparing", "ready", "delivered"], &[]),
        ("cancelled", &["cancelled"], &[]),
    ];
    let go = |known: &Known<'_>, to: &str| match to {
        "confirmed" => known.confirm(),
        "cancelled" => known.cancel(),
        other => known.put(other),
    };
    for (state, way, allowed) in ways {
        let arrive = || {
            let known = Known::place(&service);
            for step in way {
                assert_eq!(go(&known, step).status, 200, "{state}");
            }
            known
        };
        for to in ["confirmed", "preparing", "ready", "delivered", "cancelled"] {
            let known = arrive();
            let before = known.get();
            let answer = go(&known, to);
            if allowed.contains(&to) {
                assert_eq!((answer.status, &answer.json()["status"]), (200, &json!(to)), "{state} to {to}");
            } else if to == state && !matches!(to, "confirmed" | "cancelled") {
                assert_eq!((answer.status, answer.json()), (200, before), "{state} is so already");
            } else {
                let problem = answer.problem(409, "order-state");
                assert_eq!(problem["currentStatus"], state);
                assert_eq!(problem["currentVersion"], before["version"]);
                assert!(problem["detail"].as_str().unwrap().contains(state), "{problem}");
                assert_eq!(known.get(), before);
            }
        }
        let known = arrive();
        let items =
            known.patch(&json!({"items": [{"menuItemId": "m", "name": "n", "price": 1, "quantity": 1}]}));
        assert_eq!(items.status, if state == "created" { 200 } else { 409 }, "items of a {state} one");
        let notes = known.patch(&json!({"notes": "n"}));
        assert_eq!(
            notes.status,
            if matches!(state, "delivered" | "cancelled") { 409 } else { 200 },
            "notes of a {state} one"
        );
    }
}

#[test]
fn a_status_that_needs_more_than_its_name_says_where_it_is_set() {
    let stage = Stage::new();
    let service = stage.service();
    let known = Known::place(&service);
    for (status, route) in [("confirmed", "/confirm"), ("cancelled", "/cancel")] {
        let answer = known.put(status);
        assert_eq!(answer.wrong_fields(), ["/status"]);
        assert!(answer.text.contains(route), "{answer:?}");
    }
    assert_eq!(known.put("lost").wrong_fields(), ["/status"]);
    assert_eq!(known.put("created").json(), known.get());
    assert_eq!(stage.count("order_events"), 1);
}

#[test]
fn what_is_already_so_is_not_written_again() {
    let stage = Stage::new();
    let service = stage.service();
    let known = Known::place(&service);
    let before = known.get();
    for same in [
        json!({"items": before["items"]}),
        json!({"notes": null}),
        json!({"items": order()["items"], "notes": null}),
    ] {
        let answer = known.patch(&same);
        assert_eq!((answer.status, answer.json(), answer.header("etag")), (200, before.clone(), "\"1\""));
    }
    assert_eq!(stage.count("order_events"), 1);
}

#[test]
fn a_lost_update_is_refused_where_the_client_asks_for_it() {
    let stage = Stage::new();
    let service = stage.service();
    let known = Known::place(&service);
    let patch =
        |tag: &str, notes: &str| known.send("PATCH", "", &[("if-match", tag)], &json!({"notes": notes}));
    assert_eq!(patch("\"1\"", "a").status, 200);
    let lost = patch("\"1\"", "b");
    assert_eq!(lost.problem(412, "version-mismatch")["currentVersion"], 2);
    for stale in ["W/\"2\"", "\"1\", \"3\"", "\"\""] {
        patch(stale, "b").problem(412, "version-mismatch");
    }
    assert_eq!(patch("\"7\", \"2\"", "c").status, 200);
    assert_eq!(patch("*", "d").status, 200);
    for bad in ["2", "\"2", "\"2\" \"3", ""] {
        patch(bad, "e").problem(400, "invalid-header");
    }
    assert_eq!((&known.get()["notes"], &known.get()["version"]), (&json!("d"), &json!(4)));
    // Of those who all saw the same version, one wins.
    let tag = "\"4\"";
    let wins = std::thread::scope(|scope| {
        let patch = &patch;
        let clients: Vec<_> =
            (0..16).map(|n| scope.spawn(move || patch(tag, &format!("n{n}")).status)).collect();
        let statuses: Vec<_> = clients.into_iter().map(|c| c.join().unwrap()).collect();
        assert!(statuses.iter().all(|s| matches!(s, 200 | 412)), "{statuses:?}");
        statuses.iter().filter(|s| **s == 200).count()
    });
    assert_eq!((wins, &known.get()["version"]), (1, &json!(5)));
    for path in ["/confirm", "/cancel"] {
        known
            .send("POST", path, &[("if-match", "\"1\"")], &json!({"paymentId": "p", "reason": "r"}))
            .wrong_fields();
    }
    known
        .send("POST", "/confirm", &[("if-match", "\"1\"")], &json!({"paymentId": "p"}))
        .problem(412, "version-mismatch");
}

#[test]
fn who_has_the_newest_version_is_told_so() {
    let stage = Stage::new();
    let service = stage.service();
    let known = Known::place(&service);
    let get = |tag: &str| service.send("GET", &known.place, &[("if-none-match", tag)], "");
    for fresh in ["\"1\"", "W/\"1\"", "\"0\", \"1\"", "*"] {
        let answer = get(fresh);
        assert_eq!((answer.status, answer.header("etag"), answer.text.as_str()), (304, "\"1\"", ""));
    }
    assert_eq!(get("\"2\"").status, 200);
}

#[test]
fn bodies_of_commands_have_limits() {
    let stage = Stage::new();
    let service = stage.service();
    let known = Known::place(&service);
    let wrong = |method: &str, path: &str, body: &Value| known.send(method, path, &[], body).wrong_fields();
    assert_eq!(known.patch(&json!({"notes": "é".repeat(1000)})).status, 200);
    assert_eq!(wrong("PATCH", "", &json!({"notes": "é".repeat(1001)})), ["/notes"]);
    assert_eq!(wrong("PATCH", "", &json!({"notes": "\u{0}"})), ["/notes"]);
    assert_eq!(wrong("PATCH", "", &json!({})), [""]);
    assert_eq!(wrong("PATCH", "", &json!([])), [""]);
    assert_eq!(wrong("PATCH", "", &json!({"items": null})), ["/items"]);
    assert_eq!(wrong("PATCH", "", &json!({"items": [], "status": "ready"})), ["/status", "/items"]);
    let too_fine = json!({"items": [{"menuItemId": "m", "name": "n", "price": "0.001", "quantity": 1}]});
    assert_eq!(wrong("PATCH", "", &too_fine), ["/items/0/price"]);
    let items = |count: usize| json!({"items": vec![order()["items"][0].clone(); count]});
    assert_eq!(known.patch(&items(200)).status, 200);
    assert_eq!(wrong("PATCH", "", &items(201)), ["/items"]);
    assert_eq!(wrong("PUT", "/status", &json!({})), ["/status"]);
    assert_eq!(wrong("POST", "/confirm", &json!({"paymentId": "p".repeat(65)})), ["/paymentId"]);
    assert_eq!(wrong("POST", "/cancel", &json!({"reason": "r".repeat(501)})), ["/reason"]);
    assert_eq!(known.send("POST", "/confirm", &[], &json!({"paymentId": "p".repeat(64)})).status, 200);
    assert_eq!(known.send("POST", "/cancel", &[], &json!({"reason": "r".repeat(500)})).status, 200);
    for path in ["", "/status", "/confirm", "/cancel"] {
        let method = if path.is_empty() {
            "PATCH"
        } else if path == "/status" {
            "PUT"
        } else {
            "POST"
        };
        let nobody = |id: &str| {
            let body = json!({"notes": "n", "status": "ready", "paymentId": "p", "reason": "r"});
            let one = match path {
                "" => "notes",
                "/status" => "status",
                "/confirm" => "paymentId",
                _ => "reason",
            };
            service.send(
                method,
                &format!("/api/orders/{id}{path}"),
                &[JSON],
                &json!({one: body[one]}).to_string(),
            )
        };
        nobody("none").problem(404, "order-not-found");
        nobody("a%20b").problem(400, "invalid-id");
    }
}

#[test]
fn a_clients_own_id_is_taken_once() {
    let stage = Stage::new();
    let service = stage.service();
    let mut body = order();
    body["orderId"] = json!("x".repeat(64));
    let answer = service.post(&body);
    assert_eq!(
        (answer.status, answer.header("location")),
        (201, format!("/api/orders/{}", "x".repeat(64)).as_str())
    );
    body["items"] = json!([order()["items"][1]]);
    service.post(&body).problem(409, "order-exists");
    for wrong in [json!("x".repeat(65)), json!("a b"), json!(1), json!("")] {
        body["orderId"] = wrong;
        assert_eq!(service.post(&body).wrong_fields(), ["/orderId"]);
    }
    assert_eq!(stage.counts(), [1, 2, 1, 1]);
}

#[test]
fn an_order_changes_a_thousand_times_at_most() {
    let stage = Stage::new();
    let service = stage.service();
    let known = Known::place(&service);
    stage.sql("UPDATE orders SET version = 999");
    assert_eq!(known.patch(&json!({"notes": "last"})).json()["version"], 1000);
    known.patch(&json!({"notes": "one more"})).problem(409, "order-state");
}

#[test]
fn a_change_is_two_round_trips() {
    let stage = Stage::new();
    let gate = Gate::new(&stage.runtime, "127.0.0.1:0".parse().unwrap(), stage.postgres());
    let mut config = stage.config(gate.address);
    config.postgres.check_interval_ms = 60_000;
    config.idempotency.clean_interval_ms = 3_600_000;
    let service = stage.service_of(&config);
    service.wait_ready();
    let known = Known::place(&service);
    // The first connects and prepares.
    assert_eq!(known.patch(&json!({"notes": "0"})).status, 200);
    let before = gate.sent();
    for n in 1..=10 {
        let key = format!("key-{n}");
        let answer = known.send("PATCH", "", &[("idempotency-key", &key)], &json!({"notes": n.to_string()}));
        assert_eq!(answer.status, 200);
    }
    assert_eq!(gate.sent() - before, 20);
}

#[test]
fn the_list_is_by_customer_status_and_time_and_stable_while_orders_come_in() {
    let stage = Stage::new();
    let service = stage.service();
    let post = |customer: &str| {
        let mut body = order();
        body["customerId"] = json!(customer);
        service.post(&body).json()
    };
    let placed: Vec<Value> = (0..25).map(|n| post(if n % 5 == 0 { "five" } else { "other" })).collect();
    // Two of the same instant: the id decides.
    stage.sql("UPDATE orders SET created_at = (SELECT min(created_at) FROM orders WHERE customer_id = 'other') WHERE customer_id = 'other'");
    let ids = |page: &Value| -> Vec<String> {
        page["orders"].as_array().unwrap().iter().map(|o| o["orderId"].as_str().unwrap().to_owned()).collect()
    };
    let walk = |query: &str| {
        let (mut all, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = service.get(&format!("/api/orders?{query}{cursor}")).json();
            all.extend(ids(&page));
            // A newer one must not move the pages.
            post("late");
            let Some(next) = page["nextCursor"].as_str() else { return all };
            cursor = format!("&cursor={next}");
        }
    };
    let all = walk("limit=7");
    assert_eq!(all.len(), 25, "each once, none that came later");
    let newest_first = "SELECT string_agg(order_id, ' ' ORDER BY created_at DESC, order_id DESC) FROM orders WHERE customer_id <> 'late'";
    assert_eq!(all.join(" "), stage.value(newest_first));
    assert_eq!(walk("customer_id=five&limit=2").len(), 5);
    let one = &placed[3];
    let path = format!("/api/orders/{}/cancel", one["orderId"].as_str().unwrap());
    service.send("POST", &path, &[JSON], "{\"reason\": \"r\"}");
    assert_eq!(walk("status=cancelled"), [one["orderId"].as_str().unwrap()]);
    assert_eq!(walk("status=cancelled&status=created&customer_id=other&limit=100").len(), 20);
    let page = service.get("/api/orders?customer_id=five&limit=1").json();
    assert_eq!(
        page["orders"][0],
        service.get(&format!("/api/orders/{}", ids(&page)[0])).json(),
        "whole orders"
    );
    let time = page["orders"][0]["createdAt"].as_str().unwrap();
    assert_eq!(walk(&format!("customer_id=five&created_from={time}")).len(), 1);
    assert_eq!(walk(&format!("customer_id=five&created_to={time}")).len(), 4);
    // Its own cursor only.
    let cursor = page["nextCursor"].as_str().unwrap();
    service.get(&format!("/api/orders?customer_id=other&cursor={cursor}")).problem(400, "invalid-query");
    let list = |query: &str| service.get(&format!("/api/orders?{query}"));
    assert_eq!(list("limit=100").status, 200);
    for bad in [
        "limit=101",
        "limit=0",
        "limit=x",
        "status=lost",
        "customer_id=a%20b",
        "created_from=today",
        "cursor=AAAA",
        "x=1",
        "limit=1&limit=2",
        "created_to=2026-01-01",
        "limit=%ff",
    ] {
        list(bad).problem(400, "invalid-query");
    }
    assert_eq!(list("customer_id=nobody").json(), json!({"orders": [], "nextCursor": null}));
}

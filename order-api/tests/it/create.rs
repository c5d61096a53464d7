//! Orders that are taken, and what is written.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::{
    gate::Gate,
    stage::{Stage, order},
};

#[test]
fn an_order_is_taken_and_read_back() {
    let stage = Stage::new();
    let service = stage.service();
    let answer = service.post(&order());
    assert_eq!(answer.status, 201, "{answer:?}");
    let placed = answer.json();
    let id = placed["orderId"].as_str().unwrap();
    assert_eq!(answer.header("location"), format!("/api/orders/{id}"));
    assert_eq!(uuid::Uuid::parse_str(id).unwrap().get_version_num(), 7);
    for (field, value) in [
        ("status", json!("created")),
        ("version", json!(1)),
        ("customerId", json!("customer-1")),
        ("restaurantId", json!("restaurant-1")),
        ("currency", json!("EUR")),
        ("totalAmount", json!("16.40")),
    ] {
        assert_eq!(placed[field], value, "{field}");
    }
    assert_eq!(
        placed["items"][1],
        json!({"menuItemId": "vitamin-c", "name": "Vitamin C, 20 tablets", "price": "3.90", "quantity": 1})
    );
    let read = service.get(answer.header("location"));
    assert_eq!((read.status, read.json()), (200, placed));
}

#[test]
fn everything_is_written_in_one_transaction_as_the_contract_says() {
    let stage = Stage::new();
    let service = stage.service();
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let headers = [("content-type", "application/json; charset=utf-8"), ("traceparent", trace)];
    let placed = service.send("POST", "/api/orders", &headers, &order().to_string()).json();
    assert_eq!(stage.counts(), [1, 2, 1, 1]);
    let transactions = stage.value(
        "SELECT count(DISTINCT x) FROM (SELECT xmin::text x FROM orders UNION ALL SELECT xmin::text FROM order_items \
         UNION ALL SELECT xmin::text FROM order_events UNION ALL SELECT xmin::text FROM outbox) all_rows",
    );
    assert_eq!(transactions, "1");

    let row: Value = serde_json::from_str(&stage.value("SELECT to_jsonb(outbox) FROM outbox")).unwrap();
    assert_eq!(row["aggregatetype"], "order");
    assert_eq!(row["aggregateid"], placed["orderId"]);
    assert_eq!(row["type"], "OrderCreated");
    assert_eq!(row["traceparent"], trace);
    let event = &row["payload"];
    assert_eq!(event["eventId"], row["id"]);
    assert_eq!(event["occurredOn"], placed["createdAt"]);
    assert_eq!(event["items"], placed["items"]);
    let schema = include_str!("../../../contracts/events/OrderCreated.schema.json");
    let validator = jsonschema::options()
        .should_validate_formats(true)
        .build(&serde_json::from_str(schema).unwrap())
        .unwrap();
    let problems: Vec<_> = validator.iter_errors(event).map(|e| e.to_string()).collect();
    assert_eq!(problems, Vec::<String>::new());
    let stored = "SELECT payload = (SELECT payload FROM outbox) AND event_id = (SELECT id FROM outbox) \
                  AND version = 1 AND event_type = 'OrderCreated' FROM order_events";
    assert_eq!(stage.value(stored), "true");
}

#[test]
fn a_trace_context_that_is_not_one_is_left_out() {
    let stage = Stage::new();
    let service = stage.service();
    let headers = [("content-type", "application/json"), ("traceparent", "00-nonsense")];
    assert_eq!(service.send("POST", "/api/orders", &headers, &order().to_string()).status, 201);
    assert_eq!(stage.value("SELECT count(*) FROM outbox WHERE traceparent IS NULL"), "1");
}

#[test]
fn an_order_is_one_round_trip_and_so_is_reading_it() {
    let stage = Stage::new();
    let gate = Gate::new(&stage.runtime, "127.0.0.1:0".parse().unwrap(), stage.postgres());
    let mut config = stage.config(gate.address);
    config.postgres.check_interval_ms = 60_000;
    let service = stage.service_of(&config);
    service.wait_ready();
    // The first of each connects and prepares.
    let place = service.post(&order()).header("location").to_owned();
    assert_eq!(service.get(&place).status, 200);
    let before = gate.sent();
    for _ in 0..10 {
        assert_eq!(service.post(&order()).status, 201);
        assert_eq!(service.get(&place).status, 200);
    }
    assert_eq!(gate.sent() - before, 20);
}

#[test]
fn fifty_clients_at_once_lose_nothing() {
    const CLIENTS: usize = 50;
    const EACH: usize = 20;
    let stage = Stage::new();
    let service = stage.service();
    let ids: Vec<String> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|n| {
                let client = service.client.clone();
                scope.spawn(move || {
                    let mut body = order();
                    body["customerId"] = format!("customer-{n}").into();
                    let place = |_| {
                        let answer = client.post(&body);
                        assert_eq!(answer.status, 201, "{answer:?}");
                        answer.json()["orderId"].as_str().unwrap().to_owned()
                    };
                    (0..EACH).map(place).collect::<Vec<_>>()
                })
            })
            .collect();
        clients.into_iter().flat_map(|c| c.join().unwrap()).collect()
    });
    assert_eq!(ids.iter().collect::<HashSet<_>>().len(), CLIENTS * EACH);
    let all = CLIENTS * EACH;
    assert_eq!(stage.counts(), [all, 2 * all, all, all]);
    let busy = stage.value(
        "SELECT count(*) FROM pg_stat_activity WHERE usename = 'order_api' AND datname = current_database()",
    );
    assert!(busy.parse::<u32>().unwrap() <= 17, "16 of the pool and one that watches, not {busy}");
}

#[test]
fn what_happened_is_counted() {
    let stage = Stage::new();
    let service = stage.service();
    let id = service.post(&order()).json()["orderId"].as_str().unwrap().to_owned();
    service.get(&format!("/api/orders/{id}"));
    service.post(&json!({}));
    service.get("/no/such/route");
    service.send("BREW", "/api/orders", &[], "");
    let metrics = service.get("/metrics").text;
    for line in [
        "order_api_orders_created_total 1",
        r#"order_api_http_requests_total{method="POST",route="/api/orders",status="201"} 1"#,
        r#"order_api_http_requests_total{method="POST",route="/api/orders",status="422"} 1"#,
        r#"order_api_http_requests_total{method="GET",route="/api/orders/{id}",status="200"} 1"#,
        r#"order_api_http_requests_total{method="GET",route="unmatched",status="404"} 1"#,
        r#"order_api_http_requests_total{method="other",route="/api/orders",status="405"} 1"#,
        r#"order_api_http_request_duration_seconds_count{method="POST",route="/api/orders"} 2"#,
        "order_api_database_connections_max 16",
        "order_api_database_up 1",
        "order_api_database_retries_total 0",
        "# EOF",
    ] {
        assert!(metrics.lines().any(|l| l == line), "no line {line} in\n{metrics}");
    }
    assert!(metrics.contains(r#"order_api_database_connections{state="idle"}"#), "{metrics}");
    assert!(!metrics.contains(&id), "an order's id is no label");
}

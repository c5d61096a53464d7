//! The read model: orders as documents, asked for by HTTP while events are applied.

use std::{fs, time::Duration};

use serde_json::{Value, json};

use crate::{
    outage::{allow_connections, terminate_backends},
    records::{Record, confirmed, created},
    stage::{Running, Stage, eventually, on_stage},
};

/// An answer, whole.
struct Answer {
    status: u16,
    headers: ureq::http::HeaderMap,
    body: Value,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// That it is a problem of this kind; gives back its detail.
    fn problem(&self, status: u16, kind: &str) -> &str {
        assert_eq!((self.status, self.header("content-type")), (status, "application/problem+json"));
        assert_eq!(self.body["type"], format!("/problems/{kind}"), "{}", self.body);
        self.body["detail"].as_str().unwrap()
    }
}

async fn ask(consumer: &Running, path: &str, if_none_match: &str) -> Answer {
    let (url, known) = (consumer.url(path), if_none_match.to_owned());
    let ask = move || {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(30)))
            .build()
            .into();
        let mut answer = agent.get(&url).header("if-none-match", known).call().unwrap();
        let body = answer.body_mut().read_to_string().unwrap();
        let body = if body.is_empty() { Value::Null } else { serde_json::from_str(&body).unwrap() };
        Answer { status: answer.status().as_u16(), headers: answer.headers().clone(), body }
    };
    tokio::task::spawn_blocking(ask).await.unwrap()
}

fn golden(name: &str) -> Value {
    let path = format!("{}/../contracts/events/{name}.example.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

async fn until_applied(stage: &Stage, orders: usize) {
    stage.until_number("SELECT count(*) FROM order_views", i64::try_from(orders).unwrap()).await;
}

#[test]
fn the_golden_events_become_a_document() {
    on_stage(1, async |stage| {
        let consumer = stage.start("order-view").await;
        let [mut first, mut updated, confirmed, cancelled] =
            ["OrderCreated", "OrderUpdated", "OrderConfirmed", "OrderCancelled"].map(golden);
        first["notes"] = json!("Ring twice");
        updated.as_object_mut().unwrap().remove("notes");
        let path = format!("/api/orders/{}", first["aggregateId"].as_str().unwrap());
        let version = async |version: i64| {
            stage.until_number("SELECT version FROM order_views", version).await;
            ask(&consumer, &path, "").await
        };
        let mut document = json!({
            "orderId": first["aggregateId"], "status": "created", "version": 1, "notes": "Ring twice",
            "createdAt": first["occurredOn"], "updatedAt": first["occurredOn"],
        });
        let tell = |document: &mut Value, event: &Value| {
            for field in ["customerId", "restaurantId", "currency", "totalAmount", "items"] {
                document[field] = event[field].clone();
            }
        };
        tell(&mut document, &first);
        stage.produce([Record::of(&first)]).await;
        let answer = version(1).await;
        assert_eq!((answer.status, &answer.body, answer.header("etag")), (200, &document, "\"1\""));

        // An update tells all there is, so one without notes has taken them away. Then two in one batch, or in two.
        stage.produce([&updated, &confirmed].map(Record::of)).await;
        tell(&mut document, &updated);
        document.as_object_mut().unwrap().remove("notes");
        for (field, value) in [
            ("status", json!("confirmed")),
            ("version", json!(3)),
            ("paymentId", confirmed["paymentId"].clone()),
            ("updatedAt", confirmed["occurredOn"].clone()),
        ] {
            document[field] = value;
        }
        assert_eq!(version(3).await.body, document);

        stage.produce([Record::of(&cancelled)]).await;
        document["status"] = json!("cancelled");
        document["version"] = json!(4);
        document["cancellationReason"] = cancelled["reason"].clone();
        document["updatedAt"] = cancelled["occurredOn"].clone();
        let answer = version(4).await;
        assert_eq!((&answer.body, answer.header("etag")), (&document, "\"4\""));

        for known in ["\"4\"", "W/\"4\"", "\"3\", \"4\"", "*"] {
            let same = ask(&consumer, &path, known).await;
            assert_eq!(
                (same.status, &same.body, same.header("etag")),
                (304, &Value::Null, "\"4\""),
                "{known}"
            );
        }
        assert_eq!(ask(&consumer, &path, "\"3\"").await.status, 200);
    });
}

#[test]
fn what_is_asked_wrongly_is_told_as_the_order_api_tells_it() {
    on_stage(1, async |stage| {
        let consumer = stage.start("order-view").await;
        let problem = async |path: &str, status: u16, kind: &str| {
            ask(&consumer, path, "").await.problem(status, kind).to_owned()
        };
        assert!(problem("/api/orders/nobodys", 404, "order-not-found").await.contains("nobodys"));
        problem("/api/orders/a%20b", 400, "invalid-id").await;
        problem("/api/orders/%ff", 400, "invalid-id").await;
        problem(&format!("/api/orders/{}", "x".repeat(65)), 400, "invalid-id").await;
        for (query, told) in [
            ("", "customer_id"),
            ("?customer_id=a%20b", "customer_id"),
            ("?customer_id=c&colour=red", "colour is unknown"),
            ("?customer_id=c&status=eaten", "status"),
            ("?customer_id=c&limit=101", "from 1 to 100"),
            ("?customer_id=c&cursor=x", "cursor"),
        ] {
            let detail = problem(&format!("/api/orders{query}"), 400, "invalid-query").await;
            assert!(detail.contains(told), "{query}: {detail}");
        }
        problem("/api/orders/o-1?at_version=1", 400, "invalid-query").await;
        let none = ask(&consumer, "/api/orders?customer_id=nobody", "").await;
        assert_eq!((none.status, none.body), (200, json!({"orders": [], "nextCursor": null})));
    });
}

/// The n-th order of a customer, a second after the one before; every third one at the same time as its predecessor.
fn placed(customer: &str, n: usize) -> Value {
    let mut body = created(&format!("{customer}-{n:03}"));
    body["customerId"] = json!(customer);
    body["occurredOn"] = json!(format!("2026-11-21T12:00:{:02}Z", n - n % 3 / 2));
    body
}

#[test]
fn pages_go_back_from_the_newest_and_stay_as_they_are_while_orders_come() {
    on_stage(3, async |stage| {
        const ORDERS: usize = 30;
        let consumer = stage.start("order-view").await;
        let others = (0..ORDERS).map(|n| placed("other", n));
        let paid = (0..ORDERS).step_by(2).map(|n| confirmed(&format!("mine-{n:03}"), 2));
        let events = (0..ORDERS).map(|n| placed("mine", n)).chain(others).chain(paid);
        stage.produce(events.map(|body| Record::of(&body))).await;
        until_applied(&stage, 2 * ORDERS).await;
        stage.until_number("SELECT count(*) FROM order_views WHERE status = 'confirmed'", 15).await;

        let (mut cursor, mut seen, mut come) = (String::new(), Vec::new(), ORDERS);
        loop {
            let path = format!("/api/orders?customer_id=mine&limit=7{cursor}");
            let page = ask(&consumer, &path, "").await.body;
            let orders = page["orders"].as_array().unwrap();
            assert!(orders.len() <= 7, "{page}");
            seen.extend(orders.iter().map(|order| order["orderId"].as_str().unwrap().to_owned()));
            // Newer ones, of which the pages that follow must know nothing.
            stage.produce((come..come + 5).map(|n| Record::of(&placed("mine", n)))).await;
            come += 5;
            until_applied(&stage, ORDERS + come).await;
            let Some(next) = page["nextCursor"].as_str() else { break };
            cursor = format!("&cursor={next}");
        }
        let newest_first: Vec<String> = (0..ORDERS).rev().map(|n| format!("mine-{n:03}")).collect();
        assert_eq!(seen, newest_first);

        let path = "/api/orders?customer_id=mine&status=confirmed&status=ready&limit=100";
        let page = ask(&consumer, path, "").await.body;
        let orders = page["orders"].as_array().unwrap();
        assert_eq!((orders.len(), &page["nextCursor"]), (15, &Value::Null));
        assert!(orders.iter().all(|order| order["paymentId"] == "p-1"), "{page}");
    });
}

#[test]
fn while_the_database_is_away_it_says_when_to_come_again() {
    on_stage(1, async |stage| {
        let consumer = stage.start("order-view").await;
        stage.produce([Record::of(&created("o-1"))]).await;
        until_applied(&stage, 1).await;
        allow_connections(&stage, false).await;
        terminate_backends(&stage).await;
        for path in ["/api/orders/o-1", "/api/orders?customer_id=c-1"] {
            let away = ask(&consumer, path, "").await;
            away.problem(503, "database-unavailable");
            assert_eq!(away.header("retry-after"), "1");
        }
        allow_connections(&stage, true).await;
        eventually("it answers again", async || {
            Some(ask(&consumer, "/api/orders/o-1", "").await.status).filter(|status| *status == 200)
        })
        .await;
    });
}

//! A client of the order API, who asks again until it is answered.

use std::time::Duration;

use fastrand::Rng;
use serde_json::{Value, json};
use ureq::{Agent, http::Method};
use uuid::Uuid;

use super::{LoadReport, gate::Gate};

/// The rest between two requests: what the rate follows from, some 20 a second and client.
const REST_MILLISECONDS: std::ops::Range<u64> = 10..80;
/// How long an answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// The rest before a request is sent again.
const BACKOFF: Duration = Duration::from_millis(200);
/// The most orders a client has open; then it goes on with one of them.
const OPEN_MAX: usize = 40;

/// An order that may still change.
#[derive(Debug)]
struct Open {
    id: String,
    stage: usize,
}

/// Where an order goes by `PUT …/status`, one after the other, once it is confirmed.
const STAGES: [&str; 3] = ["preparing", "ready", "delivered"];

/// A request.
#[derive(Debug)]
struct Asked {
    method: Method,
    path: String,
    body: Value,
}

struct Client<'g> {
    url: &'g str,
    agent: Agent,
    gate: &'g Gate,
    report: LoadReport,
}

/// Asks until it is stopped.
pub(super) fn write(url: &str, mut random: Rng, gate: &Gate) -> LoadReport {
    let config = Agent::config_builder().timeout_global(Some(ANSWER_LIMIT)).http_status_as_error(false);
    let agent = config.build().new_agent();
    let mut client = Client { url, agent, gate, report: LoadReport::default() };
    let mut open: Vec<Open> = Vec::new();
    while gate.pass(Duration::from_millis(random.u64(REST_MILLISECONDS))) {
        let new = open.is_empty() || (open.len() < OPEN_MAX && random.u32(0..3) == 0);
        if new {
            let asked = Asked { method: Method::POST, path: "/api/orders".into(), body: order(&mut random) };
            let id = client.ask(&asked).and_then(|order| Some(order["orderId"].as_str()?.to_owned()));
            open.extend(id.map(|id| Open { id, stage: 0 }));
            continue;
        }
        let chosen = random.usize(..open.len());
        let order = &mut open[chosen];
        let asked = change(order, &mut random);
        let (before, answer) = (order.stage, client.ask(&asked));
        let over = answer.as_ref().is_none_or(|order| order["status"] == "cancelled");
        order.stage = match answer.as_ref().and_then(|order| order["status"].as_str()) {
            Some("confirmed") => 1,
            Some(status) => STAGES.iter().position(|s| *s == status).map_or(before, |at| at + 2),
            None => before,
        };
        if over || order.stage > STAGES.len() {
            open.swap_remove(chosen);
        }
    }
    client.report
}

/// What is done with an order next. Nobody else changes it, so little of it is refused.
fn change(order: &Open, random: &mut Rng) -> Asked {
    let path = |end: &str| format!("/api/orders/{}{end}", order.id);
    let post = |end: &str, body| Asked { method: Method::POST, path: path(end), body };
    let notes = format!("Ring {} times", random.u32(1..1_000));
    match (random.u32(0..10), order.stage) {
        (0..3, _) => Asked { method: Method::PATCH, path: path(""), body: json!({"notes": notes}) },
        (3..5, 0) => Asked { method: Method::PATCH, path: path(""), body: json!({"items": items(random)}) },
        (5, 0 | 1) => post("/cancel", json!({"reason": "They changed their mind"})),
        (_, 0) => post("/confirm", json!({"paymentId": format!("payment-{}", random.u32(..))})),
        (_, stage) => Asked {
            method: Method::PUT,
            path: path("/status"),
            body: json!({"status": STAGES[(stage - 1).min(STAGES.len() - 1)]}),
        },
    }
}

fn order(random: &mut Rng) -> Value {
    json!({
        "customerId": format!("customer-{}", random.u32(0..500)),
        "restaurantId": format!("restaurant-{}", random.u32(0..20)),
        "items": items(random),
    })
}

fn items(random: &mut Rng) -> Value {
    let count = random.u32(1..=4);
    let item = |n: u32, random: &mut Rng| {
        let price = format!("{}.{:02}", random.u32(0..90), random.u32(0..100));
        json!({"menuItemId": format!("item-{n}"), "name": "It's tea", "price": price, "quantity": random.u32(1..9)})
    };
    (0..count).map(|n| item(n, random)).collect()
}

impl Client<'_> {
    /// The answer, if it is one of success. A failure of the server's, or none at all, has it asked again, by the same key
    /// where the API takes one; the other requests come to nothing when they are done already.
    fn ask(&mut self, asked: &Asked) -> Option<Value> {
        let key = Uuid::new_v4().to_string();
        loop {
            match self.send(asked, &key) {
                Some((200..300, answer)) => {
                    self.report.requests += 1;
                    return Some(answer);
                }
                Some((status, _)) if status < 500 && status != 429 => {
                    self.report.refused += 1;
                    return None;
                }
                _ => {}
            }
            if !self.gate.pass(BACKOFF) {
                return None;
            }
            self.report.repeated += 1;
        }
    }

    fn send(&self, asked: &Asked, key: &str) -> Option<(u16, Value)> {
        let request = ureq::http::Request::builder()
            .method(asked.method.clone())
            .uri(format!("{}{}", self.url, asked.path))
            .header("content-type", "application/json")
            .header("idempotency-key", key)
            .body(asked.body.to_string());
        let mut answer = self.agent.run(request.ok()?).ok()?;
        let status = answer.status().as_u16();
        Some((status, answer.body_mut().read_json().unwrap_or_default()))
    }
}

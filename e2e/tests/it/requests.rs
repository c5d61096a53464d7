//! What clients are promised who ask again until they are answered: kill -9 of everything between them and the consumers.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    stack::{Stack, eventually, tell},
    views::Database,
};

/// Orders, each with a key of its own.
const ORDERS: usize = 5_000;
/// Generic messages, each to be acknowledged.
const MESSAGES: usize = 1_500;
const CLIENTS: usize = 8;
/// What is killed, once so many requests have been answered.
const KILLS: [(usize, &str); 11] = [
    (400, "order-api"),
    (900, "messages"),
    (1_400, "order-api-2"),
    (1_900, "consumers-relay"),
    (2_400, "cdc-relay"),
    (2_900, "acks"),
    (3_400, "postgres"),
    (4_000, "order-api"),
    (4_500, "kafka-1"),
    (5_200, "messages"),
    (5_900, "order-api"),
];

/// Asks one instance, then the other, until it is answered.
struct Client {
    agent: ureq::Agent,
    urls: Vec<String>,
    asked: AtomicUsize,
    again: AtomicUsize,
}

impl Client {
    fn of(stack: &Stack) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(20)))
            .http_status_as_error(false);
        let endpoints = stack.endpoints();
        let urls = endpoints["order_apis"].as_array().unwrap().iter().map(|u| u.as_str().unwrap().to_owned());
        Self {
            agent: config.build().into(),
            urls: urls.collect(),
            asked: AtomicUsize::new(0),
            again: AtomicUsize::new(0),
        }
    }

    /// The answer of success; what is not one may come of a kill, and the request is sent again with the same key.
    fn post(&self, path: &str, key: &str, body: &Value) -> Value {
        eventually(&format!("POST {path} is answered"), || {
            let url = &self.urls[self.asked.fetch_add(1, Ordering::Relaxed) % self.urls.len()];
            let sent = self.agent.post(format!("{url}{path}")).header("idempotency-key", key).send_json(body);
            let answer = sent.ok().and_then(|mut answer| {
                Some((answer.status().as_u16(), answer.body_mut().read_json::<Value>().ok()?))
            });
            match answer {
                Some((201, body)) => return Some(body),
                Some((status, body)) if status < 500 => panic!("{path}: {status} {body}"),
                _ => self.again.fetch_add(1, Ordering::Relaxed),
            };
            None
        })
    }
}

/// What was answered: the key of each order, by its id, and the messages' ids.
struct Answered {
    orders: BTreeMap<String, String>,
    messages: BTreeSet<String>,
}

#[test]
fn what_is_asked_for_again_is_done_once_and_messages_arrive_once_whatever_is_killed() {
    let stack = Stack::start("requests", &["--scale", "order-api=2"]);
    let client = Client::of(&stack);
    let answered = ask(&stack, &client);
    let database = Database::of(&stack, "postgres");
    let stored = database.texts("SELECT order_id || ' ' || customer_id FROM orders ORDER BY order_id");
    let asked: Vec<String> = answered.orders.iter().map(|(id, key)| format!("{id} {key}")).collect();
    assert_eq!(stored, asked, "as many orders as keys");
    assert_eq!((stored.len(), database.count("order_events")), (ORDERS, ORDERS));
    let told = database.texts("SELECT message_id::text FROM messages ORDER BY 1");
    assert_eq!(told, answered.messages.iter().cloned().collect::<Vec<_>>(), "as many messages as keys");
    let (acknowledged, undelivered) = assert_messages_arrive_once(&stack, &database);
    let attempts = database.number("SELECT sum(attempt) FROM messages");
    tell(&format!(
        "{ORDERS} orders by {ORDERS} keys, {} requests sent again; {MESSAGES} messages, {acknowledged} acknowledged, \
         {undelivered} undelivered, {} sent again, none applied twice; {} kills",
        client.again.into_inner(),
        attempts - i64::try_from(MESSAGES).unwrap(),
        KILLS.len()
    ));
}

/// Sends everything, while everything is killed in turn.
fn ask(stack: &Stack, client: &Client) -> Answered {
    let (answered, next) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let all = Mutex::new(Answered { orders: BTreeMap::new(), messages: BTreeSet::new() });
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= ORDERS + MESSAGES {
                        return;
                    }
                    one(client, n, &all);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for (after, process) in KILLS {
            eventually(&format!("{after} requests are answered"), || {
                (answered.load(Ordering::Relaxed) >= after).then_some(())
            });
            stack.kill(process);
        }
    });
    all.into_inner().unwrap()
}

/// The `n`th request: an order, or every so often a message.
fn one(client: &Client, n: usize, all: &Mutex<Answered>) {
    let key = format!("key-{n}");
    let messages_before = |n: usize| n * MESSAGES / (ORDERS + MESSAGES);
    if messages_before(n) == messages_before(n + 1) {
        let body = json!({
            "customerId": key, "restaurantId": "r",
            "items": [{"menuItemId": "m", "name": "Tea", "price": "1.10", "quantity": 2}],
        });
        let order = client.post("/api/orders", &key, &body);
        let id = order["orderId"].as_str().unwrap().to_owned();
        all.lock().unwrap().orders.insert(id, key);
    } else {
        let body = json!({
            "topic": "notifications", "key": format!("k-{}", n % 50), "payload": {"n": n},
            "requireAck": ["messages"], "ackTimeout": 5,
        });
        let message = client.post("/api/messages", &key, &body);
        all.lock().unwrap().messages.insert(message["messageId"].as_str().unwrap().to_owned());
    }
}

/// How many messages are acknowledged, and how many undelivered.
fn assert_messages_arrive_once(stack: &Stack, database: &Database) -> (usize, i64) {
    eventually("every message is acknowledged or undelivered", || {
        let waiting =
            "SELECT count(*) FROM messages WHERE acknowledged_at IS NULL AND undelivered_at IS NULL";
        (database.number(waiting) == 0).then_some(())
    });
    let consumers = Database::of(stack, "consumer_postgres");
    let applied = "SELECT message_id::text FROM messages_applied WHERE consumer_group = 'messages'";
    let applied = consumers.texts(applied);
    let once: BTreeSet<String> = applied.iter().cloned().collect();
    assert_eq!(applied.len(), once.len(), "none is applied twice");
    let acknowledged = "SELECT message_id::text FROM messages WHERE acknowledged_at IS NOT NULL";
    let acknowledged: BTreeSet<String> = database.texts(acknowledged).into_iter().collect();
    let not_applied: Vec<_> = acknowledged.difference(&once).collect();
    assert!(not_applied.is_empty(), "acknowledged, but not applied: {not_applied:?}");
    (acknowledged.len(), database.number("SELECT count(*) FROM messages WHERE undelivered_at IS NOT NULL"))
}

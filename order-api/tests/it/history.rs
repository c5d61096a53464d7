//! Any commands by any number of clients at once: versions without a gap, events that fold to the state, and exactly one
//! outbox row for each event.

use std::collections::BTreeMap;

use order_api::domain::{Event, Order};
use proptest::{prelude::*, test_runner::TestRunner};
use serde_json::{Value, json};

use crate::stage::{Service, Stage, order};

/// How many orders are played with.
const CASES: u32 = 40;

/// One request: method, path behind the order's, body.
fn request() -> impl Strategy<Value = (&'static str, &'static str, Value)> {
    let item = (1_u32..5, 0_u32..500).prop_map(|(quantity, cents)| {
        json!({"menuItemId": format!("m-{cents}"), "name": "Tea", "price": format!("{}.{:02}", cents / 100, cents % 100), "quantity": quantity})
    });
    let items = prop::collection::vec(item, 1..4).prop_map(Value::from);
    let notes = prop_oneof![Just(Value::Null), "[a-z]{1,5}".prop_map(Value::from)];
    prop_oneof![
        4 => (items, notes.clone()).prop_map(|(items, notes)| ("PATCH", "", json!({"items": items, "notes": notes}))),
        3 => notes.prop_map(|notes| ("PATCH", "", json!({"notes": notes}))),
        2 => Just(("POST", "/confirm", json!({"paymentId": "p"}))),
        1 => Just(("POST", "/cancel", json!({"reason": "r"}))),
        4 => prop::sample::select(vec!["created", "preparing", "ready", "delivered"])
            .prop_map(|status| ("PUT", "/status", json!({"status": status}))),
    ]
}

#[test]
fn concurrent_commands_leave_a_dense_history_that_folds_to_the_state() {
    let stage = Stage::new();
    // Two instances behind nothing: there is no coordination but the database's.
    let services = [stage.service(), stage.service()];
    let clients = prop::collection::vec(prop::collection::vec(request(), 1..8), 1..5);
    let config = ProptestConfig { cases: CASES, failure_persistence: None, ..ProptestConfig::default() };
    TestRunner::new(config)
        .run(&clients, |clients| {
            let id = play(&services, &clients);
            check(&stage, &services[0], &id);
            Ok(())
        })
        .unwrap();
    assert!(stage.count("order_events") > stage.count("orders") * 2, "hardly anything happened");
}

/// All clients at once; the id of the order. Nobody is answered anything but that it was done or why not.
fn play(services: &[Service; 2], clients: &[Vec<(&'static str, &'static str, Value)>]) -> String {
    let id = services[0].post(&order()).json()["orderId"].as_str().unwrap().to_owned();
    let changed = std::thread::scope(|scope| {
        let playing: Vec<_> = clients
            .iter()
            .enumerate()
            .map(|(n, requests)| {
                let (client, id) = (services[n % 2].client.clone(), &id);
                scope.spawn(move || {
                    let mut seen = Vec::new();
                    for (method, path, body) in requests {
                        let answer = client.send(
                            method,
                            &format!("/api/orders/{id}{path}"),
                            &[("content-type", "application/json")],
                            &body.to_string(),
                        );
                        match answer.status {
                            200 => seen.push(answer.json()),
                            409 => drop(answer.problem(409, "order-state")),
                            _ => panic!("{answer:?}"),
                        }
                    }
                    seen
                })
            })
            .collect();
        playing.into_iter().flat_map(|p| p.join().unwrap()).collect::<Vec<_>>()
    });
    // Whatever anybody was answered is what the order was at that version.
    let mut at: BTreeMap<i64, Value> = BTreeMap::new();
    for order in changed {
        let version = order["version"].as_i64().unwrap();
        let known = at
            .entry(version)
            .or_insert_with(|| services[1].get(&format!("/api/orders/{id}?at_version={version}")).json());
        assert_eq!(*known, order);
    }
    id
}

fn check(stage: &Stage, service: &Service, id: &str) {
    let stored =
        format!("SELECT jsonb_agg(payload ORDER BY version) FROM order_events WHERE order_id = '{id}'");
    let events: Vec<Event> = serde_json::from_str(&stage.value(&stored)).unwrap();
    let versions: Vec<i32> = events.iter().map(|e| e.version).collect();
    assert_eq!(versions, (1..=i32::try_from(events.len()).unwrap()).collect::<Vec<_>>());

    let mut folded = Order::begin(&events[0]).unwrap();
    for event in &events[1..] {
        assert!(event.occurred_on >= folded.updated_at, "time went back");
        folded.apply(event);
    }
    let current = service.get(&format!("/api/orders/{id}")).json();
    assert_eq!(serde_json::to_value(&folded).unwrap(), current);

    for event in &events {
        let name = event.body.type_name();
        let schema = std::fs::read_to_string(format!(
            "{}/../contracts/events/{name}.schema.json",
            env!("CARGO_MANIFEST_DIR")
        ))
        .unwrap();
        let validator =
            jsonschema::options().should_validate_formats(true).build(&schema.parse().unwrap()).unwrap();
        let event = serde_json::to_value(event).unwrap();
        let problems: Vec<_> = validator.iter_errors(&event).map(|e| e.to_string()).collect();
        assert_eq!(problems, Vec::<String>::new(), "{event}");
    }

    let unlike = format!(
        "SELECT count(*) FROM (SELECT * FROM order_events WHERE order_id = '{id}') e \
         FULL JOIN (SELECT * FROM outbox WHERE aggregateid = '{id}') o ON o.id = e.event_id \
         WHERE (e.payload = o.payload AND e.event_type = o.type) IS NOT TRUE"
    );
    assert_eq!(stage.value(&unlike), "0");
}

//! A group of three whose members are killed all the time.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use rdkafka::Message as _;
use rustix::process::{Signal, kill_process};
use serde_json::Value;

use crate::{
    stack::{Api, Stack, eventually, tell},
    views::{Database, assert_nothing_lost, records},
};

const MEMBERS: [&str; 3] = ["pharmacy", "pharmacy-2", "pharmacy-3"];
/// A kill a second for so long.
const CAMPAIGN: Duration = Duration::from_secs(60);
const CLIENTS: usize = 4;

#[test]
fn three_that_are_killed_every_second_apply_everything_once_and_publish_what_follows_once() {
    let stack = Stack::start("group", &["--scale", "pharmacy=3"]);
    let api = Api::of(&stack);
    let (taken, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let mut kills = 0;
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (api, taken, over) = (api.clone(), &taken, &over);
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    if api.post(&format!("c{client}")).is_some() {
                        taken.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        let (since, mut broker_restarted) = (Instant::now(), false);
        while since.elapsed() < CAMPAIGN {
            std::thread::sleep(Duration::from_secs(1));
            // One that is not up again yet cannot be killed.
            let up: Vec<_> = MEMBERS.iter().filter_map(|member| stack.pid(member)).collect();
            if !up.is_empty() && kill_process(up[fastrand::usize(..up.len())], Signal::KILL).is_ok() {
                kills += 1;
            }
            if since.elapsed() > CAMPAIGN / 2 && !broker_restarted {
                stack.kill("kafka-1");
                broker_restarted = true;
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    let count = assert_nothing_lost(&stack);
    let consumers = Database::of(&stack, "consumer_postgres");
    let tasks: BTreeSet<String> = consumers
        .texts("SELECT order_id || ' ' || version || ' ' || kind || ' ' || event_id FROM pharmacy_tasks")
        .into_iter()
        .collect();
    // The relay may publish a row again, with the id that it had: what follows is told once to whoever knows ids.
    let mut told: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    eventually("every task is told", || {
        told.clear();
        for record in records(&stack, "pharmacy-events") {
            let body: Value = serde_json::from_slice(record.payload().unwrap()).unwrap();
            let text = |field: &str| body[field].as_str().unwrap().to_owned();
            let task = format!(
                "{} {} {} {}",
                text("aggregateId"),
                body["version"],
                text("kind"),
                text("causationId")
            );
            told.entry(task).or_default().insert(text("eventId"));
        }
        (told.len() >= tasks.len()).then_some(())
    });
    let twice: Vec<_> = told.iter().filter(|(_, ids)| ids.len() != 1).take(5).collect();
    assert!(twice.is_empty(), "told more than once: {twice:?}");
    assert!(told.keys().eq(tasks.iter()), "what was told are not the tasks");
    let dead_letters = consumers.number("SELECT count(*) FROM dead_letters");
    assert_eq!(dead_letters, 0);
    let taken = taken.into_inner();
    tell(&format!(
        "{taken} orders taken while {kills} members were killed and the broker once: {} orders applied and {} tasks told, each once",
        count.orders,
        told.len()
    ));
    assert!(kills > 20, "only {kills} kills");
}

//! What happens between a session's look at the server and its having the slot.

use crate::{
    checkpoints,
    database::Database,
    exactly_once::settled,
    network::Gate,
    pair::{Pair, READY, major_version},
    relay::{Relay, init},
    topics::{Topic, assert_complete_and_ordered},
};

/// So that what is kept back is waited for.
const PATIENT: (&str, &str) = ("CDC_RELAY_POSTGRES__CONNECT_TIMEOUT_SECONDS", "120");

#[test]
fn what_another_relay_published_meanwhile_does_not_make_the_log_end_before_the_checkpoint() {
    let (mut database, topic) = (Database::new(), Topic::new(1, &[]));
    init(&database);
    let gate = Gate::to(&database.url());
    let mut late = Relay::spawn(&database, &[("CDC_RELAY_POSTGRES__URL", &gate.url), PATIENT]);
    gate.wait();
    let first = Relay::start(&database, &[]);
    database.insert(&topic.kind, 0, 100);
    settled(&mut database);
    first.stop();
    gate.open();
    late.wait_for_state("streaming");
    database.insert(&topic.kind, 100, 100);
    settled(&mut database);
    assert_eq!(assert_complete_and_ordered(&topic.read(200), 200), 0);
    late.stop();
}

#[test]
fn a_promotion_meanwhile_is_known_to_the_checkpoints() {
    if major_version() < 17 {
        return;
    }
    let mut pair = Pair::start(&[], &READY);
    pair.init();
    let (kind, name) = (pair.topic.kind.clone(), pair.topic.name.clone());
    let route = ("CDC_RELAY_ROUTE__TOPIC", name.as_str());
    let first = Relay::start(&pair.database, &[route]);
    pair.database.insert(&kind, 0, 10);
    settled(&mut pair.database);
    // A slot is copied where it has gone on.
    pair.sync();
    first.stop();
    pair.catch_up();
    let (name, port) = (&pair.database.name, pair.standby.port);
    let gate = Gate::to(&format!("postgres://{name}:{name}@127.0.0.1:{port}/{name}"));
    let through = [("CDC_RELAY_POSTGRES__URL", gate.url.as_str()), PATIENT, route];
    let mut late = Relay::spawn(&pair.database, &through);
    gate.wait();
    pair.fail_over();
    gate.open();
    late.wait_for_state("streaming");
    pair.database.insert(&kind, 10, 10);
    settled(&mut pair.database);
    assert_eq!(checkpoints::last(&mut pair.database)["timeline"], 2, "{}", late.log());
    late.stop();
    // One that told of the timeline before would be beyond its end.
    let next = Relay::start(&pair.database, &through);
    pair.database.insert(&kind, 20, 10);
    settled(&mut pair.database);
    assert_eq!(assert_complete_and_ordered(&pair.topic.read(30), 30), 0);
    next.stop();
}

//! Tests of the stream's reader: which rows there are, and what they become.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::{
    Relay,
    outbox::Field,
    pgoutput::tests::encode,
    poison::{Policies, Policy},
    relay,
    route::TopicTemplate,
};

const COLUMNS: [(&str, u32); 6] = [
    ("id", 2950),
    ("aggregatetype", 25),
    ("aggregateid", 25),
    ("type", 25),
    ("payload", 3802),
    ("tenant", 25),
];

/// Debezium's outbox table, routed by a template.
pub(crate) fn source_to(template: &str) -> Options {
    let topic = TopicTemplate::parse(template).unwrap();
    let outbox = Outbox::new(OutboxTable { topic, ..OutboxTable::default() }).unwrap();
    Options { outboxes: vec![outbox], ..Options::default() }
}

fn messages(topics: &[&str]) -> Messages {
    Messages {
        prefix: "outbox".into(),
        outbox: Outbox::of_messages(TopicTemplate::default()).unwrap(),
        topics: topics.iter().map(|t| (*t).to_owned()).collect(),
    }
}

fn row(oid: u32, event_type: &str) -> Vec<u8> {
    encode::insert(
        oid,
        &[Some(b"i"), Some(b"order"), Some(b"o"), Some(event_type.as_bytes()), None, Some(b"t1")],
    )
}

/// What a step made of a record, as far as tests look at it.
#[derive(Debug, PartialEq)]
struct Seen {
    topic: String,
    identity: (u64, u64),
    poison: Option<Poison>,
}

fn seen(drafted: &Drafted<'_>) -> Seen {
    let Drafted { record, poison } = drafted;
    let identity = (record.identity.commit_lsn.0, record.identity.seq);
    Seen { topic: record.topic.to_owned(), identity, poison: poison.clone() }
}

/// Handles it all, and says what the last step was.
fn feed(source: &mut Source, messages: &[Vec<u8>]) -> Result<Option<Seen>, StreamError> {
    let mut last = None;
    for bytes in messages {
        last = match source.handle(Lsn(1), bytes)? {
            Step::Row(drafted) => Some(seen(&drafted)),
            Step::Lone { drafted, end_lsn } => {
                assert_eq!(end_lsn.0, drafted.record.identity.commit_lsn.0 + 1);
                Some(seen(&drafted))
            }
            _ => None,
        };
    }
    Ok(last)
}

fn good(topic: &str, identity: (u64, u64)) -> Seen {
    Seen { topic: topic.into(), identity, poison: None }
}

#[test]
fn each_table_has_its_own_mapping() {
    let mut options = source_to("${aggregatetype}-events");
    let mut columns = COLUMNS;
    columns[1].0 = "kind";
    let mut table = OutboxTable { schema: "billing".into(), name: "events".into(), ..OutboxTable::default() };
    table.columns[Field::AggregateType as usize] = "kind".into();
    table.topic = TopicTemplate::parse("billing.${kind}.${tenant}").unwrap();
    options.outboxes.push(Outbox::new(table).unwrap());
    options.topic_by_type.insert("Mapped".into(), "mapped".into());
    let mut source = Source::new(options);
    let setup = [
        encode::relation(1, "public", "outbox", &COLUMNS),
        encode::relation(2, "billing", "events", &columns),
        encode::relation(3, "billing", "outbox", &COLUMNS),
        encode::begin(50, 0),
    ];
    feed(&mut source, &setup).unwrap();
    assert_eq!(feed(&mut source, &[row(1, "T")]), Ok(Some(good("order-events", (50, 0)))));
    assert_eq!(feed(&mut source, &[row(2, "T")]), Ok(Some(good("billing.order.t1", (50, 1)))));
    assert_eq!(feed(&mut source, &[row(3, "T")]), Ok(None), "another schema's table is passed over");
    assert_eq!(feed(&mut source, &[row(2, "Mapped")]), Ok(Some(good("mapped", (50, 3)))));
    let bytes = row(2, "T");
    let Ok(Step::Row(drafted)) = source.handle(Lsn(1), &bytes) else { panic!("not a row") };
    assert_eq!(drafted.record.describe(), "outbox row i (commit LSN 0/32, change 4) of billing.events");
}

#[test]
fn a_table_that_changes_is_read_as_it_is_then() {
    let mut source = Source::new(source_to("${tenant}"));
    feed(&mut source, &[encode::begin(50, 0), encode::relation(1, "public", "outbox", &COLUMNS)]).unwrap();
    assert_eq!(feed(&mut source, &[row(1, "T")]), Ok(Some(good("t1", (50, 0)))));
    feed(&mut source, &[encode::relation(1, "public", "outbox", &COLUMNS[..5])]).unwrap();
    let shorter = encode::insert(1, &[Some(b"i"), Some(b"order"), Some(b"o"), Some(b"T"), None]);
    let poison = feed(&mut source, &[shorter]).unwrap().unwrap().poison;
    assert_eq!(poison, Some(Poison::MissingColumn("tenant".into())));
    feed(&mut source, &[encode::relation(1, "public", "renamed", &COLUMNS)]).unwrap();
    assert_eq!(feed(&mut source, &[row(1, "T")]), Ok(None));
}

#[test]
fn updates_are_passed_over_or_halt_as_configured() {
    for (updates, halts) in [(Updates::Ignore, false), (Updates::Halt, true)] {
        let outbox = Outbox::new(OutboxTable { updates, ..OutboxTable::default() }).unwrap();
        let mut source = Source::new(Options { outboxes: vec![outbox], ..Options::default() });
        let setup = [
            encode::relation(1, "public", "outbox", &COLUMNS),
            encode::relation(2, "public", "orders", &COLUMNS),
            encode::begin(50, 0),
            encode::delete(1),
            encode::update(2),
        ];
        assert_eq!(feed(&mut source, &setup), Ok(None), "deletes, and other tables' updates");
        let result = feed(&mut source, &[encode::update(1)]);
        let at = Identity { commit_lsn: Lsn(50), seq: 2 };
        let expected =
            if halts { Err(StreamError::Updated { at, table: "public.outbox".into() }) } else { Ok(None) };
        assert_eq!(result, expected);
    }
}

#[test]
fn a_row_under_a_partitions_name_is_not_passed_over() {
    let partitions = HashSet::from([("public".to_owned(), "outbox_1".to_owned())]);
    let mut source = Source::new(Options { partitions, ..source_to("x") });
    // pgoutput describes the partition, too, where rows come under their root's name.
    let setup = [
        encode::relation(1, "public", "outbox", &COLUMNS),
        encode::relation(2, "public", "outbox_1", &COLUMNS),
        encode::begin(50, 0),
        row(1, "T"),
    ];
    assert_eq!(feed(&mut source, &setup), Ok(Some(good("x", (50, 0)))));
    let at = Identity { commit_lsn: Lsn(50), seq: 1 };
    let partition = "public.outbox_1".into();
    assert_eq!(feed(&mut source, &[row(2, "T")]), Err(StreamError::UnderPartition { at, partition }));
}

#[test]
fn a_message_outside_a_transaction_is_settled_like_one() {
    let now = Duration::ZERO;
    for (policy, in_flight) in [(Policy::Skip, 0), (Policy::DeadLetter, 1)] {
        let options = relay::Options {
            delivery: relay::Delivery::AtLeastOnce,
            source: Options { messages: Some(messages(&[])), ..source_to("x") },
            policies: Policies::all(policy),
            dead_letter_topic: "dead".into(),
            dead_letter_source: "1/slot".into(),
            in_flight_limit_bytes: 4096,
            status_interval: Duration::from_secs(10),
            silence_limit: Duration::from_mins(1),
        };
        let mut relay = Relay::new(options, Lsn::ZERO, now);
        relay.recall(relay::Past::default());
        let lone = encode::message_at(70, false, "outbox", CONTENT.as_bytes());
        let ticket =
            relay.handle_wal(Lsn(70), &lone, now).unwrap().map(|o| (o.ticket, o.record.topic.to_owned()));
        assert_eq!(relay.progress().in_flight_records(), in_flight);
        if let Some((ticket, topic)) = ticket {
            assert_eq!(topic, "dead");
            assert_eq!(relay.progress().confirmed(), Lsn(0), "not before Kafka has it");
            relay.handle_settled(ticket).unwrap();
        }
        assert_eq!(relay.progress().confirmed(), Lsn(71));
        assert!(relay.progress().is_idle());
    }
}

const CONTENT: &str = r#"{"id":"m","aggregatetype":"order","aggregateid":"o","type":"T","payload":{}}"#;

#[test]
fn a_message_is_a_row_and_counts_as_a_change_whatever_its_prefix() {
    let mut source = Source::new(Options { messages: Some(messages(&[])), ..source_to("x") });
    feed(&mut source, &[encode::begin(50, 0)]).unwrap();
    assert_eq!(feed(&mut source, &[encode::message_at(9, true, "other", b"{}")]), Ok(None));
    let bytes = encode::message_at(9, true, "outbox", CONTENT.as_bytes());
    assert_eq!(
        feed(&mut source, std::slice::from_ref(&bytes)),
        Ok(Some(good("outbox.event.order", (50, 1))))
    );
    let repeated = source.repeat(&bytes).unwrap();
    assert_eq!(seen(&repeated), good("outbox.event.order", (50, 1)));
    assert_eq!(repeated.record.describe(), "outbox message m (commit LSN 0/32, change 1)");
    // Without [messages] it means nothing.
    let mut source = Source::new(source_to("x"));
    assert_eq!(feed(&mut source, &[encode::begin(50, 0), bytes]), Ok(None));
}

#[test]
fn a_message_goes_where_it_may_and_nowhere_else() {
    let own = CONTENT.replace("\"id\"", "\"topic\":\"own\",\"id\"");
    let unlisted = |topic: &str| Some(Poison::UnlistedTopic(topic.into()));
    for (topics, content, poison) in [
        (&[][..], CONTENT, None),
        (&[], own.as_str(), unlisted("own")),
        (&["own"], &own, None),
        (&["own"], CONTENT, unlisted("outbox.event.order")),
        (&["own", "outbox.event.order"], CONTENT, None),
    ] {
        let mut source = Source::new(Options { messages: Some(messages(topics)), ..source_to("x") });
        let seen = feed(
            &mut source,
            &[encode::begin(50, 0), encode::message_at(9, true, "outbox", content.as_bytes())],
        );
        assert_eq!(seen.unwrap().unwrap().poison, poison, "{topics:?} {content}");
    }
}

#[test]
fn a_message_outside_a_transaction_is_poison_with_an_identity_of_its_own() {
    let mut source = Source::new(Options { messages: Some(messages(&[])), ..source_to("x") });
    feed(&mut source, &[encode::begin(50, 0), encode::commit(50, 60, 0)]).unwrap();
    let bytes = encode::message_at(70, false, "outbox", CONTENT.as_bytes());
    let lone = feed(&mut source, std::slice::from_ref(&bytes)).unwrap().unwrap();
    assert_eq!((lone.topic.as_str(), lone.identity), ("outbox.event.order", (70, 0)));
    assert!(matches!(lone.poison, Some(Poison::BadMessage(_))));
    assert_eq!(seen(&source.repeat(&bytes).unwrap()), lone);
    assert_eq!(feed(&mut source, &[encode::message_at(80, false, "other", b"x")]), Ok(None));
    feed(&mut source, &[encode::begin(90, 0)]).unwrap();
    assert!(matches!(feed(&mut source, &[bytes]), Err(StreamError::OutOfProtocol(_))));
}

proptest! {
    /// Any content of a message: a record or poison.
    #[test]
    fn any_message_is_a_record_or_poison(content: Vec<u8>, transactional: bool) {
        let mut source = Source::new(Options { messages: Some(messages(&[])), ..source_to("x") });
        if transactional {
            feed(&mut source, &[encode::begin(50, 0)]).unwrap();
        }
        let bytes = encode::message_at(70, transactional, "outbox", &content);
        prop_assert!(feed(&mut source, &[bytes]).unwrap().is_some());
    }
}

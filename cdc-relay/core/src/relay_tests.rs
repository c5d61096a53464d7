//! Tests of the state machine: bytes in, commands out.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::{
    pgoutput::tests::encode,
    poison::Policy,
    source::{StreamError, tests::source_to},
};

const OUTBOX: u32 = 100;
const OTHER: u32 = 200;
const COLUMNS: [(&str, u32); 7] = [
    ("id", 2950),
    ("aggregatetype", 25),
    ("aggregateid", 25),
    ("type", 25),
    ("payload", 3802),
    ("headers", 3802),
    ("traceparent", 25),
];

pub(super) fn options() -> Options {
    Options {
        delivery: Delivery::AtLeastOnce,
        source: source_to("${aggregatetype}-events"),
        policies: Policies::default(),
        dead_letter_topic: "dead".into(),
        dead_letter_source: "1/slot".into(),
        in_flight_limit_bytes: 4096,
        status_interval: Duration::from_secs(10),
        silence_limit: Duration::from_mins(1),
    }
}

/// A relay that knows both tables, and whose first status update has been sent.
fn started(now: Duration) -> Relay {
    let mut relay = started_with(options(), now);
    assert_eq!(relay.take_status(now), Some(StatusUpdate { received: Lsn(1), confirmed: Lsn(1) }));
    relay
}

pub(super) fn started_with(options: Options, now: Duration) -> Relay {
    let mut relay = Relay::new(options, Lsn(1), now);
    relay.recall(Past { checkpoint: Lsn(1).into(), ..Past::default() });
    relay.set_listening(true, now);
    for (oid, name) in [(OUTBOX, "outbox"), (OTHER, "orders")] {
        let bytes = encode::relation(oid, "public", name, &COLUMNS);
        assert!(relay.handle_wal(Lsn::ZERO, &bytes, now).unwrap().is_none());
    }
    relay
}

/// Kafka takes the checkpoint that is due.
fn checkpoint(relay: &mut Relay, now: Duration) -> Option<Lsn> {
    let checkpoint = relay.take_checkpoint(now);
    relay.handle_checkpointed();
    checkpoint.map(|checkpoint| checkpoint.lsn)
}

pub(super) fn row(id: &str, headers: Option<&str>) -> Vec<u8> {
    let values = [
        Some(id),
        Some("order"),
        Some("o1"),
        Some("OrderCreated"),
        Some("{\"a\": 1}"),
        headers,
        Some("00-tp"),
    ];
    encode::insert(OUTBOX, &values.map(|v| v.map(str::as_bytes)))
}

pub(super) fn feed(relay: &mut Relay, bytes: &[u8]) -> Option<Ticket> {
    relay.handle_wal(Lsn::ZERO, bytes, Duration::ZERO).unwrap().map(|o| o.ticket)
}

/// 2026-01-01T00:00:00Z in Postgres' microseconds.
const COMMITTED_AT_US: i64 = 820_540_800_000_000;

#[test]
fn a_row_becomes_the_record_of_the_contract() {
    let mut relay = started(Duration::ZERO);
    feed(&mut relay, &encode::begin(0x1_0000_0020, COMMITTED_AT_US));
    feed(&mut relay, &encode::delete(OTHER));
    let bytes = row("e1", Some(r#"{"tenant":"ä","n":1.50,"gone":null,"seq":"mine","traceparent":"mine"}"#));
    let out = relay.handle_wal(Lsn::ZERO, &bytes, Duration::ZERO).unwrap().unwrap();
    let out = out.record;
    assert_eq!((out.topic, out.key, out.value), ("order-events", Some(&b"o1"[..]), Some(&b"{\"a\": 1}"[..])));
    assert_eq!(out.timestamp_ms, 1_767_225_600_000);
    let headers: Vec<_> =
        out.headers.iter().map(|(n, v)| (n, v.map(|v| str::from_utf8(v).unwrap()))).collect();
    let expected = [
        ("id", Some("e1")),
        ("type", Some("OrderCreated")),
        ("aggregatetype", Some("order")),
        ("lsn", Some("1/20")),
        ("seq", Some("1")),
        ("traceparent", Some("00-tp")),
        ("gone", None),
        ("n", Some("1.50")),
        ("tenant", Some("ä")),
    ];
    assert_eq!(headers, expected);
    assert_eq!(relay.ignored_changes(), 1);
}

#[test]
fn a_record_that_is_repeated_is_the_same_and_takes_no_more_credit() {
    let mut relay = started(Duration::ZERO);
    feed(&mut relay, &encode::begin(50, 0));
    let bytes = row("e1", Some("{\"a\":\"b\"}"));
    let first = format!("{:?}", relay.handle_wal(Lsn::ZERO, &bytes, Duration::ZERO).unwrap().unwrap());
    let in_flight = relay.progress().in_flight_bytes();
    assert_eq!(format!("{:?}", relay.repeat(Ticket(0), &bytes).unwrap().unwrap()), first);
    assert_eq!(relay.progress().in_flight_bytes(), in_flight);
}

#[test]
fn the_end_of_a_commit_is_confirmed_when_its_records_are_settled_and_not_before() {
    let mut relay = started(Duration::ZERO);
    feed(&mut relay, &encode::begin(50, 0));
    let a = feed(&mut relay, &row("a", None)).unwrap();
    let b = feed(&mut relay, &row("b", None)).unwrap();
    relay.handle_settled(a).unwrap();
    relay.handle_settled(b).unwrap();
    // A keepalive in the middle of a transaction says nothing about the transaction.
    relay.handle_keepalive(Lsn(1000), false, Duration::ZERO).unwrap();
    assert_eq!(relay.progress().confirmed(), Lsn(1));
    feed(&mut relay, &encode::commit(50, 60, 0));
    assert_eq!(relay.progress().confirmed(), Lsn(60));
    relay.handle_keepalive(Lsn(1000), false, Duration::ZERO).unwrap();
    assert_eq!(relay.progress().confirmed(), Lsn(1000));
}

#[test]
fn a_keepalive_is_not_confirmed_while_anything_is_in_flight() {
    let mut relay = started(Duration::ZERO);
    feed(&mut relay, &encode::begin(50, 0));
    let a = feed(&mut relay, &row("a", None)).unwrap();
    feed(&mut relay, &encode::commit(50, 60, 0));
    relay.handle_keepalive(Lsn(1000), false, Duration::ZERO).unwrap();
    assert_eq!(relay.progress().confirmed(), Lsn(1));
    relay.handle_settled(a).unwrap();
    assert_eq!(relay.progress().confirmed(), Lsn(60));
    assert!(matches!(relay.handle_settled(a), Err(Halt::UnknownTicket(_))));
}

#[test]
fn input_pauses_at_the_bound_and_status_updates_go_on() {
    let mut relay = started(Duration::ZERO);
    feed(&mut relay, &encode::begin(50, 0));
    let mut tickets = Vec::new();
    while relay.wants_input() {
        tickets.push(feed(&mut relay, &row("a", None)).unwrap());
        assert!(tickets.len() < 100, "there is no bound");
    }
    let limit = relay.options.in_flight_limit_bytes;
    assert!(relay.progress().in_flight_bytes() < limit + 1024);
    let mut now = Duration::ZERO;
    relay.set_listening(false, now);
    for _ in 0..100 {
        let deadline = relay.next_deadline();
        assert!(deadline > now && deadline <= now + relay.options.status_interval);
        now = deadline;
        assert!(relay.take_status(now).is_some());
        assert!(!relay.is_silent(now), "the watchdog rests while nobody listens");
    }
    relay.handle_settled(tickets[0]).unwrap();
    relay.set_listening(true, now);
    assert!(relay.wants_input() && !relay.is_silent(now));
    let silent_at = now + relay.options.silence_limit;
    relay.set_listening(true, silent_at);
    assert!(relay.is_silent(silent_at), "listening on is not hearing");
}

#[test]
fn a_reply_that_is_asked_for_is_due_at_once_and_progress_soon() {
    let now = Duration::from_secs(1);
    let mut relay = started(now);
    assert_eq!(relay.take_status(now), None);
    relay.handle_keepalive(Lsn(5), true, now).unwrap();
    assert_eq!(relay.take_status(now), Some(StatusUpdate { received: Lsn(5), confirmed: Lsn(1) }));
    assert_eq!(checkpoint(&mut relay, now), Some(Lsn(5)));
    assert_eq!(relay.take_status(now), Some(StatusUpdate { received: Lsn(5), confirmed: Lsn(5) }));
    relay.handle_keepalive(Lsn(9), false, now).unwrap();
    assert_eq!((relay.take_status(now), relay.take_checkpoint(now)), (None, None));
    let soon = now + CHECKPOINT_INTERVAL;
    assert_eq!(relay.next_deadline(), soon);
    assert_eq!(checkpoint(&mut relay, soon), Some(Lsn(9)));
    assert!(relay.take_status(soon).is_some());
    assert_eq!(relay.next_deadline(), soon + relay.options.status_interval);
}

#[test]
fn nothing_is_reported_that_no_acknowledged_checkpoint_covers() {
    let now = Duration::from_secs(1);
    let mut relay = started(now);
    relay.handle_keepalive(Lsn(5), false, now).unwrap();
    assert_eq!(relay.take_checkpoint(now), Some(Lsn(5).into()));
    let later = now + CHECKPOINT_INTERVAL;
    relay.handle_keepalive(Lsn(9), false, later).unwrap();
    assert_eq!(relay.take_checkpoint(later), None, "one at a time");
    assert_eq!((relay.confirmed(), relay.is_at_rest()), (Lsn(1), false));
    assert!(relay.awaits_kafka());
    relay.handle_checkpointed();
    assert_eq!((relay.confirmed(), relay.is_at_rest()), (Lsn(5), false));
    assert!(!relay.awaits_kafka(), "the rest is not written yet");
    assert_eq!(checkpoint(&mut relay, later), Some(Lsn(9)));
    assert_eq!((relay.confirmed(), relay.is_at_rest()), (Lsn(9), true));
}

#[test]
fn what_a_checkpoint_covers_is_passed_over_and_confirmed_behind_it_only() {
    let mut relay = Relay::new(options(), Lsn(10), Duration::ZERO);
    assert!(!relay.wants_input() && !relay.is_at_rest(), "the past is not known yet");
    assert_eq!(relay.take_checkpoint(Duration::ZERO), None);
    relay.recall(Past { checkpoint: Lsn(50).into(), ..Past::default() });
    relay.handle_keepalive(Lsn(30), true, Duration::ZERO).unwrap();
    assert_eq!(relay.take_checkpoint(Duration::ZERO), None);
    let status = relay.take_status(Duration::ZERO).unwrap();
    assert_eq!(status.confirmed, Lsn(10));
    let relation = encode::relation(OUTBOX, "public", "outbox", &COLUMNS);
    feed(&mut relay, &relation);
    feed(&mut relay, &encode::begin(45, 0));
    feed(&mut relay, &row("e1", None));
    feed(&mut relay, &encode::commit(45, 48, 0));
    assert_eq!((relay.passed_over(), relay.progress().in_flight_records()), (1, 0));
    assert!(relay.passes_over() && relay.confirmed() == Lsn(10));
    // The next one commits where the last one that is covered ends.
    feed(&mut relay, &encode::begin(50, 0));
    assert!(!relay.passes_over() && relay.confirmed() == Lsn(48));
    assert!(relay.handle_wal(Lsn::ZERO, &row("e2", None), Duration::ZERO).unwrap().is_some());
}

/// The server has not come to the transaction that is published in part.
#[test]
fn on_the_way_to_a_part_nothing_new_is_written_down() {
    let (lsn, part) = (Lsn(20), Identity { commit_lsn: Lsn(30), seq: 1 });
    let last = Some(Mark { commit_lsn: Lsn(30), committed_at_us: 7 });
    let sizes = Sizes { bytes: 1 << 20, time: Duration::ZERO, split_after: Duration::from_secs(5) };
    for delivery in [Delivery::AtLeastOnce, Delivery::ExactlyOnce(sizes)] {
        let mut relay = Relay::new(Options { delivery, ..options() }, Lsn(10), Duration::ZERO);
        let before = Checkpoint { lsn, part: Some(part), last };
        relay.recall(Past { checkpoint: before, ..Past::default() });
        relay.handle_keepalive(Lsn(25), true, Duration::ZERO).unwrap();
        assert_eq!(relay.take_checkpoint(Duration::from_hours(1)), None);
        assert!(relay.is_at_rest() && relay.confirmed() == Lsn(10));
        feed(&mut relay, &encode::relation(OUTBOX, "public", "outbox", &COLUMNS));
        feed(&mut relay, &encode::begin(30, 7));
        assert!(feed(&mut relay, &row("e1", None)).is_none());
        assert!(feed(&mut relay, &row("e2", None)).is_some(), "only the first one is published");
    }
}

#[test]
fn a_transaction_is_delivered_once_all_of_it_is_acknowledged_and_committed_where_it_has_to_be() {
    let [one, two, three] = [1, 2, 3].map(Duration::from_secs);
    let sizes = Sizes { bytes: 1 << 20, time: Duration::ZERO, split_after: Duration::from_secs(5) };
    for delivery in [Delivery::AtLeastOnce, Delivery::ExactlyOnce(sizes)] {
        let mut relay = started_with(Options { delivery, ..options() }, Duration::ZERO);
        let at = |relay: &mut Relay, now, bytes: &[u8]| {
            relay.handle_wal(Lsn::ZERO, bytes, now).unwrap().map(|outgoing| outgoing.ticket)
        };
        // One that brings nothing.
        feed(&mut relay, &encode::begin(40, 5));
        feed(&mut relay, &encode::commit(40, 45, 5));
        feed(&mut relay, &encode::begin(50, 7));
        let first = [at(&mut relay, one, &row("a", None)), at(&mut relay, two, &row("b", None))];
        feed(&mut relay, &encode::commit(50, 60, 7));
        feed(&mut relay, &encode::begin(70, 9));
        let second = at(&mut relay, two, &row("c", None));
        feed(&mut relay, &encode::commit(70, 80, 9));
        for ticket in [second, first[1]] {
            relay.handle_settled(ticket.unwrap()).unwrap();
        }
        let expected =
            [(one, 7), (two, 9)].map(|(begun, committed_at_us)| crate::Delivery { begun, committed_at_us });
        assert_eq!((relay.take_delivery(), relay.oldest_delivery()), (None, Some(expected[0])));
        assert_eq!(relay.longest_wait(three), Some(two));
        relay.handle_settled(first[0].unwrap()).unwrap();
        if relay.is_exactly_once() {
            assert_eq!((relay.take_delivery(), relay.longest_wait(three)), (None, Some(two)));
            relay.take_checkpoint(two).unwrap();
            relay.handle_checkpointed();
            assert!(relay.take_commit());
            relay.handle_committed();
        }
        assert_eq!(std::iter::from_fn(|| relay.take_delivery()).collect::<Vec<_>>(), expected);
        assert_eq!((relay.oldest_delivery(), relay.longest_wait(three)), (None, None));
    }
}

/// As after a restored backup that has gone on.
#[test]
fn nothing_is_confirmed_of_a_log_that_is_not_the_one_that_was_published() {
    let mut relay = Relay::new(options(), Lsn(10), Duration::ZERO);
    let last = Some(Mark { commit_lsn: Lsn(40), committed_at_us: 7 });
    relay.recall(Past { checkpoint: Checkpoint { lsn: Lsn(50), part: None, last }, ..Past::default() });
    feed(&mut relay, &encode::begin(35, 7));
    feed(&mut relay, &encode::commit(35, 38, 7));
    let another = relay.handle_keepalive(Lsn(60), true, Duration::ZERO).unwrap_err();
    assert!(matches!(another, Halt::AnotherLog { .. }), "{another}");
    assert_eq!(relay.final_status(Duration::ZERO).confirmed, Lsn(10));
    // Nor is what it tells written down, so that the next session finds it, too.
    assert_eq!(relay.take_checkpoint(Duration::from_secs(1)), None);
    assert!(
        relay.handle_wal(Lsn::ZERO, &encode::begin(45, 7), Duration::ZERO).is_err(),
        "it may end behind the checkpoint"
    );
}

#[test]
fn poison_names_the_row() {
    let mut relay = started(Duration::ZERO);
    feed(&mut relay, &encode::begin(50, 0));
    for bad in ["[]", "x", "{\"a\":1", "\"a\""] {
        let bytes = row("e7", Some(bad));
        let Err(Halt::Poison { row, poison }) = relay.handle_wal(Lsn::ZERO, &bytes, Duration::ZERO) else {
            panic!("{bad} was taken");
        };
        assert!(row.starts_with("outbox row e7 (commit LSN 0/32, change "), "{row}");
        assert_eq!(poison, Poison::BadHeaders("is not a JSON object"));
    }
    assert_eq!(relay.progress().in_flight_records(), 0);
}

/// The simulated world's seed 1554: Kafka refuses a row after a later one of its aggregate was parked.
#[test]
fn a_row_that_is_refused_late_has_all_behind_it_parked() {
    let options = Options { policies: Policies::all(Policy::ParkKey), ..options() };
    let mut relay = started_with(options.clone(), Duration::ZERO);
    let rows = [row("a", None), row("b", None), row("c", Some("["))];
    let is_dead_letter = |relay: &mut Relay, bytes| {
        relay.handle_wal(Lsn::ZERO, bytes, Duration::ZERO).unwrap().unwrap().is_dead_letter
    };
    feed(&mut relay, &encode::begin(50, 0));
    assert_eq!(rows.each_ref().map(|row| is_dead_letter(&mut relay, row)), [false, false, true]);
    let parked = relay.take_markers().into_iter().map(|m| (m.key, m.parked.unwrap())).collect();
    let first = Identity { commit_lsn: Lsn(50), seq: 0 };
    let refused = HashMap::from([(first, Poison::Refused { topic: "t".into(), why: "w".into() })]);
    let mut relay = started_with(options, Duration::ZERO);
    relay.recall(Past { checkpoint: Lsn(1).into(), refused, parked, apart: None });
    feed(&mut relay, &encode::begin(50, 0));
    assert_eq!(rows.each_ref().map(|row| is_dead_letter(&mut relay, row)), [true; 3]);
    let markers: Vec<_> = relay.take_markers().into_iter().map(|m| m.parked).collect();
    assert_eq!(markers, [Some(first)]);
}

#[test]
fn what_is_out_of_protocol_halts() {
    let (begin, commit) = (encode::begin(50, 0), encode::commit(50, 60, 0));
    let undescribed = encode::insert(7, &[]);
    let other_commit = encode::commit(51, 60, 0);
    let cases: [&[&[u8]]; 5] = [
        &[&commit],
        &[&begin, &begin],
        &[&begin, &other_commit],
        &[&row("a", None)],
        &[&begin, &undescribed],
    ];
    for messages in cases {
        let mut relay = started(Duration::ZERO);
        let last = messages.iter().map(|m| relay.handle_wal(Lsn::ZERO, m, Duration::ZERO).err()).last();
        assert!(matches!(last, Some(Some(Halt::Stream(StreamError::OutOfProtocol(_))))), "{last:?}");
    }
}

proptest! {
    /// Any stream of bytes: an error at worst.
    #[test]
    fn handling_is_total(messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 0..20)) {
        let mut relay = started(Duration::ZERO);
        for bytes in &messages {
            let _ = relay.handle_wal(Lsn::ZERO, bytes, Duration::ZERO);
        }
    }

    /// Transactions of any sizes, acknowledged in any order that keeps no order at all: after each step nothing
    /// is confirmed that holds, or follows, a record without an acknowledgement; at the end all is.
    #[test]
    fn the_confirmed_lsn_never_passes_an_unsettled_record(
        sizes in prop::collection::vec(0_u8..5, 1..30),
        choices in prop::collection::vec(any::<prop::sample::Index>(), 150),
    ) {
        let mut relay = started_with(Options { in_flight_limit_bytes: usize::MAX, ..options() }, Duration::ZERO);
        let mut end_of: HashMap<Ticket, u64> = HashMap::new();
        let mut last = 0;
        for (i, size) in (1_u64..).zip(&sizes) {
            last = i * 100;
            feed(&mut relay, &encode::begin(last - 1, 0));
            for _ in 0..*size {
                end_of.insert(feed(&mut relay, &row("x", None)).unwrap(), last);
            }
            feed(&mut relay, &encode::commit(last - 1, last, 0));
        }
        let mut unsettled: Vec<_> = end_of.keys().copied().collect();
        unsettled.sort();
        for choice in choices {
            let bound = unsettled.iter().map(|t| end_of[t]).min().unwrap_or(u64::MAX);
            prop_assert!(relay.progress().confirmed().0 < bound);
            if unsettled.is_empty() { break; }
            let ticket = unsettled.remove(choice.index(unsettled.len()));
            relay.handle_settled(ticket).unwrap();
        }
        prop_assert!(unsettled.is_empty());
        prop_assert_eq!(relay.progress().confirmed(), Lsn(last));
        prop_assert!(relay.progress().is_idle());
    }
}

#[test]
fn an_idle_log_is_confirmed_while_records_of_our_own_are_always_in_flight() {
    let now = Duration::ZERO;
    let mut relay = started(now);
    let mut before = relay.begin_own(100, now);
    for wal_end in [1000, 2000, 3000] {
        relay.handle_keepalive(Lsn(wal_end), false, now).unwrap();
        let next = relay.begin_own(100, now);
        relay.handle_settled(before).unwrap();
        before = next;
        assert_eq!(relay.progress().confirmed(), Lsn(wal_end), "all before it, and not it, is waited for");
    }
}

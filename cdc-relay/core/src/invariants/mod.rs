//! The invariants that `ARCHITECTURE.md` promises, each against what naively follows from all that ever happened.

mod history;

use std::{collections::BTreeMap, time::Duration};

use proptest::prelude::*;

use self::history::{History, LIMIT_BYTES, Op, START, STATUS_INTERVAL, ops, options};
use crate::{
    Lsn, Relay,
    poison::Policy,
    relay::{Halt, Past},
};

fn policy() -> impl Strategy<Value = Policy> {
    prop::sample::select(vec![Policy::DeadLetter, Policy::ParkKey, Policy::Skip])
}

/// Runs the history, and looks after each step.
fn run(policy: Policy, ops: &[Op], mut look: impl FnMut(&History, &Op)) -> History {
    let mut history = History::new(policy);
    for op in ops {
        history.apply(op).expect("no policy halts");
        look(&history, op);
    }
    history
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn invariant_1_the_confirmed_lsn_never_goes_backwards(policy in policy(), ops in ops()) {
        let mut before = START;
        let history = run(policy, &ops, |history, _| {
            assert!(history.relay.confirmed() >= before);
            before = history.relay.confirmed();
        });
        assert!(history.statuses.is_sorted_by_key(|(_, status)| status.confirmed));
        assert!(history.statuses.is_sorted_by_key(|(_, status)| status.received));
    }

    /// The server leaves out what committed before the LSN that it was told.
    #[test]
    fn invariant_2_only_commits_that_are_settled_with_all_before_are_confirmed(policy in policy(), ops in ops()) {
        run(policy, &ops, |history, _| {
            let confirmed = history.relay.progress().confirmed();
            for transaction in history.transactions.iter().filter(|t| t.commit_lsn < confirmed) {
                assert!(transaction.end_lsn.is_some_and(|end| end <= confirmed) && history.is_settled(transaction));
            }
            // And all of those are.
            let mut settled = history.transactions.iter().take_while(|t| t.end_lsn.is_some() && history.is_settled(t));
            assert!(settled.all(|t| t.end_lsn <= Some(confirmed)));
        });
    }

    #[test]
    fn invariant_3_a_keepalive_is_confirmed_when_idle_and_only_then(policy in policy(), ops in ops()) {
        let mut before = START;
        run(policy, &ops, |history, op| {
            let confirmed = history.relay.progress().confirmed();
            if matches!(op, Op::Keepalive { .. }) {
                assert_eq!(confirmed, if history.is_idle() { before.max(history.keepalive) } else { before });
            }
            before = confirmed;
        });
    }

    /// Records and bytes; input pauses at the bound, and goes on below it.
    #[test]
    fn invariant_4_what_is_in_flight_is_bounded(policy in policy(), ops in ops()) {
        run(policy, &ops, |history, _| {
            let progress = history.relay.progress();
            let first = history.tickets.iter().find(|ticket| !history.settled.contains(ticket));
            let records = first.map_or(0, |first| history.tickets.range(first..).count());
            assert_eq!(progress.in_flight_records(), records);
            let rows = history.transactions.iter().flat_map(|t| &t.rows).filter_map(|row| row.sent.as_ref());
            let ours = rows.filter(|sent| first.is_some_and(|first| sent.tickets[0] >= *first));
            let bytes: usize = ours.map(|sent| sent.cost_bytes).sum();
            // Markers come on top.
            assert!(progress.in_flight_bytes() >= bytes && progress.in_flight_bytes() <= bytes + records * 600);
            assert_eq!(history.relay.wants_input(), progress.in_flight_bytes() < LIMIT_BYTES);
            assert!(progress.in_flight_bytes() < LIMIT_BYTES + 2000);
        });
    }

    /// However long Kafka is away, and whether or not input is paused.
    #[test]
    fn invariant_5_status_updates_are_in_time(policy in policy(), ops in ops(), listening: bool) {
        let mut history = run(policy, &ops, |_, _| {});
        history.relay.set_listening(listening, history.now);
        history.now = history.now.max(history.relay.next_deadline());
        history.apply(&Op::Status).expect("no row");
        for _ in 0..20 {
            let (before, deadline) = (history.now, history.relay.next_deadline());
            assert!(deadline <= before + STATUS_INTERVAL);
            assert!(deadline > before || history.relay.is_silent(before) || history.relay.take_checkpoint(before).is_some());
            history.now = before.max(deadline);
            let sent = history.statuses.len();
            history.apply(&Op::Status).expect("no row");
            assert!(history.statuses.len() > sent || history.now < before + STATUS_INTERVAL);
            assert!(listening || !history.relay.is_silent(history.now), "the watchdog rests while nobody listens");
        }
    }

    /// Behind a row that was parked, nothing of its key goes to the topic.
    #[test]
    fn invariant_6_rows_of_a_key_go_out_in_commit_order(policy in policy(), ops in ops()) {
        let history = run(policy, &ops, |_, _| {});
        let mut last = None;
        let mut parked = BTreeMap::new();
        for row in history.transactions.iter().flat_map(|t| &t.rows) {
            let Some(sent) = &row.sent else {
                assert!(row.is_poison && policy == Policy::Skip);
                continue;
            };
            assert!(last < Some(sent.tickets[0]));
            last = Some(sent.tickets[0]);
            if row.is_poison && policy == Policy::ParkKey {
                parked.entry(row.key).or_insert(row.identity);
            }
            assert_eq!(sent.is_dead_letter, row.is_poison || parked.contains_key(&row.key));
        }
    }

    /// A crash after any step: what the server sends the next session has all that is not settled.
    #[test]
    fn invariant_7_what_is_replayed_has_all_that_was_not_confirmed(policy in policy(), ops in ops()) {
        run(policy, &ops, |history, _| {
            let told = history.statuses.last().map_or(START, |(_, status)| status.confirmed);
            let (forgotten, replayed): (Vec<_>, Vec<_>) =
                history.transactions.iter().partition(|t| t.commit_lsn < told);
            assert!(forgotten.iter().all(|t| t.end_lsn.is_some() && history.is_settled(t)));
            assert!(history.transactions.iter().filter(|t| !history.is_settled(t)).all(|t| {
                replayed.iter().any(|other| other.commit_lsn == t.commit_lsn)
            }));
        });
    }

    #[test]
    fn invariant_8_nothing_is_reported_that_no_acknowledged_checkpoint_covers(policy in policy(), ops in ops()) {
        let history = run(policy, &ops, |history, op| {
            assert!(history.relay.confirmed() <= history.checkpointed());
            if let (Op::Checkpoint, Some((_, lsn, _))) = (op, history.checkpoints.last()) {
                assert!(*lsn <= history.relay.progress().confirmed());
            }
        });
        for pair in history.checkpoints.windows(2) {
            assert!(pair[0].1 < pair[1].1, "each tells something new");
            assert!(pair[1].0 >= pair[0].0 + Duration::from_millis(250), "a few times a second at most");
            assert!(pair[0].2, "one at a time");
        }
    }

    /// Until the caller knows the checkpoint, the server hears where it was, in time, and no more.
    #[test]
    fn invariant_9_before_the_past_is_known_nothing_is_confirmed(
        keepalives in prop::collection::vec(0..100_u64, 0..20), checkpoint in 0..100_u64,
    ) {
        let mut now = Duration::ZERO;
        let mut relay = Relay::new(options(Policy::Halt), START, now);
        for ahead in keepalives {
            relay.handle_keepalive(Lsn(START.0 + ahead), false, now).expect("at-least-once");
            now = now.max(relay.next_deadline());
            if let Some(status) = relay.take_status(now) {
                assert_eq!(status.confirmed, START);
            }
            assert_eq!(relay.take_checkpoint(now), None, "a checkpoint would take a doubt away");
        }
        relay.recall(Past { checkpoint: Lsn(START.0 + checkpoint).into(), ..Past::default() });
        assert!(relay.confirmed() <= Lsn(START.0 + checkpoint));
        relay.handle_keepalive(Lsn(START.0 + 100), false, now).expect("at-least-once");
        assert_eq!(relay.confirmed(), Lsn(START.0 + checkpoint));
    }

    /// What halts is named, and neither it nor anything behind it is ever confirmed.
    #[test]
    fn invariant_10_a_halt_names_its_row_and_confirms_nothing_of_it(ops in ops()) {
        let mut history = History::new(Policy::Halt);
        let halted = ops.iter().find_map(|op| history.apply(op).err());
        let Some(Halt::Poison { row, .. }) = halted else {
            assert!(halted.is_none());
            return Ok(());
        };
        let at = history.transactions.last().expect("the row's").commit_lsn;
        assert!(row.starts_with("outbox row id ") && row.contains(&at.to_string()), "{row}");
        for ticket in history.tickets.difference(&history.settled) {
            history.relay.handle_settled(*ticket).expect("it was in flight");
        }
        history.relay.handle_keepalive(Lsn(u64::MAX), true, history.now).expect("at-least-once");
        assert!(history.relay.progress().confirmed() <= at);
    }
}

use proptest::prelude::*;

use super::*;
use crate::Lsn;

fn place(offset: i64) -> Place {
    Place { partition: 0, offset }
}

fn key(aggregate: u64) -> Key {
    Key { aggregate_type: "order".into(), aggregate_id: aggregate.to_string() }
}

/// The letter of the `row`-th row, which belongs to an aggregate.
fn letter(row: u64, aggregate: u64) -> Letter {
    Letter {
        identity: Identity { commit_lsn: Lsn(row + 1), seq: 0 },
        row_id: format!("row-{row}"),
        aggregate: Some(key(aggregate)),
        is_cut: false,
        is_whole: true,
        has_topic: true,
    }
}

/// Carries a plan out; which letters were published, in order.
fn carry_out(plan: &mut Plan, refused: impl Fn(Place) -> bool) -> Vec<Place> {
    let mut published = Vec::new();
    loop {
        let step = match plan.next_step() {
            Next::Take(step) => step,
            Next::Leave => continue,
            Next::End => return published,
        };
        if refused(step.place) {
            plan.refused(&step, "no".into());
        } else {
            published.push(step.place);
            plan.settled(&step);
        }
    }
}

fn index(wanted: &[i64], parked: &[u64], letters: &[Letter]) -> Index {
    let mut index = Index::new(wanted.iter().copied().map(place).collect(), parked.iter().copied().map(key));
    for (letter, offset) in letters.iter().zip(0..) {
        index.letter(place(offset), letter).unwrap();
    }
    index
}

#[test]
fn places_are_read_as_they_are_written() {
    for at in [place(0), Place { partition: 7, offset: i64::MAX }] {
        assert_eq!(at.to_string().parse(), Ok(at));
    }
    for text in ["", "/", "1", "1/", "/1", "-1/2", "1/-2", "1/2/3", "x/1", "99999999999/1"] {
        assert!(text.parse::<Place>().is_err(), "{text}");
    }
}

#[test]
fn a_parked_aggregate_is_taken_from_its_first_open_letter_and_freed_after_its_last() {
    let letters = [letter(0, 1), letter(1, 2), letter(2, 1), letter(3, 1)];
    let mut plan = index(&[2, 3], &[1], &letters).plan(Options::default());
    assert_eq!(carry_out(&mut plan, |_| false), []);
    assert_eq!(plan.outcomes()[&place(2)], Outcome::Behind(place(0)));

    let mut plan = index(&[0, 2], &[1], &letters).plan(Options::default());
    assert_eq!(carry_out(&mut plan, |_| false), [place(0), place(2)]);
    assert_eq!((plan.free(), plan.still_parked().map(|(_, n)| n).collect()), (vec![], vec![1]));

    let mut plan = index(&[3, 0, 2], &[1], &letters).plan(Options::default());
    assert_eq!(carry_out(&mut plan, |_| false), [place(0), place(2), place(3)]);
    assert_eq!(plan.free(), [key(1)]);
}

#[test]
fn what_is_behind_a_refused_letter_of_its_aggregate_stays_and_others_go() {
    let letters = [letter(0, 1), letter(1, 2), letter(2, 1), letter(3, 2)];
    let mut plan = index(&[0, 1, 2, 3], &[1], &letters).plan(Options::default());
    assert_eq!(carry_out(&mut plan, |p| p.offset < 2), [place(3)], "aggregate 2 is not parked");
    assert_eq!(plan.outcomes()[&place(2)], Outcome::Behind(place(0)));
    assert!(plan.free().is_empty());
}

#[test]
fn a_letter_that_cannot_be_published_can_be_discarded() {
    let cut = Letter { is_cut: true, ..letter(0, 1) };
    let odd = Letter { is_whole: false, has_topic: false, ..letter(1, 2) };
    let planned = |options| {
        let mut plan = index(&[0, 1], &[1], &[cut.clone(), odd.clone()]).plan(options);
        (carry_out(&mut plan, |_| false), plan)
    };
    let (published, plan) = planned(Options::default());
    assert_eq!(published, []);
    assert_eq!(plan.outcomes()[&place(0)], Outcome::Cut);
    assert_eq!(plan.outcomes()[&place(1)], Outcome::NotWhole);
    let (_, plan) = planned(Options { as_is: true, ..Options::default() });
    assert_eq!(plan.outcomes()[&place(1)], Outcome::NoTopic);
    assert_eq!(planned(Options { as_is: true, has_topic: true, ..Options::default() }).0, [place(1)]);
    let (_, plan) = planned(Options { discard: true, ..Options::default() });
    assert_eq!(plan.outcomes()[&place(0)], Outcome::Done(State::Discarded));
    assert_eq!(plan.free(), [key(1)]);
}

#[test]
fn a_letter_is_redriven_once_unless_asked_again() {
    let marked = || {
        let mut index = index(&[0], &[], &[letter(0, 1)]);
        index.mark(place(0), State::Redriven);
        index
    };
    let mut plan = marked().plan(Options::default());
    assert_eq!(carry_out(&mut plan, |_| false), []);
    assert_eq!(plan.outcomes()[&place(0)], Outcome::Already(State::Redriven));
    let mut plan = marked().plan(Options { again: true, ..Options::default() });
    assert!(matches!(plan.next_step(), Next::Take(Step { attempt: 2, .. })));
}

#[test]
fn a_crash_between_the_last_marker_and_the_freeing_is_made_good_by_any_redrive_of_it() {
    let planned = |wanted: &[i64], options| {
        let mut index = index(wanted, &[1, 2], &[letter(0, 1)]);
        index.mark(place(0), State::Redriven);
        index.plan(options).free()
    };
    assert_eq!(planned(&[0], Options::default()), [key(1)]);
    assert_eq!(planned(&[], Options::default()), []);
    assert_eq!(planned(&[], Options { all: true, ..Options::default() }), [key(1), key(2)]);
}

#[test]
fn partitions_that_were_added_do_not_disturb_the_order() {
    let mut index = Index::new((0..3).map(place).collect(), [key(1)]);
    let moved = Place { partition: 1, offset: 0 };
    index.wanted.insert(moved);
    for (at, row) in [(moved, 1), (place(0), 0), (place(1), 2)] {
        index.letter(at, &letter(row, 1)).unwrap();
    }
    let mut plan = index.plan(Options::default());
    assert_eq!(carry_out(&mut plan, |_| false), [place(0), moved, place(1)]);
}

#[test]
fn an_aggregates_letters_go_in_the_order_of_the_log_whatever_the_order_they_came_in() {
    // The third was dead-lettered, then Kafka refused the first, and the three came again.
    let letters = [letter(2, 1), letter(0, 1), letter(1, 1), letter(2, 1)];
    let mut plan = index(&[0, 1, 2, 3], &[1], &letters).plan(Options::default());
    assert_eq!(carry_out(&mut plan, |_| false), [place(1), place(2), place(0)]);
    assert_eq!(plan.free(), [key(1)]);
}

#[test]
fn what_will_be_read_again_is_not_redriven_before_it_is() {
    let letters = [letter(0, 1), letter(5, 1), letter(1, 2), letter(6, 2)];
    let mut index = index(&[0, 1, 2, 3], &[1], &letters);
    index.at_rest([], Lsn(6));
    let mut plan = index.plan(Options::default());
    assert_eq!(carry_out(&mut plan, |_| false), [place(2), place(0)]);
    for unsettled in [place(1), place(3)] {
        assert_eq!(plan.outcomes()[&unsettled], Outcome::Unsettled);
    }
    assert_eq!(plan.free(), []);
}

proptest! {
    /// Redrives of anything, one after the other, against what every one of them must keep.
    #[test]
    fn order_is_kept_nothing_goes_twice_and_only_what_is_empty_is_free(
        // The row and the aggregate of each letter; a row may come again.
        rows in prop::collection::vec((0..8_u64, 0..3_u64), 1..12),
        redrives in prop::collection::vec((any::<u16>(), any::<u16>()), 1..5),
    ) {
        let letters: Vec<Letter> = rows.iter().map(|(row, aggregate)| letter(row * 3 + aggregate, *aggregate)).collect();
        let parked = [0, 1];
        let mut done: BTreeSet<Place> = BTreeSet::new();
        let mut published: Vec<Identity> = Vec::new();
        for (wanted, refused) in redrives {
            let has = |set: u16, p: Place| set & (1 << p.offset) != 0;
            let all: Vec<Place> = (0..).take(letters.len()).map(place).collect();
            let names: Vec<i64> = all.iter().filter(|p| has(wanted, **p)).map(|p| p.offset).collect();
            let mut index = index(&names, &parked, &letters);
            for p in &done {
                index.mark(*p, State::Redriven);
            }
            let mut plan = index.plan(Options::default());
            for p in carry_out(&mut plan, |p| has(refused, p)) {
                prop_assert!(done.insert(p), "a letter goes once");
                published.push(letters[usize::try_from(p.offset).unwrap()].identity);
            }
            for (p, outcome) in plan.outcomes() {
                if outcome.is_done() { done.insert(*p); }
            }
            for aggregate in parked {
                let of_it = |p: &&Place| letters[usize::try_from(p.offset).unwrap()].aggregate == Some(key(aggregate));
                let open = all.iter().filter(of_it).any(|p| !done.contains(p));
                prop_assert!(!open || !plan.free().contains(&key(aggregate)));
            }
        }
        for aggregate in parked {
            // The order of an aggregate's rows in the log.
            let mut order: Vec<Identity> = Vec::new();
            for letter in letters.iter().filter(|l| l.aggregate == Some(key(aggregate))) {
                if !order.contains(&letter.identity) { order.push(letter.identity); }
            }
            order.sort();
            let went: Vec<Identity> = published.iter().copied().filter(|i| order.contains(i)).collect();
            prop_assert_eq!(&went[..], &order[..went.len()], "a prefix, and no row twice");
        }
    }
}

//! A faithful log has no violation, and each that is planted in one is found and named.

use proptest::{prelude::*, sample::Index};

use super::*;
use crate::chaos::checker::murmur2;

const TOPIC: &str = "chaos-events";
const PARTITIONS: u32 = 3;

/// What was committed, and a faithful log of it.
#[derive(Debug, Clone)]
struct World {
    transactions: Vec<Transaction>,
    records: Vec<Record>,
}

impl World {
    /// Of the keys of each transaction's rows.
    fn of(transactions: &[Vec<u8>]) -> Self {
        let mut world = Self { transactions: Vec::new(), records: Vec::new() };
        let mut id = 0;
        for (number, keys) in (1..).zip(transactions) {
            let (after, end) = (Lsn(number * 100), Lsn(number * 100 + 90));
            let mut rows = Vec::new();
            for (seq, key) in (0..).zip(keys) {
                id += 1;
                let key = format!("key-{key}");
                let content = Content::of(Some(key.as_bytes()), Some(format!("v{id}").as_bytes()), vec![]);
                let murmur2 = murmur2::positive(key.as_bytes());
                let id = Uuid::from_u128(id);
                rows.push(Row { id, topic: TOPIC.into(), murmur2, content });
                world.records.push(Record {
                    topic: TOPIC.into(),
                    partition: i32::try_from(murmur2 % PARTITIONS).unwrap(),
                    offset: 0,
                    id: Some(id),
                    lsn: Some(Lsn(after.0 + 50)),
                    seq: Some(seq),
                    of_order: false,
                    content,
                });
            }
            world.transactions.push(Transaction { after, end, rows });
        }
        world
    }

    /// What is said when the log is as it is now; the offsets follow from its order.
    fn verdict(mut self) -> Verdict {
        let mut comparison = Comparison::default();
        let mut ends = BTreeMap::new();
        // The topics may be read before the slot is.
        let late = self.transactions.split_off(self.transactions.len() / 2);
        for transaction in self.transactions {
            comparison.commit(transaction).unwrap();
        }
        for record in &mut self.records {
            let end = ends.entry(record.partition).or_insert(0);
            record.offset = *end;
            *end += 1;
            comparison.publish(record);
        }
        for transaction in late {
            comparison.commit(transaction).unwrap();
        }
        let partitions = BTreeMap::from([(TOPIC.to_owned(), i32::try_from(PARTITIONS).unwrap())]);
        let verdict = comparison.verdict(&partitions, None);
        assert_eq!(comparison.complete(), verdict.missing == 0);
        assert_eq!(comparison.verdict(&partitions, None), Verdict::default(), "nothing is told twice");
        verdict
    }

    /// A verdict without violations.
    fn clean(&self) -> Verdict {
        let count = self.records.len() as u64;
        Verdict { committed: count, published: count, ..Verdict::default() }
    }

    /// Two records of one partition that are next to each other in it, of one key or of two.
    fn neighbours(&self, one_key: bool, chosen: Index) -> Option<(usize, usize)> {
        let pairs: Vec<(usize, usize)> = (0..self.records.len())
            .filter_map(|first| {
                let one = &self.records[first];
                let mut later = (first + 1..self.records.len()).map(|second| (second, &self.records[second]));
                let (second, other) = later.find(|(_, other)| other.partition == one.partition)?;
                ((one.content.key == other.content.key) == one_key).then_some((first, second))
            })
            .collect();
        (!pairs.is_empty()).then(|| *chosen.get(&pairs))
    }
}

fn worlds() -> impl Strategy<Value = World> {
    let transactions = prop::collection::vec(prop::collection::vec(0..6_u8, 0..6), 1..12);
    transactions.prop_map(|t| World::of(&t)).prop_filter("no row", |world| !world.records.is_empty())
}

/// The counts alone, and whether each example names what was planted.
fn assert_found(found: &Verdict, wanted: &Verdict, names: &[&str]) -> Result<(), TestCaseError> {
    let Verdict { examples, .. } = found;
    prop_assert_eq!(Verdict { examples: Vec::new(), ..found.clone() }, wanted.clone(), "{:?}", examples);
    for name in names {
        prop_assert!(examples.iter().any(|example| example.contains(name)), "{} in {:?}", name, examples);
    }
    Ok(())
}

fn id_of(record: &Record) -> String {
    record.id.unwrap().to_string()
}

proptest! {
    #[test]
    fn a_faithful_log_has_no_violation(world in worlds()) {
        let clean = world.clean();
        prop_assert_eq!(clean.violations(true), 0);
        prop_assert_eq!(world.verdict(), clean);
    }

    #[test]
    fn a_loss_is_found(mut world in worlds(), chosen: Index) {
        let clean = world.clean();
        let lost = world.records.remove(chosen.index(world.records.len()));
        let wanted = Verdict { published: clean.published - 1, missing: 1, ..clean };
        assert_found(&world.verdict(), &wanted, &[&id_of(&lost), "missing", TOPIC])?;
    }

    #[test]
    fn a_duplicate_is_found_wherever_it_is_and_disturbs_no_order(mut world in worlds(), chosen: Index, to: Index) {
        let clean = world.clean();
        let from = chosen.index(world.records.len());
        let again = world.records[from].clone();
        let to = from + 1 + to.index(world.records.len() - from);
        world.records.insert(to, again.clone());
        let wanted = Verdict { published: clean.published + 1, duplicates: 1, ..clean };
        prop_assert_eq!((wanted.violations(true), wanted.violations(false)), (1, 0));
        assert_found(&world.verdict(), &wanted, &[&id_of(&again), "duplicate"])?;
    }

    #[test]
    fn a_whole_run_that_comes_again_is_in_order(mut world in worlds(), chosen: Index) {
        let clean = world.clean();
        let from = chosen.index(world.records.len());
        let again = world.records[from..].to_vec();
        let repeats = again.len() as u64;
        world.records.extend(again);
        let wanted = Verdict { published: clean.published + repeats, duplicates: repeats, ..clean };
        assert_found(&world.verdict(), &wanted, &["duplicate"])?;
    }

    #[test]
    fn a_swap_within_a_key_is_found(mut world in worlds(), chosen: Index) {
        let clean = world.clean();
        let Some((first, second)) = world.neighbours(true, chosen) else { return Ok(()) };
        world.records.swap(first, second);
        let wanted = Verdict { out_of_order_in_key: 1, out_of_commit_order: 1, ..clean };
        let late = id_of(&world.records[second]);
        assert_found(&world.verdict(), &wanted, &[&late, "out of order in its key", "out of commit order"])?;
    }

    #[test]
    fn a_swap_across_keys_is_out_of_commit_order_only(mut world in worlds(), chosen: Index) {
        let clean = world.clean();
        let Some((first, second)) = world.neighbours(false, chosen) else { return Ok(()) };
        world.records.swap(first, second);
        let wanted = Verdict { out_of_commit_order: 1, ..clean };
        let late = id_of(&world.records[second]);
        assert_found(&world.verdict(), &wanted, &[&late, "out of commit order"])?;
    }

    #[test]
    fn a_record_that_nobody_committed_is_found(mut world in worlds(), chosen: Index, named: bool) {
        let clean = world.clean();
        let at = chosen.index(world.records.len());
        let mut stranger = world.records[at].clone();
        stranger.id = named.then(|| Uuid::from_u128(u128::MAX));
        world.records.insert(at, stranger);
        let wanted = Verdict { published: clean.published + 1, foreign: 1, ..clean };
        assert_found(&world.verdict(), &wanted, &["foreign", TOPIC])?;
    }

    #[test]
    fn a_wrong_record_is_found_and_what_is_wrong_named(mut world in worlds(), chosen: Index, what in 0..6_usize) {
        let clean = world.clean();
        let at = chosen.index(world.records.len());
        let record = &mut world.records[at];
        let other = Content::of(None, None, vec![("x".into(), None)]);
        let named = match what {
            0 => { record.content.value = other.value; "the value" }
            1 => { record.content.headers = other.headers; "a header" }
            2 => { record.content.key = other.key; "the key" }
            3 => { record.lsn = record.lsn.map(|lsn| Lsn(lsn.0 + 40)); "the header lsn" }
            4 => { record.lsn = None; "the header lsn" }
            _ => { record.seq = None; "the header seq" }
        };
        let id = id_of(record);
        let found = world.verdict();
        prop_assert!(found.wrong >= 1, "{:?}", found);
        assert_found(&Verdict { wrong: 0, ..found }, &clean, &[named, &id])?;
    }

    #[test]
    fn a_record_in_another_partition_or_topic_is_found(mut world in worlds(), chosen: Index, topic: bool) {
        let at = chosen.index(world.records.len());
        // The last one, so that nothing comes after it.
        let mut record = world.records.remove(at);
        if topic { record.topic = "elsewhere".into(); } else { record.partition = (record.partition + 1) % 3; }
        world.records.push(record.clone());
        let found = world.verdict();
        prop_assert_eq!((found.wrong, found.missing, found.foreign), (1, 0, 0), "{:?}", found);
        let named = if topic { "its topic is chaos-events" } else { "its partition is" };
        let id = id_of(&record);
        prop_assert!(found.examples.iter().any(|e| e.contains(named) && e.contains(&id)), "{:?}", found.examples);
    }

    #[test]
    fn a_repetition_that_says_something_else_is_found(mut world in worlds(), chosen: Index) {
        let clean = world.clean();
        let mut again = chosen.get(&world.records).clone();
        again.seq = again.seq.map(|seq| seq + 100);
        world.records.push(again);
        let wanted = Verdict { published: clean.published + 1, duplicates: 1, wrong: 1, ..clean };
        assert_found(&world.verdict(), &wanted, &["another record of the same id"])?;
    }
}

#[test]
fn ordinals_that_go_back_within_a_transaction_are_wrong() {
    let mut world = World::of(&[vec![1, 2], vec![3]]);
    world.records[1].seq = Some(0);
    let found = world.verdict();
    assert_eq!((found.wrong, found.violations(false)), (1, 1), "{found:?}");
    assert!(found.examples[0].contains("the header seq"), "{found:?}");
}

#[test]
fn an_id_that_is_committed_twice_is_refused() {
    let world = World::of(&[vec![1]]);
    let mut comparison = Comparison::default();
    comparison.commit(world.transactions[0].clone()).unwrap();
    comparison.commit(world.transactions[0].clone()).unwrap_err();
}

#[test]
fn examples_are_bounded() {
    let mut world = World::of(&vec![vec![1]; 500]);
    world.records.clear();
    let found = world.verdict();
    assert_eq!((found.missing, found.examples.len()), (500, 10));
}

#[test]
fn what_the_relay_has_confirmed_is_missing_and_the_rest_is_late() {
    let world = World::of(&[vec![1], vec![1, 2]]);
    let mut comparison = Comparison::default();
    let confirmed = world.transactions[0].end;
    for transaction in world.transactions {
        comparison.commit(transaction).unwrap();
    }
    let found = comparison.verdict(&BTreeMap::new(), Some(confirmed));
    assert_eq!((found.missing, found.late, found.violations(false)), (1, 2, 3), "{found:?}");
}

#[test]
fn what_comes_between_two_verdicts_is_in_the_second() {
    let world = World::of(&[vec![1], vec![1], vec![1]]);
    let partitions = BTreeMap::from([(TOPIC.to_owned(), 3)]);
    let mut comparison = Comparison::default();
    let mut records = world.records.clone();
    for (offset, record) in (0..).zip([2, 0, 1]) {
        records[record].offset = offset;
    }
    let mut transactions = world.transactions.into_iter();
    let mut commit = |comparison: &mut Comparison| comparison.commit(transactions.next().unwrap()).unwrap();
    commit(&mut comparison);
    comparison.publish(&records[2]);
    let first = comparison.verdict(&partitions, None);
    assert_eq!((first.committed, first.published, first.missing, first.foreign), (1, 1, 1, 1));
    // The missing one comes late, the foreign one was committed after all, and is ahead.
    commit(&mut comparison);
    commit(&mut comparison);
    records[..2].iter().for_each(|record| assert!(comparison.publish(record)));
    let second = comparison.verdict(&partitions, None);
    assert_eq!((second.committed, second.published, second.violations(true)), (2, 2, 4), "{second:?}");
    assert_eq!((second.out_of_order_in_key, second.out_of_commit_order), (2, 2));
    assert!(!comparison.publish(&records[0]));
    let third = comparison.verdict(&partitions, None);
    assert_eq!((third.published, third.duplicates, third.violations(true)), (1, 1, 1));
}

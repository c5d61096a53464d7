//! What ought to be in the topics, and what of it was found there, in [`BYTES_PER_ROW`] of memory for each row of the outbox,
//! however many records there are.

use ring::digest;

/// The most memory that a row takes, in bytes: itself, and its aggregate, where no other row has the same.
pub(super) const BYTES_PER_ROW: usize = size_of::<Row>() + size_of::<Aggregate>();

/// The number of a topic for rows that cannot be sent to any.
pub(super) const NO_TOPIC: u16 = u16::MAX;

/// A record of it is in its topic.
const PUBLISHED: u8 = 1;
/// It is in the dead-letter topic.
const LETTER: u8 = 2;
/// The relay leaves it out, as its policy says.
const LEFT_OUT: u8 = 4;
/// It is absent, and was told.
const TOLD: u8 = 8;

/// A row: what it is known by is its topic and its id.
#[derive(Debug, Clone, Copy)]
struct Row {
    hash: [u64; 2],
    aggregate: u64,
    topic: u16,
    state: u8,
}

/// An aggregate of a topic, and the place of the last of its records that came for the first time.
#[derive(Debug, Clone, Copy)]
struct Aggregate {
    hash: u64,
    lsn: u64,
    seq: u32,
    /// -1 until there is one.
    partition: i32,
}

/// A record of a topic.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen<'a> {
    pub(super) topic: &'a str,
    pub(super) id: &'a [u8],
    pub(super) partition: i32,
    /// Its commit LSN and ordinal, where it has them.
    pub(super) place: Option<(u64, u64)>,
    /// Somebody asked for it: a replay, or a dead letter that was redriven.
    pub(super) is_deliberate: bool,
}

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Of no row that is in the outbox.
    Other,
    First,
    /// The first, and it has no place: its order cannot be told.
    Unplaced,
    /// The first, and it comes behind one of its aggregate that was committed later: its LSN and ordinal.
    Late(u64, u64),
    /// The row has its record already.
    Again,
    Deliberate,
}

/// How many rows are where.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Standing {
    pub(super) published: u64,
    pub(super) dead_lettered: u64,
    pub(super) left_out: u64,
    /// In no topic.
    pub(super) absent: u64,
    /// Of these, those that were not told.
    pub(super) untold: u64,
}

#[derive(Debug, Default)]
pub(super) struct Tally {
    rows: Vec<Row>,
    aggregates: Vec<Aggregate>,
}

impl Tally {
    /// Room for so many rows, and no more than that.
    pub(super) fn with_capacity(rows: usize) -> Self {
        Self { rows: Vec::with_capacity(rows), aggregates: Vec::with_capacity(rows) }
    }

    /// A row of the outbox, whose topic has this number. After the last one comes [`seal`](Self::seal).
    pub(super) fn expect(&mut self, number: u16, topic: &str, id: &[u8], key: &[u8], is_left_out: bool) {
        let [aggregate, _] = hash(topic, key);
        let state = if is_left_out { LEFT_OUT } else { 0 };
        self.rows.push(Row { hash: hash(topic, id), aggregate, topic: number, state });
        self.aggregates.push(Aggregate { hash: aggregate, lsn: 0, seq: 0, partition: -1 });
    }

    /// From here on rows can be found.
    pub(super) fn seal(&mut self) {
        self.rows.sort_unstable_by_key(|row| row.hash);
        self.aggregates.sort_unstable_by_key(|aggregate| aggregate.hash);
        self.aggregates.dedup_by_key(|aggregate| aggregate.hash);
        self.aggregates.shrink_to_fit();
    }

    /// Takes a record: each topic's from its beginning, each partition's in order.
    pub(super) fn see(&mut self, seen: &Seen<'_>) -> Verdict {
        let rows = rows_of(&mut self.rows, seen.topic, seen.id);
        let is_known = !rows.is_empty();
        let first = rows.iter_mut().find(|row| row.state & PUBLISHED == 0);
        let aggregate = first.map(|row| {
            row.state |= PUBLISHED;
            row.aggregate
        });
        match (aggregate, seen.place) {
            _ if !is_known => Verdict::Other,
            _ if seen.is_deliberate => Verdict::Deliberate,
            (None, _) => Verdict::Again,
            (Some(_), None) => Verdict::Unplaced,
            (Some(aggregate), Some(place)) => self.order(aggregate, seen.partition, place),
        }
    }

    fn order(&mut self, aggregate: u64, partition: i32, (lsn, seq): (u64, u64)) -> Verdict {
        let Ok(at) = self.aggregates.binary_search_by_key(&aggregate, |a| a.hash) else {
            return Verdict::First;
        };
        let last = &mut self.aggregates[at];
        let seq = u32::try_from(seq).unwrap_or(u32::MAX);
        // Between two partitions there is no order.
        if last.partition == partition && (lsn, seq) < (last.lsn, last.seq) {
            return Verdict::Late(last.lsn, last.seq.into());
        }
        (last.lsn, last.seq, last.partition) = (lsn, seq, partition);
        Verdict::First
    }

    /// Takes a dead letter of a row that was to go to `topic`.
    pub(super) fn see_letter(&mut self, topic: &str, id: &[u8]) {
        let rows = rows_of(&mut self.rows, topic, id);
        if let Some(row) = rows.iter_mut().find(|row| row.state & LETTER == 0) {
            row.state |= LETTER;
        }
    }

    /// Whether this row of the outbox is in no topic, and was not told before.
    pub(super) fn tell(&mut self, topic: &str, id: &[u8]) -> bool {
        let untold = rows_of(&mut self.rows, topic, id).iter_mut().find(|row| row.state == 0);
        untold.map(|row| row.state = TOLD).is_some()
    }

    /// Where the rows are, of the topics whose numbers `wanted` wants.
    pub(super) fn standing(&self, wanted: impl Fn(u16) -> bool) -> Standing {
        let mut standing = Standing::default();
        for row in self.rows.iter().filter(|row| wanted(row.topic)) {
            let count = match row.state {
                state if state & PUBLISHED != 0 => &mut standing.published,
                state if state & LETTER != 0 => &mut standing.dead_lettered,
                state if state & LEFT_OUT != 0 => &mut standing.left_out,
                state => {
                    standing.untold += u64::from(state & TOLD == 0);
                    &mut standing.absent
                }
            };
            *count += 1;
        }
        standing
    }
}

fn rows_of<'a>(rows: &'a mut [Row], topic: &str, id: &[u8]) -> &'a mut [Row] {
    let hash = hash(topic, id);
    let from = rows.partition_point(|row| row.hash < hash);
    let rows = &mut rows[from..];
    let count = rows.iter().take_while(|row| row.hash == hash).count();
    &mut rows[..count]
}

/// 128 bits of SHA-256: two ids in 10^12 rows have the same with a chance of less than 10^-14.
fn hash(topic: &str, text: &[u8]) -> [u64; 2] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(topic.as_bytes());
    // Not in a topic's name.
    context.update(&[0]);
    context.update(text);
    let mut out = [0; 2];
    for (half, bytes) in out.iter_mut().zip(context.finish().as_ref().chunks_exact(8)) {
        *half = bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows 0 to 9 of topic `t`, the even ones of one aggregate, the odd ones of another.
    fn tally() -> Tally {
        let mut tally = Tally::with_capacity(10);
        for n in 0..10_u8 {
            tally.expect(0, "t", &[n], &[n % 2], false);
        }
        tally.seal();
        tally
    }

    fn seen(id: &[u8], lsn: u64) -> Seen<'_> {
        Seen { topic: "t", id, partition: 0, place: Some((lsn, 0)), is_deliberate: false }
    }

    #[test]
    fn a_row_takes_no_more_than_is_told() {
        assert_eq!(BYTES_PER_ROW, 56);
        let tally = tally();
        assert_eq!((tally.rows.capacity(), tally.aggregates.len()), (10, 2));
    }

    #[test]
    fn what_is_whole_and_in_order_is_told_so() {
        let mut tally = tally();
        for n in 0..10 {
            assert_eq!(tally.see(&seen(&[n], u64::from(n))), Verdict::First);
        }
        assert_eq!(tally.standing(|_| true), Standing { published: 10, ..Standing::default() });
        assert_eq!(tally.see(&seen(&[10], 10)), Verdict::Other);
        assert_eq!(tally.see(&Seen { topic: "u", ..seen(&[1], 1) }), Verdict::Other);
    }

    #[test]
    fn gaps_duplicates_and_swaps_are_found() {
        let mut tally = tally();
        assert_eq!(tally.see(&seen(&[4], 4)), Verdict::First);
        assert_eq!(tally.see(&seen(&[2], 2)), Verdict::Late(4, 0));
        assert_eq!(tally.see(&seen(&[3], 3)), Verdict::First, "another aggregate's");
        assert_eq!(tally.see(&seen(&[2], 2)), Verdict::Again);
        assert_eq!(tally.see(&Seen { partition: 1, ..seen(&[0], 0) }), Verdict::First);
        assert_eq!(tally.see(&Seen { place: None, ..seen(&[1], 1) }), Verdict::Unplaced);
        let standing = tally.standing(|_| true);
        assert_eq!((standing.published, standing.absent, standing.untold), (5, 5, 5));
        assert!(tally.tell("t", &[5]) && !tally.tell("t", &[5]) && !tally.tell("t", &[4]));
        let standing = tally.standing(|_| true);
        assert_eq!((standing.absent, standing.untold), (5, 4));
        assert_eq!(tally.standing(|topic| topic != 0), Standing::default());
    }

    #[test]
    fn what_was_asked_for_is_neither_a_duplicate_nor_out_of_order() {
        let mut tally = tally();
        tally.see(&seen(&[4], 4));
        let asked = |id| Seen { is_deliberate: true, ..seen(id, 0) };
        assert_eq!(tally.see(&asked(&[4])), Verdict::Deliberate);
        assert_eq!(tally.see(&asked(&[2])), Verdict::Deliberate);
        assert_eq!(tally.standing(|_| true).published, 2);
    }

    #[test]
    fn letters_and_rows_that_are_left_out_are_told_apart_and_two_rows_of_one_id_want_two_records() {
        let mut tally = Tally::with_capacity(4);
        tally.expect(NO_TOPIC, "a b", b"1", b"k", false);
        tally.expect(NO_TOPIC, "a b", b"2", b"k", true);
        tally.expect(0, "t", b"3", b"k", false);
        tally.expect(0, "t", b"3", b"k", false);
        tally.seal();
        tally.see_letter("a b", b"1");
        assert_eq!(tally.see(&seen(b"3", 1)), Verdict::First);
        let standing = tally.standing(|_| true);
        assert_eq!((standing.published, standing.dead_lettered), (1, 1));
        assert_eq!((standing.left_out, standing.absent), (1, 1));
        assert_eq!(tally.see(&seen(b"3", 2)), Verdict::First);
        assert_eq!(tally.see(&seen(b"3", 2)), Verdict::Again);
    }
}

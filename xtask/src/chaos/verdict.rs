//! What the checker says.

/// The most examples of each kind.
const EXAMPLES_MAX: u64 = 10;

/// What was committed beside what was published, and beside what the consumers made of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Verdict {
    /// Outbox rows.
    pub committed: u64,
    /// Records in the topics, repeated ones included.
    pub published: u64,
    /// Rows without a record, which the relay has confirmed: nobody will send them any more.
    pub missing: u64,
    /// Rows without a record when the time was up, which the relay has not confirmed either.
    #[serde(default)]
    pub late: u64,
    /// Records whose id was there before, in the order of the topics or not.
    pub duplicates: u64,
    /// First occurrences that come after one of their key which was committed later.
    pub out_of_order_in_key: u64,
    /// First occurrences that come after one of their partition which was committed later.
    pub out_of_commit_order: u64,
    /// Ids that nobody committed, and records without one.
    pub foreign: u64,
    /// Ids whose record does not say what the row does: key, value, headers, partition, topic, commit LSN, or a repetition
    /// that is not one.
    pub wrong: u64,
    /// Rows of the consumers' tables that are missing, unheard of, or not as the events tell.
    pub tables_wrong: u64,
    /// Some of each kind, with topic, partition, offset, id and commit.
    pub examples: Vec<String>,
}

/// A kind of violation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Missing,
    Late,
    Duplicate,
    OutOfOrderInKey,
    OutOfCommitOrder,
    Foreign,
    Wrong,
    Table,
}

impl Verdict {
    /// How many violations there are; duplicates are none unless delivery is exactly once.
    pub(crate) fn violations(&self, exactly_once: bool) -> u64 {
        let duplicates = if exactly_once { self.duplicates } else { 0 };
        self.missing
            + self.late
            + duplicates
            + self.out_of_order_in_key
            + self.out_of_commit_order
            + self.foreign
            + self.wrong
            + self.tables_wrong
    }

    /// Counts one, and tells of it if not too many were told of.
    pub(super) fn add(&mut self, kind: Kind, example: impl FnOnce() -> String) {
        let (count, name) = match kind {
            Kind::Missing => (&mut self.missing, "missing"),
            Kind::Late => (&mut self.late, "late"),
            Kind::Duplicate => (&mut self.duplicates, "duplicate"),
            Kind::OutOfOrderInKey => (&mut self.out_of_order_in_key, "out of order in its key"),
            Kind::OutOfCommitOrder => (&mut self.out_of_commit_order, "out of commit order"),
            Kind::Foreign => (&mut self.foreign, "foreign"),
            Kind::Wrong => (&mut self.wrong, "wrong"),
            Kind::Table => (&mut self.tables_wrong, "table"),
        };
        *count += 1;
        if *count <= EXAMPLES_MAX {
            self.examples.push(format!("{name}: {}", example()));
        }
    }
}

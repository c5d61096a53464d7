//! What an outbox table is: where it is, what its columns are called, and what its rows become.

use std::fmt;

use crate::route::{Route, TopicTemplate};

/// The most columns of one table that can be used beside the [`Field`]s: in topic templates and as headers.
pub const EXTRAS_LIMIT: usize = 16;
/// Values that are taken from a row: one for each [`Field`], then one for each further column that is used.
pub(crate) const SLOTS: usize = FIELDS + EXTRAS_LIMIT;

/// A row's values that are used; None is NULL.
pub(crate) type Slots<'a> = [Option<&'a [u8]>; SLOTS];

/// What a column is to the relay. The first five must be there; the rest are used where the table has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    Id,
    AggregateType,
    AggregateId,
    EventType,
    Payload,
    Headers,
    Traceparent,
    Partition,
    Topic,
    Timestamp,
}

/// How many kinds of [`Field`] there are.
pub const FIELDS: usize = 10;
/// How many of them, from the first, must be there.
pub(crate) const REQUIRED: usize = 5;

/// What the fields are called in a message of the table-less outbox.
pub(crate) const MESSAGE_FIELDS: [&str; FIELDS] = [
    "id",
    "aggregatetype",
    "aggregateid",
    "type",
    "payload",
    "headers",
    "traceparent",
    "partition",
    "topic",
    "timestamp",
];

/// Headers that are the relay's. A row's own header of such a name is left out, and no column can be one.
const RESERVED_HEADERS: [&str; 5] = ["id", "type", "aggregatetype", "lsn", "seq"];

/// What an update of a row in the outbox means. It is never published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Updates {
    /// Nothing.
    #[default]
    Ignore,
    /// A mistake that a person has to look at.
    Halt,
}

/// An outbox table as it is configured. The defaults are Debezium's
/// (<https://debezium.io/documentation/reference/stable/transformations/outbox-event-router.html>).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboxTable {
    pub schema: String,
    pub name: String,
    /// The columns' names in the order of [`Field`]; an optional one may be empty: it is not used then.
    pub columns: [String; FIELDS],
    /// Further columns that become headers: the column's name, and the header's.
    pub header_columns: Vec<(String, String)>,
    pub topic: TopicTemplate,
    pub updates: Updates,
}

impl Default for OutboxTable {
    fn default() -> Self {
        let mut columns = MESSAGE_FIELDS.map(String::from);
        // The time of the commit, unless a column is named.
        columns[Field::Timestamp as usize].clear();
        Self {
            schema: "public".into(),
            name: "outbox".into(),
            columns,
            header_columns: Vec::new(),
            topic: TopicTemplate::default(),
            updates: Updates::Ignore,
        }
    }
}

/// The table's configuration cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutboxError {
    /// A required column has no name.
    Unnamed(Field),
    /// Two fields have the same column.
    SharedColumn(String),
    /// A column would be a header of a name that is taken.
    TakenHeader(String),
    /// More than [`EXTRAS_LIMIT`] columns beside the fields.
    TooManyColumns,
}

impl fmt::Display for OutboxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unnamed(field) => {
                write!(f, "gives no name to the column for {}", MESSAGE_FIELDS[*field as usize])
            }
            Self::SharedColumn(column) => write!(f, "names the column {column:?} twice"),
            Self::TakenHeader(header) => write!(f, "makes a column the header {header:?}, which is taken"),
            Self::TooManyColumns => {
                write!(f, "uses more than {EXTRAS_LIMIT} columns in its topic template and as headers")
            }
        }
    }
}

impl std::error::Error for OutboxError {}

/// An outbox: a table, or the messages of the table-less form. What is used of it has been given its slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outbox {
    table: OutboxTable,
    /// The table for an operator, `schema.name`; empty for messages.
    label: String,
    /// Columns beside the fields, in the order of their slots.
    extras: Vec<String>,
    headers: Vec<(usize, String)>,
    route: Route,
}

impl Outbox {
    /// Checks a table's configuration.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn new(table: OutboxTable) -> Result<Self, OutboxError> {
        let label = format!("{}.{}", table.schema, table.name);
        Self::with_label(table, label)
    }

    /// The table-less outbox, whose messages go where the template says.
    ///
    /// # Errors
    /// The template uses too many fields.
    pub fn of_messages(topic: TopicTemplate) -> Result<Self, OutboxError> {
        let columns = MESSAGE_FIELDS.map(String::from);
        Self::with_label(OutboxTable { columns, topic, ..OutboxTable::default() }, String::new())
    }

    fn with_label(table: OutboxTable, label: String) -> Result<Self, OutboxError> {
        for (i, column) in table.columns.iter().enumerate() {
            if column.is_empty() && i < REQUIRED {
                return Err(OutboxError::Unnamed(FIELD_ORDER[i]));
            }
            if !column.is_empty() && table.columns[..i].contains(column) {
                return Err(OutboxError::SharedColumn(column.clone()));
            }
        }
        for (i, (_, header)) in table.header_columns.iter().enumerate() {
            let taken = RESERVED_HEADERS.contains(&header.as_str())
                || header == "traceparent"
                || is_cloud_event_header(header)
                || table.header_columns[..i].iter().any(|(_, other)| other == header);
            if header.is_empty() || taken {
                return Err(OutboxError::TakenHeader(header.clone()));
            }
        }
        let mut extras: Vec<String> = Vec::new();
        let mut slot_of = |column: &str| {
            // An unused field has no name, and a place in a template always has one.
            if let Some(field) = table.columns.iter().position(|c| c == column) {
                return field;
            }
            let known = extras.iter().position(|c| c == column);
            FIELDS
                + known.unwrap_or_else(|| {
                    extras.push(column.to_owned());
                    extras.len() - 1
                })
        };
        let route = table
            .topic
            .resolve(|place| Field::of_place(place).map_or_else(|| slot_of(place), |f| f as usize));
        let headers = table.header_columns.iter().map(|(c, header)| (slot_of(c), header.clone())).collect();
        if extras.len() > EXTRAS_LIMIT {
            return Err(OutboxError::TooManyColumns);
        }
        Ok(Self { table, label, extras, headers, route })
    }

    /// The table's schema and name.
    pub fn name(&self) -> (&str, &str) {
        (&self.table.schema, &self.table.name)
    }

    /// The table for an operator, `schema.name`; empty for messages.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// What an update means.
    pub fn updates(&self) -> Updates {
        self.table.updates
    }

    /// The columns that the table must have.
    pub fn required_columns(&self) -> impl Iterator<Item = &str> {
        let fields = self.table.columns[..REQUIRED].iter().chain(&self.extras);
        fields.map(String::as_str)
    }

    /// The columns that are used where the table has them.
    pub fn optional_columns(&self) -> impl Iterator<Item = &str> {
        self.table.columns[REQUIRED..].iter().map(String::as_str).filter(|c| !c.is_empty())
    }

    /// Whether its template could send a row to that topic.
    pub fn may_go_to(&self, topic: &str) -> bool {
        self.route.may_make(topic)
    }

    /// The topic of every row that has none of its own, where the template has no places.
    pub fn constant_topic(&self) -> Option<String> {
        self.route.constant()
    }

    /// Whether a record's timestamp is a column's and not the commit's.
    pub fn has_timestamp_column(&self) -> bool {
        !self.table.columns[Field::Timestamp as usize].is_empty()
    }

    /// The same with that column as the time of its rows.
    ///
    /// # Errors
    /// The column is used for something else.
    pub fn with_timestamp_column(&self, column: &str) -> Result<Self, OutboxError> {
        let mut table = self.table.clone();
        column.clone_into(&mut table.columns[Field::Timestamp as usize]);
        Self::with_label(table, self.label.clone())
    }

    /// The column with which a row names its own topic; empty where none does.
    pub fn topic_column(&self) -> &str {
        &self.table.columns[Field::Topic as usize]
    }

    pub(crate) fn route(&self) -> &Route {
        &self.route
    }

    /// The columns that become headers: their slots and the headers' names.
    pub(crate) fn headers(&self) -> &[(usize, String)] {
        &self.headers
    }

    /// Whether a row's own header of that name would be one of ours, or a column's.
    pub(crate) fn reserves_header(&self, name: &str) -> bool {
        RESERVED_HEADERS.contains(&name) || self.headers.iter().any(|(_, header)| header == name)
    }

    /// What the value in a slot is called.
    pub(crate) fn slot_name(&self, slot: usize) -> &str {
        let extra = || self.extras.get(slot.wrapping_sub(FIELDS));
        self.table.columns.get(slot).or_else(extra).map(String::as_str).unwrap_or_default()
    }

    /// The column's slot; None where it is not used.
    pub(crate) fn slot(&self, column: &str) -> Option<usize> {
        if column.is_empty() {
            return None;
        }
        let field = self.table.columns.iter().position(|c| c == column);
        field.or_else(|| self.extras.iter().position(|c| c == column).map(|i| FIELDS + i))
    }

    /// Every slot that is used, with its name.
    pub(crate) fn slots(&self) -> impl Iterator<Item = (usize, &str)> {
        let all = self.table.columns.iter().chain(&self.extras).map(String::as_str).enumerate();
        all.filter(|(_, name)| !name.is_empty())
    }
}

const FIELD_ORDER: [Field; REQUIRED] =
    [Field::Id, Field::AggregateType, Field::AggregateId, Field::EventType, Field::Payload];

impl Field {
    /// The field that a place in a topic template means, whatever its column is called. `routedByValue` is
    /// Debezium's name for what it routes by.
    fn of_place(place: &str) -> Option<Self> {
        match place {
            "id" => Some(Self::Id),
            "aggregatetype" | "routedByValue" => Some(Self::AggregateType),
            "aggregateid" => Some(Self::AggregateId),
            "type" => Some(Self::EventType),
            _ => None,
        }
    }
}

/// Whether CloudEvents' Kafka binding has a say in a header of that name.
pub(crate) fn is_cloud_event_header(name: &str) -> bool {
    name == "content-type" || name.starts_with("ce_")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(change: impl FnOnce(&mut OutboxTable)) -> Result<Outbox, OutboxError> {
        let mut table = OutboxTable::default();
        change(&mut table);
        Outbox::new(table)
    }

    fn header(column: &str, header: &str) -> (String, String) {
        (column.into(), header.into())
    }

    #[test]
    fn what_is_used_has_its_slot() {
        let outbox = table(|t| {
            t.topic = TopicTemplate::parse("${tenant}.${aggregatetype}.${kind}").unwrap();
            t.columns[Field::AggregateType as usize] = "kind".into();
            t.header_columns =
                vec![header("tenant", "tenant"), header("kind", "x-kind"), header("zone", "zone")];
        })
        .unwrap();
        assert_eq!(outbox.label(), "public.outbox");
        assert_eq!(outbox.extras, ["tenant", "zone"], "each once, and no field among them");
        let slots: Vec<_> = outbox.headers().iter().map(|(slot, _)| *slot).collect();
        assert_eq!(slots, [FIELDS, Field::AggregateType as usize, FIELDS + 1]);
        for (slot, name) in outbox.slots() {
            assert_eq!((outbox.slot(name), outbox.slot_name(slot)), (Some(slot), name));
        }
        assert_eq!((outbox.slot("other"), outbox.slot("")), (None, None));
        assert_eq!(outbox.constant_topic(), None);
        let constant = table(|t| t.topic = TopicTemplate::parse("orders").unwrap()).unwrap();
        assert_eq!(constant.constant_topic().as_deref(), Some("orders"));
        let required: Vec<_> = outbox.required_columns().collect();
        assert_eq!(required, ["id", "kind", "aggregateid", "type", "payload", "tenant", "zone"]);
        let optional: Vec<_> = outbox.optional_columns().collect();
        assert_eq!(optional, ["headers", "traceparent", "partition", "topic"]);
    }

    #[test]
    fn what_cannot_be_used_says_why() {
        assert_eq!(table(|t| t.columns[4].clear()), Err(OutboxError::Unnamed(Field::Payload)));
        assert_eq!(table(|t| t.columns[8] = "id".into()), Err(OutboxError::SharedColumn("id".into())));
        let outbox = table(|_| {}).unwrap();
        assert_eq!(outbox.with_timestamp_column("id"), Err(OutboxError::SharedColumn("id".into())));
        assert!(outbox.with_timestamp_column("at").unwrap().has_timestamp_column());
        for name in ["", "id", "seq", "traceparent", "ce_id", "content-type"] {
            let bad = table(|t| t.header_columns = vec![header("tenant", name)]);
            assert_eq!(bad, Err(OutboxError::TakenHeader(name.into())));
        }
        let twice = table(|t| t.header_columns = vec![header("a", "x"), header("b", "x")]);
        assert_eq!(twice, Err(OutboxError::TakenHeader("x".into())));
        let many = |n| {
            table(|t| t.header_columns = (0..n).map(|i| header(&i.to_string(), &i.to_string())).collect())
        };
        assert!(many(EXTRAS_LIMIT).is_ok());
        assert_eq!(many(EXTRAS_LIMIT + 1), Err(OutboxError::TooManyColumns));
    }
}

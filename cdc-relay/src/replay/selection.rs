//! Which records a replay publishes: what is asked for, checked.

use chrono::{DateTime, SecondsFormat, Utc};
use relay_core::{
    Lsn,
    outbox::{Field, Outbox},
    route::is_legal_topic,
};
use serde::{Deserialize, Serialize};
use service::problem::FieldError;

use crate::{config::Settings, replication::stream::quote_identifier, snapshot::OrderBy};

/// The most ids that one replay may name.
pub(crate) const IDS_LIMIT: usize = 10_000;
/// The most topics that one replay may name.
const TOPICS_LIMIT: usize = 100;
/// The most characters of an id, or of a part of an aggregate's name.
const TEXT_LIMIT: usize = 1024;

/// What is asked for: rows, or records.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Request {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rows: Option<RowsRequest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) records: Option<RecordsRequest>,
}

/// Rows of the retained outbox: these ids, or those that meet every condition that is given.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct RowsRequest {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) ids: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) aggregate: Option<Aggregate>,
    /// By the time column, this one included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) since: Option<DateTime<Utc>>,
    /// By the time column, this one excluded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) until: Option<DateTime<Utc>>,
    /// Which column is the time; without this, `created_at`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) time_column: Option<String>,
    /// Columns, each perhaps with ` desc`; without this, the ids' own order, or the time column's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) order_by: Option<String>,
}

/// An aggregate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Aggregate {
    #[serde(rename = "aggregateType")]
    pub(crate) kind: String,
    #[serde(rename = "aggregateId")]
    pub(crate) id: String,
}

/// Records of these topics whose transactions were committed from one LSN through another, by their header `lsn`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct RecordsRequest {
    pub(crate) topics: Vec<String>,
    /// The first, `X/Y`.
    pub(crate) from_lsn: String,
    /// The last, `X/Y`.
    pub(crate) through_lsn: String,
}

/// What is asked for and can be looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Selection {
    Rows(Rows),
    Records(Records),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rows {
    /// Empty: by the conditions.
    pub(crate) ids: Vec<String>,
    aggregate: Option<Aggregate>,
    since: Option<DateTime<Utc>>,
    until: Option<DateTime<Utc>>,
    time_column: String,
    order: Option<OrderBy>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Records {
    pub(crate) topics: Vec<String>,
    pub(crate) from: Lsn,
    pub(crate) through: Lsn,
}

impl Request {
    /// Checks it.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub(crate) fn check(self, settings: &Settings) -> Result<Selection, Vec<FieldError>> {
        match (self.rows, self.records) {
            (Some(rows), None) => rows.check(settings).map(Selection::Rows),
            (None, Some(records)) => records.check(settings).map(Selection::Records),
            _ => Err(vec![wrong("", "has to have either rows or records")]),
        }
    }
}

fn wrong(pointer: &str, detail: impl Into<String>) -> FieldError {
    FieldError { pointer: pointer.into(), detail: detail.into() }
}

/// Whether a text can be a value in Postgres, and is no longer than one has reason to be.
fn is_fit(text: &str) -> bool {
    !text.is_empty() && !text.contains('\0') && text.chars().nth(TEXT_LIMIT).is_none()
}

impl RowsRequest {
    fn check(self, settings: &Settings) -> Result<Rows, Vec<FieldError>> {
        let Self { ids, aggregate, since, until, time_column, order_by } = self;
        let mut errors = Vec::new();
        let unfit = format!("has to have 1 to {TEXT_LIMIT} characters, none of them NUL");
        if settings.source.outboxes.is_empty() {
            errors.push(wrong("/rows", "there is no outbox table: messages leave no rows"));
        }
        if ids.len() > IDS_LIMIT {
            errors.push(wrong("/rows/ids", format!("names {} ids; at most {IDS_LIMIT}", ids.len())));
        }
        for (i, _) in ids.iter().enumerate().filter(|(_, id)| !is_fit(id)).take(10) {
            errors.push(wrong(&format!("/rows/ids/{i}"), unfit.clone()));
        }
        let has_condition = aggregate.is_some() || since.is_some() || until.is_some();
        if ids.is_empty() && !has_condition {
            errors.push(wrong("/rows", "has to name ids, an aggregate or a time: all rows are never meant"));
        }
        if !ids.is_empty() && has_condition {
            errors.push(wrong("/rows/ids", "names rows already: no aggregate or time can be added"));
        }
        if aggregate.as_ref().is_some_and(|a| !is_fit(&a.kind) || !is_fit(&a.id)) {
            errors.push(wrong("/rows/aggregate", unfit.clone()));
        }
        if let (Some(since), Some(until)) = (since, until)
            && since >= until
        {
            errors.push(wrong("/rows/until", "is not later than since"));
        }
        let time_column = time_column.unwrap_or_else(|| "created_at".into());
        if !is_fit(&time_column) {
            errors.push(wrong("/rows/timeColumn", unfit));
        }
        let order = match order_by.map(|text| text.parse::<OrderBy>()).transpose() {
            Ok(order) => order,
            Err(e) => {
                errors.push(wrong("/rows/orderBy", e));
                None
            }
        };
        if errors.is_empty() {
            Ok(Rows { ids, aggregate, since, until, time_column, order })
        } else {
            Err(errors)
        }
    }
}

impl Rows {
    /// The condition and the order for one outbox, and the parameters: what comes behind FROM. The values' types are
    /// their columns', so that an index serves.
    pub(crate) fn clauses(&self, outbox: &Outbox) -> (String, Vec<String>) {
        let field = |field: Field| {
            quote_identifier(outbox.required_columns().nth(field as usize).unwrap_or_default())
        };
        let mut parameters = Vec::new();
        let mut parameter = |value: String| {
            parameters.push(value);
            format!("${}", parameters.len())
        };
        let mut conditions = Vec::new();
        let id = field(Field::Id);
        if !self.ids.is_empty() {
            conditions.push(format!("{id} = ANY ({})", parameter(array(&self.ids))));
        }
        if let Some(Aggregate { kind, id }) = &self.aggregate {
            let (kind, id) = (parameter(kind.clone()), parameter(id.clone()));
            conditions.push(format!("{} = {kind}", field(Field::AggregateType)));
            conditions.push(format!("{} = {id}", field(Field::AggregateId)));
        }
        let time = quote_identifier(&self.time_column);
        let text = |time: DateTime<Utc>| time.to_rfc3339_opts(SecondsFormat::Micros, true);
        if let Some(since) = self.since {
            conditions.push(format!("{time} >= {}", parameter(text(since))));
        }
        if let Some(until) = self.until {
            conditions.push(format!("{time} < {}", parameter(text(until))));
        }
        let order = match &self.order {
            Some(order) => order.clause(outbox),
            None if !self.ids.is_empty() => format!("ORDER BY array_position($1, {id})"),
            None => format!("ORDER BY {time}, {id}"),
        };
        (format!("WHERE {} {order}", conditions.join(" AND ")), parameters)
    }
}

/// The text of an array of Postgres (<https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO>).
fn array(values: &[String]) -> String {
    let quoted: Vec<_> =
        values.iter().map(|v| format!("\"{}\"", v.replace('\\', "\\\\").replace('"', "\\\""))).collect();
    format!("{{{}}}", quoted.join(","))
}

impl RecordsRequest {
    fn check(self, settings: &Settings) -> Result<Records, Vec<FieldError>> {
        let Self { mut topics, from_lsn, through_lsn } = self;
        let mut errors = Vec::new();
        if topics.is_empty() || topics.len() > TOPICS_LIMIT {
            errors.push(wrong("/records/topics", format!("has to name 1 to {TOPICS_LIMIT} topics")));
        }
        let own =
            [&settings.kafka.checkpoint_topic, &settings.dead_letter_topic, &settings.parked_keys_topic];
        for (i, topic) in topics.iter().enumerate().take(TOPICS_LIMIT) {
            let pointer = format!("/records/topics/{i}");
            if !is_legal_topic(topic) {
                errors.push(wrong(&pointer, format!("{topic:?} is not a legal name of a Kafka topic")));
            } else if own.contains(&topic) {
                errors.push(wrong(&pointer, format!("{topic:?} is the relay's own")));
            }
        }
        let mut lsn = |name: &str, text: &str| {
            text.parse::<Lsn>().unwrap_or_else(|e| {
                errors.push(wrong(&format!("/records/{name}"), e.to_string()));
                Lsn::ZERO
            })
        };
        let (from, through) = (lsn("fromLsn", &from_lsn), lsn("throughLsn", &through_lsn));
        if errors.is_empty() && from > through {
            errors.push(wrong("/records/throughLsn", "is before fromLsn"));
        }
        topics.sort();
        topics.dedup();
        if errors.is_empty() { Ok(Records { topics, from, through }) } else { Err(errors) }
    }
}

#[cfg(test)]
mod tests {
    use relay_core::outbox::OutboxTable;

    use super::*;

    fn settings() -> Settings {
        crate::config::Config::default().check().unwrap()
    }

    fn rows(change: impl FnOnce(&mut RowsRequest)) -> Result<Rows, Vec<String>> {
        let mut request = RowsRequest::default();
        change(&mut request);
        let checked = Request { rows: Some(request), records: None }.check(&settings());
        match checked {
            Ok(Selection::Rows(rows)) => Ok(rows),
            Ok(Selection::Records(_)) => panic!("records"),
            Err(errors) => Err(errors.into_iter().map(|e| e.pointer).collect()),
        }
    }

    fn clauses(change: impl FnOnce(&mut RowsRequest)) -> (String, Vec<String>) {
        rows(change).unwrap().clauses(&Outbox::new(OutboxTable::default()).unwrap())
    }

    #[test]
    fn values_are_parameters_and_names_are_quoted() {
        let (sql, parameters) = clauses(|r| r.ids = vec!["a\"b".into(), "c\\d,}".into()]);
        assert_eq!(sql, "WHERE \"id\" = ANY ($1) ORDER BY array_position($1, \"id\")");
        assert_eq!(parameters, [r#"{"a\"b","c\\d,}"}"#]);
        let (sql, parameters) = clauses(|r| {
            r.aggregate = Some(Aggregate { kind: "order".into(), id: "' OR true --".into() });
            r.until = Some("2026-11-21T13:00:00+01:00".parse().unwrap());
            r.time_column = Some("t\"m".into());
        });
        assert_eq!(
            sql,
            "WHERE \"aggregatetype\" = $1 AND \"aggregateid\" = $2 AND \"t\"\"m\" < $3 ORDER BY \"t\"\"m\", \"id\""
        );
        assert_eq!(parameters, ["order", "' OR true --", "2026-11-21T12:00:00.000000Z"]);
        let (sql, _) = clauses(|r| {
            r.since = Some("2026-11-21T13:00:00Z".parse().unwrap());
            r.order_by = Some("seq desc".into());
        });
        assert_eq!(sql, "WHERE \"created_at\" >= $1 ORDER BY \"seq\" DESC, \"id\"");
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_its_place() {
        let time = |text: &str| Some(text.parse().unwrap());
        assert_eq!(rows(|_| {}), Err(vec!["/rows".into()]), "not all rows by mistake");
        assert_eq!(rows(|r| r.ids = vec!["a".into(), "b\0".into()]), Err(vec!["/rows/ids/1".into()]));
        assert_eq!(rows(|r| r.ids = vec!["a".into(); IDS_LIMIT + 1]), Err(vec!["/rows/ids".into()]));
        let both = rows(|r| (r.ids, r.since) = (vec!["a".into()], time("2026-11-21T13:00:00Z")));
        assert_eq!(both, Err(vec!["/rows/ids".into()]));
        let never =
            rows(|r| (r.since, r.until) = (time("2026-11-21T13:00:00Z"), time("2026-11-21T13:00:00Z")));
        assert_eq!(never, Err(vec!["/rows/until".into()]));
        let order = rows(|r| (r.ids, r.order_by) = (vec!["a".into()], Some("a b c".into())));
        assert_eq!(order, Err(vec!["/rows/orderBy".into()]));
        let nothing = Request::default().check(&settings());
        assert_eq!(nothing.unwrap_err()[0].pointer, "");
    }

    #[test]
    fn records_are_of_topics_that_are_not_the_relays_own() {
        let records = |topics: &[&str], from: &str, through: &str| {
            let topics = topics.iter().map(|t| (*t).to_owned()).collect();
            let request = RecordsRequest { topics, from_lsn: from.into(), through_lsn: through.into() };
            let checked = Request { rows: None, records: Some(request) }.check(&settings());
            checked.map_err(|errors| errors.into_iter().map(|e| e.pointer).collect::<Vec<_>>())
        };
        let found = Records { topics: vec!["a".into(), "b".into()], from: Lsn(16), through: Lsn(1 << 32) };
        assert_eq!(records(&["b", "a", "b"], "0/10", "1/0"), Ok(Selection::Records(found)));
        assert_eq!(records(&[], "0/10", "0/10"), Err(vec!["/records/topics".into()]));
        assert_eq!(records(&["a"], "0/11", "0/10"), Err(vec!["/records/throughLsn".into()]));
        assert_eq!(records(&["a"], "x", "0/10"), Err(vec!["/records/fromLsn".into()]));
        for bad in ["cdc-relay-dlq", "cdc-relay-checkpoints", "cdc-relay-parked-keys", "a b"] {
            assert_eq!(records(&[bad], "0/1", "0/1"), Err(vec!["/records/topics/0".into()]), "{bad}");
        }
    }
}

//! The record that a row, or a message, becomes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use crate::{
    Lsn,
    headers::{CloudEvents, Ingredients},
    outbox::{Outbox, Slots},
    poison::Poison,
    record::{Headers, Identity, Record},
    route::is_legal_topic,
    shape::{Findings, OutboxRow},
};

/// The record that a row becomes. Where `poison` says why it cannot be one, what could be read of it: the topic
/// is then empty unless it is known.
#[derive(Debug)]
pub struct Drafted<'a> {
    pub record: Record<'a>,
    pub poison: Option<Poison>,
}

/// Which row it is, and when it was committed: in milliseconds since the Unix epoch, 0 where there was no commit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    pub(crate) identity: Identity,
    pub(crate) committed_at_ms: i64,
}

/// Scratch for what is made of a row. It keeps its capacity from row to row.
#[derive(Debug, Default)]
pub(crate) struct Draft {
    commit_lsn: String,
    seq: String,
    topic: String,
    headers: Headers,
}

impl Draft {
    pub(crate) fn set_commit_lsn(&mut self, lsn: Lsn) {
        self.commit_lsn.clear();
        // Writing to a String cannot fail.
        let _ = write!(self.commit_lsn, "{lsn}");
    }

    pub(crate) fn set_seq(&mut self, seq: u64) {
        self.seq.clear();
        let _ = write!(self.seq, "{seq}");
    }

    /// The record that a row becomes. `allowed` is where a message may go.
    pub(crate) fn make<'a>(
        &'a mut self,
        (topic_by_type, cloud_events): (&BTreeMap<String, String>, Option<&CloudEvents>),
        outbox: &'a Outbox,
        (row, slots): (OutboxRow<'a>, &Slots<'a>),
        moment: Moment,
        mut findings: Findings,
        allowed: Option<&BTreeSet<String>>,
    ) -> Drafted<'a> {
        if let Err(poison) = put_topic(&mut self.topic, outbox, slots, &row, topic_by_type) {
            findings.add(poison);
        } else if let Some(topics) = allowed
            && !topics.contains(&self.topic)
            && (row.topic.is_some() || !topics.is_empty())
        {
            findings.add(Poison::UnlistedTopic(self.topic.clone()));
        }
        let timestamp_ms = row.timestamp_ms.unwrap_or(moment.committed_at_ms);
        let headers = Ingredients {
            outbox,
            row: &row,
            slots,
            commit_lsn: &self.commit_lsn,
            seq: &self.seq,
            timestamp_ms,
            cloud_events,
        };
        if let Err(poison) = headers.put(&mut self.headers) {
            findings.add(poison);
        }
        let record = Record {
            identity: moment.identity,
            table: outbox.label(),
            row_id: row.id,
            aggregate_type: row.aggregate_type,
            aggregate_id: row.aggregate_id,
            topic: &self.topic,
            key: Some(row.aggregate_id.as_bytes()),
            value: row.payload,
            partition: row.partition,
            timestamp_ms,
            headers: &self.headers,
        };
        Drafted { record, poison: findings.0 }
    }
}

/// Writes a row's topic into `out`: its own where it has one, else what `by_type` has for its type, else what the
/// outbox's template says.
///
/// # Errors
/// That is not a legal name, which `out` then holds, or a column that the template names is NULL.
fn put_topic(
    out: &mut String,
    outbox: &Outbox,
    slots: &Slots<'_>,
    row: &OutboxRow<'_>,
    by_type: &BTreeMap<String, String>,
) -> Result<(), Poison> {
    out.clear();
    if let Some(topic) = row.topic {
        out.push_str(topic);
    } else if let Some(topic) = by_type.get(row.event_type) {
        out.push_str(topic);
    } else {
        outbox.route().put(out, slots, |slot| outbox.slot_name(slot).to_owned())?;
    }
    if is_legal_topic(out) { Ok(()) } else { Err(Poison::IllegalTopic(out.clone())) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        outbox::{Field, OutboxTable, SLOTS},
        route::TopicTemplate,
    };

    const AGGREGATE_TYPE: usize = Field::AggregateType as usize;

    /// The topic of a row of aggregate type `order`, type `OrderCreated`, and as column `tenant` what is given.
    fn topic(template: &str, own: Option<&str>, tenant: Option<&[u8]>) -> (String, Result<(), Poison>) {
        let topic = TopicTemplate::parse(template).unwrap();
        let outbox = Outbox::new(OutboxTable { topic, ..OutboxTable::default() }).unwrap();
        let mut slots: Slots<'_> = [None; SLOTS];
        slots[AGGREGATE_TYPE] = Some(b"order");
        slots[Field::EventType as usize] = Some(b"OrderCreated");
        if let Some(slot) = outbox.slot("tenant") {
            slots[slot] = tenant;
        }
        let by_type = BTreeMap::from([("OrderMapped".to_owned(), "mapped".to_owned())]);
        let mut out = "left over".to_owned();
        let row = OutboxRow { topic: own, event_type: "OrderCreated", ..OutboxRow::default() };
        let result = put_topic(&mut out, &outbox, &slots, &row, &by_type);
        (out, result)
    }

    #[test]
    fn places_are_filled_and_the_rows_own_topic_wins() {
        let tenant = Some(&b"t1"[..]);
        for (template, own, expected) in [
            ("outbox.event.${aggregatetype}", None, "outbox.event.order"),
            ("outbox.event.${routedByValue}", None, "outbox.event.order"),
            ("${aggregatetype}-${type}", None, "order-OrderCreated"),
            ("${tenant}.${aggregatetype}.${tenant}", None, "t1.order.t1"),
            ("constant", None, "constant"),
            ("${aggregatetype}-events", Some("mine"), "mine"),
        ] {
            assert_eq!(topic(template, own, tenant), (expected.to_owned(), Ok(())));
        }
    }

    #[test]
    fn a_types_topic_comes_before_the_template_and_after_the_rows_own() {
        let outbox = Outbox::new(OutboxTable::default()).unwrap();
        let by_type = BTreeMap::from([("T".to_owned(), "t-topic".to_owned())]);
        let (mut out, slots) = (String::new(), [None; SLOTS]);
        let mut row = OutboxRow { event_type: "T", ..OutboxRow::default() };
        put_topic(&mut out, &outbox, &slots, &row, &by_type).unwrap();
        assert_eq!(out, "t-topic");
        row.topic = Some("own");
        put_topic(&mut out, &outbox, &slots, &row, &by_type).unwrap();
        assert_eq!(out, "own");
    }

    #[test]
    fn a_place_without_a_value_and_an_illegal_name_are_told() {
        assert_eq!(topic("${tenant}", None, None).1, Err(Poison::NullColumn("tenant".into())));
        let not_text = Poison::BadColumn("tenant".into(), "is not UTF-8");
        assert_eq!(topic("${tenant}", None, Some(b"\xFF")).1, Err(not_text));
        let illegal = |name: &str| Err(Poison::IllegalTopic(name.into()));
        assert_eq!(topic("${tenant}", None, Some(b"a b")), ("a b".into(), illegal("a b")));
        assert_eq!(topic("x", Some("a/b"), None), ("a/b".into(), illegal("a/b")));
        assert_eq!(topic("x", Some(""), None).1, illegal(""));
    }

    proptest! {
        /// Whatever a row holds: a legal topic, or poison.
        #[test]
        fn a_topic_is_legal_or_poison(tenant: Vec<u8>, own: Option<String>) {
            let (name, result) = topic("a${tenant}", own.as_deref(), Some(&tenant));
            prop_assert_eq!(result.is_ok(), is_legal_topic(&name) && (own.is_some() || str::from_utf8(&tenant).is_ok()));
        }
    }
}

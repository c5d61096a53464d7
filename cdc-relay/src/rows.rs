//! The outboxes' rows, each made into a record as the relay itself makes it: as a row of the stream.

use relay_core::{
    Lsn,
    checkpoint::Mark,
    outbox::{Field, Outbox},
    poison::Poison,
    record::Record,
    source::{Options, Source, Step},
};

use crate::{
    config::Settings,
    error::{Error, Kind},
    replication::{encode::Encoder, stream::quote_identifier},
    snapshot::{Column, Snapshot},
};

/// Hands every row over as the record that it becomes, or with the reason why it cannot be one. Payloads are not read:
/// nothing depends on them but their size.
pub(crate) fn read(
    snapshot: &mut Snapshot<'_>,
    source: &Options,
    order: &str,
    mut take: impl FnMut(&Record<'_>, Option<&Poison>) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut rows = Rows::new(Options { messages: None, cloud_events: None, ..source.clone() }, 0)?;
    for (oid, outbox) in (1..).zip(&source.outboxes) {
        let mut columns = snapshot.columns(outbox)?;
        let payload = columns.remove(Field::Payload as usize);
        rows.describe(oid, outbox, &columns, &payload)?;
        snapshot
            .read(outbox, &columns, order, &[], |values| rows.row(oid, values.chain([None]), &mut take))?;
    }
    Ok(())
}

/// Hands over the largest rows of each outbox, at most so many, as whole records; as Postgres stores the payloads,
/// compressed or not.
pub(crate) fn read_largest(
    snapshot: &mut Snapshot<'_>,
    settings: &Settings,
    count: usize,
    take: impl FnMut(&Record<'_>, Option<&Poison>) -> Result<(), Error>,
) -> Result<(), Error> {
    let largest = |outbox: &Outbox| {
        let payload = outbox.required_columns().nth(Field::Payload as usize).unwrap_or_default();
        let payload = quote_identifier(payload);
        (format!("ORDER BY pg_column_size({payload}) DESC NULLS LAST LIMIT {count}"), Vec::new())
    };
    read_whole(snapshot, settings, 0, largest, take)
}

/// Hands over rows of each outbox as whole records of a transaction that was committed then (in microseconds since
/// Postgres' epoch). `rest` says which rows and in which order: what comes behind FROM, with its parameters.
pub(crate) fn read_whole(
    snapshot: &mut Snapshot<'_>,
    settings: &Settings,
    committed_at_us: i64,
    rest: impl Fn(&Outbox) -> (String, Vec<String>),
    mut take: impl FnMut(&Record<'_>, Option<&Poison>) -> Result<(), Error>,
) -> Result<(), Error> {
    let options = Options { messages: None, ..settings.source.clone() };
    let mut rows = Rows::new(options, committed_at_us)?;
    for (oid, outbox) in (1..).zip(&settings.source.outboxes) {
        let mut columns = snapshot.columns(outbox)?;
        let payload = columns.remove(Field::Payload as usize);
        rows.describe(oid, outbox, &columns, &payload)?;
        columns.push(payload);
        let (rest, parameters) = rest(outbox);
        let parameters: Vec<&str> = parameters.iter().map(String::as_str).collect();
        snapshot.read(outbox, &columns, &rest, &parameters, |values| rows.row(oid, values, &mut take))?;
    }
    Ok(())
}

/// Rows of SQL in one transaction that does not end.
struct Rows {
    source: Source,
    encoder: Encoder,
}

impl Rows {
    fn new(options: Options, committed_at_us: i64) -> Result<Self, Error> {
        let mut rows = Self { source: Source::new(options), encoder: Encoder::default() };
        let mark = Mark { commit_lsn: Lsn::ZERO, committed_at_us };
        hand_over(&mut rows.source, rows.encoder.begin(mark), |_, _| Ok(()))?;
        Ok(rows)
    }

    fn describe(
        &mut self,
        oid: u32,
        outbox: &Outbox,
        columns: &[Column],
        payload: &Column,
    ) -> Result<(), Error> {
        // The payload comes last.
        let all: Vec<_> = columns.iter().chain([payload]).map(|c| (c.name.as_str(), c.type_oid)).collect();
        let message = self.encoder.relation(oid, outbox.name(), all.into_iter());
        hand_over(&mut self.source, message, |_, _| Ok(()))
    }

    fn row<'v>(
        &mut self,
        oid: u32,
        values: impl Iterator<Item = Option<&'v [u8]>>,
        take: impl FnMut(&Record<'_>, Option<&Poison>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let values: Vec<_> = values.collect();
        hand_over(&mut self.source, self.encoder.insert(oid, values.into_iter()), take)
    }
}

fn hand_over(
    source: &mut Source,
    message: &[u8],
    mut take: impl FnMut(&Record<'_>, Option<&Poison>) -> Result<(), Error>,
) -> Result<(), Error> {
    let step = source.handle(Lsn::ZERO, message);
    match step.map_err(|e| Error::new(Kind::Internal, format!("a row cannot be read: {e}")))? {
        Step::Row(drafted) => take(&drafted.record, drafted.poison.as_ref()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use relay_core::{outbox::OutboxTable, route::TopicTemplate};

    use super::*;

    #[test]
    fn a_row_goes_where_the_relay_sends_it() {
        let topic = TopicTemplate::parse("${tenant}.${aggregatetype}").unwrap();
        let outbox = Outbox::new(OutboxTable { topic, ..OutboxTable::default() }).unwrap();
        let options = Options { outboxes: vec![outbox.clone()], ..Options::default() };
        let mut rows = Rows::new(options, 0).unwrap();
        let column = |name: &str| Column { name: name.into(), type_oid: 25 };
        let columns = ["id", "type", "aggregatetype", "aggregateid", "tenant", "topic"].map(column);
        rows.describe(7, &outbox, &columns, &column("payload")).unwrap();
        let mut read = |values: [Option<&str>; 6]| {
            let mut out = None;
            let values = values.into_iter().map(|v| v.map(str::as_bytes)).chain([None]);
            rows.row(7, values, |record, poison| {
                let text = |text: &str| text.to_owned();
                out = Some((
                    text(record.row_id),
                    text(record.topic),
                    record.key.map(<[u8]>::to_vec),
                    poison.cloned(),
                ));
                Ok(())
            })
            .unwrap();
            out.unwrap()
        };
        let some = |text| Some(text);
        let plain = read([some("1"), some("T"), some("order"), some("o1"), some("eu"), None]);
        assert_eq!(plain, ("1".into(), "eu.order".into(), Some(b"o1".to_vec()), None));
        let own = read([some("2"), some("T"), some("order"), some("o1"), None, some("mine")]);
        assert_eq!((own.1.as_str(), own.3), ("mine", None));
        let none = read([some("3"), some("T"), some("order"), some("o1"), None, None]);
        assert_eq!(none.3, Some(Poison::NullColumn("tenant".into())));
    }
}

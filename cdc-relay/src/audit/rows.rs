//! The outbox's rows by SQL, each made into a record as the relay itself makes it: as a row of the stream.

use relay_core::{
    Lsn,
    outbox::{Field, Outbox},
    poison::Poison,
    record::Record,
    source::{Options, Source, Step},
};

use crate::{
    config::Settings,
    error::{Error, Kind},
    replication::{connection::Connection, stream::quote_identifier},
};

/// How many rows are in memory at once.
const FETCHED_ROWS: usize = 500;

/// The outboxes as they were at one moment. Payloads are not read: nothing depends on them but their size.
pub(super) struct Snapshot<'a> {
    connection: &'a mut Connection,
    settings: &'a Settings,
    filter: Option<&'a str>,
}

impl<'a> Snapshot<'a> {
    /// Begins a transaction that only reads.
    pub(super) fn begin(
        connection: &'a mut Connection,
        settings: &'a Settings,
        filter: Option<&'a str>,
    ) -> Result<Self, Error> {
        for sql in [
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
            // What a policy hides would not be looked for: let it be an error.
            "SET LOCAL row_security = off",
            // The text of values, as the stream has it.
            "SET LOCAL DateStyle = 'ISO'",
            "SET LOCAL IntervalStyle = 'postgres'",
            "SET LOCAL TimeZone = 'UTC'",
            "SET LOCAL bytea_output = 'hex'",
            "SET LOCAL extra_float_digits = 3",
        ] {
            connection.simple_query(sql)?;
        }
        Ok(Self { connection, settings, filter })
    }

    /// How many rows there are.
    pub(super) fn count(&mut self) -> Result<u64, Error> {
        let mut count = 0;
        for outbox in &self.settings.source.outboxes {
            let sql = format!("SELECT count(*) {}", self.from(outbox));
            let rows = self.connection.query(&sql, &[]).map_err(|e| self.explain(outbox, e))?;
            let rows: Option<u64> = rows.into_iter().flatten().flatten().next().and_then(|n| n.parse().ok());
            count += rows.unwrap_or(0);
        }
        Ok(count)
    }

    /// Hands every row over as the record that it becomes, or with the reason why it cannot be one.
    pub(super) fn read(
        &mut self,
        mut take: impl FnMut(&Record<'_>, Option<&Poison>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let outboxes = self.settings.source.outboxes.clone();
        let options = Options { messages: None, cloud_events: None, ..self.settings.source.clone() };
        let mut rows = Rows::new(options)?;
        for (oid, outbox) in (1..).zip(&outboxes) {
            let columns = self.columns(outbox)?;
            rows.describe(oid, outbox, &columns)?;
            let list: Vec<_> = columns.iter().map(|column| quote_identifier(column)).collect();
            let sql = format!(
                "DECLARE audit NO SCROLL CURSOR FOR SELECT {} {}",
                list.join(", "),
                self.from(outbox)
            );
            self.connection.query(&sql, &[]).map_err(|e| self.explain(outbox, e))?;
            loop {
                let fetched = self.connection.simple_query(&format!("FETCH {FETCHED_ROWS} FROM audit"))?;
                for row in &fetched {
                    rows.row(oid, row, &mut take)?;
                }
                if fetched.len() < FETCHED_ROWS {
                    break;
                }
            }
            self.connection.simple_query("CLOSE audit")?;
        }
        Ok(())
    }

    pub(super) fn end(self) -> Result<(), Error> {
        self.connection.simple_query("COMMIT").map(drop)
    }

    fn from(&self, outbox: &Outbox) -> String {
        let (schema, table) = outbox.name();
        let filter = self.filter.map(|sql| format!(" WHERE ({sql}\n)")).unwrap_or_default();
        format!("FROM {}.{}{filter}", quote_identifier(schema), quote_identifier(table))
    }

    /// The columns that are used and that the table has, without the payload.
    fn columns(&mut self, outbox: &Outbox) -> Result<Vec<String>, Error> {
        let sql = "SELECT a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid \
                   JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2 \
                   AND a.attnum > 0 AND NOT a.attisdropped";
        let (schema, table) = outbox.name();
        let there: Vec<String> =
            self.connection.query(sql, &[schema, table])?.into_iter().flatten().flatten().collect();
        if let Some(missing) = outbox.required_columns().find(|column| !there.iter().any(|c| c == column)) {
            let what = format!("the outbox {} has no column {missing:?}", outbox.label());
            return Err(
                Error::new(Kind::Halted, what).hint("mend the column's name in the configuration ([outbox])")
            );
        }
        let used = outbox.required_columns().chain(outbox.optional_columns());
        let used = used.enumerate().filter(|(i, _)| *i != Field::Payload as usize).map(|(_, column)| column);
        Ok(used.filter(|column| there.iter().any(|c| c == column)).map(str::to_owned).collect())
    }

    fn explain(&self, outbox: &Outbox, error: Error) -> Error {
        let (schema, table) = outbox.name();
        match error.sqlstate.as_deref() {
            Some("42501") => {
                let role = quote_identifier(&self.settings.postgres.user);
                let (schema, table) = (quote_identifier(schema), quote_identifier(table));
                let grant = format!(
                    "let the table's owner run: GRANT SELECT ON {schema}.{table} TO {role}; GRANT USAGE ON SCHEMA {schema} TO {role};"
                );
                Error { kind: Kind::Refused, ..error }.hint(grant)
            }
            Some(state) if self.filter.is_some() && (state.starts_with("42") || state.starts_with("22")) => {
                let hint = "look at --where: a condition of SQL, on the columns of each outbox";
                Error { kind: Kind::Misconfigured, ..error }.hint(hint)
            }
            _ => error,
        }
    }
}

/// Rows of SQL as messages of `pgoutput`, in one transaction that does not end.
struct Rows {
    source: Source,
    message: Vec<u8>,
}

impl Rows {
    fn new(options: Options) -> Result<Self, Error> {
        let mut rows = Self { source: Source::new(options), message: Vec::new() };
        rows.message.push(b'B');
        // Commit LSN, time and transaction id.
        rows.message.extend_from_slice(&[0; 8 + 8 + 4]);
        rows.hand_over(|_, _| Ok(()))?;
        Ok(rows)
    }

    fn describe(&mut self, oid: u32, outbox: &Outbox, columns: &[String]) -> Result<(), Error> {
        let (schema, table) = outbox.name();
        let payload = outbox.required_columns().nth(Field::Payload as usize).unwrap_or_default();
        let message = &mut self.message;
        message.clear();
        message.push(b'R');
        message.extend_from_slice(&oid.to_be_bytes());
        for name in [schema, table] {
            put_text(message, name);
        }
        message.push(b'd');
        put_count(message, columns.len() + 1);
        for column in columns.iter().map(String::as_str).chain([payload]) {
            // No part of the identity; no type that matters, and none of its modifiers.
            message.push(0);
            put_text(message, column);
            message.extend_from_slice(&[0; 4 + 4]);
        }
        self.hand_over(|_, _| Ok(()))
    }

    fn row(
        &mut self,
        oid: u32,
        values: &[Option<String>],
        take: impl FnMut(&Record<'_>, Option<&Poison>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let message = &mut self.message;
        message.clear();
        message.push(b'I');
        message.extend_from_slice(&oid.to_be_bytes());
        message.push(b'N');
        put_count(message, values.len() + 1);
        for value in values {
            let Some(value) = value else {
                message.push(b'n');
                continue;
            };
            message.push(b't');
            // Postgres has no value of 2 GiB.
            message.extend_from_slice(&u32::try_from(value.len()).unwrap_or(0).to_be_bytes());
            message.extend_from_slice(value.as_bytes());
        }
        message.push(b'n');
        self.hand_over(take)
    }

    fn hand_over(
        &mut self,
        mut take: impl FnMut(&Record<'_>, Option<&Poison>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let step = self.source.handle(Lsn::ZERO, &self.message);
        match step.map_err(|e| Error::new(Kind::Internal, format!("a row cannot be read: {e}")))? {
            Step::Row(drafted) => take(&drafted.record, drafted.poison.as_ref()),
            _ => Ok(()),
        }
    }
}

/// Text behind which a zero byte is.
fn put_text(message: &mut Vec<u8>, text: &str) {
    message.extend_from_slice(text.as_bytes());
    message.push(0);
}

fn put_count(message: &mut Vec<u8>, count: usize) {
    // A table has no more than 1600 columns.
    message.extend_from_slice(&u16::try_from(count).unwrap_or(u16::MAX).to_be_bytes());
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
        let mut rows = Rows::new(options).unwrap();
        let columns = ["id", "type", "aggregatetype", "aggregateid", "tenant", "topic"].map(String::from);
        rows.describe(7, &outbox, &columns).unwrap();
        let mut read = |values: [Option<&str>; 6]| {
            let values = values.map(|value| value.map(str::to_owned));
            let mut out = None;
            rows.row(7, &values, |record, poison| {
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

//! The outboxes' rows as they were at one moment, by SQL.

use relay_core::outbox::Outbox;

use crate::{
    config::Settings,
    error::{Error, Kind},
    replication::{
        connection::{Connection, Values},
        stream::{quote_identifier, quote_literal},
    },
};

/// A transaction that only reads.
#[derive(Debug)]
pub(crate) struct Snapshot<'a> {
    connection: &'a mut Connection,
    settings: &'a Settings,
    /// A condition of SQL.
    filter: Option<&'a str>,
}

/// A column of an outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Column {
    pub(crate) name: String,
    pub(crate) type_oid: u32,
}

impl<'a> Snapshot<'a> {
    /// Begins the transaction: of this moment, or of the one that was `exported`.
    pub(crate) fn begin(
        connection: &'a mut Connection,
        settings: &'a Settings,
        filter: Option<&'a str>,
        exported: Option<&str>,
    ) -> Result<Self, Error> {
        connection.simple_query("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")?;
        if let Some(exported) = exported {
            connection.simple_query(&format!("SET TRANSACTION SNAPSHOT {}", quote_literal(exported)))?;
        }
        for sql in [
            // What a policy hides would not be looked for: let it be an error.
            "SET LOCAL row_security = off",
            // However long it takes.
            "SET LOCAL statement_timeout = 0",
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
    pub(crate) fn count(&mut self) -> Result<u64, Error> {
        let mut count = 0;
        for outbox in &self.settings.source.outboxes {
            let sql = format!("SELECT count(*) {}", self.from(outbox));
            let rows = self.connection.simple_query(&sql).map_err(|e| self.explain(outbox, e))?;
            let rows: Option<u64> = rows.into_iter().flatten().flatten().next().and_then(|n| n.parse().ok());
            count += rows.unwrap_or(0);
        }
        Ok(count)
    }

    /// The columns that are used and that the table has.
    pub(crate) fn columns(&mut self, outbox: &Outbox) -> Result<Vec<Column>, Error> {
        let sql = "SELECT a.attname, a.atttypid FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid \
                   JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2 \
                   AND a.attnum > 0 AND NOT a.attisdropped";
        let (schema, table) = outbox.name();
        let column = |row: Vec<Option<String>>| {
            let mut values = row.into_iter().flatten();
            Some(Column { name: values.next()?, type_oid: values.next()?.parse().ok()? })
        };
        let rows = self.connection.query(sql, &[schema, table])?;
        let there: Vec<Column> = rows.into_iter().filter_map(column).collect();
        if let Some(missing) = outbox.required_columns().find(|name| !there.iter().any(|c| c.name == *name)) {
            let what = format!("the outbox {} has no column {missing:?}", outbox.label());
            return Err(
                Error::new(Kind::Halted, what).hint("mend the column's name in the configuration ([outbox])")
            );
        }
        let used = outbox.required_columns().chain(outbox.optional_columns());
        Ok(used.filter_map(|name| there.iter().find(|column| column.name == name).cloned()).collect())
    }

    /// Hands over each row's values of these columns, as they come. `order` is the rest of the statement: what comes
    /// behind the condition.
    pub(crate) fn read(
        &mut self,
        outbox: &Outbox,
        columns: &[Column],
        order: &str,
        take: impl FnMut(Values<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let list: Vec<_> = columns.iter().map(|column| quote_identifier(&column.name)).collect();
        let sql = format!("SELECT {} {} {order}", list.join(", "), self.from(outbox));
        self.connection.each_row(&sql, take).map_err(|e| self.explain(outbox, e))
    }

    pub(crate) fn end(self) -> Result<(), Error> {
        self.connection.simple_query("COMMIT").map(drop)
    }

    fn from(&self, outbox: &Outbox) -> String {
        let (schema, table) = outbox.name();
        let filter = self.filter.map(|sql| format!(" WHERE ({sql}\n)")).unwrap_or_default();
        format!("FROM {}.{}{filter}", quote_identifier(schema), quote_identifier(table))
    }

    fn explain(&self, outbox: &Outbox, error: Error) -> Error {
        let (schema, table) = outbox.name();
        match error.sqlstate.as_deref() {
            Some("42501") => {
                let role = quote_identifier(&self.settings.postgres.user);
                let (schema, table) = (quote_identifier(schema), quote_identifier(table));
                let grant = format!("let the table's owner run: GRANT SELECT ON {schema}.{table} TO {role}");
                Error { kind: Kind::Refused, ..error }.hint(grant)
            }
            Some(state) if self.filter.is_some() && (state.starts_with("42") || state.starts_with("22")) => {
                let hint = "look at --where, a condition of SQL on the columns of each outbox";
                Error { kind: Kind::Misconfigured, ..error }.hint(hint)
            }
            _ => error,
        }
    }
}

//! The outboxes' rows as they were at one moment, by SQL.

use std::str::FromStr;

use relay_core::{
    Lsn,
    outbox::{Field, Outbox},
};

use crate::{
    config::Settings,
    error::{Error, Kind},
    replication::{
        connection::{Connection, Values},
        stream::{quote_identifier, quote_literal},
    },
    wal,
};

/// A transaction that only reads.
pub(crate) struct Snapshot<'a> {
    connection: &'a mut Connection,
    settings: &'a Settings,
    /// A condition of SQL.
    filter: Option<&'a str>,
    /// Whether rows are still wanted.
    patience: &'a dyn Fn() -> Result<(), Error>,
}

/// A column of an outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Column {
    pub(crate) name: String,
    pub(crate) type_oid: u32,
}

/// In which order: columns, and whether each is descending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OrderBy(Vec<(String, bool)>);

impl FromStr for OrderBy {
    type Err = String;

    /// `created_at, seq desc`
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let column = |part: &str| {
            let words: Vec<_> = part.split_whitespace().collect();
            match words.as_slice() {
                [name] => Ok(((*name).to_owned(), false)),
                [name, way] if way.eq_ignore_ascii_case("asc") => Ok(((*name).to_owned(), false)),
                [name, way] if way.eq_ignore_ascii_case("desc") => Ok(((*name).to_owned(), true)),
                _ => Err(format!("{part:?} is not a column, perhaps with asc or desc behind it")),
            }
        };
        text.split(',').map(column).collect::<Result<_, _>>().map(Self)
    }
}

impl OrderBy {
    /// The id comes last, so that two readings of one snapshot have one order.
    pub(crate) fn clause(&self, outbox: &Outbox) -> String {
        let id = outbox.required_columns().nth(Field::Id as usize).unwrap_or_default();
        let column = |(name, is_descending): &(String, bool)| {
            format!("{}{}", quote_identifier(name), if *is_descending { " DESC" } else { "" })
        };
        let columns: Vec<_> = self.0.iter().map(column).chain([quote_identifier(id)]).collect();
        format!("ORDER BY {}", columns.join(", "))
    }
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
        Ok(Self { connection, settings, filter, patience: &|| Ok(()) })
    }

    /// Waits for rows as long as this is Ok.
    pub(crate) fn with_patience(self, patience: &'a dyn Fn() -> Result<(), Error>) -> Self {
        Self { patience, ..self }
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

    /// The end of the server's log now: every row was committed before it.
    pub(crate) fn end_of_log(&mut self) -> Result<Lsn, Error> {
        wal::end_of_log(self.connection)
    }

    /// Hands over each row's values of these columns, as they come. `rest` is what comes behind the condition, with its
    /// parameters.
    pub(crate) fn read(
        &mut self,
        outbox: &Outbox,
        columns: &[Column],
        rest: &str,
        parameters: &[&str],
        take: impl FnMut(Values<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let list: Vec<_> = columns.iter().map(|column| quote_identifier(&column.name)).collect();
        let sql = format!("SELECT {} {} {rest}", list.join(", "), self.from(outbox));
        self.connection.each_row(&sql, parameters, self.patience, take).map_err(|e| self.explain(outbox, e))
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
                let grant = format!(
                    "let the table's owner run: GRANT SELECT ON {schema}.{table} TO {role}; GRANT USAGE ON SCHEMA {schema} TO {role};"
                );
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

#[cfg(test)]
mod tests {
    use relay_core::outbox::OutboxTable;

    use super::*;

    #[test]
    fn an_order_is_columns_and_their_ways_and_the_id_decides_between_equals() {
        let outbox = Outbox::new(OutboxTable::default()).unwrap();
        let order: OrderBy = "created_at DESC, se\"q".parse().unwrap();
        assert_eq!(order.clause(&outbox), "ORDER BY \"created_at\" DESC, \"se\"\"q\", \"id\"");
        for bad in ["", "a,", "a b", "a desc nulls", "random() desc limit"] {
            assert!(bad.parse::<OrderBy>().is_err(), "{bad}");
        }
        // A function is taken for the name of a column, which is not there.
        assert!("random()".parse::<OrderBy>().unwrap().clause(&outbox).contains("\"random()\""));
    }
}

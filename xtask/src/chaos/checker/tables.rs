//! The consumers' tables, row by row, beside the fold of the events.

use std::{cmp::Ordering, time::Duration};

use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection, Row as _};

use crate::{
    chaos::{
        connection,
        fold::{Fold, Row, Table},
        verdict::{Kind, Verdict},
    },
    failure::{Explain, Failure, Result},
};

/// Rows that are asked for at a time.
const PAGE_ROWS: usize = 5_000;
/// How long one question may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Makes sure that the tables are new.
pub(super) async fn empty(url: &str) -> Result<()> {
    let mut connection = connection::open(url).await?;
    for table in Table::ALL {
        let name = table.name();
        let sql = format!("SELECT count(*) FROM {name}");
        let ask = sqlx::query_scalar::<_, i64>(AssertSqlSafe(sql)).fetch_one(&mut connection);
        let rows =
            connection::within(ANSWER_LIMIT, ask).await.explain(|| format!("count the rows of {name}"))?;
        if rows > 0 {
            let plural = if rows == 1 { "" } else { "s" };
            return Err(Failure::new(format!("{name} has {rows} row{plural} before anything was written"))
                .hint(
                    "start on new databases: what is in the tables is held against the events from now on",
                ));
        }
    }
    Ok(())
}

/// Whether every table has taken in as much as there is.
pub(super) async fn caught_up(url: &str, fold: &Fold) -> Result<bool> {
    let mut connection = connection::open(url).await?;
    for table in Table::ALL {
        let sql = format!("SELECT {} FROM {}", table.progress(), table.name());
        let ask = sqlx::query_scalar::<_, i64>(AssertSqlSafe(sql)).fetch_one(&mut connection);
        let progress = connection::within(ANSWER_LIMIT, ask)
            .await
            .explain(|| format!("ask how far {} is", table.name()))?;
        if progress < fold.progress(table) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Compares all rows.
pub(super) async fn compare(url: &str, fold: &Fold, verdict: &mut Verdict) -> Result<()> {
    let mut connection = connection::open(url).await?;
    for table in Table::ALL {
        let mut merge = Merge { table, wanted: fold.rows(table), waiting: None };
        let mut after = None;
        loop {
            let page = page(&mut connection, table, after.as_deref()).await?;
            for (key, row) in &page {
                merge.found(key, row, verdict);
            }
            let full = page.len() == PAGE_ROWS;
            after = page.into_iter().next_back().map(|(key, _)| key);
            if !full {
                break;
            }
        }
        merge.end(verdict);
    }
    Ok(())
}

/// The next rows behind a key.
async fn page(
    connection: &mut PgConnection,
    table: Table,
    after: Option<&str>,
) -> Result<Vec<(String, Row)>> {
    let columns: Vec<String> = table.columns().iter().map(|name| text_of(name)).collect();
    let key = format!("{}::text COLLATE \"C\"", table.key());
    let sql = format!(
        "SELECT {key}, {} FROM {} WHERE $1::text IS NULL OR {key} > $1 ORDER BY 1 LIMIT {PAGE_ROWS}",
        columns.join(", "),
        table.name()
    );
    let ask = sqlx::query(AssertSqlSafe(sql)).bind(after).fetch_all(connection);
    let what = || format!("read {}", table.name());
    let rows = connection::within(ANSWER_LIMIT, ask).await.explain(what)?;
    rows.iter()
        .map(|row| {
            let columns = (1..=table.columns().len()).map(|n| row.try_get(n)).collect::<sqlx::Result<_>>();
            Ok((row.try_get(0).explain(what)?, columns.explain(what)?))
        })
        .collect()
}

/// A column as the fold writes it.
fn text_of(column: &str) -> String {
    match column {
        "created_at" | "updated_at" | "occurred_on" => {
            format!("(extract(epoch FROM {column}) * 1000000)::int8::text")
        }
        _ => format!("{column}::text"),
    }
}

/// Two sorted sequences, laid beside each other.
struct Merge<'f> {
    table: Table,
    wanted: Box<dyn Iterator<Item = (String, Row)> + 'f>,
    /// Of the wanted, the next.
    waiting: Option<(String, Row)>,
}

impl Merge<'_> {
    /// Takes the next row that is there.
    fn found(&mut self, key: &str, row: &Row, verdict: &mut Verdict) {
        let name = self.table.name();
        while let Some((wanted, columns)) = self.waiting.take().or_else(|| self.wanted.next()) {
            match wanted.as_str().cmp(key) {
                Ordering::Less => verdict.add(Kind::Table, || format!("{name} has no row {wanted}")),
                Ordering::Equal => {
                    let differences = differences(self.table, &columns, row);
                    if !differences.is_empty() {
                        verdict
                            .add(Kind::Table, || format!("{name}, row {wanted}: {}", differences.join(", ")));
                    }
                    return;
                }
                Ordering::Greater => {
                    self.waiting = Some((wanted, columns));
                    break;
                }
            }
        }
        verdict.add(Kind::Table, || format!("{name} has a row {key}, of which no event tells"));
    }

    /// There is none any more.
    fn end(mut self, verdict: &mut Verdict) {
        let name = self.table.name();
        while let Some((wanted, _)) = self.waiting.take().or_else(|| self.wanted.next()) {
            verdict.add(Kind::Table, || format!("{name} has no row {wanted}"));
        }
    }
}

fn differences(table: Table, wanted: &Row, found: &Row) -> Vec<String> {
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "NULL".to_owned());
    let columns = table.columns().iter().zip(wanted.iter().zip(found));
    columns
        .filter(|(name, (wanted, found))| !same(name, wanted.as_deref(), found.as_deref()))
        .map(|(name, (wanted, found))| format!("{name} is {}, not {}", text(found), text(wanted)))
        .collect()
}

fn same(column: &str, wanted: Option<&str>, found: Option<&str>) -> bool {
    let json = |text: &str| serde_json::from_str::<Value>(text).ok();
    match (column, wanted, found) {
        // JSON's own order of members.
        ("items", Some(wanted), Some(found)) => json(wanted) == json(found),
        // The digits behind the point that say nothing: the driver writes none of a zero.
        ("total_amount", Some(wanted), Some(found)) => amount(wanted) == amount(found),
        _ => wanted == found,
    }
}

/// The same text for the same number.
fn amount(text: &str) -> &str {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_numbers() {
        let same = |wanted, found| same("total_amount", Some(wanted), Some(found));
        assert!(same("0.00", "0") && same("16.490", "16.49") && same("100", "100.0"));
        assert!(!same("0.01", "0") && !same("10", "100") && !same("10", "1"));
    }

    fn merged(wanted: &[(&str, &str)], found: &[(&str, &str)]) -> Vec<String> {
        let row = |kind: &str| vec![Some("o".to_owned()), None, Some(kind.to_owned())];
        let rows: Vec<_> = wanted.iter().map(|(key, kind)| ((*key).to_owned(), row(kind))).collect();
        let mut verdict = Verdict::default();
        let mut merge =
            Merge { table: Table::PharmacyTasks, wanted: Box::new(rows.into_iter()), waiting: None };
        for (key, kind) in found {
            merge.found(key, &row(kind), &mut verdict);
        }
        merge.end(&mut verdict);
        assert_eq!(verdict.tables_wrong, verdict.examples.len() as u64);
        verdict.examples
    }

    #[test]
    fn rows_that_are_missing_unheard_of_or_other_are_told() {
        let rows = [("a", "x"), ("b", "y"), ("c", "z")];
        assert_eq!(merged(&rows, &rows), [""; 0]);
        let told = |what: &str| format!("table: pharmacy_tasks {what}");
        assert_eq!(merged(&rows, &rows[1..]), [told("has no row a")]);
        assert_eq!(merged(&rows, &rows[..1]), [told("has no row b"), told("has no row c")]);
        assert_eq!(merged(&rows[..1], &rows[..2]), [told("has a row b, of which no event tells")]);
        assert_eq!(merged(&rows[1..2], &rows[..2]), [told("has a row a, of which no event tells")]);
        assert_eq!(
            merged(&rows, &[("a", "x"), ("b", "!"), ("c", "z")]),
            ["table: pharmacy_tasks, row b: kind is !, not y"]
        );
    }

    #[test]
    fn the_order_of_members_is_no_difference() {
        assert!(same("items", Some(r#"[{"a":1,"b":2}]"#), Some(r#"[{"b": 2, "a": 1}]"#)));
        assert!(!same("items", Some("[]"), None));
        assert!(!same("notes", Some("[ ]"), Some("[]")));
    }
}

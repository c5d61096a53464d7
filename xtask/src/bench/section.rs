//! What one scenario found: a table, plots, and its numbers for a program.

use serde::Serialize;
use serde_json::Value;

use super::plot::Chart;
use crate::failure::{Explain, Failure, Result};

/// One of them.
#[derive(Debug, Default, Serialize)]
pub(super) struct Section {
    pub(super) name: String,
    #[serde(skip)]
    pub(super) title: String,
    /// What the table means.
    #[serde(skip)]
    pub(super) notes: Vec<String>,
    /// The first row is the head.
    #[serde(skip)]
    pub(super) table: Vec<Vec<String>>,
    /// What follows from the table.
    #[serde(skip)]
    pub(super) findings: Vec<String>,
    #[serde(skip)]
    pub(super) charts: Vec<Chart>,
    pub(super) numbers: Value,
    /// What the numbers cannot say.
    pub(super) warnings: Vec<String>,
    /// What must not be: the bench fails for it.
    pub(super) failures: Vec<String>,
}

impl Section {
    /// With what it measured.
    pub(super) fn of(name: impl Into<String>, title: String, numbers: &impl Serialize) -> Result<Self> {
        let numbers = serde_json::to_value(numbers).explain(|| "write the numbers".to_owned())?;
        Ok(Self { name: name.into(), title, numbers, ..Self::default() })
    }

    /// Of a scenario that could not be carried out.
    pub(super) fn failed(name: &str, failure: &Failure) -> Self {
        let failures = vec![failure.to_string()];
        Self { name: name.to_owned(), title: "not measured".to_owned(), failures, ..Self::default() }
    }

    /// For a person.
    pub(super) fn text(&self) -> String {
        let mut lines = vec![format!("{}: {}", self.name, self.title)];
        lines.extend(self.notes.iter().cloned());
        if !self.table.is_empty() {
            lines.push(String::new());
            lines.push(table(&self.table));
        }
        if !self.findings.is_empty() {
            lines.push(String::new());
            lines.extend(self.findings.iter().cloned());
        }
        lines.extend(self.warnings.iter().map(|warning| format!("warning: {warning}")));
        lines.extend(self.failures.iter().map(|failure| format!("FAILED: {failure}")));
        lines.join("\n")
    }
}

/// The head of a table.
pub(super) fn head<const N: usize>(names: [&str; N]) -> Vec<Vec<String>> {
    vec![names.map(str::to_owned).to_vec()]
}

/// Aligned columns; the first row is the head.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_what_is_wrong_is_last() {
        let mut section = Section::of("drain", "rows".into(), &7).unwrap();
        section.table = head(["ARM", "ROWS"]);
        section.table.push(vec!["relay".into(), "1".into()]);
        section.failures.push("one is missing".into());
        assert_eq!(section.text(), "drain: rows\n\nARM    ROWS\nrelay  1\nFAILED: one is missing");
        let failed = Section::failed("api", &Failure::new("no pgbench"));
        assert_eq!(failed.text(), "api: not measured\nFAILED: no pgbench");
    }
}

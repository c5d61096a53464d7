//! Rows of text in columns, and text that others wrote on a terminal.

use std::io;

/// Prints the rows below their heads, each column as wide as it has to be. On a terminal that is narrower, each row by
/// itself, a line for each of its cells, as psql's `\\x auto` does.
pub fn print<const N: usize>(heads: [&str; N], rows: &[[String; N]]) {
    for line in lines(heads, rows, terminal_columns()) {
        crate::say!("{line}");
    }
}

/// How many characters a line of the terminal has; None where the output goes elsewhere.
fn terminal_columns() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

fn lines<const N: usize>(heads: [&str; N], rows: &[[String; N]], columns: Option<usize>) -> Vec<String> {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or_default().max(heads[column].len())
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |cells: [&str; N]| {
        let padded: Vec<_> =
            cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let table = std::iter::once(line(heads))
        .chain(rows.iter().map(|row| line(std::array::from_fn(|column| row[column].as_str()))));
    let table: Vec<String> = table.collect();
    let is_narrower = |columns| table.iter().any(|line| line.chars().count() > columns);
    if rows.is_empty() || !columns.is_some_and(is_narrower) {
        return table;
    }
    let name = heads.iter().map(|head| head.len()).max().unwrap_or_default();
    let cells = |row: &[String; N]| -> Vec<String> {
        heads
            .iter()
            .zip(row)
            .map(|(head, cell)| format!("{head:<name$}  {cell}").trim_end().to_owned())
            .collect()
    };
    let records: Vec<_> = rows.iter().map(cells).collect();
    records.join(&String::new())
}

/// How long ago something was, in one unit: `42s`, `5m`, `3h`, `2d`.
pub fn age(seconds: i64) -> String {
    let seconds = seconds.max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Text without what a terminal would obey.
pub fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escaped = c.is_control().then(|| c.escape_default());
            let plain = (!c.is_control()).then_some(c);
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}

/// At most so many characters.
pub fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}

/// A dash where there is nothing.
pub fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { printable(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_cannot_command_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\n\u{9b}ä"), "a\\u{1b}[2Jb\\n\\u{9b}ä");
        assert_eq!(cut("äöü", 3), "äöü");
        assert_eq!(cut("äöüß", 3), "äö…");
    }

    #[test]
    fn a_table_that_does_not_fit_is_told_row_by_row() {
        let rows = [["0/1".to_owned(), "it is large".to_owned()], ["0/20".to_owned(), String::new()]];
        let table = ["AT    WHY", "0/1   it is large", "0/20"];
        for columns in [None, Some(17), Some(80)] {
            assert_eq!(lines(["AT", "WHY"], &rows, columns), table);
        }
        let records = ["AT   0/1", "WHY  it is large", "", "AT   0/20", "WHY"];
        assert_eq!(lines(["AT", "WHY"], &rows, Some(16)), records);
        assert_eq!(lines::<2>(["AT", "WHY"], &[], Some(3)), ["AT  WHY"]);
    }

    #[test]
    fn an_age_has_one_unit() {
        assert_eq!([-1, 119, 120, 7199, 7200, 172_800].map(age), ["0s", "119s", "2m", "119m", "2h", "2d"]);
    }
}

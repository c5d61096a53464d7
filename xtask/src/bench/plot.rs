//! Bars as SVG.

use std::fmt::Write as _;

use super::numbers::Spread;

const BAR_HEIGHT: usize = 22;
const ROW_HEIGHT: usize = 34;
const NAMES_WIDTH: f64 = 190.0;
const BARS_WIDTH: f64 = 560.0;
const VALUES_WIDTH: f64 = 130.0;
/// Of the parts of a bar, in their order.
const COLOURS: [&str; 3] = ["#2f6fab", "#9bb8d3", "#d9a441"];

/// Bars from the left, on one scale that begins at 0.
#[derive(Debug)]
pub(super) struct Chart {
    pub(super) title: String,
    pub(super) bars: Vec<Bar>,
}

/// One arm's.
#[derive(Debug)]
pub(super) struct Bar {
    pub(super) name: String,
    /// Beside one another, three at most.
    pub(super) parts: Vec<f64>,
    pub(super) spread: Option<Spread>,
    pub(super) label: String,
}

impl Bar {
    fn end(&self) -> f64 {
        let sum: f64 = self.parts.iter().sum();
        self.spread.map_or(sum, |spread| spread.max.max(sum))
    }
}

impl Chart {
    /// Adds it to a page.
    pub(super) fn draw(&self, out: &mut String) {
        let most = self.bars.iter().map(Bar::end).fold(f64::MIN_POSITIVE, f64::max);
        let x = |value: f64| NAMES_WIDTH + BARS_WIDTH * value / most;
        // Writing to a String cannot fail.
        let _ = write!(
            out,
            "<h3>{}</h3><svg viewBox=\"0 0 {} {}\" role=\"img\">",
            escape(&self.title),
            NAMES_WIDTH + BARS_WIDTH + VALUES_WIDTH,
            self.bars.len() * ROW_HEIGHT
        );
        for (row, bar) in self.bars.iter().enumerate() {
            let top = row * ROW_HEIGHT + (ROW_HEIGHT - BAR_HEIGHT) / 2;
            let (middle, text) = (top + BAR_HEIGHT / 2, top + BAR_HEIGHT / 2 + 5);
            let _ = write!(out, "<text x=\"0\" y=\"{text}\">{}</text>", escape(&bar.name));
            let mut from = 0.0;
            for (value, colour) in bar.parts.iter().zip(COLOURS) {
                let (left, width) = (x(from), x(from + value) - x(from));
                let _ = write!(
                    out,
                    "<rect x=\"{left:.1}\" y=\"{top}\" width=\"{width:.1}\" height=\"{BAR_HEIGHT}\" fill=\"{colour}\"/>"
                );
                from += value;
            }
            if let Some(Spread { min, max, .. }) = bar.spread {
                let _ = write!(
                    out,
                    "<path d=\"M{:.1} {middle}H{:.1}\" stroke=\"#1c2733\" stroke-width=\"2\"/>",
                    x(min),
                    x(max)
                );
            }
            let _ = write!(
                out,
                "<text x=\"{:.1}\" y=\"{text}\">{}</text>",
                x(bar.end()) + 8.0,
                escape(&bar.label)
            );
        }
        out.push_str("</svg>");
    }
}

/// As text of a page.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_bar_ends_where_the_scale_does_and_text_is_no_markup() {
        let bar = |name: &str, value, max| Bar {
            name: name.into(),
            parts: vec![value],
            spread: Some(Spread { median: value, min: value, max }),
            label: "<b>".into(),
        };
        let mut out = String::new();
        let bars = vec![bar("one", 50.0, 100.0), bar("two", 25.0, 25.0)];
        Chart { title: "a & b".into(), bars }.draw(&mut out);
        assert!(out.contains("a &amp; b") && out.contains("&lt;b&gt;") && !out.contains("<b>"), "{out}");
        assert!(
            out.contains("width=\"280.0\"") && out.contains("width=\"140.0\""),
            "half, and a quarter: {out}"
        );
        assert!(out.contains("H750.0"), "{out}");
    }
}

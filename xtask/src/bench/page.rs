//! A run as a page: one HTML file with its plots in it, which needs nothing from elsewhere.

use std::fmt::Write as _;

use super::{document::Document, plot::escape, section::Section};

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2733}\
    h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.5rem}h3{font-size:1rem;margin:1.5rem 0 .3rem}\
    pre{background:#f3f5f7;padding:1rem;overflow-x:auto;font-size:12px}.note{color:#5a6876}.warning{color:#a33}\
    svg{max-width:100%;height:auto}text{font:13px system-ui,sans-serif;fill:#1c2733}";

/// The page.
pub(super) fn page(document: &Document) -> String {
    let Document { command, at, host, versions, warnings, sections, .. } = document;
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write!(
        out,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>bench</title><style>{STYLE}</style>\
         <h1>Throughput, latency, cost and loss</h1><p class=\"note\"><code>{}</code>, {}<br>{}<br>{}<br>{}</p>",
        escape(command),
        escape(at),
        escape(&versions.join(", ")),
        escape(&host.line()),
        escape(&document.settings().unwrap_or_default())
    );
    complaints(&mut out, warnings);
    for section in sections {
        let Section { name, title, charts, warnings, failures, .. } = section;
        let _ = write!(out, "<h2>{}: {}</h2>", escape(name), escape(title));
        for chart in charts {
            chart.draw(&mut out);
        }
        complaints(&mut out, warnings);
        complaints(&mut out, failures);
        let _ = write!(
            out,
            "<details open><summary>All numbers</summary><pre>{}</pre></details>",
            escape(&section.text())
        );
    }
    out.push_str("</html>");
    out
}

fn complaints(out: &mut String, lines: &[String]) {
    for line in lines {
        let _ = write!(out, "<p class=\"warning\">{}</p>", escape(line));
    }
}

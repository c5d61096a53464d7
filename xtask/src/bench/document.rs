//! All that one run of the bench found: on the terminal, as JSON, and as a page.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::Command,
};

use serde::Serialize;

use super::{
    host::{self, Host},
    page,
    section::Section,
};
use crate::{
    failure::{Explain, Failure, Result},
    progress::Progress,
    services,
};

/// One run.
#[derive(Debug, Serialize)]
pub(super) struct Document {
    pub(super) command: String,
    /// When it ended.
    pub(super) at: String,
    pub(super) host: Host,
    /// Programs and servers, with their versions.
    pub(super) versions: Vec<String>,
    /// Of Postgres, beside the local stack's.
    pub(super) postgres_settings: Vec<String>,
    pub(super) sections: Vec<Section>,
    pub(super) warnings: Vec<String>,
}

impl Document {
    pub(super) fn new(warnings: Vec<String>) -> Self {
        let arguments: Vec<_> = std::env::args().skip(1).collect();
        Self {
            command: format!("cargo xtask {}", arguments.join(" ")),
            at: String::new(),
            host: Host::look(),
            versions: Vec::new(),
            postgres_settings: Vec::new(),
            sections: Vec::new(),
            warnings,
        }
    }

    /// Adds a version that is not there yet.
    pub(super) fn version(&mut self, version: String) {
        if !self.versions.contains(&version) {
            self.versions.push(version);
        }
    }

    /// Warns where others use the machine. We do as soon as something was measured.
    pub(super) fn busy(&mut self) {
        if self.sections.is_empty() {
            self.warnings.extend(host::busy());
        }
    }

    /// Tells of a scenario that could not be carried out.
    pub(super) fn failed(&mut self, name: &str, result: Result<()>) {
        if let Err(failure) = result {
            self.sections.push(Section::failed(name, &failure));
        }
    }

    /// For a person.
    pub(super) fn text(&self) -> String {
        let mut lines = vec![self.versions.join(", "), self.host.line()];
        lines.extend(self.settings());
        lines.extend(self.warnings.iter().map(|warning| format!("warning: {warning}")));
        for section in &self.sections {
            lines.push(String::new());
            lines.push(section.text());
        }
        lines.join("\n")
    }

    /// Of the servers of the scenarios that do not tell their own.
    pub(super) fn settings(&self) -> Option<String> {
        let settings = self.postgres_settings.join(", ");
        (!settings.is_empty()).then(|| {
            format!("one broker, all on loopback; Postgres with {settings} where nothing else is said")
        })
    }

    /// Writes it to `target/bench/NAME.json` and `.html`, prints it, and fails where a section does.
    pub(super) fn finish(mut self, name: &str, as_json: bool, progress: &Progress) -> Result<()> {
        self.at = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
        let json = serde_json::to_string_pretty(&self).explain(|| "write the numbers".to_owned())?;
        let folder = services::target()?.join("bench");
        fs::create_dir_all(&folder).explain(|| format!("create {}", folder.display()))?;
        let write = |ending: &str, text: &str| -> Result<PathBuf> {
            let file = folder.join(format!("{name}.{ending}"));
            fs::write(&file, text).explain(|| format!("write {}", file.display()))?;
            Ok(file)
        };
        let (numbers, plots) = (write("json", &json)?, write("html", &page::page(&self))?);
        progress.line(&format!("the numbers are in {}, the plots in {}", numbers.display(), plots.display()));
        let text = if as_json { json } else { self.text() };
        writeln!(io::stdout(), "{text}").explain(|| "print the report".to_owned())?;
        let failures: Vec<_> = self
            .sections
            .iter()
            .flat_map(|section| section.failures.iter().map(|failure| format!("{}: {failure}", section.name)))
            .collect();
        if failures.is_empty() { Ok(()) } else { Err(Failure::new(failures.join("; "))) }
    }
}

/// What a program says of itself.
pub(super) fn version(program: &Path) -> Result<String> {
    let output = Command::new(program).arg("--version").output();
    let output = output.explain(|| format!("run {} --version", program.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

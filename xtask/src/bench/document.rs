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

/// So many rounds have extremes and something between them.
const ENOUGH_ROUNDS: u32 = 3;

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

/// What is measured, if it is in a clone.
fn commit() -> Option<String> {
    let described = Command::new("git").args(["describe", "--always", "--dirty"]).output().ok()?;
    let name = String::from_utf8(described.stdout).ok().filter(|_| described.status.success())?;
    Some(format!("commit {}", name.trim()))
}

/// The relay has its settings from the environment, which is that of the bench.
fn settings_from_outside() -> Option<String> {
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    let mut names: Vec<_> = names.filter(|name| name.starts_with("CDC_RELAY_")).collect();
    names.sort();
    (!names.is_empty()).then(|| format!("the relay is not at its defaults, by {}", names.join(", ")))
}

impl Document {
    pub(super) fn new() -> Self {
        let arguments: Vec<_> = std::env::args().skip(1).collect();
        Self {
            command: format!("cargo xtask {}", arguments.join(" ")),
            at: String::new(),
            host: Host::look(),
            versions: commit().into_iter().collect(),
            postgres_settings: Vec::new(),
            sections: Vec::new(),
            warnings: settings_from_outside().into_iter().collect(),
        }
    }

    /// Adds a version that is not there yet.
    pub(super) fn version(&mut self, version: String) {
        if !self.versions.contains(&version) {
            self.versions.push(version);
        }
    }

    /// Warns where too few rounds say how much of a ratio is chance.
    pub(super) fn few(&mut self, rounds: u32) {
        if rounds < ENOUGH_ROUNDS {
            self.warnings.push(format!(
                "rounds: {rounds}. With fewer than {ENOUGH_ROUNDS} nobody can tell how much of a number is chance"
            ));
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
        let mut lines = vec![format!("{}, {}", self.command, self.at)];
        lines.extend([self.versions.join(", "), self.host.line()]);
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

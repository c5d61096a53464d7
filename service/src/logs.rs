//! Logs: one line an event on standard error, as text for people or JSON for machines.

use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use tracing_subscriber::{EnvFilter, filter::LevelFilter, fmt};

use crate::Failure;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// `2026-01-01T00:00:00.000000Z  INFO message key=value`
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The `[log]` section every service has.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `info,cdc_relay=debug`.
    #[serde(deserialize_with = "filter")]
    pub level: String,
    /// `text` or `json`.
    pub format: Format,
}

/// A filter that means something: by itself, any word would be taken for the name of a module.
fn filter<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    let levels = text.split(',').map(|part| part.rsplit_once('=').map_or(part, |(_, level)| level));
    for level in levels {
        if level.trim().parse::<LevelFilter>().is_err() {
            let why = format!("log.level {text:?}: {level:?} is not error, warn, info, debug, trace or off");
            return Err(D::Error::custom(why));
        }
    }
    Ok(text)
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".into(), format: Format::Text }
    }
}

/// Installs the process's subscriber. Call once, first thing after the configuration is known.
pub fn init(config: &LogConfig) -> Result<(), Failure> {
    let filter = EnvFilter::try_new(&config.level).map_err(|e| {
        Failure::configuration(format!("log.level {:?} is not a log filter: {e}", config.level))
    })?;
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    let done = match config.format {
        Format::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init(),
        Format::Json => builder.json().flatten_event(true).try_init(),
    };
    done.map_err(|e| Failure::new(crate::exit::Kind::Internal, format!("cannot install the logger: {e}")))
}

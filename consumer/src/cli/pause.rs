//! `pause` and `resume`.

use std::time::Duration;

use serde_json::json;
use service::{
    Failure,
    table::{age, printable},
};
use tokio::time::timeout;

use crate::{config::Settings, ledger, ledger::Ledger};

/// A command that takes longer than this says what it waits for.
const SILENCE: Duration = Duration::from_secs(2);

#[derive(Debug, clap::Args)]
pub(super) struct Pause {
    /// Why, for whoever asks `consumer status`
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// A JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Resume {
    /// A JSON object
    #[arg(long)]
    json: bool,
}

pub(super) async fn pause(settings: &Settings, ledger: &mut Ledger, pause: &Pause) -> Result<(), Failure> {
    // A batch that is under way ends within its time, or is given up.
    let patience = settings.limits.apply_timeout + Duration::from_secs(5);
    let mut pausing = std::pin::pin!(ledger.pause(pause.reason.as_deref(), patience));
    let before = if let Ok(before) = timeout(SILENCE, &mut pausing).await {
        before?
    } else {
        eprintln!("waiting for the batches under way, for at most {} s", patience.as_secs());
        pausing.await?
    };
    let group = &settings.kafka.group;
    if pause.json {
        service::say!("{}", json!({ "group": group, "paused": true, "before": told(before.as_ref()) }));
        return Ok(());
    }
    match before {
        Some(before) => service::say!("{group} was paused already, {}", since(&before)),
        None => service::say!("{group} is paused; `consumer resume`, for the same group, lets it go on"),
    }
    Ok(())
}

pub(super) async fn resume(settings: &Settings, ledger: &mut Ledger, resume: &Resume) -> Result<(), Failure> {
    let before = ledger.resume().await?;
    let group = &settings.kafka.group;
    if resume.json {
        service::say!("{}", json!({ "group": group, "paused": false, "before": told(before.as_ref()) }));
        return Ok(());
    }
    match before {
        Some(before) => service::say!("{group} goes on; it was paused {}", since(&before)),
        None => service::say!("{group} was not paused"),
    }
    Ok(())
}

/// Since when and why, for a person.
pub(super) fn since(pause: &ledger::Pause) -> String {
    let seconds = (chrono::Utc::now() - pause.paused_at).num_seconds();
    let why = pause.paused_for.as_deref().map(|why| format!(": {}", printable(why))).unwrap_or_default();
    format!("since {} ({}){why}", pause.paused_at.format("%Y-%m-%dT%H:%M:%SZ"), age(seconds))
}

/// Since when and why, for a program.
pub(super) fn told(pause: Option<&ledger::Pause>) -> serde_json::Value {
    json!(pause.map(|pause| json!({ "pausedAt": pause.paused_at, "reason": pause.paused_for })))
}

//! What is kept of a round with a violation: the ends of all logs, before later rounds push them out.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use super::journal::Round;
use crate::{
    failure::{Explain, Result},
    layout::Layout,
};

/// How much of the end of each log. Bytes.
const LOG_BYTES: u64 = 4 << 20;

/// Copies the logs and the round into a folder beside the journal.
pub(super) fn keep(layout: &Layout, journal: &Path, round: &Round) -> Result<PathBuf> {
    let campaign = journal.file_stem().unwrap_or_default().to_string_lossy();
    let folder = layout.dir.join("evidence").join(format!("{campaign}-round-{}", round.number + 1));
    fs::create_dir_all(&folder).explain(|| format!("create {}", folder.display()))?;
    let text = serde_json::to_string_pretty(round).explain(|| "write a round".to_owned())?;
    fs::write(folder.join("round.json"), text).explain(|| format!("write to {}", folder.display()))?;
    let logs = fs::read_dir(layout.logs()).explain(|| format!("read {}", layout.logs().display()))?;
    for log in logs.filter_map(std::result::Result::ok) {
        let (from, to) = (log.path(), folder.join(log.file_name()));
        copy_end(&from, &to).explain(|| format!("copy {}", from.display()))?;
    }
    Ok(folder)
}

fn copy_end(from: &Path, to: &Path) -> std::io::Result<()> {
    let mut log = File::open(from)?;
    let start = log.metadata()?.len().saturating_sub(LOG_BYTES);
    log.seek(SeekFrom::Start(start))?;
    std::io::copy(&mut log.take(LOG_BYTES), &mut File::create(to)?).map(drop)
}

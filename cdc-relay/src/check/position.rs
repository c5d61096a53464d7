//! Whether the slot and the checkpoint in Kafka belong together.

use std::time::Instant;

use super::Report;
use crate::{
    config::Settings,
    error::{Error, Kind},
    ledger::{Ledger, Owner},
    position::{self, Doubt},
    replication::{connection::Connection, handshake::Purpose, stream::identify},
    scribe::{KAFKA_TIMEOUT, no_answer},
    slot::Slot,
};

/// Looks at both, where there are both; what else is wrong with either is told elsewhere.
pub(super) fn examine(settings: &Settings, report: &mut Report) {
    match judge(settings) {
        Ok(None) => {}
        Ok(Some(doubt)) => {
            let found = format!("slot {:?}: {doubt}", settings.slot);
            let hint = format!("# {}", Error::from(doubt.clone()).hint.unwrap_or_default());
            let mend: &[&str] = match doubt {
                Doubt::NoCheckpoint { .. } => &[&hint, "cdc-relay init"],
                Doubt::SlotAhead { .. } => &[
                    "# what was committed in between, and is not in Kafka, is told by:",
                    "cdc-relay audit",
                    "# to go on without it, while no relay runs:",
                    "cdc-relay accept-gap --yes",
                ],
                _ => &[&hint],
            };
            report.finding("position-in-doubt", &"", found, mend);
        }
        Err(e) => {
            report.note(format!("whether slot and checkpoint belong together was not looked at: {e}"));
        }
    }
}

fn judge(settings: &Settings) -> Result<Option<Doubt>, Error> {
    let connect = |purpose| Connection::connect(&settings.postgres, purpose, settings.connect_timeout);
    let mut connection = connect(Purpose::Sql)?;
    if connection.is_in_recovery()? {
        return Ok(None);
    }
    // Before the checkpoint, which a relay that runs writes first.
    let slot = Slot::look(&mut connection, &settings.slot)?;
    let Some(confirmed) = slot.filter(|slot| !slot.is_lost && slot.check_kind(&settings.slot).is_ok()) else {
        return Ok(None);
    };
    let Some(confirmed) = confirmed.confirmed else { return Ok(None) };
    let mut replication =
        connection.beside(&settings.postgres, Purpose::Replication, settings.connect_timeout)?;
    let owner = Owner { system: identify(&mut replication)?.identifier, slot: settings.slot.clone() };
    let since = Instant::now();
    let patience = || if since.elapsed() < KAFKA_TIMEOUT { Ok(()) } else { Err(no_answer(settings)) };
    let ledger = match Ledger::read(settings, &owner, &patience) {
        // A topic that is missing is a finding already.
        Err(e) if e.kind == Kind::Halted => return Ok(None),
        read => read?,
    };
    // After it, so that the log is as long as the checkpoint was by then.
    let system = identify(&mut replication)?;
    Ok(position::judge(&ledger, confirmed, &system).err())
}

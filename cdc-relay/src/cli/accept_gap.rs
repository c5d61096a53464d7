//! `cdc-relay accept-gap`: the deliberate way on when the position is in doubt, or past what cannot be published.

use std::{fmt, str::FromStr};

use relay_core::Lsn;
use serde_json::json;
use service::{
    Failure, exit,
    table::{self, or_dash, printable},
};

use crate::{
    config::Settings,
    error::Error,
    foreign::{Event, Foreign},
    ledger::Checkpoint,
    position::Doubt,
    setup::Desk,
    slot::Slot,
};

#[derive(Debug, clap::Args)]
pub(super) struct AcceptGap {
    /// Give up everything through the transaction with this commit LSN (X/Y, as the relay's messages and the lsn header
    /// have it), or through what is committed `now`
    #[arg(long, value_name = "LSN|now")]
    through: Option<Through>,
    /// Forget the checkpoint: go on from the slot's confirmed LSN, whatever Kafka has of what comes then. For a server that
    /// was restored from a backup and has written something else since
    #[arg(long, conflicts_with = "through")]
    from_slot: bool,
    /// Do it. Without this, only say what would be done
    #[arg(long)]
    yes: bool,
    /// Say it as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Through {
    Commit(Lsn),
    Now,
}

impl FromStr for Through {
    type Err = relay_core::lsn::NotAnLsn;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "now" { Ok(Self::Now) } else { text.parse().map(Self::Commit) }
    }
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    /// Make a slot; the one that there is, if there is one, is of no more use.
    MakeSlot { drop_first: bool },
    /// Move the slot on to here.
    Advance(Lsn),
    /// Go on from where the slot is.
    TakeAsItIs(Lsn),
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MakeSlot { drop_first: true } => {
                write!(f, "drop the slot, make a new one, and go on from its first LSN")
            }
            Self::MakeSlot { drop_first: false } => {
                write!(f, "make a new slot, and go on from its first LSN")
            }
            Self::Advance(to) => write!(f, "move the slot on to {to}, and go on from there"),
            Self::TakeAsItIs(lsn) => write!(f, "go on from the slot's confirmed LSN, {lsn}"),
        }
    }
}

/// What there is to decide on.
struct Found {
    checkpoint: Option<Checkpoint>,
    /// None where there is none.
    slot: Option<Slot>,
    doubt: Option<Doubt>,
    /// Events that exist only in Kafka.
    foreign: Option<Foreign>,
    /// What was to be given up is not missing.
    is_covered: bool,
    /// None when there is nothing to do.
    plan: Option<Plan>,
}

/// Says what would be given up, and with `--yes` gives it up.
pub(super) fn accept_gap(settings: &Settings, command: &AcceptGap) -> Result<(), Failure> {
    service::logs::init(&settings.log)?;
    let desk = if command.yes { Desk::open_to_accept(settings) } else { Desk::open(settings) };
    let mut desk = desk.map_err(Error::into_failure)?;
    let found = look(&mut desk, command).map_err(Error::into_failure)?;
    if command.json {
        service::say!("{}", found.as_json(&settings.slot));
    } else {
        found.print(&settings.slot, command.yes);
    }
    let Some(plan) = found.plan else { return Ok(()) };
    if !command.yes {
        let what =
            "nothing was changed: what lies before that point and is not in Kafka would never be published";
        return Err(Failure::new(exit::Kind::Halted, what).hint("run it again with --yes to accept that"));
    }
    let lsn = carry_out(&mut desk, plan).map_err(Error::into_failure)?;
    if !command.json {
        service::say!("{:<12} {lsn}", "checkpoint");
    }
    Ok(())
}

fn carry_out(desk: &mut Desk<'_>, plan: Plan) -> Result<Lsn, Error> {
    let lsn = match plan {
        Plan::MakeSlot { drop_first } => desk.make_slot_again(drop_first)?,
        Plan::Advance(to) => desk.advance(to)?,
        Plan::TakeAsItIs(lsn) => lsn,
    };
    desk.accept(lsn)?;
    Ok(lsn)
}

/// Looks at everything, and decides.
fn look(desk: &mut Desk<'_>, command: &AcceptGap) -> Result<Found, Error> {
    let checkpoint = desk.ledger.checkpoint.clone();
    let slot = desk.slot()?;
    // Whatever becomes of the slot: one that a promotion did not keep says nothing of what the checkpoint covers.
    let confirmed = slot.as_ref().filter(|slot| !slot.is_lost).and_then(|slot| slot.confirmed);
    let (published, doubt) = match desk.position(confirmed.unwrap_or(Lsn::ZERO)) {
        // One that is published in part is not behind it.
        Ok(position) => (position.part.map_or(position.lsn, |part| part.commit_lsn), None),
        Err(doubt) => (Lsn::ZERO, Some(doubt)),
    };
    let doubt = doubt.filter(|doubt| confirmed.is_some() || doubt.beyond().is_some());
    let foreign = doubt.as_ref().and_then(Doubt::beyond).map(|beyond| desk.foreign(beyond)).transpose()?;
    let mut is_covered = false;
    let plan = match (&slot, confirmed) {
        (None, _) => Some(Plan::MakeSlot { drop_first: false }),
        (Some(_), None) => Some(Plan::MakeSlot { drop_first: true }),
        (Some(_), Some(confirmed)) if command.from_slot => Some(Plan::TakeAsItIs(confirmed)),
        (Some(_), Some(confirmed)) => {
            let to = match command.through {
                None => None,
                // A slot that is confirmed beyond the beginning of a commit's record leaves that transaction out.
                Some(Through::Commit(lsn)) => Some(Lsn(lsn.0.saturating_add(1))),
                Some(Through::Now) => Some(desk.wal_end()?),
            };
            is_covered = to.is_some_and(|to| to <= published);
            match to.filter(|to| *to > confirmed) {
                // To go back behind the checkpoint would repeat what it covers.
                Some(_) if is_covered => None,
                Some(to) => Some(Plan::Advance(to)),
                None => doubt.as_ref().map(|_| Plan::TakeAsItIs(confirmed)),
            }
        }
    };
    Ok(Found { checkpoint, slot, doubt, foreign, is_covered, plan })
}

impl Found {
    fn print(&self, name: &str, yes: bool) {
        match &self.checkpoint {
            Some(c) => {
                service::say!(
                    "{:<12} {} ({}, {}, timeline {})",
                    "checkpoint",
                    c.lsn,
                    c.at,
                    c.instance,
                    c.timeline
                );
            }
            None => service::say!("{:<12} none", "checkpoint"),
        }
        match &self.slot {
            None => service::say!("{:<12} {name:?} does not exist", "slot"),
            Some(Slot { confirmed: Some(confirmed), is_lost: false, .. }) => {
                service::say!("{:<12} {name:?}, confirmed LSN {confirmed}", "slot");
            }
            Some(_) => {
                service::say!(
                    "{:<12} {name:?} is lost: the server has removed the log that it still needed",
                    "slot"
                );
            }
        }
        if let Some(doubt) = &self.doubt {
            service::say!("{:<12} {doubt}", "in doubt");
        }
        if let Some(foreign) = &self.foreign {
            print_events(foreign);
        }
        match &self.plan {
            Some(plan) => service::say!("{:<12} {plan}", if yes { "doing" } else { "would" }),
            None if self.is_covered => {
                service::say!("nothing to accept: all of that is published already, or was given up before");
            }
            None => service::say!("nothing to accept: slot and checkpoint belong together"),
        }
    }

    fn as_json(&self, name: &str) -> serde_json::Value {
        let slot = self.slot.as_ref().map(|slot| {
            let confirmed = slot.confirmed.map(|lsn| lsn.to_string());
            json!({ "name": name, "confirmed": confirmed, "isLost": slot.is_lost })
        });
        json!({
            "checkpoint": self.checkpoint,
            "slot": slot,
            "inDoubt": self.doubt.as_ref().map(ToString::to_string),
            "onlyInKafka": self.foreign,
            "isCovered": self.is_covered,
            "plan": self.plan.map(|plan| plan.to_string()),
        })
    }
}

/// Every one of them.
fn print_events(foreign: &Foreign) {
    service::say!("{:<12} {}", "Kafka only", foreign.describe());
    let row = |event: &Event| {
        [
            event.lsn.to_string(),
            event.seq.to_string(),
            or_dash(&printable(&event.id)),
            or_dash(&printable(&event.kind)),
            printable(&format!("{}/{}", or_dash(&event.aggregate_type), or_dash(&event.aggregate_id))),
            format!("{}/{}/{}", event.topic, event.partition, event.offset),
        ]
    };
    let rows: Vec<_> = foreign.events.iter().map(row).collect();
    if !rows.is_empty() {
        table::print(["LSN", "SEQ", "ID", "TYPE", "AGGREGATE", "TOPIC/PARTITION/OFFSET"], &rows);
    }
    if foreign.more > 0 {
        service::say!("and {} more", foreign.more);
    }
    for (topic, why) in &foreign.unread {
        service::say!("{:<12} topic {topic}: {why}", "not read");
    }
}

//! `cdc-relay accept-gap`: the deliberate way on when the position is in doubt, or past what cannot be published.

use std::{fmt, str::FromStr};

use relay_core::Lsn;
use service::{Failure, exit};

use crate::{config::Settings, error::Error, setup::Desk};

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

/// Says what would be given up, and with `--yes` gives it up.
pub(super) fn accept_gap(settings: &Settings, command: &AcceptGap) -> Result<(), Failure> {
    let mut desk = Desk::open(settings).map_err(Error::into_failure)?;
    let plan = plan(&mut desk, settings, command).map_err(Error::into_failure)?;
    let Some(plan) = plan else {
        println!("nothing to accept: slot and checkpoint belong together");
        return Ok(());
    };
    println!("{:<12} {plan}", if command.yes { "doing" } else { "would" });
    if !command.yes {
        let what =
            "nothing was changed: what lies before that point and is not in Kafka would never be published";
        return Err(Failure::new(exit::Kind::Halted, what).hint("run it again with --yes to accept that"));
    }
    let carry_out = || -> Result<Lsn, Error> {
        let lsn = match plan {
            Plan::MakeSlot { drop_first } => desk.make_slot_again(drop_first)?,
            Plan::Advance(to) => desk.advance(to)?,
            Plan::TakeAsItIs(lsn) => lsn,
        };
        desk.accept(lsn)?;
        Ok(lsn)
    };
    let mut carry_out = carry_out;
    let lsn = carry_out().map_err(Error::into_failure)?;
    println!("{:<12} {lsn}", "checkpoint");
    Ok(())
}

/// Looks at everything, tells it, and decides. None when nothing is in doubt.
fn plan(desk: &mut Desk<'_>, settings: &Settings, command: &AcceptGap) -> Result<Option<Plan>, Error> {
    match &desk.ledger.checkpoint {
        Some(c) => {
            println!("{:<12} {} ({}, {}, timeline {})", "checkpoint", c.lsn, c.at, c.instance, c.timeline);
        }
        None => println!("{:<12} none", "checkpoint"),
    }
    let name = &settings.slot;
    let Some(slot) = desk.slot()? else {
        println!("{:<12} {name:?} does not exist", "slot");
        return Ok(Some(Plan::MakeSlot { drop_first: false }));
    };
    let Some(confirmed) = slot.confirmed.filter(|_| !slot.is_lost) else {
        println!("{:<12} {name:?} is lost: the server has removed the log that it still needed", "slot");
        return Ok(Some(Plan::MakeSlot { drop_first: true }));
    };
    println!("{:<12} {name:?}, confirmed LSN {confirmed}", "slot");
    let doubt = desk.doubt(confirmed);
    if let Some(doubt) = &doubt {
        println!("{:<12} {doubt}", "in doubt");
    }
    if command.from_slot {
        return Ok(Some(Plan::TakeAsItIs(confirmed)));
    }
    let to = match command.through {
        None => None,
        // A slot that is confirmed beyond the beginning of a commit's record leaves that transaction out.
        Some(Through::Commit(lsn)) => Some(Lsn(lsn.0.saturating_add(1))),
        Some(Through::Now) => Some(desk.wal_end()?),
    };
    Ok(match to.filter(|to| *to > confirmed) {
        Some(to) => Some(Plan::Advance(to)),
        None => doubt.map(|_| Plan::TakeAsItIs(confirmed)),
    })
}

//! Whether what Kafka remembers of the position and what Postgres remembers of it belong together.
//!
//! A checkpoint that covers an LSN is in Kafka before Postgres is told that LSN, so on one history of the log the
//! slot is never ahead of the checkpoint, and the checkpoint never ahead of the log. Anything else means that
//! somebody moved, dropped, recreated or restored something, and that only a person can say what is missing.

use std::fmt;

use chrono::DateTime;
use relay_core::Lsn;

use crate::{
    config::Settings,
    error::{Error, Kind},
    ledger::{Checkpoint, Ledger},
};

/// The server at the other end of a replication connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct System {
    /// The cluster's identifier, made by `initdb`.
    pub(crate) identifier: String,
    pub(crate) timeline: u32,
    /// The end of its log.
    pub(crate) wal_end: Lsn,
    /// Where each earlier timeline ended.
    pub(crate) switches: Vec<(u32, Lsn)>,
}

/// Why the position is not known for sure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// Kafka has no checkpoint of this slot of this cluster.
    NoCheckpoint { others: Vec<(String, Lsn)> },
    /// The slot was advanced by hand, or dropped and created again.
    SlotAhead { checkpoint: Lsn, confirmed: Lsn },
    /// The server's log ends before the checkpoint: it was restored from a backup.
    LogBehind { checkpoint: Lsn, at: String, wal_end: Lsn },
    /// The server left the checkpoint's timeline before the checkpoint: it was restored, or a standby was promoted
    /// that had not received everything. What the checkpoint covers ends there, and the LSNs from there on are used again.
    Diverged { checkpoint: Lsn, at: String, timeline: u32, ended: Lsn },
    /// The server's history does not have the checkpoint's timeline: it is the old primary that has come back after a
    /// promotion, or was restored.
    OtherTimeline { checkpoint: Lsn, timeline: u32, server: u32 },
    /// What was in the table before the slot is being published, or that was interrupted.
    Backfilling { at: String, instance: String },
}

/// From where on records are of transactions that this server never had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Beyond {
    /// Their commit LSNs are this or later.
    pub(crate) lsn: Lsn,
    /// When the last checkpoint was written, in milliseconds since the Unix epoch: soon after, nothing more of them
    /// was published.
    pub(crate) until_ms: Option<i64>,
}

impl Doubt {
    /// None where there are no such records, or it cannot be told from where on.
    pub(crate) fn beyond(&self) -> Option<Beyond> {
        let (lsn, at) = match self {
            Self::NoCheckpoint { .. }
            | Self::SlotAhead { .. }
            | Self::OtherTimeline { .. }
            | Self::Backfilling { .. } => return None,
            Self::LogBehind { wal_end, at, .. } => (*wal_end, at),
            Self::Diverged { ended, at, .. } => (*ended, at),
        };
        let until_ms = DateTime::parse_from_rfc3339(at).ok().map(|at| at.timestamp_millis());
        Some(Beyond { lsn, until_ms })
    }
}

/// Compares the two.
pub(crate) fn judge(
    ledger: &Ledger,
    confirmed: Lsn,
    system: &System,
) -> Result<relay_core::Checkpoint, Doubt> {
    let Some(entry @ Checkpoint { lsn: checkpoint, timeline, at, .. }) = &ledger.checkpoint else {
        let others = ledger.others.iter().map(|(system, c)| (system.clone(), c.lsn)).collect();
        return Err(Doubt::NoCheckpoint { others });
    };
    if entry.backfilling {
        return Err(Doubt::Backfilling { at: at.clone(), instance: entry.instance.clone() });
    }
    let (timeline, position) = (*timeline, entry.position());
    let part = position.part;
    // What is published in part lies behind it.
    let published = part.map_or(*checkpoint, |part| part.commit_lsn);
    let checkpoint = *checkpoint;
    let ended = system.switches.iter().find(|(ended, _)| *ended == timeline).map(|(_, at)| *at);
    let at = at.clone();
    // The part's LSN is where its commit begins.
    let is_behind = |end: Lsn| published > end || part.is_some() && published == end;
    // What was published last is there, and only the position went on: Kafka has nothing that the server does not have.
    let is_complete = |end: Lsn| part.is_none() && position.last.is_some_and(|last| last.commit_lsn < end);
    let ahead_of = |end: Lsn| is_behind(end) && !is_complete(end);
    if let Some(ended) = ended.filter(|ended| ahead_of(*ended)) {
        return Err(Doubt::Diverged { checkpoint: published, at, timeline, ended });
    }
    if ahead_of(system.wal_end) {
        return Err(Doubt::LogBehind { checkpoint: published, at, wal_end: system.wal_end });
    }
    if timeline != system.timeline && ended.is_none() {
        return Err(Doubt::OtherTimeline { checkpoint: published, timeline, server: system.timeline });
    }
    // The positions behind it are used again, for something else.
    let lsn = checkpoint.min(system.wal_end).min(ended.unwrap_or(Lsn(u64::MAX)));
    if confirmed > lsn {
        return Err(Doubt::SlotAhead { checkpoint: lsn, confirmed });
    }
    Ok(relay_core::Checkpoint { lsn, ..position })
}

/// What a session goes on from.
///
/// # Errors
/// Halted: a transaction is published in part, and now its changes would be counted otherwise.
pub(crate) fn resume(
    ledger: &Ledger,
    position: relay_core::Checkpoint,
    settings: &Settings,
) -> Result<relay_core::Checkpoint, Error> {
    let Some(entry) = &ledger.checkpoint else { return Ok(position) };
    let is_same =
        entry.publication == settings.publication && entry.messages == settings.source.messages.is_some();
    match position.part {
        Some(part) if !is_same => {
            let what = format!(
                "the transaction committed at {} is published up to its change {}, counted in publication {:?} {} messages",
                part.commit_lsn,
                part.seq,
                entry.publication,
                if entry.messages { "with" } else { "without" }
            );
            Err(Error::new(Kind::Halted, what).hint(
                "start once with postgres.publication and messages.prefix as they were, until a checkpoint is behind it",
            ))
        }
        // Which transaction comes last depends on them.
        None if !is_same => Ok(position.lsn.into()),
        _ => Ok(position),
    }
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCheckpoint { others } => {
                write!(f, "Kafka has no checkpoint of this slot")?;
                for (system, lsn) in others {
                    write!(f, "; it has one of a slot of this name at {lsn} of another cluster, {system}")?;
                }
                Ok(())
            }
            Self::SlotAhead { checkpoint, confirmed } => write!(
                f,
                "the slot is confirmed up to {confirmed}, which is {} bytes beyond the last checkpoint, {checkpoint}: it was \
                 advanced by hand, or dropped and created again, and what was committed in between may not be in Kafka",
                confirmed.bytes_since(*checkpoint)
            ),
            Self::LogBehind { checkpoint, at, wal_end } => write!(
                f,
                "the server's log ends at {wal_end}, before the last checkpoint, {checkpoint} of {at}: it was restored from a backup, and \
                 Kafka has events that it does not have"
            ),
            Self::Diverged { checkpoint, at, timeline, ended } => write!(
                f,
                "the server left timeline {timeline} at {ended}, before the last checkpoint, {checkpoint} of {at}: it was restored from a \
                 backup, or is a standby that was promoted before it had everything, and Kafka has events that it does not have"
            ),
            Self::OtherTimeline { checkpoint, timeline, server } => write!(
                f,
                "the last checkpoint, {checkpoint}, is on timeline {timeline}, and the server is on timeline {server}, whose history \
                 does not have that one: it is an old primary that has come back, or was restored from a backup, and events of \
                 timeline {timeline} are in Kafka that it does not have"
            ),
            Self::Backfilling { at, instance } => write!(
                f,
                "the backfill that {instance} began at {at} has not ended: what was in the outbox before the slot may not be in Kafka"
            ),
        }
    }
}

/// One way on.
const ACCEPT: &str = "To accept that: `cdc-relay accept-gap` says what it would do, and `cdc-relay accept-gap --yes` goes on from the \
     slot's confirmed LSN";

/// The other one, for what the outbox still has.
pub(crate) const REPUBLISH: &str = "To publish what is missing once the relay streams again, behind newer rows: set retention.mode = \"keep\" \
     before it starts, because what is missing counts as confirmed then; `cdc-relay audit` names the rows \
     that no topic has, and `cdc-relay replay --id ID --yes` publishes them. To publish it before anything new, accept nothing: drop \
     the slot (SELECT pg_drop_replication_slot('SLOT')), and `cdc-relay init --backfill --order-by COLUMN --where CONDITION` makes a \
     new one and publishes the rows of that condition first";

impl From<Doubt> for Error {
    fn from(doubt: Doubt) -> Self {
        let hint = match &doubt {
            Doubt::NoCheckpoint { .. } => format!(
                "if this relay never ran here, `cdc-relay init` writes the first one. Else find out what became of topic \
                 kafka.checkpoint_topic, and of the server. What the slot sends from its confirmed LSN on may be in Kafka already; \
                 what was committed before that and is not in Kafka does not come from the slot any more. {ACCEPT}: the first is \
                 published, perhaps again, the second is not. {REPUBLISH}"
            ),
            Doubt::SlotAhead { checkpoint, confirmed } => format!(
                "what was committed from {checkpoint} to {confirmed} and is not in Kafka does not come from the slot any more, and no \
                 slot goes back. {ACCEPT}. {REPUBLISH}"
            ),
            Doubt::LogBehind { .. } | Doubt::Diverged { .. } => {
                "consumers may have applied events that this database never had. `cdc-relay accept-gap` lists them all (--json for \
                 a program); `cdc-relay accept-gap --yes` goes on without them from the slot's confirmed LSN, and new events may \
                 repeat their LSNs. Or bring back the server that has them, put it into postgres.url, and start again"
                    .to_owned()
            }
            Doubt::OtherTimeline { .. } => format!(
                "put the server that was promoted into postgres.url (with target_session_attrs=read-write no standby is taken for \
                 it), make this one its standby, and start again: then nothing is lost. To stay with this one: consumers may have \
                 applied events that it never had, and what it committed since the promotion is not in Kafka. {ACCEPT}: what it \
                 has from there on is published, some of it perhaps again, and new events may repeat the LSNs of old ones. {REPUBLISH}"
            ),
            Doubt::Backfilling { .. } => {
                "if `cdc-relay init --backfill` still runs, wait until it has ended. If it was interrupted, run it again: it starts over \
                 with a new slot, and what it had published is published again. `cdc-relay accept-gap --yes` goes on without the rest"
                    .to_owned()
            }
        };
        Self { beyond: doubt.beyond(), ..Self::new(Kind::Halted, doubt.to_string()).hint(hint) }
    }
}

/// The content of a timeline history file: where each earlier timeline ended
/// (<https://www.postgresql.org/docs/current/continuous-archiving.html#BACKUP-TIMELINES>).
pub(crate) fn parse_history(text: &str) -> Vec<(u32, Lsn)> {
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(lsn: u64, timeline: u32) -> Ledger {
        let text = |s: &str| s.to_owned();
        let checkpoint = Checkpoint {
            lsn: Lsn(lsn),
            seq: 0,
            last: None,
            generation: 0,
            timeline,
            instance: text("i"),
            publication: text("p"),
            messages: false,
            backfilling: false,
            at: text("t"),
        };
        Ledger { checkpoint: Some(checkpoint), ..Ledger::default() }
    }

    fn system(wal_end: u64, switches: &[(u32, u64)]) -> System {
        let switches: Vec<_> = switches.iter().map(|(t, l)| (*t, Lsn(*l))).collect();
        let timeline = u32::try_from(switches.len() + 1).unwrap();
        System { identifier: "1".into(), timeline, wal_end: Lsn(wal_end), switches }
    }

    #[test]
    fn a_slot_at_or_behind_the_checkpoint_is_good() {
        for confirmed in [1, 49, 50] {
            assert_eq!(judge(&ledger(50, 1), Lsn(confirmed), &system(50, &[])), Ok(Lsn(50).into()));
        }
        // A standby that had everything was promoted.
        assert_eq!(judge(&ledger(50, 1), Lsn(50), &system(90, &[(1, 50)])), Ok(Lsn(50).into()));
        // What came last is there, and the position was told while nothing came.
        let mut idle = ledger(50, 1);
        let last = serde_json::from_str(r#"{"commitLsn":"0/20","committedAtUs":7}"#).unwrap();
        idle.checkpoint.as_mut().unwrap().last = Some(last);
        assert_eq!(judge(&idle, Lsn(30), &system(90, &[(1, 45)])).unwrap().lsn, Lsn(45));
        assert_eq!(judge(&idle, Lsn(30), &system(40, &[])).unwrap().lsn, Lsn(40));
        assert!(matches!(judge(&idle, Lsn(30), &system(90, &[(1, 0x20)])), Err(Doubt::Diverged { .. })));
    }

    #[test]
    fn everything_else_has_its_name() {
        let doubt = |confirmed, system: &System| judge(&ledger(50, 1), Lsn(confirmed), system).unwrap_err();
        assert!(matches!(doubt(51, &system(90, &[])), Doubt::SlotAhead { .. }));
        assert!(matches!(doubt(40, &system(49, &[])), Doubt::LogBehind { .. }));
        assert!(matches!(doubt(40, &system(90, &[(1, 49)])), Doubt::Diverged { timeline: 1, .. }));
        // Two promotions since then: what counts is where its own timeline ended.
        assert!(matches!(
            doubt(40, &system(90, &[(1, 49), (2, 80)])),
            Doubt::Diverged { timeline: 1, ended: Lsn(49), .. }
        ));
        // The old primary has come back, and has gone on by itself.
        let promoted = ledger(50, 2);
        let doubt_of = |confirmed, system: &System| judge(&promoted, Lsn(confirmed), system).unwrap_err();
        assert!(matches!(
            doubt_of(40, &system(90, &[])),
            Doubt::OtherTimeline { timeline: 2, server: 1, .. }
        ));
        assert!(matches!(doubt_of(40, &system(49, &[])), Doubt::LogBehind { .. }));
        assert_eq!(judge(&promoted, Lsn(40), &system(90, &[(1, 30), (2, 60)])), Ok(Lsn(50).into()));
        let others = vec![("7".to_owned(), ledger(5, 1).checkpoint.unwrap())];
        let none = Ledger { others, ..Ledger::default() };
        let doubt = judge(&none, Lsn(1), &system(1, &[])).unwrap_err();
        let mut begun = ledger(50, 1);
        begun.checkpoint.as_mut().unwrap().backfilling = true;
        let unfinished = judge(&begun, Lsn(40), &system(90, &[])).unwrap_err();
        assert!(matches!(unfinished, Doubt::Backfilling { .. }));
        assert!(doubt.to_string().ends_with("at 0/5 of another cluster, 7"), "{doubt}");
    }

    #[test]
    fn each_doubt_says_what_is_lost_and_both_ways_on() {
        let lsn = Lsn(80);
        let at = "2026-11-22T11:51:03.743Z".to_owned();
        let again = ["cdc-relay audit", "cdc-relay replay --id ID --yes", "cdc-relay init --backfill"];
        let server = ["events that", "postgres.url"];
        let cases = [
            (
                Doubt::NoCheckpoint { others: Vec::new() },
                "committed before that and is not in Kafka",
                &again[..],
            ),
            (
                Doubt::SlotAhead { checkpoint: Lsn(50), confirmed: lsn },
                "committed from 0/32 to 0/50 and is not",
                &again,
            ),
            (Doubt::OtherTimeline { checkpoint: lsn, timeline: 2, server: 1 }, "is not in Kafka", &again),
            (
                Doubt::OtherTimeline { checkpoint: lsn, timeline: 2, server: 1 },
                "events that it never had",
                &server,
            ),
            (Doubt::LogBehind { checkpoint: lsn, at: at.clone(), wal_end: Lsn(50) }, "never had", &server),
            (
                Doubt::Diverged { checkpoint: lsn, at: at.clone(), timeline: 1, ended: Lsn(50) },
                "never had",
                &server,
            ),
            (Doubt::Backfilling { at, instance: "i".into() }, "the rest", &["cdc-relay init --backfill"]),
        ];
        for (doubt, lost, other_way) in cases {
            let error = Error::from(doubt.clone());
            let hint = error.hint.unwrap();
            assert!(hint.contains(lost) && hint.contains("cdc-relay accept-gap --yes"), "{doubt:?}: {hint}");
            assert!(other_way.iter().all(|command| hint.contains(command)), "{doubt:?}: {hint}");
        }
    }

    #[test]
    fn a_history_is_read_and_its_comments_are_not() {
        let text =
            "1\t0/A000000\tno recovery target specified\n\n# comment\n2\t1/B\tat restore point \"x\"\n";
        assert_eq!(parse_history(text), [(1, Lsn(0xA00_0000)), (2, Lsn(0x1_0000_000B))]);
    }
}

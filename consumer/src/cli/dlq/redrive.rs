//! `redrive` and `discard`: which letters, sent to the group's own topic at a bounded pace, and what became of each.

use std::{collections::BTreeSet, time::Duration};

use serde_json::json;
use service::{Failure, exit::Kind, table};
use tokio::{
    task::block_in_place,
    time::{Instant, sleep, sleep_until},
};

use super::{
    Filter,
    copy::{self, Copy},
    sender::Sender,
};
use crate::{
    cluster::{Cluster, Member, Topic},
    config::Settings,
    delivery::redrive_topic,
    ledger::{Chosen, Ledger, Letter, Place},
    redrive::Action,
};

/// Letters that are sent before their outcomes are waited for.
const LETTERS_LIMIT: i64 = 1000;
/// A command that takes longer than this tells how far it is, as often.
const TELL_EVERY: Duration = Duration::from_secs(2);
/// How often the outcomes are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// When nothing has moved for so long, nobody waits any more.
const STILL_LIMIT: Duration = Duration::from_secs(30);
/// How much of an error a table has room for, in characters.
const ERROR_CHARS: usize = 80;

#[derive(Debug, clap::Args)]
pub(crate) struct Redrive {
    #[command(flatten)]
    selection: Selection,
    /// Leave out letters that have been redriven so often
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(i32).range(1..=1_000_000))]
    redrives_max: i32,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Discard {
    #[command(flatten)]
    selection: Selection,
    /// Yes, give them up. Without this it is a dry run
    #[arg(long)]
    yes: bool,
}

#[derive(Debug, clap::Args)]
struct Selection {
    /// Each as TOPIC/PARTITION/OFFSET, as `list` tells it
    #[arg(value_name = "TOPIC/PARTITION/OFFSET")]
    letters: Vec<Place>,
    /// Every open letter
    #[arg(long, conflicts_with = "letters")]
    all: bool,
    #[command(flatten)]
    filter: Filter,
    /// Only tell what would be done
    #[arg(long)]
    dry_run: bool,
    /// At most so many letters a second
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,
    /// Do not wait for what becomes of them
    #[arg(long)]
    no_wait: bool,
    /// A JSON object a line
    #[arg(long)]
    json: bool,
}

pub(super) async fn redrive(
    settings: &Settings,
    ledger: &mut Ledger,
    redrive: Redrive,
) -> Result<(), Failure> {
    let Redrive { selection, redrives_max } = redrive;
    Work::new(settings, selection, Action::Apply, redrives_max)?.carry_out(ledger).await
}

pub(super) async fn discard(
    settings: &Settings,
    ledger: &mut Ledger,
    discard: Discard,
) -> Result<(), Failure> {
    let Discard { mut selection, yes } = discard;
    let unsaid = !yes && !selection.dry_run;
    selection.dry_run |= unsaid;
    // A letter may be given up however often it has been tried.
    Work::new(settings, selection, Action::Discard, i32::MAX)?.carry_out(ledger).await?;
    if unsaid {
        return Err(Failure::configuration("nothing was discarded: this was a dry run").hint("add --yes"));
    }
    Ok(())
}

/// What became of a letter.
#[derive(Debug, Clone)]
struct Line {
    place: Place,
    outcome: Outcome,
    detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    WouldBe,
    /// Not sent, and why is told.
    Refused,
    /// Sent, and not waited for.
    Sent,
    /// Sent; the group has not dealt with it.
    Waiting,
    FailedAgain,
    Applied,
    Discarded,
}

impl Outcome {
    fn word(self, action: Action) -> &'static str {
        match (self, action) {
            (Self::WouldBe, Action::Apply) => "would be redriven",
            (Self::WouldBe, Action::Discard) => "would be discarded",
            (Self::Refused, _) => "refused",
            (Self::Sent, _) => "sent",
            (Self::Waiting, _) => "waiting",
            (Self::FailedAgain, _) => "failed again",
            (Self::Applied, _) => "applied",
            (Self::Discarded, _) => "discarded",
        }
    }

    fn stays_open(self) -> bool {
        matches!(self, Self::Refused | Self::Waiting | Self::FailedAgain)
    }
}

/// One redrive or discard.
struct Work<'a> {
    settings: &'a Settings,
    selection: Selection,
    action: Action,
    redrives_max: i32,
    cluster: Cluster,
    sender: Sender,
    /// When the next letter may be sent.
    next_at: Instant,
    told_at: Instant,
    sent: usize,
}

impl<'a> Work<'a> {
    fn new(
        settings: &'a Settings,
        selection: Selection,
        action: Action,
        redrives_max: i32,
    ) -> Result<Self, Failure> {
        if selection.letters.is_empty() && !selection.all && !selection.filter.names_something() {
            return Err(Failure::configuration(
                "say which letters: TOPIC/PARTITION/OFFSET, --all, or a filter such as --reason",
            )
            .hint("`consumer dlq list` tells which there are, and --dry-run what would be done"));
        }
        let (cluster, sender) = (Cluster::new(&settings.kafka)?, Sender::new(&settings.kafka)?);
        let now = Instant::now();
        Ok(Self {
            settings,
            selection,
            action,
            redrives_max,
            cluster,
            sender,
            next_at: now,
            told_at: now,
            sent: 0,
        })
    }

    async fn carry_out(mut self, ledger: &mut Ledger) -> Result<(), Failure> {
        block_in_place(|| self.look_for_topic())?;
        let now = ledger.now().await?;
        let filter = self.selection.filter.chosen();
        let chosen = Chosen {
            places: self.selection.letters.clone(),
            // A letter that fails again is not taken again.
            to: Some(filter.to.map_or(now, |to| to.min(now))),
            ..filter
        };
        let (mut letters, mut open, mut still) = (0, 0, false);
        let mut after = None;
        let mut absent = self.absent(ledger).await?;
        loop {
            let page = ledger.page(&chosen, after.as_ref(), LETTERS_LIMIT).await?;
            after = page.last().map(|letter| letter.place.clone());
            let is_last = i64::try_from(page.len()).is_ok_and(|count| count < LETTERS_LIMIT);
            let mut lines = self.send(ledger, page).await?;
            if !self.selection.no_wait {
                still = self.wait(ledger, &mut lines).await?;
            }
            lines.append(&mut absent);
            letters += lines.len();
            open += lines.iter().filter(|line| line.outcome.stays_open()).count();
            self.tell(&lines);
            if is_last || still {
                break;
            }
        }
        if letters == 0 && !self.selection.json {
            service::say!("there are no such letters");
        }
        if still {
            return Err(self.nobody_consumes(ledger).await);
        }
        if open > 0 {
            let what = format!("{open} of {letters} letters stay open");
            return Err(Failure::new(Kind::Halted, what).hint("the table above says why, for each"));
        }
        Ok(())
    }

    /// # Errors
    /// When the group's own topic does not exist.
    fn look_for_topic(&self) -> Result<(), Failure> {
        let kafka = &self.settings.kafka;
        let topic = redrive_topic(&kafka.group);
        if self.cluster.topic(&topic)?.is_some() {
            return Ok(());
        }
        let sources = kafka.topics.iter().map(|source| self.cluster.topic(source));
        let sources = sources.collect::<Result<Vec<_>, _>>()?;
        Err(missing(&topic, &kafka.brokers, &sources))
    }

    /// Of the letters that were named, what there is to say of those that are not open.
    async fn absent(&self, ledger: &mut Ledger) -> Result<Vec<Line>, Failure> {
        if self.selection.letters.is_empty() {
            return Ok(Vec::new());
        }
        let chosen = Chosen { places: self.selection.letters.clone(), settled: true, ..Chosen::default() };
        let known = ledger.page(&chosen, None, i64::MAX).await?;
        let mut lines = Vec::new();
        let named: BTreeSet<&Place> = self.selection.letters.iter().collect();
        for place in named {
            let (outcome, detail) = match known.iter().find(|letter| letter.place == *place) {
                None => (Outcome::Refused, "there is no such dead letter".into()),
                Some(letter) => match (settled(letter), letter.settled_at) {
                    (Some(outcome), Some(at)) => (outcome, format!("already, at {}", at.format("%FT%TZ"))),
                    _ => continue,
                },
            };
            lines.push(Line { place: place.clone(), outcome, detail });
        }
        Ok(lines)
    }

    /// Sends what can be sent of these letters.
    async fn send(&mut self, ledger: &mut Ledger, page: Vec<Letter>) -> Result<Vec<Line>, Failure> {
        let mut lines: Vec<Line> = Vec::with_capacity(page.len());
        for letter in page {
            let (outcome, detail) = match block_in_place(|| self.prepare(&letter))? {
                Err(refusal) => (Outcome::Refused, refusal),
                Ok(_) if self.selection.dry_run => (Outcome::WouldBe, why(&letter)),
                Ok(copy) => {
                    self.pace().await;
                    match ledger.count_redrive(&letter.place, self.redrives_max).await? {
                        None => (Outcome::Refused, "somebody else has dealt with it meanwhile".into()),
                        Some(number) => {
                            self.sender.send(lines.len(), &letter, copy.as_ref(), number, self.action)?;
                            let waits = !self.selection.no_wait;
                            (
                                if waits { Outcome::Waiting } else { Outcome::Sent },
                                format!("redrive {number}"),
                            )
                        }
                    }
                }
            };
            lines.push(Line { place: letter.place, outcome, detail });
            if self.sender.is_full() {
                self.finish(&mut lines).await?;
            }
        }
        self.finish(&mut lines).await?;
        Ok(lines)
    }

    async fn finish(&mut self, lines: &mut [Line]) -> Result<(), Failure> {
        for too_large in self.sender.finish().await? {
            let topic = redrive_topic(&self.settings.kafka.group);
            lines[too_large].outcome = Outcome::Refused;
            lines[too_large].detail =
                format!("{topic} does not take a record that large: raise its max.message.bytes");
        }
        Ok(())
    }

    /// What is needed of a letter's record, or why it cannot be sent.
    fn prepare(&mut self, letter: &Letter) -> Result<Result<Option<Copy>, String>, Failure> {
        if letter.redrives >= self.redrives_max {
            return Ok(Err(format!(
                "redriven {} times already: --redrives-max N once its cause is mended, or `consumer dlq discard {} --yes`",
                letter.redrives, letter.place
            )));
        }
        if self.action == Action::Discard {
            return Ok(Ok(None));
        }
        let discard = format!("`consumer dlq discard {} --yes` gives it up", letter.place);
        Ok(match copy::find(&mut self.cluster, &self.settings.kafka.group, letter)? {
            None => Err(format!("its record is gone, from the dead letters and from its topic: {discard}")),
            Some(copy) if copy.lacks_value => {
                Err(format!("its value was too large to keep and is gone from its topic: {discard}"))
            }
            Some(copy) if copy.headers.is_none() => {
                Err(format!("the name of a header is not UTF-8, so it cannot be sent as it was: {discard}"))
            }
            Some(copy) => Ok(Some(copy)),
        })
    }

    /// Waits until the next letter may be sent.
    async fn pace(&mut self) {
        sleep_until(self.next_at).await;
        self.next_at = self.next_at.max(Instant::now()) + Duration::from_secs(1) / self.selection.rate;
        self.sent += 1;
        self.progress(|work| format!("{} letters sent", work.sent - 1));
    }

    fn progress(&mut self, what: impl Fn(&Self) -> String) {
        if self.told_at.elapsed() >= TELL_EVERY {
            self.told_at = Instant::now();
            eprintln!("{}", what(self));
        }
    }

    /// Waits for the outcomes; whether it was given up because nothing moved.
    async fn wait(&mut self, ledger: &mut Ledger, lines: &mut [Line]) -> Result<bool, Failure> {
        let mut moved_at = Instant::now();
        loop {
            let waiting = lines.iter().filter(|line| line.outcome == Outcome::Waiting);
            let places: Vec<Place> = waiting.map(|line| line.place.clone()).collect();
            if places.is_empty() {
                return Ok(false);
            }
            if moved_at.elapsed() >= STILL_LIMIT {
                return Ok(true);
            }
            sleep(LOOK_EVERY).await;
            let count = places.len();
            let chosen = Chosen { places, settled: true, ..Chosen::default() };
            for letter in ledger.page(&chosen, None, i64::MAX).await? {
                let outcome = match settled(&letter) {
                    Some(outcome) => outcome,
                    None if letter.state() == "open" => Outcome::FailedAgain,
                    None => continue,
                };
                if let Some(line) = lines.iter_mut().find(|line| line.place == letter.place) {
                    line.outcome = outcome;
                    line.detail =
                        if outcome == Outcome::FailedAgain { why(&letter) } else { line.detail.clone() };
                    moved_at = Instant::now();
                }
            }
            self.progress(|work| {
                format!("waiting until {} has dealt with {count} letters", work.settings.kafka.group)
            });
        }
    }

    fn tell(&self, lines: &[Line]) {
        if self.selection.json {
            for Line { place, outcome, detail } in lines {
                let outcome = outcome.word(self.action);
                service::say!(
                    "{}",
                    json!({ "letter": place.to_string(), "outcome": outcome, "detail": detail })
                );
            }
            return;
        }
        let rows = lines.iter().map(|Line { place, outcome, detail }| {
            [place.to_string(), outcome.word(self.action).to_owned(), table::printable(detail)]
        });
        let rows: Vec<_> = rows.collect();
        if !rows.is_empty() {
            table::print(["LETTER", "OUTCOME", "DETAIL"], &rows);
        }
    }

    /// Why nothing moves.
    async fn nobody_consumes(&self, ledger: &mut Ledger) -> Failure {
        let (group, seconds) = (&self.settings.kafka.group, STILL_LIMIT.as_secs());
        let topic = redrive_topic(group);
        let still =
            |why: String| Failure::new(Kind::GaveUp, format!("nothing has moved for {seconds} s: {why}"));
        if let Ok(Some(_)) = ledger.paused().await {
            return still(format!("{group} is paused"))
                .hint("`consumer resume`; the letters are dealt with then");
        }
        let members = block_in_place(|| self.cluster.group()).map(|group| group.members).unwrap_or_default();
        let reads = |member: &&Member| member.partitions.iter().any(|(of, _)| *of == topic);
        match members.iter().find(reads) {
            Some(member) => still(format!("{} at {} reads {topic}, and waits for something", member.id, member.host))
                .hint("its /health/ready tells for what; the letters are dealt with then"),
            None => still(format!("no instance of {group} seems to consume {topic}")).hint(format!(
                "start one: consumer --handler {} --group {group} --topics {}; the letters are dealt with then",
                self.settings.handler,
                self.settings.kafka.topics.join(",")
            )),
        }
    }
}

/// What became of a letter, if it is settled.
fn settled(letter: &Letter) -> Option<Outcome> {
    match letter.outcome.as_deref()? {
        "discarded" => Some(Outcome::Discarded),
        _ => Some(Outcome::Applied),
    }
}

/// Why it is a dead letter.
fn why(letter: &Letter) -> String {
    table::cut(&format!("{}: {}", letter.reason, letter.error), ERROR_CHARS)
}

/// The failure that a group's own topic is not there, with what makes it: as many partitions as the topics it consumes.
fn missing(topic: &str, brokers: &str, sources: &[Option<Topic>]) -> Failure {
    let known = || sources.iter().flatten();
    let partitions = known().map(|topic| topic.partitions).max().unwrap_or(6);
    let replicas = known().map(|topic| topic.replicas).max().unwrap_or(3);
    Failure::new(Kind::Refused, format!("the topic {topic} does not exist")).hint(format!(
        "kafka-topics.sh --bootstrap-server {brokers} --create --topic {topic} --partitions {partitions} \
         --replication-factor {replicas}"
    ))
}

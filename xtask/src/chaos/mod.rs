//! `cargo xtask chaos`: the whole system under load while its processes are killed and stopped and its connections
//! cut, and a checker that says what was lost, repeated or out of order.
//!
//! A campaign goes by rounds: a load begins, a handful of faults happen at random moments, all is mended, the load
//! ends, and the checker compares. The seed decides which faults, their order, moments and lengths (`plan`); what the
//! processes are doing at those moments it cannot decide. Each sitting has a new stage; the journal has what ran.

mod actor;
mod checker;
mod connection;
mod evidence;
mod faults;
mod fold;
mod journal;
mod load;
mod plan;
mod proxy;
mod quota;
mod stage;
mod table;
mod targets;
mod verdict;

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    sync::Mutex,
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};

pub(crate) use self::plan::Fault;
use self::{
    checker::Checker,
    journal::{Journal, Round, Struck},
    load::Load,
    plan::{Deck, Planned},
    stage::{Relays, Stage},
    table::Summary,
    verdict::Verdict,
};
use crate::{
    cli::{self, Delivery},
    down,
    failure::{Explain, Failure, Result},
    layout::Layout,
    prerequisites,
    progress::Progress,
    services, state,
    supervise::{self, Interrupts},
};

/// How many faults there are where neither a number nor a time is given.
const FAULTS: usize = 100;
/// How often the checker takes what was committed, so that its slot holds back no log.
const COLLECT_INTERVAL: Duration = Duration::from_millis(500);
/// How long after the load everything may take to arrive.
const ARRIVE_LIMIT: Duration = Duration::from_secs(120);

/// Runs a campaign, or goes on with one.
pub(crate) async fn chaos(args: &cli::Chaos) -> Result<()> {
    if let Some(relay) = args.relay.as_ref().filter(|path| !path.is_file()) {
        return Err(Failure::new(format!("there is no {}", relay.display())));
    }
    let home = Layout::open(None)?;
    let dir = args.dir.clone().unwrap_or_else(|| home.dir.join("chaos"));
    let layout = Layout::open(Some(&dir))?;
    let progress = Progress::new(None);
    let _lock = state::lock(&layout)?.ok_or_else(|| supervise::already(&layout))?;
    // One that was just ending has taken its folders away.
    let layout = Layout::open(Some(&dir))?;
    let mut interrupts = Interrupts::new()?;
    down::clear(&layout, &progress).await;
    prerequisites::disk(&layout.dir)?;
    let seed = args.replay.or(args.seed).map_or_else(new_seed, Ok)?;
    let deck = Deck::of(&args.only);
    let mut journal = Journal::open(&layout.dir, args.delivery, seed, &deck, args.replay.is_some())?;
    let kills = args.kills.and_then(|kills| usize::try_from(kills).ok());
    let wanted = kills.or_else(|| args.minutes.is_none().then_some(FAULTS));
    if wanted.is_none_or(|wanted| journal.faults() < wanted) {
        if !args.no_build {
            services::build(&layout, &progress)?;
        }
        let done = journal.faults();
        progress.line(&format!(
            "seed {seed}, {}, {done} faults done; the journal is {}",
            args.delivery.name(),
            journal.path().display()
        ));
        supervise::wipe(&layout)?;
        let result = tokio::select! {
            result = play(args, seed, wanted, &layout, &progress, &mut journal) => result,
            () = interrupts.next() => Err(Failure::new("interrupted").hint(format!(
                "the round under way does not count; to go on: cargo xtask chaos --seed {seed} {}",
                options(args)
            ))),
        };
        down::clear(&layout, &progress).await;
        stage::sweep(&layout);
        result?;
    }
    finish(args, seed, &journal)
}

/// From a new stage to the last round of this sitting.
async fn play(
    args: &cli::Chaos,
    seed: u64,
    wanted: Option<usize>,
    layout: &Layout,
    progress: &Progress,
    journal: &mut Journal,
) -> Result<()> {
    let until = args.minutes.map(|minutes| Instant::now() + Duration::from_secs(60 * minutes));
    let deck = Deck::of(&args.only);
    let relays = Relays { program: relay(args)?, delivery: args.delivery };
    let stage = Stage::start(layout, args.postgres, relays, progress).await?;
    let checker = Mutex::new(Checker::create(&stage.targets).await?);
    while until.is_none_or(|until| Instant::now() < until) {
        let left = wanted.map_or(plan::ROUND, |wanted| wanted.saturating_sub(journal.faults()));
        if left == 0 {
            break;
        }
        let number = journal.rounds.len() as u64;
        let planned = deck.round(seed, number, left);
        let step = progress.step(format!("round {}", number + 1));
        let stage = stage.clone();
        let round = tokio::select! {
            round = round(&stage, &checker, args.delivery, seed, number, planned) => round?,
            failure = stage.watch() => return failure,
            () = collect(&checker) => continue,
        };
        drop(step);
        progress.line(&table::line(&round, journal.faults(), wanted));
        for note in &round.notes {
            progress.line(&format!("   {note}"));
        }
        if !round.violations.is_empty() {
            let kept = evidence::keep(layout, journal.path(), &round)?;
            progress.line(&format!(
                "!! {}\n!! evidence is in {}",
                round.violations.join("\n!! "),
                kept.display()
            ));
        }
        journal.add(round)?;
    }
    Ok(())
}

/// For as long as it is let.
async fn collect(checker: &Mutex<Checker>) {
    loop {
        // Postgres may be away; what it says then is the next collection's.
        let _ = checker.lock().await.collect().await;
        sleep(COLLECT_INTERVAL).await;
    }
}

async fn round(
    stage: &Arc<Stage>,
    checker: &Mutex<Checker>,
    delivery: Delivery,
    seed: u64,
    number: u64,
    planned: Vec<Planned>,
) -> Result<Round> {
    let since = Instant::now();
    let (quotas, planned): (Vec<_>, Vec<_>) =
        planned.into_iter().partition(|planned| planned.fault == Fault::SlotQuota);
    // Before the load, so that a verdict follows.
    let mut faults = Vec::new();
    for planned in quotas {
        let drain = || async { checker.lock().await.collect().await.map(drop) };
        let hit = quota::fill(stage, drain).await?;
        stage.heal().await;
        faults.push(Struck { planned, hit });
    }
    let load = Load::start(&stage.targets, seed.wrapping_add(number))?;
    faults.extend(strike(stage, planned).await?);
    stage.heal().await;
    load.stop().await?;
    let verdict = checker.lock().await.verdict(Instant::now().into_std() + ARRIVE_LIMIT).await?;
    let (mut violations, notes) = stage.take_told();
    violations.extend(found(&verdict, delivery));
    Ok(Round { number, faults, seconds: since.elapsed().as_secs(), verdict, violations, notes })
}

/// All faults of a round, each at its moment; they may overlap.
async fn strike(stage: &Arc<Stage>, planned: Vec<Planned>) -> Result<Vec<Struck>> {
    let since = Instant::now();
    let mut striking = JoinSet::new();
    for planned in planned {
        let stage = stage.clone();
        striking.spawn(async move {
            sleep_until(since + planned.after()).await;
            faults::strike(&stage, planned).await.map(|hit| Struck { planned, hit })
        });
    }
    let mut struck = Vec::new();
    while let Some(ended) = striking.join_next().await {
        struck.push(ended.explain(|| "carry a fault out".to_owned())??);
    }
    struck.sort_by_key(|struck| struck.planned.after_ms);
    Ok(struck)
}

/// What the checker found, as a violation.
fn found(verdict: &Verdict, delivery: Delivery) -> Option<String> {
    let count = verdict.violations(delivery == Delivery::ExactlyOnce);
    (count > 0).then(|| format!("{verdict:?}"))
}

/// The binary of the relays. They are started in another folder.
fn relay(args: &cli::Chaos) -> Result<PathBuf> {
    let Some(path) = &args.relay else { return services::binary("cdc-relay") };
    fs::canonicalize(path).explain(|| format!("find {}", path.display()))
}

/// What the same campaign is called with, beside its seed and its size.
fn options(args: &cli::Chaos) -> String {
    let mut options = vec![format!("--delivery {}", args.delivery.name())];
    if !args.only.is_empty() {
        let names: Vec<String> = args.only.iter().map(|fault| fault.name()).collect();
        options.push(format!("--only {}", names.join(",")));
    }
    if args.postgres != cli::Postgres::V18 {
        options.push(format!("--postgres {}", args.postgres.name()));
    }
    options.extend(args.relay.iter().map(|path| format!("--relay {}", path.display())));
    options.extend(args.dir.iter().map(|path| format!("--dir {}", path.display())));
    options.join(" ")
}

fn new_seed() -> Result<u64> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map(|now| now.as_secs()).explain(|| "read the clock".to_owned())
}

/// Prints the table; fails where there was a violation.
fn finish(args: &cli::Chaos, seed: u64, journal: &Journal) -> Result<()> {
    let summary = Summary::of(journal, seed, args.delivery);
    if args.json {
        let json = serde_json::to_string_pretty(&summary).explain(|| "write the summary".to_owned())?;
        println!("{json}");
    } else {
        println!("{}", summary.text());
    }
    match journal.violations() {
        0 => Ok(()),
        count => Err(Failure::new(format!("{count} violations with seed {seed}")).hint(format!(
            "the same faults again: cargo xtask chaos --replay {seed} --kills {} {}",
            journal.faults(),
            options(args)
        ))),
    }
}

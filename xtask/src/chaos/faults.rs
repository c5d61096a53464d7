//! Carrying faults out: each breaks something, waits, and mends it again.

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    process::ExitStatus,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use sqlx::{Connection, PgConnection};

use super::{
    actor::{Actor, Held},
    plan::{Fault, Planned},
    proxy::{Link, Way},
    stage::Stage,
};
use crate::{
    ending,
    failure::{Explain, Failure, Result},
    identity, logs, postgres,
    spec::{Layer, Probe},
};

/// How long a relay may take to stop when asked to: its drain, and some more on a busy machine.
const TERM_LIMIT: Duration = Duration::from_secs(30);
/// How a relay may end that was asked to: drained, or cut short because Postgres or Kafka is away, which it says.
const TERM_CODES: [i32; 2] = [0, 75];
/// How long Postgres may take to stop at once.
const IMMEDIATE_LIMIT: Duration = Duration::from_secs(20);
/// How long each delay is on.
const DELAY_LASTS: Duration = Duration::from_secs(3);
/// How long the brokers may take to elect a controller, on a busy machine, and how often they are looked at.
const ELECTION_LIMIT: Duration = Duration::from_secs(60);
const ELECTION_INTERVAL: Duration = Duration::from_millis(200);
/// How long the slot may be in nobody's use while other faults happen, and how often it is looked at.
const TAKEN_LIMIT: Duration = Duration::from_secs(90);
const TAKEN_INTERVAL: Duration = Duration::from_millis(200);
/// How long one question to a server may take.
const ASK_LIMIT: Duration = Duration::from_secs(2);

/// Carries one fault out, and says what it hit.
pub(super) async fn strike(stage: &Stage, planned: Planned) -> Result<String> {
    match planned.fault {
        Fault::RelayKill => kill(stage, relay(stage, planned.pick).await?, planned).await,
        Fault::RelayPause => pause(stage, relay(stage, planned.pick).await?, planned).await,
        Fault::RelayTerm => term(stage, relay(stage, planned.pick).await?, planned).await,
        Fault::BrokerKill | Fault::ControllerKill | Fault::BrokerPause => strike_broker(stage, planned).await,
        Fault::PostgresImmediate => immediate(stage, stage.actor("postgres")?, planned).await,
        Fault::PostgresCrash => kill(stage, stage.actor("postgres")?, planned).await,
        Fault::WalsenderKill => kill_walsender(stage).await,
        Fault::ConsumerKill => kill(stage, consumer(stage, planned.pick)?, planned).await,
        Fault::ConsumersPostgresCrash => kill(stage, stage.actor("consumers-postgres")?, planned).await,
        Fault::PostgresCut => cut(&stage.postgres_link, planned).await,
        Fault::KafkaCut => cut(&stage.kafka_link, planned).await,
        Fault::PostgresDelay => delay(&stage.postgres_link, planned).await,
        Fault::KafkaDelay => delay(&stage.kafka_link, planned).await,
        Fault::PostgresHalfClose => Ok(half_close(&stage.postgres_link, planned)),
        Fault::KafkaHalfClose => Ok(half_close(&stage.kafka_link, planned)),
        // Needs a stage on which nobody writes.
        Fault::SlotQuota => Err(Failure::new("the quota is filled between rounds only")),
    }
}

/// Holds a process that runs: one that ended by itself is told of, and started first.
pub(super) async fn hold<'a>(stage: &Stage, actor: &'a Actor) -> Result<Held<'a>> {
    let mut held = actor.hold().await;
    if let Some(how) = held.ended_by_itself() {
        stage.ended(actor, how);
        held.start().await?;
    }
    Ok(held)
}

async fn kill(stage: &Stage, actor: &Arc<Actor>, planned: Planned) -> Result<String> {
    let mut held = hold(stage, actor).await?;
    held.kill().await?;
    tokio::time::sleep(planned.lasts()).await;
    held.start().await?;
    Ok(actor.spec.name.clone())
}

async fn pause(stage: &Stage, actor: &Arc<Actor>, planned: Planned) -> Result<String> {
    let held = hold(stage, actor).await?;
    held.signal(Signal::STOP);
    tokio::time::sleep(planned.lasts()).await;
    held.signal(Signal::CONT);
    Ok(format!("{} for {} ms", actor.spec.name, planned.lasts_ms))
}

async fn term(stage: &Stage, actor: &Arc<Actor>, planned: Planned) -> Result<String> {
    let mut held = hold(stage, actor).await?;
    // One that has hardly begun does not listen to signals yet.
    let was_up =
        Probe::Http { url: format!("http://127.0.0.1:{}/health/live", actor.spec.port) }.attempt().await;
    held.signal(Signal::TERM);
    let status = held.ended(TERM_LIMIT).await?;
    let is_fine = |status: &ExitStatus| match status.code() {
        Some(code) => TERM_CODES.contains(&code),
        None => !was_up && status.signal() == Some(Signal::TERM.as_raw()),
    };
    if let Some(status) = status.filter(|status| !is_fine(status)) {
        let failure = Failure::new(format!("{} at SIGTERM: {}", actor.spec.name, ending::describe(status)));
        stage.violation(logs::with_tail(failure, &actor.spec.log).to_string());
    }
    tokio::time::sleep(planned.lasts()).await;
    held.start().await?;
    let how = status.map(ending::describe).unwrap_or_default();
    Ok(format!("{}, {how}", actor.spec.name))
}

async fn immediate(stage: &Stage, actor: &Arc<Actor>, planned: Planned) -> Result<String> {
    let mut held = hold(stage, actor).await?;
    held.signal(Signal::QUIT);
    held.ended(IMMEDIATE_LIMIT).await?;
    tokio::time::sleep(planned.lasts()).await;
    held.start().await?;
    Ok(actor.spec.name.clone())
}

async fn cut(link: &Link, planned: Planned) -> Result<String> {
    link.cut();
    tokio::time::sleep(planned.lasts()).await;
    link.heal();
    Ok(format!("for {} ms", planned.lasts_ms))
}

async fn delay(link: &Link, planned: Planned) -> Result<String> {
    link.delay(planned.lasts());
    tokio::time::sleep(DELAY_LASTS).await;
    link.heal();
    Ok(format!("of {} ms", planned.lasts_ms))
}

fn half_close(link: &Link, planned: Planned) -> String {
    let way = if planned.pick.is_multiple_of(2) { Way::ToServer } else { Way::ToRelay };
    link.half_close(way);
    match way {
        Way::ToServer => "to the server".to_owned(),
        Way::ToRelay => "to the relay".to_owned(),
    }
}

fn pick<'a>(from: &[&'a Arc<Actor>], pick: u32) -> Result<&'a Arc<Actor>> {
    let at = usize::try_from(pick).unwrap_or(0) % from.len().max(1);
    from.get(at).copied().ok_or_else(|| Failure::new("there is nobody to pick"))
}

/// Three times of four the relay that streams, else any of the two.
async fn relay(stage: &Stage, choice: u32) -> Result<&Arc<Actor>> {
    let relays = stage.instances("cdc-relay");
    if !choice.is_multiple_of(4) {
        for relay in &relays {
            if is_streaming(relay).await {
                return Ok(*relay);
            }
        }
    }
    pick(&relays, choice / 4)
}

async fn is_streaming(relay: &Actor) -> bool {
    let url = format!("http://127.0.0.1:{}/health/ready", relay.spec.port);
    let asked = tokio::task::spawn_blocking(move || {
        let agent = ureq::Agent::config_builder().timeout_global(Some(ASK_LIMIT)).build().new_agent();
        agent.get(&url).call().ok()?.body_mut().read_to_string().ok()
    });
    asked.await.ok().flatten().is_some_and(|text| text.contains("\"streaming\""))
}

fn consumer(stage: &Stage, choice: u32) -> Result<&Arc<Actor>> {
    let consumers: Vec<_> =
        stage.actors.values().filter(|actor| actor.spec.layer == Layer::Consumer).collect();
    pick(&consumers, choice)
}

/// One broker at a time, until it is back: what three of them are made to bear. Two would be an outage of Kafka for as
/// long as they take to start, after which a relay that Kafka never let in gives up.
async fn strike_broker(stage: &Stage, planned: Planned) -> Result<String> {
    let _turn = stage.brokers.lock().await;
    let broker = match planned.fault {
        Fault::ControllerKill => controller(stage).await?,
        _ => broker(stage, planned.pick).await?,
    };
    let hit = match planned.fault {
        Fault::BrokerPause => pause(stage, broker, planned).await?,
        _ => kill(stage, broker, planned).await?,
    };
    if let Err(failure) = broker.ready().await {
        stage.violation(failure.to_string());
    }
    Ok(hit)
}

/// A broker that is not the active controller.
async fn broker(stage: &Stage, choice: u32) -> Result<&Arc<Actor>> {
    let controller = controller(stage).await?;
    let others: Vec<_> = stage
        .instances("kafka")
        .into_iter()
        .filter(|actor| actor.spec.name != controller.spec.name)
        .collect();
    pick(&others, choice)
}

/// The broker that leads the quorum, once there is one: while one is elected nobody leads.
async fn controller(stage: &Stage) -> Result<&Arc<Actor>> {
    let until = Instant::now() + ELECTION_LIMIT;
    loop {
        match leader(stage) {
            Err(e) if Instant::now() >= until => return Err(e),
            Err(_) => tokio::time::sleep(ELECTION_INTERVAL).await,
            found => return found,
        }
    }
}

/// From what each broker has written down about its last election.
fn leader(stage: &Stage) -> Result<&Arc<Actor>> {
    let brokers = stage.instances("kafka");
    let election = |broker: &&Arc<Actor>| {
        let path = broker.spec.cwd.join("log/__cluster_metadata-0/quorum-state");
        let state: serde_json::Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        Some((state["leaderEpoch"].as_i64()?, state["leaderId"].as_u64().filter(|id| *id > 0)?))
    };
    let leader = brokers.iter().filter_map(election).max().map(|(_, id)| format!("kafka-{id}"));
    let leader = leader.ok_or_else(|| Failure::new("no broker knows the controller"))?;
    stage.actor(&leader)
}

/// kill -9 of the backend that serves the relay's slot: Postgres ends all others and recovers. Other faults may have taken
/// it, or be about to; one that hit nobody would be none, so it waits for the next.
async fn kill_walsender(stage: &Stage) -> Result<String> {
    let actor = stage.actor("postgres")?;
    let until = Instant::now() + TAKEN_LIMIT;
    loop {
        {
            // Nobody else stops Postgres between the question and the kill.
            let _held = hold(stage, actor).await?;
            let asked = tokio::time::timeout(ASK_LIMIT, walsender(stage)).await;
            let pid = asked.ok().and_then(Result::ok).flatten();
            if let Some(pid) = pid.filter(|pid| postgres::inhabitants(&actor.spec.cwd).contains(pid)) {
                identity::send(pid, Signal::KILL);
                return Ok(format!("process {pid}"));
            }
        }
        if Instant::now() >= until {
            let what = format!("no relay had the slot for {} s", TAKEN_LIMIT.as_secs());
            stage.violation(what.clone());
            return Ok(what);
        }
        tokio::time::sleep(TAKEN_INTERVAL).await;
    }
}

async fn walsender(stage: &Stage) -> Result<Option<u32>> {
    let mut connection = connect(stage).await?;
    let pid: Option<Option<i32>> =
        sqlx::query_scalar("SELECT active_pid FROM pg_replication_slots WHERE slot_name = 'cdc_relay'")
            .fetch_optional(&mut connection)
            .await
            .explain(|| "look at the slot".to_owned())?;
    Ok(pid.flatten().and_then(|pid| u32::try_from(pid).ok()))
}

pub(super) async fn connect(stage: &Stage) -> Result<PgConnection> {
    let url = &stage.targets.postgres_url;
    PgConnection::connect(url).await.explain(|| "connect to the orders' Postgres".to_owned())
}

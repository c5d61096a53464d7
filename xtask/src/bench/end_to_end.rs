//! The order system as users have it: orders over HTTP at a rate that waits for nobody, until an outside consumer sees their
//! events and every consumer group has applied them.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant, SystemTime},
};

use hyper::body::Bytes;
use rdkafka::{
    Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    message::Headers,
};
use serde::Serialize;
use serde_json::json;
use uuid::Uuid;

use super::{
    document::{Document, version},
    load::Paced,
    numbers::{Percentiles, Spread},
    plot::{Bar, Chart},
    section::{Section, head},
    servers::{Servers, connect},
    trial::nothing,
};
use crate::{
    cli,
    endpoints::Endpoints,
    failure::{Explain, Failure, Result},
    layout::Layout,
    progress::Progress,
    services,
    topics::{self, Quiet},
};

const PATH: &str = "/api/orders";
const TOPIC: &str = "order-events";
/// How many partitions `contracts/topics.txt` gives it.
const PARTITIONS: i32 = 6;
/// The groups that apply an order's event.
const GROUPS: [&str; 3] = ["pharmacy", "fulfillment", "order-view"];
const CONNECTIONS: u32 = 32;
/// How long everything may take to have seen the last order.
const LIMIT: Duration = Duration::from_secs(60);
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
const POLL_LIMIT: Duration = Duration::from_secs(1);
/// Orders before those that count: their rate, and how many seconds of it.
const WARM_UP: (u32, u64) = (100, 5);

/// From when an order was due to be sent, in microseconds.
#[derive(Debug, Clone, Serialize)]
struct Round {
    orders_per_second: u32,
    orders: u64,
    stages: Vec<Stage>,
}

/// How far an order has come.
#[derive(Debug, Clone, Serialize)]
struct Stage {
    name: String,
    #[serde(flatten)]
    took: Percentiles,
}

impl Stage {
    fn of(name: &str, mut took: Vec<u32>) -> Self {
        took.sort_unstable();
        Self { name: name.to_owned(), took: Percentiles::of(&took) }
    }
}

/// Runs the scenario on a stack of its own, which is gone when it returns.
pub(super) async fn end_to_end(
    args: &cli::EndToEnd,
    document: &mut Document,
    progress: &Progress,
) -> Result<()> {
    if !args.no_build {
        services::build(&Layout::open(None)?, progress)?;
    }
    for program in ["order-api", "cdc-relay", "consumer"] {
        document.version(version(&services::binary(program)?)?);
    }
    document.busy();
    let settings = [("fsync", "on"), ("track_commit_timestamp", "on")];
    let settings: Vec<_> =
        settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let (servers, mut stack) = Servers::start_whole(args.postgres, &settings, progress).await?;
    let endpoints = stack.endpoints();
    let result = tokio::select! {
        result = rounds(args, &servers, &endpoints) => result,
        () = stack.interrupted() => Err(Failure::new("interrupted")),
    };
    let postgres = servers.postgres_version.clone();
    servers.stop(stack, result.is_err()).await;
    let rounds = result?;
    document.version(format!("PostgreSQL {postgres}"));
    document.sections.push(section(args, &rounds)?);
    Ok(())
}

async fn rounds(args: &cli::EndToEnd, servers: &Servers, endpoints: &Endpoints) -> Result<Vec<Round>> {
    let (rate, seconds) = WARM_UP;
    one(endpoints, 0, rate, u64::from(rate) * seconds).await?;
    let mut rounds = Vec::new();
    for (round, &rate) in (1..).zip(&args.rate) {
        let what = format!("end-to-end, {rate} orders/s");
        let step = servers.progress.step(&what);
        rounds.push(one(endpoints, round, rate, u64::from(rate) * args.seconds).await?);
        step.done(&what);
    }
    Ok(rounds)
}

/// An order that tells its number.
fn order(round: u32, number: u64) -> Bytes {
    json!({
        "orderId": id(round, number), "customerId": "customer-1", "restaurantId": "restaurant-1",
        "items": [
            {"menuItemId": "margherita", "name": "Pizza Margherita", "price": "9.50", "quantity": 2},
            {"menuItemId": "water", "name": "Water", "price": "1.75", "quantity": 1},
        ],
    })
    .to_string()
    .into()
}

fn id(round: u32, number: u64) -> String {
    format!("bench-{round}-{number}")
}

/// The number of an order of this round.
fn number(round: u32, id: &[u8]) -> Option<u64> {
    std::str::from_utf8(id).ok()?.strip_prefix(&format!("bench-{round}-"))?.parse().ok()
}

/// An order's event, as the outside consumer saw it.
#[derive(Debug, Clone, Copy)]
struct Seen {
    event: Uuid,
    at: Instant,
}

async fn one(endpoints: &Endpoints, round: u32, rate: u32, orders: u64) -> Result<Round> {
    let address: SocketAddr = endpoints
        .order_api
        .as_deref()
        .and_then(|url| url.strip_prefix("http://")?.parse().ok())
        .ok_or_else(|| Failure::new("the stack has no order-api"))?;
    let kafka = endpoints.kafka.clone();
    let watching = tokio::task::spawn_blocking(move || watch(&kafka, round, orders));
    let (start, clock) = (Instant::now() + POLL_LIMIT, SystemTime::now() + POLL_LIMIT);
    let load =
        Paced { address, path: PATH, connections: CONNECTIONS, status: 201, start, rate, requests: orders };
    let answered = load.run(move |number| order(round, number)).await?;
    let seen = watching.await.explain(|| "read the events".to_owned())??;
    let micros = |took: Duration| u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
    let published =
        seen.iter().map(|(number, seen)| micros(seen.at.saturating_duration_since(load.due(*number))));
    let mut stages = vec![Stage::of("answered", answered), Stage::of("seen in Kafka", published.collect())];
    let numbers: HashMap<Uuid, u64> = seen.iter().map(|(number, seen)| (seen.event, *number)).collect();
    let clock = clock.duration_since(SystemTime::UNIX_EPOCH).explain(|| "look at the clock".to_owned())?;
    for group in GROUPS {
        let applied = applied(endpoints, group, &numbers).await?;
        let took = applied.into_iter().map(|(number, at)| {
            let due = clock + Duration::from_secs(number) / rate;
            micros(at.saturating_sub(due))
        });
        stages.push(Stage::of(&format!("applied by {group}"), took.collect()));
    }
    Ok(Round { orders_per_second: rate, orders, stages })
}

/// Sees each order's first event.
fn watch(bootstrap: &str, round: u32, orders: u64) -> Result<HashMap<u64, Seen>> {
    let mut config = topics::client(bootstrap);
    config.set("group.id", "bench").set("enable.auto.commit", "false");
    let reader: BaseConsumer<Quiet> =
        config.create_with_context(Quiet).explain(|| "make a Kafka client".to_owned())?;
    let mut partitions = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        let added = partitions.add_partition_offset(TOPIC, partition, Offset::Beginning);
        added.explain(|| format!("read {TOPIC}"))?;
    }
    reader.assign(&partitions).explain(|| format!("read {TOPIC}"))?;
    let (mut seen, mut since) = (HashMap::new(), Instant::now());
    while (seen.len() as u64) < orders {
        let record = match reader.poll(POLL_LIMIT) {
            None | Some(Err(KafkaError::PartitionEOF(_))) if since.elapsed() < LIMIT => continue,
            None => return Err(Failure::new(format!("{} events of {orders} orders were seen", seen.len()))),
            Some(record) => record.explain(|| format!("read {TOPIC}"))?,
        };
        since = Instant::now();
        let id = record.headers().and_then(|all| all.iter().find(|header| header.key == "id")?.value);
        let event = id.and_then(|id| std::str::from_utf8(id).ok()?.parse().ok());
        if let (Some(number), Some(event)) = (number(round, record.key().unwrap_or_default()), event) {
            seen.entry(number).or_insert(Seen { event, at: since });
        }
    }
    Ok(seen)
}

/// When a group has committed each event, since the Unix epoch; waits until it has all of them.
async fn applied(
    endpoints: &Endpoints,
    group: &str,
    numbers: &HashMap<Uuid, u64>,
) -> Result<Vec<(u64, Duration)>> {
    let url = &endpoints.postgres_superuser;
    let url = format!("{}/consumers", url.rsplit_once('/').map_or(url.as_str(), |(server, _)| server));
    let mut connection = connect(&url).await?;
    let until = Instant::now() + LIMIT;
    loop {
        let rows: Vec<(Uuid, i64)> = sqlx::query_as(
            "SELECT event_id, (extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1000000)::int8 FROM inbox \
             WHERE consumer_group = $1",
        )
        .bind(group)
        .fetch_all(&mut connection)
        .await
        .explain(|| format!("ask what {group} has applied"))?;
        let applied: Vec<_> = rows
            .into_iter()
            .filter_map(|(event, at)| {
                Some((*numbers.get(&event)?, Duration::from_micros(u64::try_from(at).ok()?)))
            })
            .collect();
        if applied.len() == numbers.len() {
            return Ok(applied);
        }
        if Instant::now() > until {
            let what = format!("{group} has applied {} events of {}", applied.len(), numbers.len());
            return Err(Failure::new(what));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

fn section(args: &cli::EndToEnd, rounds: &[Round]) -> Result<Section> {
    let title =
        format!("orders over HTTP for {} s of each rate, the whole system on this machine", args.seconds);
    let mut section = Section::of("end-to-end", title, &rounds)?;
    section.notes.push(
        "milliseconds from when an order was due to be sent until it was answered, until one outside consumer saw its event, and \
         until each group had committed it (pg_xact_commit_timestamp); Postgres with fsync=on"
            .to_owned(),
    );
    section.table = head(["ORDERS/S", "UNTIL", "P50", "P95", "P99", "P99.9", "MAX", "LOST"]);
    for Round { orders_per_second, orders, stages } in rounds {
        let mut bars = Vec::new();
        for stage in stages {
            let ms = |us: u32| format!("{:.1}", f64::from(us) / 1e3);
            let lost = orders.saturating_sub(stage.took.count as u64);
            section.table.push(vec![
                orders_per_second.to_string(),
                stage.name.clone(),
                ms(stage.took.p50_us),
                ms(stage.took.p95_us),
                ms(stage.took.p99_us),
                ms(stage.took.p999_us),
                ms(stage.took.max_us),
                lost.to_string(),
            ]);
            if lost > 0 {
                section.failures.push(format!("{lost} of {orders} orders were never {}", stage.name));
            }
            let p99 = f64::from(stage.took.p99_us) / 1e3;
            let label = format!("{p99:.1} ms");
            bars.push(Bar { name: stage.name.clone(), parts: vec![p99], spread: None::<Spread>, label });
        }
        let title = format!("P99 at {orders_per_second} orders a second, in milliseconds");
        section.charts.push(Chart { title, bars });
    }
    if rounds.is_empty() { Err(nothing()) } else { Ok(section) }
}

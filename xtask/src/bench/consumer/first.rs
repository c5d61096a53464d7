//! How long the first event takes: the first of a new topic, for a new group.

use std::time::{Duration, Instant};

use serde::Serialize;
use sqlx::PgConnection;

use super::{
    Bench,
    events::{Event, Producer},
    running::Running,
};
use crate::{
    bench::numbers::Spread,
    failure::{Explain, Failure, Result},
};

/// How often each is tried.
const TRIES: u64 = 5;
/// How long one may take.
const LIMIT: Duration = Duration::from_secs(300);
/// How often the database is asked whether the event is there.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);
/// Its tables are there before.
const DATABASE: &str = "first";

/// In seconds.
#[derive(Debug, Serialize)]
pub(super) struct First {
    pub(super) tries: u64,
    /// The group waits on the empty topic; from the writing of the event to its row in the database.
    pub(super) waiting: Spread,
    /// The event is there before the group; from the start of the consumer's process to the row.
    pub(super) starting: Spread,
}

/// Measures both.
pub(super) async fn measure(bench: &Bench<'_>) -> Result<First> {
    bench.create_database(DATABASE).await?;
    let mut connection = bench.connect("postgres", DATABASE).await?;
    let mut producer = Producer::new(&bench.servers.kafka)?;
    // A relay that runs knows its brokers and has its producer's id; this costs the first write half a second.
    bench.create_topic("first-of-all").await?;
    producer = write(producer, bench, "first-of-all", 2 * TRIES).await?;
    let (mut waiting, mut starting) = (Vec::new(), Vec::new());
    for number in 0..TRIES {
        let step = bench.servers.progress.step(format!("first event, try {} of {TRIES}", number + 1));
        let topic = format!("first-waiting-{number}");
        bench.create_topic(&topic).await?;
        let mut running = Running::start(bench, &topic, &topic, DATABASE)?;
        running.ready().await?;
        let since = Instant::now();
        // It may be applied before the writer hears that it was written.
        let written = write(producer, bench, &topic, 2 * number);
        let (written, seconds) =
            tokio::try_join!(written, applied(&mut running, &mut connection, &topic, since))?;
        producer = written;
        waiting.push(seconds);
        running.stop().await?;

        let topic = format!("first-starting-{number}");
        bench.create_topic(&topic).await?;
        producer = write(producer, bench, &topic, 2 * number + 1).await?;
        let since = Instant::now();
        let mut running = Running::start(bench, &topic, &topic, DATABASE)?;
        starting.push(applied(&mut running, &mut connection, &topic, since).await?);
        running.stop().await?;
        let last = |seconds: &[f64]| seconds.last().copied().unwrap_or(0.0);
        step.done(&format!(
            "first event, try {} of {TRIES}: {:.2} s to a group that waits, {:.2} s to one that starts",
            number + 1,
            last(&waiting),
            last(&starting)
        ));
    }
    let spread = |seconds| Spread::of(seconds).ok_or_else(|| Failure::new("nothing was measured"));
    Ok(First { tries: TRIES, waiting: spread(waiting)?, starting: spread(starting)? })
}

/// Writes an event and waits until it is acknowledged.
async fn write(producer: Producer, bench: &Bench<'_>, topic: &str, number: u64) -> Result<Producer> {
    let (topic, partitions) = (topic.to_owned(), bench.events.partitions);
    let writing = tokio::task::spawn_blocking(move || {
        producer.write(&topic, partitions, std::iter::once(Event::first(number)))?;
        Ok(producer)
    });
    writing.await.explain(|| "write an event".to_owned())?
}

/// Waits for the group's only event; gives back the seconds since then.
async fn applied(
    running: &mut Running<'_>,
    connection: &mut PgConnection,
    group: &str,
    since: Instant,
) -> Result<f64> {
    loop {
        let found = sqlx::query_scalar("SELECT EXISTS (SELECT FROM inbox WHERE consumer_group = $1)");
        let found: bool = found
            .bind(group)
            .fetch_one(&mut *connection)
            .await
            .explain(|| "look into the inbox".to_owned())?;
        if found {
            return Ok(since.elapsed().as_secs_f64());
        }
        if since.elapsed() > LIMIT {
            return Err(running.failed(&format!("the first event was not applied in {} s", LIMIT.as_secs())));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

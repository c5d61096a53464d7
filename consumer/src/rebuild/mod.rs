//! `consumer rebuild`: makes a handler's projection anew from the beginning of its topics, beside the live one, and puts
//! it in its place in one transaction.
//!
//! The live consumers go on all the time. The rebuild is a group of its own that writes to tables of the same names in a
//! schema of its own, its inbox, versions and outbox among them, so that it neither disturbs anybody nor publishes
//! anything again. To swap, one transaction closes the group's gate: the live consumers wait where they are. What they had
//! read by then is read by the rebuild too; then its gate is closed as well, its tables and its inbox take the place of
//! theirs, and they go on. What the rebuild was ahead of them comes to them as known already, and what follows from it is
//! published then. If the rebuild ends before its transaction does, whatever the reason, nothing has changed.

mod tables;
mod topics;

use std::{
    io::{self, Write},
    sync::Arc,
    time::Duration,
};

use service::{Failure, Health, exit::Kind, shutdown::Shutdown};
use sqlx::{Connection, PgConnection};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use self::{tables::Beside, topics::Topics};
use crate::{
    app::App,
    config::Settings,
    handler::Tables,
    offer::{Offer, Traits},
};

/// How often we look how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How often that is told.
const TELL_EVERY: Duration = Duration::from_secs(2);
/// With no more than so many records to go, the live consumers are made to wait for the rest.
const NEAR_RECORDS: i64 = 2000;
/// How long they are made to wait, before they go on and the rebuild catches up again.
const HOLD_MAX: Duration = Duration::from_secs(20);
/// How often that is tried.
const SWAPS_MAX: u32 = 10;

/// What the user may choose.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Choice {
    /// Keep the tables that were replaced.
    pub(crate) keep_old: bool,
    /// Swap although records fail in the rebuild that had not failed before.
    pub(crate) accept_failures: bool,
    /// Rebuild although the topics do not begin with their first records any more.
    pub(crate) accept_missing: bool,
}

/// Whether a handler can be rebuilt.
///
/// # Errors
/// 64, saying why not.
pub(crate) fn check(name: &str, traits: &Traits) -> Result<(), Failure> {
    if traits.projection.is_empty() || !matches!(traits.tables, Tables::Ours) {
        let why = format!("{name} cannot be rebuilt: what it does is not only in tables of its own");
        return Err(Failure::configuration(why));
    }
    Ok(())
}

/// Rebuilds and swaps.
///
/// # Errors
/// As a consumer's; 65 if records fail that had not failed before; 75 if it could not catch up or was stopped. The live
/// projection is then as it was.
pub(crate) async fn run(
    settings: Settings,
    offer: Offer,
    choice: Choice,
    shutdown: Shutdown,
) -> Result<(), Failure> {
    let traits = offer.traits();
    check(offer.name(), &traits)?;
    let live = settings.kafka.group.clone();
    settings.database.prepare("consumer-rebuild", traits.tables, traits.schema).await?;
    let mut connection = settings.database.connect("consumer-rebuild", traits.tables).await?;
    let group = format!("{live}-rebuild-{}", &Uuid::new_v4().simple().to_string()[..8]);
    let beside = Beside::make(&mut connection, &live, &group, traits.projection).await?;
    let topics = Arc::new(Topics::new(&settings.kafka, &group)?);
    let rebuilding = Rebuilding { beside, topics: topics.clone(), choice };
    let done = rebuilding.carry_out(&settings, offer, &mut connection, shutdown).await;
    if done.is_err() {
        // Only tidying up: the next rebuild would do it too.
        let cleared = rebuilding.beside.clear(&mut connection).await;
        drop(cleared);
    }
    topics.forget().await;
    done
}

struct Rebuilding {
    beside: Beside,
    topics: Arc<Topics>,
    choice: Choice,
}

impl Rebuilding {
    async fn carry_out(
        &self,
        settings: &Settings,
        offer: Offer,
        connection: &mut PgConnection,
        shutdown: Shutdown,
    ) -> Result<(), Failure> {
        let missing = self.topics.ends().await?.missing();
        if missing > 0 && !self.choice.accept_missing {
            let why = format!(
                "the first {missing} records of the topics are gone: a rebuild would lack what they tell"
            );
            return Err(Failure::new(Kind::Halted, why)
                .hint("add --accept-missing if the projection does not need them; it is as it was"));
        }
        tell(&format!("rebuilding {} in the schema {}", self.beside.live, self.beside.schema));
        let (trigger, stopped) = Shutdown::manual();
        let app = App::beside(self.settings(settings), offer.traits(), Health::default());
        let consuming = offer.run(app, stopped);
        let swapping = async {
            let swapped = self.catch_up_and_swap(connection).await;
            trigger.request();
            swapped
        };
        let stopping = async {
            shutdown.requested().await;
            trigger.request();
            Err(Failure::new(Kind::GaveUp, "stopped; the live projection is as it was"))
        };
        tokio::pin!(consuming);
        tokio::select! {
            // By itself it ends only if it cannot go on.
            ended = &mut consuming => {
                return ended.and(Err(Failure::new(Kind::Internal, "the rebuild ended by itself")));
            }
            stopped = stopping => {
                drop(consuming.await);
                return stopped;
            }
            swapped = swapping => swapped?,
        }
        drop(consuming.await);
        if self.choice.keep_old {
            tell(&format!("the tables that were replaced are in the schema {}", self.beside.old()));
        } else {
            self.beside.drop_old(connection).await?;
        }
        self.beside.clear(connection).await?;
        tell(&format!("{} has its new projection", self.beside.live));
        Ok(())
    }

    /// What the rebuild's own consumers run on.
    fn settings(&self, live: &Settings) -> Settings {
        let mut settings = live.clone();
        settings.kafka.group.clone_from(&self.beside.group);
        // A static member's name is one instance's.
        settings.kafka.properties.remove("group.instance.id");
        settings.database.options =
            settings.database.options.options([("search_path", self.beside.schema.as_str())]);
        settings.limits.commit_interval = LOOK_EVERY;
        settings.fleet = None;
        settings
    }

    async fn catch_up_and_swap(&self, connection: &mut PgConnection) -> Result<(), Failure> {
        for _ in 0..SWAPS_MAX {
            self.come_near().await?;
            if self.swap(connection).await? {
                return Ok(());
            }
            tell("it could not catch up in time; the live consumers go on, and it tries again");
        }
        Err(Failure::new(Kind::GaveUp, "the rebuild is slower than what is written to the topics")
            .hint("try it when less is written, or with a larger consumer.batch_records_max"))
    }

    /// Waits until there is little to go.
    async fn come_near(&self) -> Result<(), Failure> {
        let mut told: Option<Instant> = None;
        loop {
            let ends = self.topics().ends().await?;
            let left = self.topics().left(&ends).await?;
            if told.is_none_or(|at| at.elapsed() >= TELL_EVERY) {
                told = Some(Instant::now());
                tell(&format!("{left} of {} records to go", ends.records()));
            }
            // Not before it has begun: joining its group takes it longer than anybody should wait.
            let has_begun = left < ends.records() || ends.records() == 0;
            if left <= NEAR_RECORDS && has_begun {
                return Ok(());
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Holds the live consumers, catches up with them and swaps; false if that took too long.
    async fn swap(&self, connection: &mut PgConnection) -> Result<bool, Failure> {
        let mut transaction = connection.begin().await.map_err(tables::failed)?;
        self.beside.hold_live(&mut transaction).await?;
        let since = Instant::now();
        // They have read nothing beyond this.
        let ends = self.topics().ends().await?;
        while self.topics().left(&ends).await? > 0 {
            if since.elapsed() > HOLD_MAX {
                return Ok(false);
            }
            sleep(Duration::from_millis(20)).await;
        }
        self.beside.hold_rebuild(&mut transaction).await?;
        self.beside.refuse_what_hangs_on_them(&mut transaction).await?;
        if self.beside.discarded_since(&mut transaction).await? > 0 {
            let why = "a dead letter was discarded while the rebuild worked, which has applied it";
            return Err(Failure::new(Kind::Halted, why)
                .hint("start the rebuild again; the live projection is as it was"));
        }
        let failing = self.beside.failing(&mut transaction).await?;
        if !failing.is_empty() && !self.choice.accept_failures {
            let why = format!(
                "{} records fail in the rebuild that had not failed before, such as {}",
                failing.len(),
                failing[0]
            );
            return Err(Failure::new(Kind::Halted, why)
                .hint("mend why they fail, or add --accept-failures; the live projection is as it was"));
        }
        self.beside.replace(&mut transaction).await?;
        transaction.commit().await.map_err(tables::failed)?;
        tell(&format!("swapped; the live consumers had waited {} ms", since.elapsed().as_millis()));
        Ok(true)
    }

    fn topics(&self) -> &Arc<Topics> {
        &self.topics
    }
}

/// Tells how it goes.
fn tell(what: &str) {
    // Nobody reads it any more: not our affair.
    drop(writeln!(io::stderr(), "{what}"));
}

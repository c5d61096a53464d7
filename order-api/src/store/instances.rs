//! The instances of every service, by their last heartbeats. Times are the database's: clocks of machines differ.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{Connection, FromRow, postgres::PgConnection};
use utoipa::ToSchema;

use super::{
    Store, is_duplicate,
    keys::{self, Answer, Key},
};
use crate::error::Error;

/// The most instances that are kept.
pub(crate) const MAX_INSTANCES: u32 = 1000;

/// Those who have been silent for long are forgotten on the way; two heartbeats at once do not wait for each other.
const HEARTBEAT: &str = "
WITH forgotten AS (
    DELETE FROM public.instances WHERE instance_id IN (
        SELECT instance_id FROM public.instances
        WHERE heartbeat_at < now() - make_interval(secs => $6) AND instance_id <> $1
        FOR UPDATE SKIP LOCKED)
)
INSERT INTO public.instances (instance_id, service, version, started_at, state, heartbeat_at)
SELECT $1, $2, $3, $4, $5, now()
WHERE EXISTS (SELECT FROM public.instances WHERE instance_id = $1)
   OR (SELECT count(*) FROM public.instances WHERE heartbeat_at >= now() - make_interval(secs => $6)) < $7
ON CONFLICT (instance_id) DO UPDATE
    SET service = EXCLUDED.service, version = EXCLUDED.version, started_at = EXCLUDED.started_at,
        state = EXCLUDED.state, heartbeat_at = EXCLUDED.heartbeat_at
RETURNING instance_id, service, version, started_at, state, heartbeat_at, false AS stale";

const LIST: &str = "
SELECT instance_id, service, version, started_at, state, heartbeat_at,
       heartbeat_at < now() - make_interval(secs => $1) AS stale
FROM public.instances
WHERE heartbeat_at >= now() - make_interval(secs => $2)
ORDER BY service, instance_id";

pub(super) const STATEMENTS: [&str; 2] = [HEARTBEAT, LIST];

/// What an instance tells of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Heartbeat {
    /// Which instance.
    pub(crate) id: String,
    /// Of which service.
    pub(crate) service: String,
    pub(crate) version: String,
    /// By its own clock.
    pub(crate) started: DateTime<Utc>,
    /// One word: `serving`, `streaming`, `stopped`, …
    pub(crate) state: String,
}

/// An instance as it is stored and answered.
#[derive(Debug, Clone, PartialEq, Eq, FromRow, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Instance {
    #[sqlx(rename = "instance_id")]
    id: String,
    service: String,
    version: String,
    #[sqlx(rename = "started_at")]
    started: DateTime<Utc>,
    state: String,
    /// By the database's clock.
    heartbeat_at: DateTime<Utc>,
    /// Whether the last heartbeat is older than it should be.
    stale: bool,
}

impl Store {
    /// Writes a heartbeat down; gives back what `answer` makes of the instance then, or what was answered before for the
    /// same key. Instances that have been silent for longer than `forget_after` are forgotten.
    ///
    /// # Errors
    /// There are as many instances as there may be, and this is another one; the database does not serve us.
    pub(crate) async fn heartbeat(
        &self,
        heartbeat: &Heartbeat,
        forget_after: Duration,
        key: Option<&Key>,
        answer: impl Fn(&Instance) -> Result<Answer, Error> + Sync,
    ) -> Result<Answer, Error> {
        // Twice is the same as once.
        let mut retry = self.writing();
        loop {
            let work = async |c: &mut PgConnection| match beat(c, heartbeat, forget_after, key, &answer).await
            {
                Err(error) if is_duplicate(&error) => match keys::known(c, key).await? {
                    Some(known) => Ok(known),
                    None => Err(error),
                },
                done => done,
            };
            match self.with_connection(work).await {
                Ok(done) => return done,
                Err(trouble) => retry.after(trouble)?,
            }
        }
    }

    /// Every instance that was heard of within `forget_after`, by service and id. One that was not heard of within
    /// `stale_after` is stale.
    ///
    /// # Errors
    /// The database does not serve us.
    pub(crate) async fn instances(
        &self,
        stale_after: Duration,
        forget_after: Duration,
    ) -> Result<Vec<Instance>, Error> {
        let read = async |c: &mut PgConnection| {
            let times = (stale_after.as_secs_f64(), forget_after.as_secs_f64());
            sqlx::query_as(LIST).bind(times.0).bind(times.1).fetch_all(c).await
        };
        let mut retry = self.reading();
        loop {
            match self.with_connection(read).await {
                Ok(found) => return Ok(found),
                Err(trouble) => retry.after(trouble)?,
            }
        }
    }
}

/// All of it in one transaction: the answer tells what the database made of the heartbeat.
async fn beat(
    connection: &mut PgConnection,
    heartbeat: &Heartbeat,
    forget_after: Duration,
    key: Option<&Key>,
    answer: impl Fn(&Instance) -> Result<Answer, Error>,
) -> Result<Result<Answer, Error>, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    let stored: Option<Instance> = sqlx::query_as(HEARTBEAT)
        .bind(&heartbeat.id)
        .bind(&heartbeat.service)
        .bind(&heartbeat.version)
        .bind(heartbeat.started)
        .bind(&heartbeat.state)
        .bind(forget_after.as_secs_f64())
        .bind(i64::from(MAX_INSTANCES))
        .fetch_optional(&mut *transaction)
        .await?;
    let answered = stored.map_or(Err(Error::FleetFull(MAX_INSTANCES)), |instance| answer(&instance));
    match &answered {
        Ok(answer) => {
            keys::remembering(keys::REMEMBER, key, answer).execute(&mut *transaction).await?;
            transaction.commit().await?;
        }
        Err(_) => transaction.rollback().await?,
    }
    Ok(answered)
}

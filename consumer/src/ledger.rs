//! What the database knows of a group, for an operator's commands: its dead letters, what is parked behind them, and
//! whether it is paused.

use std::{collections::HashMap, fmt, str::FromStr, time::Duration};

use chrono::{DateTime, Utc};
use service::{Failure, exit::Kind};
use sqlx::{Connection as _, FromRow, PgConnection, Postgres, postgres::PgArguments, query::QueryAs};

use crate::{config::Settings, database::Database, gate, handler::Tables};

/// Where a record was, and the name of its dead letter: `TOPIC/PARTITION/OFFSET`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, FromRow)]
pub(crate) struct Place {
    pub(crate) topic: String,
    pub(crate) partition: i32,
    #[sqlx(rename = "record_offset")]
    pub(crate) offset: i64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.topic, self.partition, self.offset)
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let place = || {
            let (rest, offset) = text.rsplit_once('/')?;
            let (topic, partition) = rest.rsplit_once('/')?;
            let (partition, offset) = (partition.parse().ok()?, offset.parse().ok()?);
            (partition >= 0 && offset >= 0 && !topic.is_empty()).then(|| Self {
                topic: topic.into(),
                partition,
                offset,
            })
        };
        place().ok_or_else(|| format!("{text:?} is not TOPIC/PARTITION/OFFSET"))
    }
}

/// A dead letter, as the database has it.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct Letter {
    #[sqlx(flatten)]
    pub(crate) place: Place,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) event_type: Option<String>,
    pub(crate) written_at: Option<DateTime<Utc>>,
    pub(crate) reason: String,
    pub(crate) error: String,
    pub(crate) attempts: i32,
    pub(crate) blocks_key: bool,
    pub(crate) dead_at: DateTime<Utc>,
    pub(crate) dlq_partition: Option<i32>,
    pub(crate) dlq_offset: Option<i64>,
    pub(crate) redrives: i32,
    pub(crate) redriven_at: Option<DateTime<Utc>>,
    pub(crate) settled_at: Option<DateTime<Utc>>,
    pub(crate) outcome: Option<String>,
}

impl Letter {
    /// `open`, `redriven` (and not settled since), or what became of it.
    pub(crate) fn state(&self) -> &str {
        match (&self.outcome, self.redriven_at) {
            (Some(outcome), _) => outcome,
            (None, Some(redriven_at)) if redriven_at >= self.dead_at => "redriven",
            (None, _) => "open",
        }
    }
}

/// Which letters: each list lets everything through where it is empty.
#[derive(Debug, Clone, Default)]
pub(crate) struct Chosen {
    pub(crate) places: Vec<Place>,
    pub(crate) reasons: Vec<String>,
    pub(crate) types: Vec<String>,
    pub(crate) keys: Vec<Vec<u8>>,
    pub(crate) from: Option<DateTime<Utc>>,
    pub(crate) to: Option<DateTime<Utc>>,
    /// Those that are settled, too.
    pub(crate) settled: bool,
}

/// A statement about the letters that [`Chosen`] lets through: its arguments are $1 to $10.
macro_rules! of_the_chosen {
    ($columns:literal, $rest:literal) => {
        concat!(
            "SELECT ",
            $columns,
            " FROM dead_letters WHERE consumer_group = $1
              AND (cardinality($2::text[]) = 0 OR (topic, partition, record_offset) IN
                   (SELECT * FROM unnest($2::text[], $3::int[], $4::bigint[])))
              AND (cardinality($5::text[]) = 0 OR reason = ANY($5))
              AND (cardinality($6::text[]) = 0 OR event_type = ANY($6))
              AND (cardinality($7::bytea[]) = 0 OR key = ANY($7))
              AND ($8::timestamptz IS NULL OR dead_at >= $8)
              AND ($9::timestamptz IS NULL OR dead_at <= $9)
              AND ($10 OR settled_at IS NULL) ",
            $rest
        )
    };
}

impl Chosen {
    fn bind<'q, O>(
        &'q self,
        query: QueryAs<'q, Postgres, O, PgArguments>,
        group: &'q str,
    ) -> QueryAs<'q, Postgres, O, PgArguments> {
        let (topics, partitions, offsets) = columns(&self.places);
        query
            .bind(group)
            .bind(topics)
            .bind(partitions)
            .bind(offsets)
            .bind(&self.reasons)
            .bind(&self.types)
            .bind(&self.keys)
            .bind(self.from)
            .bind(self.to)
            .bind(self.settled)
    }
}

fn columns(places: &[Place]) -> (Vec<&str>, Vec<i32>, Vec<i64>) {
    let topics = places.iter().map(|p| p.topic.as_str()).collect();
    (topics, places.iter().map(|p| p.partition).collect(), places.iter().map(|p| p.offset).collect())
}

/// A record that waits behind a dead letter of its key.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct Parked {
    #[sqlx(flatten)]
    pub(crate) place: Place,
    pub(crate) parked_at: DateTime<Utc>,
}

/// Since when a group is paused, and why.
#[derive(Debug, Clone, FromRow)]
pub(crate) struct Pause {
    pub(crate) paused_at: DateTime<Utc>,
    pub(crate) paused_for: Option<String>,
}

/// A connection to the database of a group.
pub(crate) struct Ledger {
    connection: PgConnection,
    database: Database,
    tables: Tables,
    group: String,
}

impl Ledger {
    /// # Errors
    /// 69 when the database refuses us for good, 75 when it does not answer.
    pub(crate) async fn open(settings: &Settings, tables: Tables) -> Result<Self, Failure> {
        let (database, group) = (settings.database.clone(), settings.kafka.group.clone());
        let connection = database.connect(&format!("consumer-{group}-operator"), tables).await?;
        Ok(Self { connection, database, tables, group })
    }

    fn failed(&self) -> impl Fn(sqlx::Error) -> Failure + use<> {
        let (database, tables) = (self.database.clone(), self.tables);
        move |error| database.failure(error, tables)
    }

    /// The time at the database, which dates the letters.
    pub(crate) async fn now(&mut self) -> Result<DateTime<Utc>, Failure> {
        let now = sqlx::query_scalar("SELECT clock_timestamp()").fetch_one(&mut self.connection).await;
        now.map_err(self.failed())
    }

    /// The oldest `limit` of the chosen letters, oldest first.
    pub(crate) async fn oldest(&mut self, chosen: &Chosen, limit: i64) -> Result<Vec<Letter>, Failure> {
        let sql = of_the_chosen!("*", "ORDER BY dead_at, topic, partition, record_offset LIMIT $11");
        let query = chosen.bind(sqlx::query_as(sql), &self.group).bind(limit);
        query.fetch_all(&mut self.connection).await.map_err(self.failed())
    }

    /// The next `limit` of the chosen letters after a place, in the order of their places.
    pub(crate) async fn page(
        &mut self,
        chosen: &Chosen,
        after: Option<&Place>,
        limit: i64,
    ) -> Result<Vec<Letter>, Failure> {
        let sql = of_the_chosen!(
            "*",
            "AND ($11::text IS NULL OR (topic, partition, record_offset) > ($11, $12, $13))
             ORDER BY topic, partition, record_offset LIMIT $14"
        );
        let query = chosen.bind(sqlx::query_as(sql), &self.group);
        let query = query
            .bind(after.map(|place| &place.topic))
            .bind(after.map(|place| place.partition))
            .bind(after.map(|place| place.offset))
            .bind(limit);
        query.fetch_all(&mut self.connection).await.map_err(self.failed())
    }

    /// How many of the chosen letters there are for each reason, most first.
    pub(crate) async fn by_reason(&mut self, chosen: &Chosen) -> Result<Vec<(String, i64)>, Failure> {
        let sql = of_the_chosen!("reason, count(*)", "GROUP BY reason ORDER BY count(*) DESC, reason");
        let query = chosen.bind(sqlx::query_as(sql), &self.group);
        query.fetch_all(&mut self.connection).await.map_err(self.failed())
    }

    /// How many records wait behind each of these keys, of those behind which any do.
    pub(crate) async fn parked_by_key(&mut self, keys: &[Vec<u8>]) -> Result<HashMap<Vec<u8>, i64>, Failure> {
        if matches!(self.tables, Tables::Theirs { .. }) {
            return Ok(HashMap::new());
        }
        let sql = "SELECT key, count(*) FROM parked_records WHERE consumer_group = $1 AND key = ANY($2) GROUP BY key";
        let query = sqlx::query_as(sql).bind(&self.group).bind(keys);
        let rows: Vec<(Vec<u8>, i64)> = query.fetch_all(&mut self.connection).await.map_err(self.failed())?;
        Ok(rows.into_iter().collect())
    }

    /// The first `limit` records that wait behind a key.
    pub(crate) async fn parked_behind(&mut self, key: &[u8], limit: i64) -> Result<Vec<Parked>, Failure> {
        if matches!(self.tables, Tables::Theirs { .. }) {
            return Ok(Vec::new());
        }
        let sql = "SELECT topic, partition, record_offset, parked_at FROM parked_records
                   WHERE consumer_group = $1 AND key = $2 ORDER BY topic, partition, record_offset LIMIT $3";
        let query = sqlx::query_as(sql).bind(&self.group).bind(key).bind(limit);
        query.fetch_all(&mut self.connection).await.map_err(self.failed())
    }

    /// How many keys are blocked by a letter, and how many records wait behind all of them.
    pub(crate) async fn blocked(&mut self) -> Result<(i64, i64), Failure> {
        let sql = "SELECT count(DISTINCT key) FROM dead_letters
                   WHERE consumer_group = $1 AND blocks_key AND settled_at IS NULL";
        let keys = sqlx::query_scalar(sql).bind(&self.group).fetch_one(&mut self.connection).await;
        let keys = keys.map_err(self.failed())?;
        if matches!(self.tables, Tables::Theirs { .. }) {
            return Ok((keys, 0));
        }
        let sql = "SELECT count(*) FROM parked_records WHERE consumer_group = $1";
        let records = sqlx::query_scalar(sql).bind(&self.group).fetch_one(&mut self.connection).await;
        Ok((keys, records.map_err(self.failed())?))
    }

    /// Counts one more redrive of a letter and gives back the count; nothing if it is settled already, or its redrives
    /// have reached `redrives_max`.
    pub(crate) async fn count_redrive(
        &mut self,
        place: &Place,
        redrives_max: i32,
    ) -> Result<Option<i32>, Failure> {
        let sql = "UPDATE dead_letters SET redrives = redrives + 1, redriven_at = now()
                   WHERE consumer_group = $1 AND topic = $2 AND partition = $3 AND record_offset = $4
                     AND settled_at IS NULL AND redrives < $5
                   RETURNING redrives";
        let query = sqlx::query_scalar(sql).bind(&self.group).bind(&place.topic).bind(place.partition);
        let query = query.bind(place.offset).bind(redrives_max);
        query.fetch_optional(&mut self.connection).await.map_err(self.failed())
    }

    /// Since when the group is paused, if it is.
    pub(crate) async fn paused(&mut self) -> Result<Option<Pause>, Failure> {
        let sql = "SELECT paused_at, paused_for FROM consumer_groups
                   WHERE consumer_group = $1 AND paused_at IS NOT NULL";
        let query = sqlx::query_as(sql).bind(&self.group);
        query.fetch_optional(&mut self.connection).await.map_err(self.failed())
    }

    /// Pauses the group, once the batches under way have ended, and gives back what was so before. A group that is
    /// paused already stays so since when it was; the reason changes if there is one.
    ///
    /// # Errors
    /// 75 if a batch is still under way after `patience`.
    pub(crate) async fn pause(
        &mut self,
        reason: Option<&str>,
        patience: Duration,
    ) -> Result<Option<Pause>, Failure> {
        let failed = self.failed();
        match pause(&mut self.connection, &self.group, reason, patience).await {
            Ok(before) => Ok(before),
            Err(e)
                if e.as_database_error().and_then(sqlx::error::DatabaseError::code).as_deref()
                    == Some("55P03") =>
            {
                let why =
                    format!("a batch is still under way after {} s; the group goes on", patience.as_secs());
                Err(Failure::new(Kind::GaveUp, why).hint("ask again, or stop its instances"))
            }
            Err(e) => Err(failed(e)),
        }
    }

    /// Lets the group go on and gives back what was so before.
    pub(crate) async fn resume(&mut self) -> Result<Option<Pause>, Failure> {
        let sql = "WITH before AS (SELECT * FROM consumer_groups
                       WHERE consumer_group = $1 AND paused_at IS NOT NULL FOR UPDATE),
                   resumed AS (UPDATE consumer_groups SET paused_at = NULL, paused_for = NULL FROM before
                       WHERE consumer_groups.consumer_group = before.consumer_group)
                   SELECT paused_at, paused_for FROM before";
        let query = sqlx::query_as(sql).bind(&self.group);
        query.fetch_optional(&mut self.connection).await.map_err(self.failed())
    }
}

async fn pause(
    connection: &mut PgConnection,
    group: &str,
    reason: Option<&str>,
    patience: Duration,
) -> sqlx::Result<Option<Pause>> {
    let mut transaction = connection.begin().await?;
    sqlx::query("SELECT set_config('lock_timeout', $1, true)")
        .bind(patience.as_millis().to_string())
        .execute(&mut *transaction)
        .await?;
    gate::close(&mut transaction, group).await?;
    let sql = "SELECT paused_at, paused_for FROM consumer_groups WHERE consumer_group = $1 AND paused_at IS NOT NULL";
    let before = sqlx::query_as(sql).bind(group).fetch_optional(&mut *transaction).await?;
    sqlx::query(
        "INSERT INTO consumer_groups AS g (consumer_group, paused_at, paused_for) VALUES ($1, now(), $2)
         ON CONFLICT (consumer_group) DO UPDATE
         SET paused_at = coalesce(g.paused_at, excluded.paused_at),
             paused_for = CASE WHEN g.paused_at IS NULL THEN excluded.paused_for
                               ELSE coalesce(excluded.paused_for, g.paused_for) END",
    )
    .bind(group)
    .bind(reason)
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await?;
    Ok(before)
}

#[cfg(test)]
mod tests {
    use super::Place;

    #[test]
    fn a_place_is_read_as_it_is_written() {
        let place = Place { topic: "order-events".into(), partition: 3, offset: 42 };
        assert_eq!(place.to_string().parse(), Ok(place));
        for wrong in ["", "a", "a/1", "/1/2", "a/x/1", "a/1/x", "a/-1/2", "a/1/-2", "a/1/2/"] {
            assert!(wrong.parse::<Place>().unwrap_err().contains("TOPIC/PARTITION/OFFSET"), "{wrong}");
        }
    }
}

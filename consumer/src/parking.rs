//! What a group keeps about records that could not be applied: its dead letters, and the later records of their keys,
//! which are parked behind them so that an aggregate's events stay in order.
//!
//! A key is blocked while it has an open dead letter that blocks it, or a parked record. It becomes blocked only by its
//! own partition's worker or while it is blocked already; it is freed only under the key's lock. So whoever finds it
//! free needs no lock, and whoever finds it blocked takes the lock and looks again.
//!
//! What comes by its topic waits behind whatever of its key failed, wherever that was. What is redriven or released waits
//! only for what is before it in its own partition: of two partitions nobody can say which comes first, and each would wait
//! for the other.

use chrono::{DateTime, Datelike as _, Utc};
use sqlx::{FromRow, PgConnection};

use crate::{
    decide::Poison,
    delivery::{Delivery, Parked, Place},
};

/// Behind a longer key nothing is parked: an index of Postgres' takes no more than 2704 bytes.
const KEY_BYTES_MAX: usize = 1024;

/// When a record says that it was written, if Postgres can hold that.
fn written_at(record: &Delivery<'_>) -> Option<DateTime<Utc>> {
    let at = record.written_ms().and_then(DateTime::from_timestamp_millis)?;
    (0..10_000).contains(&at.year()).then_some(at)
}

/// Where a record stands, if there is something to know about it.
#[derive(Debug, Clone, Copy, FromRow)]
pub(crate) struct Standing {
    /// Its index in what was asked, from 0.
    index: i64,
    /// Somebody decided that it shall not be applied.
    pub(crate) discarded: bool,
    /// An earlier record of its key is a dead letter.
    pub(crate) behind_letter: bool,
    /// An earlier record of its key is parked.
    pub(crate) behind_parked: bool,
}

const LETTERS_AHEAD: &str = "
    EXISTS (SELECT FROM dead_letters AS ahead
            WHERE ahead.consumer_group = $1 AND ahead.key = given.key AND ahead.blocks_key
              AND ahead.settled_at IS NULL
              AND CASE WHEN ahead.topic = given.topic AND ahead.partition = given.partition
                       THEN ahead.record_offset < given.record_offset ELSE given.polled END)";
const PARKED_AHEAD: &str = "
    EXISTS (SELECT FROM parked_records AS ahead
            WHERE ahead.consumer_group = $1 AND ahead.key = given.key
              AND CASE WHEN ahead.topic = given.topic AND ahead.partition = given.partition
                       THEN ahead.record_offset < given.record_offset ELSE given.polled END)";

/// Those of the records about which there is something to know, open dead letters among them. `parks`: the database holds parked records.
pub(crate) async fn standing(
    transaction: &mut PgConnection,
    group: &str,
    records: &[&Delivery<'_>],
    parks: bool,
) -> sqlx::Result<Vec<(usize, Standing)>> {
    let places = Places::of(records.iter().map(|r| r.place()));
    let parked_ahead = if parks { PARKED_AHEAD } else { "false" };
    let sql = format!(
        "SELECT * FROM (
             SELECT given.number - 1 AS index, coalesce(own.outcome = 'discarded', false) AS discarded,
                    own.topic IS NOT NULL AND own.settled_at IS NULL AS own_letter,
                    {LETTERS_AHEAD} AS behind_letter, {parked_ahead} AS behind_parked
             FROM unnest($2::bytea[], $3::text[], $4::integer[], $5::bigint[], $6::boolean[])
                  WITH ORDINALITY AS given (key, topic, partition, record_offset, polled, number)
             LEFT JOIN dead_letters AS own
                 ON own.consumer_group = $1 AND own.topic = given.topic AND own.partition = given.partition
                AND own.record_offset = given.record_offset
         ) AS found WHERE discarded OR own_letter OR behind_letter OR behind_parked"
    );
    // Made of two constants.
    let rows: Vec<Standing> = sqlx::query_as(sqlx::AssertSqlSafe(sql))
        .bind(group)
        .bind(records.iter().map(|r| r.key()).collect::<Vec<_>>())
        .bind(places.topics)
        .bind(places.partitions)
        .bind(places.offsets)
        .bind(records.iter().map(|r| r.is_from_its_topic()).collect::<Vec<_>>())
        .fetch_all(transaction)
        .await?;
    Ok(rows.into_iter().filter_map(|row| Some((usize::try_from(row.index).ok()?, row))).collect())
}

/// Takes the locks of keys until the transaction ends, in their order.
pub(crate) async fn lock(transaction: &mut PgConnection, group: &str, keys: &[&[u8]]) -> sqlx::Result<()> {
    sqlx::query(
        "SELECT pg_advisory_xact_lock(hashtextextended($1 || '/' || encode(key, 'hex'), 0))
         FROM (SELECT DISTINCT key FROM unnest($2::bytea[]) AS key ORDER BY key) AS sorted",
    )
    .bind(group)
    .bind(keys)
    .execute(transaction)
    .await
    .map(drop)
}

/// Parks records behind those of their keys. One that is parked already stays where it is.
pub(crate) async fn park(
    transaction: &mut PgConnection,
    group: &str,
    records: &[&Delivery<'_>],
) -> sqlx::Result<()> {
    // One by one: an array of arrays has to be rectangular, and nobody is in a hurry here.
    for record in records {
        let (place, whole) = (record.place(), record.record());
        let headers = whole.headers.as_ref();
        sqlx::query(
            "INSERT INTO parked_records (consumer_group, topic, partition, record_offset, key, value, header_names,
                                         header_values, written_at)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT DO NOTHING",
        )
        .bind(group)
        .bind(place.topic)
        .bind(place.partition)
        .bind(place.offset)
        .bind(record.key())
        .bind(record.value())
        .bind(headers.map(|all| all.iter().map(|(name, _)| *name).collect::<Vec<_>>()))
        .bind(headers.map(|all| all.iter().map(|(_, value)| *value).collect::<Vec<_>>()))
        .bind(written_at(record))
        .execute(&mut *transaction)
        .await?;
    }
    Ok(())
}

/// The first records that are parked under a key, in order.
pub(crate) async fn parked(
    connection: &mut PgConnection,
    group: &str,
    key: &[u8],
    count_max: usize,
) -> sqlx::Result<Vec<Parked>> {
    let rows: Vec<Row> = sqlx::query_as(
        "SELECT topic, partition, record_offset, key, value, header_names, header_values, written_at
         FROM parked_records WHERE consumer_group = $1 AND key = $2 ORDER BY topic, partition, record_offset LIMIT $3",
    )
    .bind(group)
    .bind(key)
    .bind(i64::try_from(count_max).unwrap_or(i64::MAX))
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().map(Parked::from).collect())
}

#[derive(FromRow)]
struct Row {
    topic: String,
    partition: i32,
    record_offset: i64,
    key: Vec<u8>,
    value: Option<Vec<u8>>,
    header_names: Option<Vec<String>>,
    header_values: Option<Vec<Option<Vec<u8>>>>,
    written_at: Option<DateTime<Utc>>,
}

impl From<Row> for Parked {
    fn from(row: Row) -> Self {
        Self {
            topic: row.topic,
            partition: row.partition,
            offset: row.record_offset,
            key: row.key,
            value: row.value,
            headers: row
                .header_names
                .zip(row.header_values)
                .map(|(names, values)| names.into_iter().zip(values).collect()),
            written_ms: row.written_at.map(|at| at.timestamp_millis()),
        }
    }
}

/// Keys whose release was cut short: they have parked records and nothing that blocks them, or a parked record that failed
/// and whose dead letter was not sent.
pub(crate) async fn abandoned(connection: &mut PgConnection, group: &str) -> sqlx::Result<Vec<Vec<u8>>> {
    sqlx::query_scalar(
        "SELECT DISTINCT key FROM parked_records AS mine WHERE consumer_group = $1 AND (
             NOT EXISTS (
                 SELECT FROM dead_letters AS letter WHERE letter.consumer_group = $1 AND letter.key = mine.key
                    AND letter.blocks_key AND letter.settled_at IS NULL)
             OR EXISTS (
                 SELECT FROM dead_letters AS own WHERE own.consumer_group = $1 AND own.topic = mine.topic
                    AND own.partition = mine.partition AND own.record_offset = mine.record_offset
                    AND own.settled_at IS NULL AND own.dlq_offset IS NULL))",
    )
    .bind(group)
    .fetch_all(connection)
    .await
}

/// These records are parked no longer.
pub(crate) async fn unpark(
    transaction: &mut PgConnection,
    group: &str,
    places: Places<'_>,
) -> sqlx::Result<()> {
    sqlx::query(
        "DELETE FROM parked_records AS mine
         USING unnest($2::text[], $3::integer[], $4::bigint[]) AS given (topic, partition, record_offset)
         WHERE mine.consumer_group = $1 AND mine.topic = given.topic AND mine.partition = given.partition
           AND mine.record_offset = given.record_offset",
    )
    .bind(group)
    .bind(places.topics)
    .bind(places.partitions)
    .bind(places.offsets)
    .execute(transaction)
    .await
    .map(drop)
}

/// A record that cannot be applied, and why.
pub(crate) struct Failure<'d, 'm> {
    pub(crate) record: &'d Delivery<'m>,
    pub(crate) poison: Poison,
    /// How often it was tried this time.
    pub(crate) attempts: u32,
}

/// Takes note of dead letters. Gives back the attempts, in all, of those that are to be sent to the dead-letter topic,
/// by their index: not what is there already (Kafka delivered it again), and not what somebody has settled.
pub(crate) async fn note(
    transaction: &mut PgConnection,
    group: &str,
    failures: &[Failure<'_, '_>],
    park_key: bool,
) -> sqlx::Result<Vec<(usize, i32)>> {
    let mut wanted = Vec::with_capacity(failures.len());
    for (index, failure) in failures.iter().enumerate() {
        let (record, place) = (failure.record, failure.record.place());
        let whole = record.record();
        let event_type = whole.header("type").ok().flatten();
        let noted: Option<i32> = sqlx::query_scalar(
            "INSERT INTO dead_letters AS mine (consumer_group, topic, partition, record_offset, key, event_type,
                                               written_at, reason, error, attempts, blocks_key, redrives)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
             ON CONFLICT (consumer_group, topic, partition, record_offset) DO UPDATE SET
                 reason = excluded.reason, error = excluded.error, attempts = mine.attempts + excluded.attempts,
                 dead_at = clock_timestamp(), dlq_partition = NULL, dlq_offset = NULL
             WHERE mine.settled_at IS NULL AND (mine.dlq_offset IS NULL OR excluded.redrives > 0)
             RETURNING attempts",
        )
        .bind(group)
        .bind(place.topic)
        .bind(place.partition)
        .bind(place.offset)
        .bind(record.key())
        .bind(event_type)
        .bind(written_at(record))
        .bind(failure.poison.reason.as_str())
        // Postgres cannot hold U+0000, and a record may.
        .bind(failure.poison.error.replace('\0', "\u{fffd}"))
        .bind(i32::try_from(failure.attempts).unwrap_or(i32::MAX))
        .bind(park_key && record.key().is_some_and(|key| key.len() <= KEY_BYTES_MAX))
        .bind(record.redrive())
        .fetch_optional(&mut *transaction)
        .await?;
        wanted.extend(noted.map(|attempts| (index, attempts)));
    }
    Ok(wanted)
}

/// Where a dead letter is in its topic, now that Kafka has acknowledged it.
pub(crate) async fn sent(
    connection: &mut PgConnection,
    group: &str,
    place: Place<'_>,
    (partition, offset): (i32, i64),
) -> sqlx::Result<()> {
    sqlx::query(
        "UPDATE dead_letters SET dlq_partition = $5, dlq_offset = $6
         WHERE consumer_group = $1 AND topic = $2 AND partition = $3 AND record_offset = $4",
    )
    .bind(group)
    .bind(place.topic)
    .bind(place.partition)
    .bind(place.offset)
    .bind(partition)
    .bind(offset)
    .execute(connection)
    .await
    .map(drop)
}

/// How a dead letter ended: a value of `dead_letters.outcome`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Applied,
    Discarded,
}

/// Settles those of the records that are open dead letters. Gives back how many were.
pub(crate) async fn settle(
    transaction: &mut PgConnection,
    group: &str,
    places: Places<'_>,
    outcome: Outcome,
) -> sqlx::Result<u64> {
    let outcome = match outcome {
        Outcome::Applied => "applied",
        Outcome::Discarded => "discarded",
    };
    let done = sqlx::query(
        "UPDATE dead_letters AS mine SET settled_at = clock_timestamp(), outcome = $5
         FROM unnest($2::text[], $3::integer[], $4::bigint[]) AS given (topic, partition, record_offset)
         WHERE mine.consumer_group = $1 AND mine.topic = given.topic AND mine.partition = given.partition
           AND mine.record_offset = given.record_offset AND mine.settled_at IS NULL",
    )
    .bind(group)
    .bind(places.topics)
    .bind(places.partitions)
    .bind(places.offsets)
    .bind(outcome)
    .execute(transaction)
    .await?;
    Ok(done.rows_affected())
}

/// Places, column by column.
#[derive(Debug, Default)]
pub(crate) struct Places<'a> {
    topics: Vec<&'a str>,
    partitions: Vec<i32>,
    offsets: Vec<i64>,
}

impl<'a> Places<'a> {
    pub(crate) fn of(places: impl IntoIterator<Item = Place<'a>>) -> Self {
        let mut columns = Self::default();
        for place in places {
            columns.topics.push(place.topic);
            columns.partitions.push(place.partition);
            columns.offsets.push(place.offset);
        }
        columns
    }
}

//! The inbox: which events a group has applied. Its row is in the transaction that applies the event, so either
//! both are there or neither, and an event that Kafka delivers again is dropped.

use std::collections::HashSet;

use sqlx::PgConnection;
use uuid::Uuid;

use crate::record::Event;

/// Marks events as applied by `group` and gives back the indices of those that were not yet, in order, each once
/// even if it stands in `events` twice. Waits for a rival who is marking the same ones.
pub(crate) async fn claim<E: Event>(
    transaction: &mut PgConnection,
    group: &str,
    events: &[&E],
) -> sqlx::Result<Vec<usize>> {
    let ids: Vec<Uuid> = events.iter().map(|event| event.id()).collect();
    let mut fresh: HashSet<Uuid> = sqlx::query_scalar(
        "INSERT INTO inbox (consumer_group, event_id) SELECT $1, id FROM unnest($2::uuid[]) AS id
         ON CONFLICT DO NOTHING RETURNING event_id",
    )
    .bind(group)
    .bind(ids)
    .fetch_all(transaction)
    .await?
    .into_iter()
    .collect();
    Ok(events.iter().enumerate().filter(|(_, e)| fresh.remove(&e.id())).map(|(index, _)| index).collect())
}

/// Those of these events, which the group has applied, of which it has not published what follows; from now on it has.
pub(crate) async fn take_due<'e, E: Event>(
    transaction: &mut PgConnection,
    group: &str,
    events: &[&'e E],
) -> sqlx::Result<Vec<&'e E>> {
    let ids: Vec<Uuid> = events.iter().map(|event| event.id()).collect();
    let mut due: HashSet<Uuid> = sqlx::query_scalar(
        "UPDATE inbox SET follow_ups_due = false
         WHERE consumer_group = $1 AND event_id = ANY ($2) AND follow_ups_due RETURNING event_id",
    )
    .bind(group)
    .bind(ids)
    .fetch_all(transaction)
    .await?
    .into_iter()
    .collect();
    Ok(events.iter().filter(|event| due.remove(&event.id())).copied().collect())
}

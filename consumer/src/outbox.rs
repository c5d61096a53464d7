//! The consumer's own outbox, which a `cdc-relay` drains.

use sqlx::PgConnection;
use uuid::Uuid;

/// What is to be published.
#[derive(Debug)]
pub struct Row<'a> {
    /// The record's header `id`, by which whoever gets it twice knows it.
    pub id: Uuid,
    /// What the record is about: its header `aggregatetype`.
    pub aggregate_type: &'a str,
    /// The record's key.
    pub aggregate_id: String,
    /// The record's header `type`.
    pub event_type: &'a str,
    /// JSON.
    pub payload: String,
    /// The record's header `traceparent`: of what this follows from.
    pub traceparent: Option<&'a str>,
    /// Where it goes.
    pub topic: &'a str,
}

/// Publishes rows, in order, if and only if the transaction commits. They are deleted again at once: the relay reads
/// their insertion from the log, so the table stays empty.
pub async fn publish(transaction: &mut PgConnection, rows: &[Row<'_>]) -> sqlx::Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let ids: Vec<Uuid> = rows.iter().map(|row| row.id).collect();
    sqlx::query(
        "INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload, traceparent, topic)
         SELECT id, aggregatetype, aggregateid, type, payload::jsonb, traceparent, topic
         FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[])
              WITH ORDINALITY AS given (id, aggregatetype, aggregateid, type, payload, traceparent, topic, number)
         ORDER BY number",
    )
    .bind(&ids)
    .bind(rows.iter().map(|r| r.aggregate_type).collect::<Vec<_>>())
    .bind(rows.iter().map(|r| r.aggregate_id.as_str()).collect::<Vec<_>>())
    .bind(rows.iter().map(|r| r.event_type).collect::<Vec<_>>())
    .bind(rows.iter().map(|r| r.payload.as_str()).collect::<Vec<_>>())
    .bind(rows.iter().map(|r| r.traceparent).collect::<Vec<_>>())
    .bind(rows.iter().map(|r| r.topic).collect::<Vec<_>>())
    .execute(&mut *transaction)
    .await?;
    sqlx::query("DELETE FROM outbox WHERE id = ANY ($1)").bind(&ids).execute(transaction).await.map(drop)
}

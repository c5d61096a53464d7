//! A group's gate: each batch goes through it, together with the others; whoever has to be alone with what the group has
//! written (to pause it, to swap a projection) closes it, and then no batch is under way. A lock of Postgres' that queues
//! fairly: nobody overtakes who waits to close it. It lasts as long as the transaction.

use sqlx::PgConnection;

/// Goes through, and keeps it open until the transaction ends.
pub(crate) async fn pass(transaction: &mut PgConnection, group: &str) -> sqlx::Result<()> {
    sqlx::query("SELECT pg_advisory_xact_lock_shared(hashtextextended('consumer group ' || $1, 0))")
        .bind(group)
        .execute(transaction)
        .await
        .map(drop)
}

/// Waits for the batches under way, and lets none begin until the transaction ends.
pub(crate) async fn close(transaction: &mut PgConnection, group: &str) -> sqlx::Result<()> {
    sqlx::query("SELECT pg_advisory_xact_lock(hashtextextended('consumer group ' || $1, 0))")
        .bind(group)
        .execute(transaction)
        .await
        .map(drop)
}

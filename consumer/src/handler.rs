//! What a handler is: it says what it reads out of a record (its [`Event`]) and writes its rows inside the transaction
//! that the inbox row is in, and nothing else; it sees each event once, a batch at a time, a key's events in order.

use axum::Router;
use sqlx::{PgConnection, PgPool};

use crate::{decide::Fault, outbox::Row, record::Event};

/// Applies events to its own tables. One method is required.
pub trait Handler: Send + Sync + 'static {
    /// What it reads out of a record; the handlers of one topic share theirs.
    type Event: Event;

    /// Who makes the consumer's own tables, the inbox among them.
    const TABLES: Tables = Tables::Ours;

    /// Statements that make the handler's own tables where they are not there yet (`CREATE TABLE IF NOT EXISTS …`), run
    /// at every start, in one transaction, by one instance at a time.
    const SCHEMA: &'static str = "";

    /// The tables that hold nothing but what `apply` makes of the topic, so that `consumer rebuild` can make them anew;
    /// none for a handler that cannot be rebuilt, because what it does is not only in its tables.
    const PROJECTION: &'static [&'static str] = &[];

    /// How many events one transaction takes at most, from 1. As many as a batch has, unless what `apply` does is not
    /// undone with the transaction (a request to somebody else): then 1, or a failure would repeat the others.
    const BATCH_MAX: usize = usize::MAX;

    /// Applies events that this group has not applied before, never empty, within the caller's transaction. Of an
    /// aggregate whose events have versions they come in order, and none older than what was applied.
    ///
    /// # Errors
    /// All of it is rolled back. An error of the database may be passed on as it is: what becomes of it is not the
    /// handler's affair. A [`Fault::Record`] or [`Fault::Transient`] is a verdict on the events; where there are
    /// several, they are tried again in smaller parts until it is one that is at fault. A panic is a verdict too.
    fn apply(
        &self,
        transaction: &mut PgConnection,
        events: &[&Self::Event],
    ) -> impl Future<Output = Result<(), Fault>> + Send;

    /// What follows from events that are applied: published, in this order, if and only if the transaction commits. Once for
    /// each event, also where a rebuild has applied it first; so nothing else a handler with a [`Self::PROJECTION`] does may
    /// publish. What a rebuild
    /// gives goes nowhere.
    ///
    /// # Errors
    /// As those of [`Self::apply`].
    fn follow_ups<'e>(&self, events: &[&'e Self::Event]) -> Result<Vec<Row<'e>>, Fault> {
        let _ = events;
        Ok(Vec::new())
    }

    /// Told of events that this group has applied before (in an earlier transaction, or a moment ago in this one),
    /// never empty, within the caller's transaction and after `apply`.
    fn repeated(
        &self,
        transaction: &mut PgConnection,
        events: &[&Self::Event],
    ) -> impl Future<Output = Result<(), Fault>> + Send {
        let _ = (transaction, events);
        async { Ok(()) }
    }

    /// Queries of what it has written, served beside health and metrics.
    fn router(&self, pool: PgPool) -> Router {
        let _ = pool;
        Router::new()
    }
}

/// Who makes the consumer's own tables.
#[derive(Debug, Clone, Copy)]
pub enum Tables {
    /// The consumer, by its migrations.
    Ours,
    /// Somebody else, whose database it is; they are looked at when the handler starts. Keys cannot be parked there.
    Theirs {
        /// Each table with a privilege that the handler needs on it or on a column of it.
        needed: &'static [(&'static str, &'static str)],
        /// The file that makes them.
        made_by: &'static str,
    },
}

//! One transaction for each batch: what the group knows about the records, the inbox, the versions, and what the
//! handler writes.

use std::{
    collections::HashSet,
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    task::Poll,
    time::Duration,
};

use sqlx::{Connection, FromRow, PgConnection, PgPool, Postgres, pool::PoolConnection};
use tokio::time::timeout;

use crate::{
    config::Policy,
    decide::{Cause, Fault, Poison, Reason},
    delivery::Delivery,
    gate,
    guard::{Guard, Verdict},
    handler::{Handler, Tables},
    inbox, outbox,
    parking::{self, Failure, Outcome, Places},
    record::Event,
};

/// How long the answer to a liveness question may take.
const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// Applies batches of events, each in one transaction.
pub(crate) struct Store<H> {
    pub(crate) pool: PgPool,
    pub(crate) group: String,
    pub(crate) handler: H,
    pub(crate) policy: Policy,
    /// A batch that takes longer is given up.
    pub(crate) apply_timeout: Duration,
}

/// An event and the record it was read out of.
pub(crate) struct Entry<'d, 'm, E> {
    pub(crate) event: E,
    pub(crate) record: &'d Delivery<'m>,
    /// The record is settled with it: not so an event that was fetched because of the record.
    pub(crate) settles: bool,
}

/// What became of a batch.
#[derive(Debug, Default)]
pub(crate) struct Done {
    /// The indices of those that were applied.
    pub(crate) applied: Vec<usize>,
    /// Applied before.
    pub(crate) duplicates: usize,
    /// Older than what was applied of their aggregate.
    pub(crate) stale: usize,
    /// Of those applied, whose predecessor was not.
    pub(crate) gaps: usize,
    /// Parked behind a dead letter of their key.
    pub(crate) parked: usize,
    /// Discarded by somebody.
    pub(crate) discarded: usize,
    /// Dead letters that are settled by it.
    pub(crate) settled: u64,
}

/// Whether a group is paused, and whether there is anything to know about its records.
#[derive(FromRow)]
struct Group {
    paused: bool,
    letters: bool,
    parked: bool,
}

impl<H: Handler> Store<H> {
    /// Whether records can be parked in this database.
    const PARKS: bool = matches!(H::TABLES, Tables::Ours);

    /// Applies those of `entries` that are to be applied, all or none.
    pub(crate) async fn apply(&self, entries: &[Entry<'_, '_, H::Event>]) -> Result<Done, Fault> {
        let mut connection = self.pool.acquire().await?;
        let ended = self.bounded(self.apply_on(&mut connection, entries)).await;
        ended.on(&mut connection)
    }

    /// Takes note of dead letters: see [`parking::note`].
    pub(crate) async fn note(&self, failures: &[Failure<'_, '_>]) -> Result<Vec<(usize, i32)>, Fault> {
        let mut connection = self.pool.acquire().await?;
        let ended = self.bounded(self.note_on(&mut connection, failures)).await;
        ended.on(&mut connection)
    }

    async fn note_on(
        &self,
        connection: &mut PgConnection,
        failures: &[Failure<'_, '_>],
    ) -> Result<Vec<(usize, i32)>, Fault> {
        let mut transaction = connection.begin().await?;
        self.enter(&mut transaction).await?;
        let wanted = parking::note(&mut transaction, &self.group, failures, self.policy.park_key).await?;
        // Those that are to be sent stay parked until they are.
        let done = (0..failures.len()).filter(|index| !wanted.iter().any(|(wanted, _)| wanted == index));
        let done: Vec<_> = done.map(|index| failures[index].record).filter(|r| r.is_parked()).collect();
        self.unpark(&mut transaction, &done).await?;
        transaction.commit().await?;
        Ok(wanted)
    }

    /// These shall not be applied any more. Gives back how many of them were still open.
    pub(crate) async fn discard(&self, records: &[&Delivery<'_>]) -> Result<u64, Fault> {
        let mut connection = self.pool.acquire().await?;
        let ended = self.bounded(self.discard_on(&mut connection, records)).await;
        ended.on(&mut connection)
    }

    async fn discard_on(
        &self,
        connection: &mut PgConnection,
        records: &[&Delivery<'_>],
    ) -> Result<u64, Fault> {
        let mut transaction = connection.begin().await?;
        self.enter(&mut transaction).await?;
        self.lock(&mut transaction, records).await?;
        let places = Places::of(records.iter().map(|r| r.place()));
        let settled = parking::settle(&mut transaction, &self.group, places, Outcome::Discarded).await?;
        self.unpark(&mut transaction, records).await?;
        transaction.commit().await?;
        Ok(settled)
    }

    /// Kafka has acknowledged dead letters: where each is now; nothing for those that are not sent at all.
    pub(crate) async fn sent(&self, letters: &[(&Delivery<'_>, Option<(i32, i64)>)]) -> Result<(), Fault> {
        let mut connection = self.pool.acquire().await?;
        let ended = self.bounded(self.sent_on(&mut connection, letters)).await;
        ended.on(&mut connection)
    }

    async fn sent_on(
        &self,
        connection: &mut PgConnection,
        letters: &[(&Delivery<'_>, Option<(i32, i64)>)],
    ) -> Result<(), Fault> {
        let mut transaction = connection.begin().await?;
        for (record, at) in letters {
            if let Some(at) = at {
                parking::sent(&mut transaction, &self.group, record.place(), *at).await?;
            }
        }
        let parked: Vec<_> = letters.iter().map(|(record, _)| *record).filter(|r| r.is_parked()).collect();
        self.unpark(&mut transaction, &parked).await?;
        Ok(transaction.commit().await?)
    }

    /// The first records that are parked under a key.
    pub(crate) async fn parked(&self, key: &[u8], count_max: usize) -> Result<Vec<Delivery<'static>>, Fault> {
        if !Self::PARKS {
            return Ok(Vec::new());
        }
        let mut connection = self.pool.acquire().await?;
        let rows = parking::parked(&mut connection, &self.group, key, count_max).await?;
        Ok(rows.into_iter().map(Delivery::Parked).collect())
    }

    /// Keys whose parked records nothing holds back.
    pub(crate) async fn abandoned(&self) -> Result<Vec<Vec<u8>>, Fault> {
        if !Self::PARKS {
            return Ok(Vec::new());
        }
        let mut connection = self.pool.acquire().await?;
        Ok(parking::abandoned(&mut connection, &self.group).await?)
    }

    /// Work on a connection, within its time, whatever it does.
    async fn bounded<T>(&self, work: impl Future<Output = Result<T, Fault>>) -> Ended<T> {
        let mut work = pin!(work);
        let caught = poll_fn(|context| {
            catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context)))
                .map_or_else(|panic| Poll::Ready(Err(panicked(&*panic))), |polled| polled.map(Ok))
        });
        match timeout(self.apply_timeout, caught).await {
            Ok(Ok(outcome)) => Ended::Whole(outcome),
            Ok(Err(poison)) => Ended::Broken(Fault::Record(poison)),
            Err(_) => {
                let seconds = self.apply_timeout.as_secs();
                Ended::Broken(Fault::database(format!("no answer within {seconds} s")))
            }
        }
    }

    /// Goes through the group's gate, and looks whether there is anything to know. Two statements, because the second one
    /// must see what was done while the first one waited.
    async fn enter(&self, transaction: &mut PgConnection) -> Result<Group, Fault> {
        const OURS: &str = "
            SELECT EXISTS (SELECT FROM consumer_groups WHERE consumer_group = $1 AND paused_at IS NOT NULL) AS paused,
                   EXISTS (SELECT FROM dead_letters WHERE consumer_group = $1) AS letters,
                   EXISTS (SELECT FROM parked_records WHERE consumer_group = $1) AS parked";
        const THEIRS: &str = "
            SELECT EXISTS (SELECT FROM consumer_groups WHERE consumer_group = $1 AND paused_at IS NOT NULL) AS paused,
                   EXISTS (SELECT FROM dead_letters WHERE consumer_group = $1) AS letters, false AS parked";
        gate::pass(transaction, &self.group).await?;
        let look = if Self::PARKS { OURS } else { THEIRS };
        let group: Group = sqlx::query_as(look).bind(&self.group).fetch_one(transaction).await?;
        if group.paused { Err(Fault::paused()) } else { Ok(group) }
    }

    async fn apply_on(
        &self,
        connection: &mut PgConnection,
        entries: &[Entry<'_, '_, H::Event>],
    ) -> Result<Done, Fault> {
        let mut transaction = connection.begin().await?;
        let group = self.enter(&mut transaction).await?;
        let mut done = Done::default();
        let known = group.letters || group.parked;
        let todo: Vec<usize> = if known {
            self.sort_out(&mut transaction, entries, &mut done).await?
        } else {
            (0..entries.len()).collect()
        };
        let events: Vec<&H::Event> = todo.iter().map(|index| &entries[*index].event).collect();
        let fresh = inbox::claim(&mut transaction, &self.group, &events).await?;
        done.duplicates = events.len() - fresh.len();
        let current = self.guard(&mut transaction, entries, &todo, &fresh, &mut done).await?;
        let mut following: Vec<&H::Event> = current.iter().map(|at| events[*at]).collect();
        if !following.is_empty() {
            self.handler.apply(&mut transaction, &following).await?;
        }
        if done.duplicates > 0 {
            let fresh: HashSet<usize> = fresh.iter().copied().collect();
            let repeated = events.iter().enumerate().filter(|(at, _)| !fresh.contains(at));
            let repeated: Vec<&H::Event> = repeated.map(|(_, event)| *event).collect();
            self.handler.repeated(&mut transaction, &repeated).await?;
            if Self::PARKS {
                following.extend(inbox::take_due(&mut transaction, &self.group, &repeated).await?);
            }
        }
        outbox::publish(&mut transaction, &self.handler.follow_ups(&following)?).await?;
        if known && !todo.is_empty() {
            let settling = todo.iter().map(|index| &entries[*index]).filter(|entry| entry.settles);
            let records: Vec<_> = settling.map(|entry| entry.record).collect();
            let places = Places::of(records.iter().map(|record| record.place()));
            done.settled = parking::settle(&mut transaction, &self.group, places, Outcome::Applied).await?;
            let parked: Vec<_> = records.into_iter().filter(|record| record.is_parked()).collect();
            self.unpark(&mut transaction, &parked).await?;
        }
        transaction.commit().await?;
        done.applied = current.into_iter().map(|at| todo[at]).collect();
        Ok(done)
    }

    /// The indices of the entries that are to be applied: not those that somebody has discarded, and not those that are
    /// behind a dead letter of their key, which are parked.
    async fn sort_out(
        &self,
        transaction: &mut PgConnection,
        entries: &[Entry<'_, '_, H::Event>],
        done: &mut Done,
    ) -> Result<Vec<usize>, Fault> {
        let records: Vec<&Delivery<'_>> = entries.iter().map(|entry| entry.record).collect();
        let mut found = parking::standing(transaction, &self.group, &records, Self::PARKS).await?;
        // What does not come in its turn meets what does: one after the other.
        let mut meeting: HashSet<usize> = found.iter().map(|(index, _)| *index).collect();
        meeting.extend((0..records.len()).filter(|index| !records[*index].is_from_its_topic()));
        if !meeting.is_empty() {
            let meeting: Vec<_> = meeting.into_iter().map(|index| records[index]).collect();
            self.lock(transaction, &meeting).await?;
            found = parking::standing(transaction, &self.group, &records, Self::PARKS).await?;
        }
        let (mut left_out, mut waiting, mut dropped) = (HashSet::new(), Vec::new(), Vec::new());
        for (index, standing) in found {
            let record = records[index];
            if standing.discarded {
                done.discarded += 1;
                left_out.insert(index);
                if record.is_parked() {
                    dropped.push(record);
                }
            } else if record.is_parked() {
                // The first of its key may go; it stays where it is while something is ahead of it.
                if standing.behind_letter {
                    left_out.insert(index);
                }
            } else if standing.behind_letter || standing.behind_parked {
                left_out.insert(index);
                waiting.push(record);
            }
        }
        done.parked = waiting.len();
        parking::park(transaction, &self.group, &waiting).await?;
        self.unpark(transaction, &dropped).await?;
        Ok((0..entries.len()).filter(|index| !left_out.contains(index)).collect())
    }

    /// Of the fresh ones of `todo`, those that are not overtaken; stores the versions they bring.
    async fn guard(
        &self,
        transaction: &mut PgConnection,
        entries: &[Entry<'_, '_, H::Event>],
        todo: &[usize],
        fresh: &[usize],
        done: &mut Done,
    ) -> Result<Vec<usize>, Fault> {
        if !H::Event::VERSIONED || fresh.is_empty() {
            return Ok(fresh.to_vec());
        }
        let entry = |at: usize| &entries[todo[at]];
        let aggregates: Vec<&str> =
            fresh.iter().filter_map(|at| entry(*at).event.version().map(|(id, _)| id)).collect();
        let stored: Vec<(String, i64)> = sqlx::query_as(
            "SELECT aggregate_id, version FROM aggregate_versions
             WHERE consumer_group = $1 AND aggregate_id = ANY ($2) ORDER BY aggregate_id FOR UPDATE",
        )
        .bind(&self.group)
        .bind(&aggregates)
        .fetch_all(&mut *transaction)
        .await?;
        let mut guard = Guard::new(stored);
        let mut current = Vec::with_capacity(fresh.len());
        for at in fresh {
            let Entry { event, record, .. } = entry(*at);
            let Some((aggregate, version)) = event.version() else {
                current.push(*at);
                continue;
            };
            // What is redriven or released comes because somebody decided so.
            let accepted = self.policy.accepts_gaps() || !record.is_from_its_topic();
            match guard.judge(aggregate, version, accepted) {
                Verdict::Apply => current.push(*at),
                Verdict::Stale => done.stale += 1,
                Verdict::Gap { .. } if accepted => {
                    done.gaps += 1;
                    current.push(*at);
                }
                Verdict::Gap { after } => {
                    return Err(Fault::Gap { aggregate: aggregate.to_owned(), after, version });
                }
            }
        }
        let (ids, versions) = guard.moved();
        let count = ids.len() as u64;
        let stored = sqlx::query(
            "INSERT INTO aggregate_versions AS mine (consumer_group, aggregate_id, version)
             SELECT $1, id, version FROM unnest($2::text[], $3::bigint[]) AS given (id, version)
             ON CONFLICT (consumer_group, aggregate_id)
             DO UPDATE SET version = excluded.version WHERE mine.version < excluded.version",
        )
        .bind(&self.group)
        .bind(ids)
        .bind(versions)
        .execute(transaction)
        .await?;
        if stored.rows_affected() < count {
            // Of an aggregate that was new there was no row to lock.
            return Err(Fault::database("another batch has applied events of the same aggregate meanwhile"));
        }
        Ok(current)
    }

    async fn lock(&self, transaction: &mut PgConnection, records: &[&Delivery<'_>]) -> sqlx::Result<()> {
        let keys: Vec<&[u8]> = records.iter().filter_map(|record| record.key()).collect();
        parking::lock(transaction, &self.group, &keys).await
    }

    async fn unpark(&self, transaction: &mut PgConnection, records: &[&Delivery<'_>]) -> sqlx::Result<()> {
        if records.is_empty() || !Self::PARKS {
            return Ok(());
        }
        let places = Places::of(records.iter().map(|record| record.place()));
        parking::unpark(transaction, &self.group, places).await
    }

    /// Whether the database answers; if not, why.
    pub(crate) async fn ping(&self) -> Result<(), String> {
        let query = sqlx::query("SELECT 1").execute(&self.pool);
        match timeout(PING_TIMEOUT, query).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(e)) => Err(e.to_string()),
            Err(_) => Err(format!("no answer within {} s", PING_TIMEOUT.as_secs())),
        }
    }
}

/// How work on a connection ended.
enum Ended<T> {
    Whole(Result<T, Fault>),
    /// In the middle of the protocol.
    Broken(Fault),
}

impl<T> Ended<T> {
    /// The outcome; a connection in the middle of the protocol does not go back to the others.
    fn on(self, connection: &mut PoolConnection<Postgres>) -> Result<T, Fault> {
        match self {
            Self::Whole(outcome) => outcome,
            Self::Broken(fault) => {
                connection.close_on_drop();
                Err(fault)
            }
        }
    }
}

/// The poison that a panic is.
pub(crate) fn panicked(panic: &(dyn std::any::Any + Send)) -> Poison {
    let said = panic.downcast_ref::<&str>().copied();
    let said = said.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or_default();
    Poison::new(Reason::HandlerPanicked, format!("the handler panicked: {said}"))
}

impl Fault {
    fn paused() -> Self {
        Self::Around { cause: Cause::Paused, error: "the group is paused (consumer resume)".into() }
    }
}

impl From<sqlx::Error> for Fault {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(e) => {
                Self::from_sqlstate(e.code().as_deref().unwrap_or("XX000"), e.message())
            }
            sqlx::Error::Encode(e) => Self::Record(Poison::new(Reason::DatabaseRefused, e.to_string())),
            other => Self::database(other),
        }
    }
}

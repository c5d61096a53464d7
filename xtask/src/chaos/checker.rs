//! Whether what was committed is what was published, and what the consumers made of it. It shares no code with the
//! relay: the commit order is what a slot of its own says in the text of `test_decoding`, the topics are read as any
//! consumer reads them.

mod compare;
mod content;
mod decoding;
mod lsn;
mod murmur2;
mod tables;
#[cfg(test)]
mod tests;
mod topics;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use sqlx::PgConnection;
use tokio::sync::Mutex;

use self::{compare::Comparison, decoding::Decoder, lsn::Lsn, topics::Reader};
use crate::{
    chaos::{
        connection,
        fold::Fold,
        targets::Targets,
        verdict::{Kind, Verdict},
    },
    failure::{Explain, Failure, Result},
};

/// How long one question to the slot may take: it decodes again what it did not let go of.
const SLOT_LIMIT: Duration = Duration::from_secs(60);
/// Lines of the slot that are taken at a time, and what is left of the transaction of the last one.
const PAGE_LINES: i32 = 5_000;
/// How long nothing must have been added when all is there: what follows then would be a repetition.
const SETTLE: Duration = Duration::from_secs(1);
/// Likewise when all is confirmed, and not all is there: a broker may still be about to show what was committed.
const CONFIRMED_SETTLE: Duration = Duration::from_secs(10);
/// How long the tables may take where something is lost or out of order: then they need not come to what is expected.
const WRONGED_LIMIT: Duration = Duration::from_secs(10);
/// How long it waits before it looks again.
const LOOK_INTERVAL: Duration = Duration::from_millis(300);

/// What has been taken in so far.
#[derive(Debug)]
pub(crate) struct Checker {
    targets: Targets,
    slot: String,
    /// The end of the last transaction that was taken from the slot.
    taken: Lsn,
    /// How far whoever else has a slot of this database has confirmed: nobody will send that again. None: there is no slot.
    confirmed: Option<Lsn>,
    books: Arc<Mutex<Books>>,
}

/// What reading the topics fills, on a thread of its own.
#[derive(Debug)]
struct Books {
    comparison: Comparison,
    fold: Fold,
    reader: Reader,
    /// Records of orders that are no events.
    unreadable: Vec<String>,
}

/// How much there is of what.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Outbox rows.
    pub committed: u64,
    /// Records, repeated ones included.
    pub published: u64,
    /// Records whose id was there before.
    pub duplicates: u64,
}

impl Checker {
    /// Makes the slot. To be called before anything is written: the relay has nothing left to publish, and the consumers'
    /// tables are empty. A slot that an earlier checker left behind is made anew.
    pub(crate) async fn create(targets: &Targets) -> Result<Self> {
        tables::empty(&targets.consumers_url).await?;
        let mut connection = connection::open(&targets.postgres_url).await?;
        let what = || "make the checker's slot".to_owned();
        // Slots belong to the cluster, so each database has a name for its own.
        let slot: String = sqlx::query_scalar(
            "SELECT 'chaos_checker_' || oid FROM pg_database WHERE datname = current_database()",
        )
        .fetch_one(&mut connection)
        .await
        .explain(what)?;
        drop_slot(&mut connection, &slot).await?;
        let make = sqlx::query_scalar::<_, String>(
            "SELECT lsn::text FROM pg_create_logical_replication_slot($1, 'test_decoding')",
        );
        let made = connection::within(SLOT_LIMIT, make.bind(&slot).fetch_one(&mut connection))
            .await
            .explain(what)?;
        let (brokers, topics) = (targets.brokers.clone(), targets.topics.clone());
        let reader = tokio::task::spawn_blocking(move || Reader::new(&brokers, &topics)).await;
        let reader = reader.explain(|| "look at the topics".to_owned())??;
        let books = Books {
            comparison: Comparison::default(),
            fold: Fold::default(),
            reader,
            unreadable: Vec::new(),
        };
        let taken = made.parse().explain(what)?;
        Ok(Self {
            targets: targets.clone(),
            slot,
            taken,
            confirmed: None,
            books: Arc::new(Mutex::new(books)),
        })
    }

    /// Takes what was committed since, and lets the slot go on. After an error it may be called again: nothing is taken
    /// twice, and nothing let go of before it was taken.
    pub(crate) async fn collect(&mut self) -> Result<()> {
        let mut connection = connection::open(&self.targets.postgres_url).await?;
        loop {
            let ask = sqlx::query_scalar::<_, String>("SELECT pg_current_wal_flush_lsn()::text");
            let end = connection::within(SLOT_LIMIT, ask.fetch_one(&mut connection)).await;
            let end = end.explain(|| "ask for the end of the log".to_owned())?;
            let lines = self.page(&mut connection).await?;
            self.take(&lines).await?;
            let last = lines.len() < PAGE_LINES.unsigned_abs() as usize;
            // Not the last transaction only: others may write much log that is none of ours.
            let done = if last { end } else { self.taken.to_string() };
            let advance = sqlx::query("SELECT pg_replication_slot_advance($1, $2::text::pg_lsn)");
            let advance = advance.bind(&self.slot).bind(done).execute(&mut connection);
            connection::within(SLOT_LIMIT, advance)
                .await
                .explain(|| "advance the checker's slot".to_owned())?;
            if last {
                return Ok(());
            }
        }
    }

    /// The next lines of whole transactions, empty ones too: without them, older servers give a message no BEGIN. Those of other tables, and others' messages, are there without their text.
    async fn page(&self, connection: &mut PgConnection) -> Result<Vec<(String, Option<String>)>> {
        let ask = sqlx::query_as(
            "SELECT lsn::text, CASE WHEN data LIKE ANY (ARRAY['BEGIN%', 'COMMIT%', 'table public.outbox: INSERT:%', \
                                                           'message: transactional: 1 prefix: outbox,%']) \
                                    THEN data END \
             FROM pg_logical_slot_peek_changes($1, NULL, $2, 'include-xids', 'on')",
        );
        let ask = ask.bind(&self.slot).bind(PAGE_LINES).fetch_all(connection);
        connection::within(SLOT_LIMIT, ask).await.explain(|| "read the checker's slot".to_owned())
    }

    async fn take(&mut self, lines: &[(String, Option<String>)]) -> Result<()> {
        let what = || "understand test_decoding".to_owned();
        let mut decoder = Decoder::new(self.taken);
        let mut books = self.books.lock().await;
        for (lsn, data) in lines {
            let lsn = lsn.parse().explain(what)?;
            let transaction = decoder.line(lsn, data.as_deref().unwrap_or_default()).explain(what)?;
            // After a crash the slot says again what it had been let go of shortly before.
            if let Some(transaction) = transaction.filter(|transaction| transaction.end > self.taken) {
                self.taken = transaction.end;
                books.comparison.commit(transaction).map_err(Failure::new)?;
            }
        }
        Ok(())
    }

    /// Reads the topics to where they end now. After an error it may be called again.
    pub(crate) async fn read(&mut self) -> Result<Counts> {
        let (books, topics) = (self.books.clone(), self.targets.topics.clone());
        let reading = tokio::task::spawn_blocking(move || books.blocking_lock().read(topics)).await;
        reading.explain(|| "read the topics".to_owned())??;
        Ok(self.books.lock().await.comparison.counts())
    }

    /// Waits until everything committed is published and has arrived in the consumers' tables, or the deadline has passed,
    /// or the relay calls done what is not, and says what there is since the last verdict: no row, record or violation is
    /// told of twice, but for what is wrong with the tables. To be called when nothing is written any more.
    ///
    /// # Errors
    /// A server could not be asked until the deadline, so that nothing can be said.
    pub(crate) async fn verdict(&mut self, deadline: Instant) -> Result<Verdict> {
        self.settled(deadline).await?;
        let books = &mut *self.books.lock().await;
        let mut verdict = books.comparison.verdict(&books.reader.partitions(), self.confirmed);
        for record in books.unreadable.drain(..) {
            verdict.add(Kind::Table, || record);
        }
        let url = &self.targets.consumers_url;
        let deadline = match verdict.violations(false) {
            0 => deadline,
            _ => deadline.min(Instant::now() + WRONGED_LIMIT),
        };
        loop {
            let passed = Instant::now() >= deadline;
            match tables::caught_up(url, &books.fold).await {
                Err(error) if passed => return Err(error),
                Ok(done) if done || passed => break,
                _ => tokio::time::sleep(LOOK_INTERVAL).await,
            }
        }
        tables::compare(url, &books.fold, &mut verdict).await?;
        Ok(verdict)
    }

    /// Returns when nothing more is to come, or the deadline has passed.
    async fn settled(&mut self, deadline: Instant) -> Result<()> {
        let (mut before, mut since) = (None, Instant::now());
        loop {
            let looked = self.look().await;
            let passed = Instant::now() >= deadline;
            if passed {
                return looked.map(drop);
            }
            let now = looked.ok();
            if before != now {
                (before, since) = (now, Instant::now());
            }
            if now.and_then(|(_, settle)| settle).is_some_and(|settle| since.elapsed() >= settle) {
                return Ok(());
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// Takes what there is, and tells for how long it must stay as it is, if nothing more need come.
    async fn look(&mut self) -> Result<(Counts, Option<Duration>)> {
        self.collect().await?;
        self.confirmed = self.ask_confirmed().await?;
        let counts = self.read().await?;
        // What was read was committed before, but what is committed now need not be read yet.
        let complete = self.books.lock().await.comparison.complete();
        let confirmed = self.confirmed.is_some_and(|confirmed| confirmed >= self.taken);
        Ok((counts, if complete { Some(SETTLE) } else { confirmed.then_some(CONFIRMED_SETTLE) }))
    }

    async fn ask_confirmed(&self) -> Result<Option<Lsn>> {
        let mut connection = connection::open(&self.targets.postgres_url).await?;
        let ask = sqlx::query_scalar::<_, Option<String>>(
            "SELECT min(confirmed_flush_lsn)::text FROM pg_replication_slots \
             WHERE database = current_database() AND slot_name <> $1",
        );
        let what = || "look at the relay's slot".to_owned();
        let ask = ask.bind(&self.slot).fetch_one(&mut connection);
        let lsn = connection::within(SLOT_LIMIT, ask).await.explain(what)?;
        lsn.map(|lsn| lsn.parse()).transpose().explain(what)
    }

    /// Drops the slot, which would hold the log of servers that are used again.
    #[cfg(test)]
    pub(crate) async fn close(self) -> Result<()> {
        let mut connection = connection::open(&self.targets.postgres_url).await?;
        drop_slot(&mut connection, &self.slot).await
    }
}

impl Books {
    fn read(&mut self, mut topics: Vec<String>) -> Result<()> {
        topics.extend(self.comparison.topics().iter().cloned());
        topics.sort_unstable();
        topics.dedup();
        for topic in topics {
            self.reader.read(&topic, |record, value| {
                if self.comparison.publish(record) && record.of_order {
                    let applied = self.fold.apply(value.unwrap_or_default());
                    let at = || format!("{}/{}@{}", record.topic, record.partition, record.offset);
                    self.unreadable.extend(applied.err().map(|error| format!("{}: {error}", at())));
                }
            })?;
        }
        Ok(())
    }
}

async fn drop_slot(connection: &mut PgConnection, slot: &str) -> Result<()> {
    let drop = sqlx::query(
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1",
    );
    connection::within(SLOT_LIMIT, drop.bind(slot).execute(connection))
        .await
        .map(std::mem::drop)
        .explain(|| format!("drop the slot {slot}"))
}

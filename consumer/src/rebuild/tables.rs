//! The rebuild's tables: made like the live ones in a schema of their own, and put in their place.

use std::time::Duration;

use service::{Failure, exit::Kind};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgTransaction, error::DatabaseError};
use tokio::time::{Instant, sleep};

use crate::gate;

/// The consumer's own tables that a rebuild has beside its projection.
const OWN: [&str; 6] =
    ["inbox", "aggregate_versions", "consumer_groups", "dead_letters", "parked_records", "outbox"];
/// How long a lock on the projection is waited for at a time: shorter than Postgres waits before it looks for a deadlock,
/// so that it is never a reader who is given up.
const LOCK_TIMEOUT_MS: u32 = 250;
/// How long another rebuild of the group is waited for.
const ALONE_MS: u32 = 3000;
/// How long the locks are waited for in all.
const LOCK_MAX: Duration = Duration::from_secs(60);

/// A projection beside the live one.
pub(super) struct Beside {
    /// The live group.
    pub(super) live: String,
    /// The rebuild's group.
    pub(super) group: String,
    /// Where the rebuild's tables are; of letters, digits and `_`.
    pub(super) schema: String,
    /// Where the live ones are.
    home: String,
    tables: &'static [&'static str],
}

impl Beside {
    /// Makes the tables. Those of a rebuild that was cut short are dropped.
    ///
    /// # Errors
    /// 69 if another rebuild of the group is under way, or if something hangs on the live tables that would be lost.
    pub(super) async fn make(
        connection: &mut PgConnection,
        live: &str,
        group: &str,
        tables: &'static [&'static str],
    ) -> Result<Self, Failure> {
        // What is dropped, or is not there to be dropped, is nobody's concern.
        execute(connection, "SET client_min_messages = warning").await?;
        alone(connection, live).await?;
        let (schema, home): (String, String) = sqlx::query_as(
            "SELECT 'rebuild_' || left(regexp_replace(lower($1), '[^a-z0-9]+', '_', 'g'), 30) || '_' || left(md5($1), 8),
                    current_schema()",
        )
        .bind(live)
        .fetch_one(&mut *connection)
        .await
        .map_err(failed)?;
        let beside =
            Self { live: live.to_owned(), group: group.to_owned(), schema, home: quoted(&home), tables };
        beside.refuse_what_hangs_on_them(connection).await?;
        beside.clear(connection).await?;
        beside.refuse_old(connection).await?;
        execute(connection, &format!("CREATE SCHEMA {}", beside.schema)).await?;
        for table in OWN.iter().chain(tables) {
            let (new, old) = (beside.made(table), beside.live_table(table));
            execute(connection, &format!("CREATE TABLE {new} (LIKE {old} INCLUDING ALL)")).await?;
        }
        // What somebody has discarded stays discarded.
        beside.copy_discarded(connection).await?;
        Ok(beside)
    }

    /// Tables that were kept on purpose are not ours to drop.
    async fn refuse_old(&self, connection: &mut PgConnection) -> Result<(), Failure> {
        let is_there: bool = sqlx::query_scalar("SELECT to_regnamespace($1) IS NOT NULL")
            .bind(self.old())
            .fetch_one(connection)
            .await
            .map_err(failed)?;
        if !is_there {
            return Ok(());
        }
        let why =
            format!("the tables that an earlier rebuild replaced are still in the schema {}", self.old());
        Err(Failure::new(Kind::Refused, why)
            .hint(format!("keep what you need of them, then: DROP SCHEMA {} CASCADE", self.old())))
    }

    async fn copy_discarded(&self, connection: &mut PgConnection) -> Result<(), Failure> {
        let (new, live) = (self.made("dead_letters"), self.live_table("dead_letters"));
        let copy = format!(
            "INSERT INTO {new} SELECT * FROM {live} WHERE consumer_group = $1 AND outcome = 'discarded'"
        );
        let name = format!("UPDATE {new} SET consumer_group = $1");
        let group = [(copy, &self.live), (name, &self.group)];
        for (sql, group) in group {
            sqlx::query(AssertSqlSafe(sql)).bind(group).execute(&mut *connection).await.map_err(failed)?;
        }
        Ok(())
    }

    /// Views, foreign keys and the like belong to a table and not to its name.
    pub(super) async fn refuse_what_hangs_on_them(
        &self,
        connection: &mut PgConnection,
    ) -> Result<(), Failure> {
        let names: Vec<String> = self.tables.iter().map(|table| self.live_table(table)).collect();
        let found: Vec<String> = sqlx::query_scalar(
            "WITH mine AS (SELECT name::regclass::oid AS oid FROM unnest($1::text[]) AS name)
             SELECT 'the sequence ' || objid::regclass FROM pg_depend JOIN pg_class ON pg_class.oid = objid
             WHERE classid = 'pg_class'::regclass AND refobjid IN (SELECT oid FROM mine) AND deptype = 'a'
               AND relkind = 'S'
             UNION SELECT 'the foreign key ' || conname FROM pg_constraint
             WHERE contype = 'f' AND (conrelid IN (SELECT oid FROM mine) OR confrelid IN (SELECT oid FROM mine))
             UNION SELECT 'the trigger ' || tgname FROM pg_trigger
             WHERE NOT tgisinternal AND tgrelid IN (SELECT oid FROM mine)
             UNION SELECT 'the policy ' || polname FROM pg_policy WHERE polrelid IN (SELECT oid FROM mine)
             UNION SELECT 'the publication ' || pubname FROM pg_publication_rel
             JOIN pg_publication ON pg_publication.oid = prpubid WHERE prrelid IN (SELECT oid FROM mine)
             UNION SELECT 'the view ' || ev_class::regclass FROM pg_depend
             JOIN pg_rewrite ON pg_rewrite.oid = objid
             WHERE classid = 'pg_rewrite'::regclass AND refclassid = 'pg_class'::regclass
               AND refobjid IN (SELECT oid FROM mine) AND ev_class NOT IN (SELECT oid FROM mine)",
        )
        .bind(names)
        .fetch_all(connection)
        .await
        .map_err(failed)?;
        if found.is_empty() {
            return Ok(());
        }
        let why = format!("{} would stay with the tables that are replaced", found.join(", "));
        Err(Failure::new(Kind::Refused, why).hint("drop it before, and make it again afterwards"))
    }

    /// Makes the live consumers wait, until the transaction ends.
    pub(super) async fn hold_live(&self, transaction: &mut PgTransaction<'_>) -> Result<(), Failure> {
        gate::close(transaction, &self.live).await.map_err(failed)
    }

    /// Makes the rebuild's own consumers wait: what they have written does not change any more.
    pub(super) async fn hold_rebuild(&self, transaction: &mut PgTransaction<'_>) -> Result<(), Failure> {
        gate::close(transaction, &self.group).await.map_err(failed)
    }

    /// How many dead letters somebody has discarded since the rebuild began, which it knows nothing of.
    pub(super) async fn discarded_since(&self, transaction: &mut PgTransaction<'_>) -> Result<i64, Failure> {
        let sql = format!(
            "SELECT count(*) FROM {} AS live WHERE consumer_group = $1 AND outcome = 'discarded' AND NOT EXISTS (
                 SELECT FROM {} AS new WHERE new.consumer_group = $2 AND new.topic = live.topic
                    AND new.partition = live.partition AND new.record_offset = live.record_offset
                    AND new.outcome = 'discarded')",
            self.live_table("dead_letters"),
            self.made("dead_letters")
        );
        let found = sqlx::query_scalar(AssertSqlSafe(sql)).bind(&self.live).bind(&self.group);
        found.fetch_one(&mut **transaction).await.map_err(failed)
    }

    /// Records that fail in the rebuild and did not before.
    pub(super) async fn failing(&self, transaction: &mut PgTransaction<'_>) -> Result<Vec<String>, Failure> {
        let sql = format!(
            "SELECT format('%s/%s/%s (%s: %s)', topic, partition, record_offset, reason, error) FROM {} AS new
             WHERE consumer_group = $1 AND settled_at IS NULL AND NOT EXISTS (
                 SELECT FROM {} AS live WHERE live.consumer_group = $2 AND live.topic = new.topic
                    AND live.partition = new.partition AND live.record_offset = new.record_offset
                    AND live.settled_at IS NULL)
             ORDER BY topic, partition, record_offset",
            self.made("dead_letters"),
            self.live_table("dead_letters")
        );
        let found = sqlx::query_scalar(AssertSqlSafe(sql)).bind(&self.group).bind(&self.live);
        found.fetch_all(&mut **transaction).await.map_err(failed)
    }

    /// Puts the rebuild in the place of the live projection, with what the group knows.
    pub(super) async fn replace(&self, transaction: &mut PgTransaction<'_>) -> Result<(), Failure> {
        for sql in self.knowledge() {
            let done = sqlx::query(AssertSqlSafe(sql))
                .bind(&self.live)
                .bind(&self.group)
                .execute(&mut **transaction);
            done.await.map_err(failed)?;
        }
        self.lock(transaction).await?;
        execute(transaction, &format!("CREATE SCHEMA {}", self.old())).await?;
        for table in self.tables {
            let (new, live) = (self.made(table), self.live_table(table));
            for sql in self.dress(transaction, &new, &live).await? {
                execute(transaction, &sql).await?;
            }
            execute(transaction, &format!("ALTER TABLE {live} SET SCHEMA {}", self.old())).await?;
            execute(transaction, &format!("ALTER TABLE {new} SET SCHEMA {}", self.home)).await?;
        }
        Ok(())
    }

    /// Statements that make what the live group (`$1`) knows what the rebuild's (`$2`) does. What follows from an event that
    /// only the rebuild has applied is due. The live group's dead letters and parked records stay as they are, also where
    /// the rebuild could apply them: when they are redriven they are found to be applied, and what follows from them is
    /// published.
    fn knowledge(&self) -> Vec<String> {
        let (new, live) = (|table: &str| self.made(table), |table: &str| self.live_table(table));
        let letter = "topic, partition, record_offset, key, event_type, written_at, reason, error, attempts, blocks_key,
                      dead_at";
        let parked =
            "topic, partition, record_offset, key, value, header_names, header_values, written_at, parked_at";
        vec![
            format!(
                "DELETE FROM {live} AS live WHERE consumer_group = $1 AND NOT EXISTS (
                     SELECT FROM {new} AS new WHERE new.consumer_group = $2 AND new.event_id = live.event_id)",
                live = live("inbox"),
                new = new("inbox")
            ),
            format!(
                "INSERT INTO {} (consumer_group, event_id, applied_at, follow_ups_due)
                 SELECT $1, event_id, applied_at, true FROM {} WHERE consumer_group = $2 ON CONFLICT DO NOTHING",
                live("inbox"),
                new("inbox")
            ),
            format!(
                "DELETE FROM {live} AS live WHERE consumer_group = $1 AND NOT EXISTS (
                     SELECT FROM {new} AS new WHERE new.consumer_group = $2 AND new.aggregate_id = live.aggregate_id)",
                live = live("aggregate_versions"),
                new = new("aggregate_versions")
            ),
            format!(
                "INSERT INTO {} AS live (consumer_group, aggregate_id, version)
                 SELECT $1, aggregate_id, version FROM {} WHERE consumer_group = $2
                 ON CONFLICT (consumer_group, aggregate_id) DO UPDATE SET version = excluded.version
                 WHERE live.version <> excluded.version",
                live("aggregate_versions"),
                new("aggregate_versions")
            ),
            format!(
                "INSERT INTO {} AS live (consumer_group, {letter})
                 SELECT $1, {letter} FROM {} WHERE consumer_group = $2 AND settled_at IS NULL
                 ON CONFLICT (consumer_group, topic, partition, record_offset)
                 DO UPDATE SET settled_at = NULL, outcome = NULL WHERE live.settled_at IS NOT NULL",
                live("dead_letters"),
                new("dead_letters")
            ),
            format!(
                "INSERT INTO {} (consumer_group, {parked}) SELECT $1, {parked} FROM {} WHERE consumer_group = $2
                 ON CONFLICT DO NOTHING",
                live("parked_records"),
                new("parked_records")
            ),
        ]
    }

    /// Locks the live projection against everybody, without ever being the reason why a reader is given up.
    async fn lock(&self, transaction: &mut PgTransaction<'_>) -> Result<(), Failure> {
        let tables: Vec<String> = self.tables.iter().map(|table| self.live_table(table)).collect();
        let lock = format!("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE", tables.join(", "));
        execute(transaction, &format!("SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}")).await?;
        let since = Instant::now();
        loop {
            let mut attempt = transaction.begin().await.map_err(failed)?;
            let Err(error) = sqlx::raw_sql(AssertSqlSafe(lock.clone())).execute(&mut *attempt).await else {
                attempt.commit().await.map_err(failed)?;
                return execute(transaction, "SET LOCAL lock_timeout = 0").await;
            };
            attempt.rollback().await.map_err(failed)?;
            if !is_lock_timeout(&error) || since.elapsed() > LOCK_MAX {
                return Err(failed(error).hint(
                    "somebody holds the tables (SELECT * FROM pg_locks); the live projection is as it was",
                ));
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Statements that give a new table what the live one has beside its columns: the names of its indexes, and grants.
    async fn dress(
        &self,
        transaction: &mut PgTransaction<'_>,
        new: &str,
        live: &str,
    ) -> Result<Vec<String>, Failure> {
        sqlx::query_scalar(
            "WITH indexes AS (
                 SELECT indrelid, indexrelid,
                        regexp_replace(pg_get_indexdef(indexrelid), ' INDEX .* ON .* USING ', ' ') AS definition
                 FROM pg_index WHERE indrelid IN ($1::regclass, $2::regclass)
             )
             SELECT format('ALTER INDEX %s RENAME TO %I', new.indexrelid::regclass, relname)
             FROM indexes AS new JOIN indexes AS live USING (definition) JOIN pg_class ON pg_class.oid = live.indexrelid
             WHERE new.indrelid = $1::regclass AND live.indrelid = $2::regclass
               AND relname <> (SELECT relname FROM pg_class WHERE oid = new.indexrelid)
             UNION ALL
             SELECT format('GRANT %s%s ON %s TO %s%s', privilege_type,
                           CASE WHEN attname IS NOT NULL THEN format(' (%I)', attname) END, $1,
                           CASE WHEN grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END,
                           CASE WHEN is_grantable THEN ' WITH GRANT OPTION' END)
             FROM (
                 SELECT NULL AS attname, (aclexplode(relacl)).*, relowner FROM pg_class WHERE oid = $2::regclass
                 UNION ALL
                 SELECT attname, (aclexplode(attacl)).*, relowner FROM pg_attribute
                 JOIN pg_class ON pg_class.oid = attrelid WHERE attrelid = $2::regclass AND NOT attisdropped
             ) AS given WHERE grantee <> relowner",
        )
        .bind(new)
        .bind(live)
        .fetch_all(&mut **transaction)
        .await
        .map_err(failed)
    }

    /// Drops the rebuild's tables.
    pub(super) async fn clear(&self, connection: &mut PgConnection) -> Result<(), Failure> {
        execute(connection, &format!("DROP SCHEMA IF EXISTS {} CASCADE", self.schema)).await
    }

    /// Drops the tables that were replaced, and with them nothing else.
    pub(super) async fn drop_old(&self, connection: &mut PgConnection) -> Result<(), Failure> {
        let mut sql: Vec<String> =
            self.tables.iter().map(|table| format!("DROP TABLE {}.{}", self.old(), quoted(table))).collect();
        sql.push(format!("DROP SCHEMA {}", self.old()));
        for sql in sql {
            execute(connection, &sql).await.map_err(|failure| {
                let why = format!("swapped, but what was replaced is still there: {}", failure.message);
                Failure::new(failure.kind, why).hint(format!("drop the schema {} by hand", self.old()))
            })?;
        }
        Ok(())
    }

    /// Where the tables go that are replaced.
    pub(super) fn old(&self) -> String {
        format!("{}_old", self.schema)
    }

    fn made(&self, table: &str) -> String {
        format!("{}.{}", self.schema, quoted(table))
    }

    fn live_table(&self, table: &str) -> String {
        format!("{}.{}", self.home, quoted(table))
    }
}

/// Makes sure that no other rebuild of the group is under way, as long as the connection lasts. One that has just ended may
/// not have ended for Postgres yet.
async fn alone(connection: &mut PgConnection, live: &str) -> Result<(), Failure> {
    execute(connection, &format!("SET lock_timeout = {ALONE_MS}")).await?;
    let lock = sqlx::query("SELECT pg_advisory_lock(hashtextextended('consumer rebuild ' || $1, 0))");
    match lock.bind(live).execute(&mut *connection).await {
        Ok(_) => execute(connection, "SET lock_timeout = 0").await,
        Err(error) if is_lock_timeout(&error) => {
            Err(Failure::new(Kind::Refused, format!("another rebuild of {live} is under way"))
                .hint("wait for it, or stop it"))
        }
        Err(error) => Err(failed(error)),
    }
}

fn is_lock_timeout(error: &sqlx::Error) -> bool {
    error.as_database_error().and_then(DatabaseError::code).as_deref() == Some("55P03")
}

async fn execute(connection: &mut PgConnection, sql: &str) -> Result<(), Failure> {
    // Made of our own names, quoted.
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(connection).await.map(drop).map_err(failed)
}

/// An identifier.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The failure that an error of the database is.
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
pub(super) fn failed(error: sqlx::Error) -> Failure {
    let kind = match &error {
        sqlx::Error::Database(e) if e.code().is_some_and(|code| code.starts_with("42")) => Kind::Refused,
        _ => Kind::GaveUp,
    };
    Failure::new(kind, format!("the rebuild failed in the database: {error}"))
        .hint("the live projection is as it was; start the rebuild again")
}

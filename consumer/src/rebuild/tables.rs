//! The rebuild's tables: made like the live ones in a schema of their own, and put in their place.

use std::time::Duration;

use service::{Failure, exit::Kind};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgTransaction, error::DatabaseError};
use tokio::time::{Instant, sleep};

/// The consumer's own tables that a rebuild has beside its projection.
const OWN: [&str; 6] =
    ["inbox", "aggregate_versions", "consumer_groups", "dead_letters", "parked_records", "outbox"];
/// How long a lock on the projection is waited for at a time: shorter than Postgres waits before it looks for a deadlock,
/// so that it is never a reader who is given up.
const LOCK_TIMEOUT_MS: u32 = 250;
/// How long in all.
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
        let is_alone: bool =
            sqlx::query_scalar("SELECT pg_try_advisory_lock(hashtextextended('consumer rebuild ' || $1, 0))")
                .bind(live)
                .fetch_one(&mut *connection)
                .await
                .map_err(failed)?;
        if !is_alone {
            return Err(Failure::new(Kind::Refused, format!("another rebuild of {live} is under way"))
                .hint("wait for it, or stop it"));
        }
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
        execute(connection, &format!("DROP SCHEMA IF EXISTS {} CASCADE", beside.old())).await?;
        execute(connection, &format!("CREATE SCHEMA {}", beside.schema)).await?;
        for table in OWN.iter().chain(tables) {
            let (new, old) = (beside.made(table), beside.live_table(table));
            execute(connection, &format!("CREATE TABLE {new} (LIKE {old} INCLUDING ALL)")).await?;
        }
        // What somebody has discarded stays discarded.
        beside.copy_discarded(connection).await?;
        Ok(beside)
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
    async fn refuse_what_hangs_on_them(&self, connection: &mut PgConnection) -> Result<(), Failure> {
        let names: Vec<String> = self.tables.iter().map(|table| self.live_table(table)).collect();
        let found: Vec<String> = sqlx::query_scalar(
            "WITH mine AS (SELECT name::regclass::oid AS oid FROM unnest($1::text[]) AS name)
             SELECT 'the foreign key ' || conname FROM pg_constraint
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
    pub(super) async fn hold(&self, transaction: &mut PgTransaction<'_>) -> Result<(), Failure> {
        let groups = self.live_table("consumer_groups");
        for sql in [
            format!("INSERT INTO {groups} (consumer_group) VALUES ($1) ON CONFLICT DO NOTHING"),
            format!("SELECT FROM {groups} WHERE consumer_group = $1 FOR UPDATE"),
        ] {
            let done = sqlx::query(AssertSqlSafe(sql)).bind(&self.live).execute(&mut **transaction).await;
            done.map_err(failed)?;
        }
        Ok(())
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

    /// Statements that put what the rebuild's group (`$2`) knows in the place of what the live one (`$1`) does. Open dead
    /// letters keep their row, which says where they are; those that did not fail this time are settled.
    fn knowledge(&self) -> Vec<String> {
        let of = |table: &str, columns: &str, order: &str| {
            let (new, live) = (self.made(table), self.live_table(table));
            // Each statement has both parameters, because each is given both.
            [
                format!("DELETE FROM {live} WHERE consumer_group = $1 AND $2::text IS NOT NULL"),
                format!(
                    "INSERT INTO {live} (consumer_group, {columns}) SELECT $1, {columns} FROM {new}
                     WHERE consumer_group = $2 {order}"
                ),
            ]
        };
        let (new, live) = (self.made("dead_letters"), self.live_table("dead_letters"));
        let same = "theirs.topic = mine.topic AND theirs.partition = mine.partition
                    AND theirs.record_offset = mine.record_offset";
        let letter = "topic, partition, record_offset, key, event_type, written_at, reason, error, attempts, blocks_key,
                      dead_at";
        let mut all = Vec::new();
        all.extend(of("inbox", "event_id, applied_at", ""));
        all.extend(of("aggregate_versions", "aggregate_id, version", ""));
        all.extend(of(
            "parked_records",
            "topic, partition, record_offset, key, value, header_names, header_values, written_at, parked_at",
            "ORDER BY number",
        ));
        all.push(format!(
            "UPDATE {live} AS mine SET settled_at = clock_timestamp(), outcome = 'applied'
             WHERE consumer_group = $1 AND settled_at IS NULL AND NOT EXISTS (
                 SELECT FROM {new} AS theirs
                 WHERE theirs.consumer_group = $2 AND theirs.settled_at IS NULL AND {same})"
        ));
        all.push(format!(
            "INSERT INTO {live} (consumer_group, {letter}) SELECT $1, {letter} FROM {new} AS theirs
             WHERE consumer_group = $2 AND settled_at IS NULL
             ON CONFLICT (consumer_group, topic, partition, record_offset) DO UPDATE SET
                 settled_at = NULL, outcome = NULL"
        ));
        all
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
            let is_timeout =
                error.as_database_error().and_then(DatabaseError::code).as_deref() == Some("55P03");
            if !is_timeout || since.elapsed() > LOCK_MAX {
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

    /// Drops what is left of the rebuild, and the tables that were replaced.
    pub(super) async fn drop_old(&self, connection: &mut PgConnection) -> Result<(), Failure> {
        self.clear(connection).await?;
        execute(connection, &format!("DROP SCHEMA IF EXISTS {} CASCADE", self.old())).await
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

//! What is in Kafka leaves the outbox: rows, or partitions, that are older than the configuration says, and never one
//! that is not confirmed.
//!
//! A row does not tell where in the log it was committed. So each time this takes from the server, in this order, which
//! transactions had ended (the oldest that had not is the bound), and how far the log had been written. What the ended
//! ones had committed lies before that position; once the slot's confirmed flush LSN has passed it, every row of theirs
//! is in Kafka. Then, and only then, those of them that are old enough are deleted. A partition is detached first, so
//! that no more rows come into it; the position that counts for it is the one after that.

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::Duration,
};

use relay_core::outbox::Outbox;

use crate::{
    config::{Retention, Settings},
    error::{Error, Kind},
    replication::{
        connection::Connection,
        handshake::Purpose,
        stream::{quote_identifier, quote_literal},
    },
    shared::Shared,
    wal,
};

/// Between two looks, of the age from which on something may go; within bounds.
const INTERVAL_SHARE: u32 = 10;
const INTERVAL_LEAST: Duration = Duration::from_secs(1);
const INTERVAL_MOST: Duration = Duration::from_secs(60);
/// How often the slot is looked at while it has not passed the position.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// So many rows go in one transaction: the slot's decoder has it in memory as a whole.
const ROWS_PER_TRANSACTION: u64 = 10_000;
/// How long one statement may take, without an index on the column that tells the age.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(10);
/// How far the time zone that is the furthest behind UTC is, whose times a column without one may have.
const ZONE_MARGIN: &str = "interval '12 hours'";

/// Goes on until the sending side of `stop` is dropped. An error is told, and does not stop the relay.
pub(crate) fn run(shared: &Shared, stop: &Receiver<()>) {
    let age = match &shared.settings.retention {
        Retention::Keep => return,
        Retention::Delete { older_than, .. } | Retention::DropPartitions { older_than } => *older_than,
    };
    let interval = (age / INTERVAL_SHARE).clamp(INTERVAL_LEAST, INTERVAL_MOST);
    let mut told = None;
    while stop.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
        // A standby has nothing to do, and whoever has the slot does it.
        if !shared.metrics.has_slot() {
            continue;
        }
        match Pass::begin(shared, stop).and_then(|mut pass| pass.run()) {
            Ok(()) => told = None,
            Err(e) => {
                shared.metrics.retention_failures.inc();
                let hint = e.hint.as_deref().map(|hint| format!(": {hint}")).unwrap_or_default();
                let said = format!("{e}{hint}");
                if told.as_ref() != Some(&said) {
                    tracing::warn!(
                        "the outbox is not cleaned, it is tried again every {} s: {said}",
                        interval.as_secs()
                    );
                    told = Some(said);
                }
            }
        }
    }
}

/// One way through the outboxes, over a connection of its own.
struct Pass<'a> {
    shared: &'a Shared,
    settings: &'a Settings,
    stop: &'a Receiver<()>,
    connection: Connection,
    /// How long the oldest row of the outboxes so far has been due to go, in seconds.
    overdue_seconds: f64,
}

impl<'a> Pass<'a> {
    fn begin(shared: &'a Shared, stop: &'a Receiver<()>) -> Result<Self, Error> {
        let settings = &*shared.settings;
        let (info, timeout) = (&settings.postgres, settings.connect_timeout);
        let mut connection = match shared.server() {
            Some(server) => Connection::connect_to(info, server, Purpose::Sql, timeout)?,
            None => Connection::connect(info, Purpose::Sql, timeout)?,
        };
        connection.set_answer_timeout(ANSWER_TIMEOUT)?;
        for sql in [
            // What a policy hides would stay for ever: let it be an error.
            "SET row_security = off",
            "SET statement_timeout = 0",
            // Whoever waits behind us does not wait for long.
            "SET lock_timeout = '2s'",
            // The text of a partition's bounds.
            "SET DateStyle = 'ISO'",
            "SET TimeZone = 'UTC'",
        ] {
            connection.simple_query(sql)?;
        }
        Ok(Self { shared, settings, stop, connection, overdue_seconds: 0.0 })
    }

    fn run(&mut self) -> Result<(), Error> {
        let mut result = Ok(());
        for outbox in &self.settings.source.outboxes {
            let done = match &self.settings.retention {
                Retention::Keep => Ok(()),
                Retention::Delete { older_than, column } => self.delete(outbox, *older_than, column),
                Retention::DropPartitions { older_than } => self.drop_partitions(outbox, *older_than),
            };
            // What one outbox lacks keeps no other from being cleaned.
            result = result.and(done);
        }
        result
    }

    /// Deletes the old rows of transactions that had ended before now.
    fn delete(&mut self, outbox: &Outbox, older_than: Duration, column: &str) -> Result<(), Error> {
        // The order counts: see above. A snapshot's xmin is of the oldest transaction that has not ended.
        let rows = self.connection.query(
            "SELECT (now() - make_interval(secs => $1::text::float8))::text, pg_snapshot_xmin(pg_current_snapshot())::xid::text",
            &[&older_than.as_secs().to_string()],
        )?;
        let Some([Some(before), Some(xmin)]) = rows.first().map(Vec::as_slice) else { return Ok(()) };
        // Ages wrap: far below 0 is one of more than 2^31 transactions. Not all below 0, because a row that is changed while it is
        // being deleted is looked at once more, and is younger than what ages are counted from.
        let old = format!(
            "{} < {}::timestamptz AND (age(xmin) > age({}::text::xid) OR age(xmin) < -1000000000)",
            quote_identifier(column),
            quote_literal(before),
            quote_literal(xmin)
        );
        let table = name(outbox);
        self.tell_overdue(outbox, column, before)?;
        let some =
            self.connection.value(&format!("SELECT EXISTS (SELECT FROM {table} WHERE {old})::text"), &[]);
        if some.map_err(|e| self.explain(outbox, e))?.as_deref() != Some("true") || !self.is_confirmed()? {
            return Ok(());
        }
        // A place in the table may have another row by now: the conditions are for this one, too.
        let sql = format!(
            "WITH gone AS (DELETE FROM {table} WHERE ctid = ANY (ARRAY(\
             SELECT ctid FROM {table} WHERE {old} LIMIT {ROWS_PER_TRANSACTION})) AND {old} RETURNING 1) \
             SELECT count(*)::text FROM gone"
        );
        while self.goes_on() {
            let count = self.connection.value(&sql, &[]).map_err(|e| self.explain(outbox, e))?;
            let count: u64 = count.and_then(|count| count.parse().ok()).unwrap_or(0);
            self.shared.metrics.retention_deleted.inc_by(count);
            tracing::debug!(count, outbox = outbox.label(), before, "deleted rows");
            if count < ROWS_PER_TRANSACTION {
                break;
            }
        }
        Ok(())
    }

    /// Says how long the oldest row has been due to go: a transaction that does not end keeps rows, and nothing fails.
    fn tell_overdue(&mut self, outbox: &Outbox, column: &str, before: &str) -> Result<(), Error> {
        let sql = format!(
            "SELECT extract(epoch FROM {}::timestamptz - min({})::timestamptz)::float8::text FROM {}",
            quote_literal(before),
            quote_identifier(column),
            name(outbox)
        );
        let seconds = self.connection.value(&sql, &[]).map_err(|e| self.explain(outbox, e))?;
        let seconds = seconds.and_then(|seconds| seconds.parse().ok()).unwrap_or(0.0);
        self.overdue_seconds = self.overdue_seconds.max(seconds);
        self.shared.metrics.retention_overdue.set(Some(self.overdue_seconds));
        Ok(())
    }

    /// Detaches what ended long ago, and drops what is detached once all of it is confirmed.
    fn drop_partitions(&mut self, outbox: &Outbox, older_than: Duration) -> Result<(), Error> {
        // By this a detached table is found again, whoever detached it was killed before it could drop it.
        let mark = format!(
            "detached from the outbox {} by cdc-relay, slot {}, to be dropped once it is confirmed",
            outbox.label(),
            self.settings.slot
        );
        let has_default = self.partitioned(outbox)?;
        for (partition, is_pending) in self.ended(outbox, older_than, &mark)? {
            if !self.goes_on() {
                return Ok(());
            }
            self.detach(outbox, &partition, &mark, is_pending, has_default)?;
        }
        let detached = self.connection.query(
            "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_description d JOIN pg_class c ON c.oid = d.objoid \
             JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE d.classoid = 'pg_class'::regclass AND d.objsubid = 0 AND d.description = $1 AND NOT c.relispartition \
             AND c.relkind IN ('r', 'p') ORDER BY 1",
            &[&mark],
        )?;
        if detached.is_empty() || !self.is_confirmed()? {
            return Ok(());
        }
        for partition in detached.into_iter().flatten().flatten() {
            let dropped = self.connection.simple_query(&format!("DROP TABLE {partition}"));
            dropped.map_err(|e| self.explain(outbox, e))?;
            self.shared.metrics.retention_dropped.inc();
            tracing::info!(partition, outbox = outbox.label(), "dropped a partition");
        }
        Ok(())
    }

    /// Whether it has a default partition.
    ///
    /// # Errors
    /// It is not partitioned by ranges of one time: then no partition is known to be over.
    fn partitioned(&mut self, outbox: &Outbox) -> Result<bool, Error> {
        let rows = self.connection.query(
            "SELECT (partstrat = 'r' AND partnatts = 1 AND EXISTS (SELECT FROM pg_attribute WHERE attrelid = partrelid \
             AND attnum = partattrs[0] AND atttypid IN ('timestamptz'::regtype, 'timestamp'::regtype, 'date'::regtype)))::text, \
             (partdefid <> 0)::text FROM pg_partitioned_table WHERE partrelid = $1::text::regclass",
            &[&name(outbox)],
        )?;
        match rows.first().map(Vec::as_slice) {
            Some([Some(fits), Some(has_default)]) if fits == "true" => Ok(has_default == "true"),
            _ => {
                let what = format!("the outbox {} is not partitioned by ranges of a time", outbox.label());
                Err(Error::new(Kind::Misconfigured, what).hint(
                    "make it PARTITION BY RANGE of a timestamptz, timestamp or date column, or set retention.mode = \"delete\"",
                ))
            }
        }
    }

    /// The partitions whose range ended before, and those that somebody began to detach for us: each with whether.
    fn ended(
        &mut self,
        outbox: &Outbox,
        older_than: Duration,
        mark: &str,
    ) -> Result<Vec<(String, bool)>, Error> {
        let sql = format!(
            "SELECT format('%I.%I', n.nspname, c.relname), i.inhdetachpending::text \
             FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
             JOIN pg_partitioned_table p ON p.partrelid = i.inhparent \
             JOIN pg_attribute a ON a.attrelid = p.partrelid AND a.attnum = p.partattrs[0] \
             WHERE i.inhparent = $1::text::regclass AND CASE WHEN i.inhdetachpending \
             THEN obj_description(c.oid, 'pg_class') IS NOT DISTINCT FROM $2 \
             ELSE substring(pg_get_expr(c.relpartbound, c.oid) FROM 'TO \\(''([^'']+)''\\)$')::timestamptz \
             + CASE WHEN a.atttypid = 'timestamptz'::regtype THEN interval '0' ELSE {ZONE_MARGIN} END \
             <= now() - make_interval(secs => $3::text::float8) END ORDER BY 1"
        );
        let seconds = older_than.as_secs().to_string();
        let rows = self.connection.query(&sql, &[&name(outbox), mark, &seconds])?;
        let partition = |row: Vec<Option<String>>| {
            let mut values = row.into_iter().flatten();
            Some((values.next()?, values.next()? == "true"))
        };
        Ok(rows.into_iter().filter_map(partition).collect())
    }

    fn detach(
        &mut self,
        outbox: &Outbox,
        partition: &str,
        mark: &str,
        is_pending: bool,
        has_default: bool,
    ) -> Result<(), Error> {
        let table = name(outbox);
        let how = match (is_pending, has_default) {
            (true, _) => " FINALIZE",
            // Writers go on meanwhile.
            (false, false) => " CONCURRENTLY",
            // Postgres has no such way beside a default partition.
            (false, true) => "",
        };
        for sql in [
            format!("COMMENT ON TABLE {partition} IS {}", quote_literal(mark)),
            format!("ALTER TABLE {table} DETACH PARTITION {partition}{how}"),
        ] {
            self.connection.simple_query(&sql).map_err(|e| self.explain(outbox, e))?;
        }
        tracing::info!(
            partition,
            outbox = outbox.label(),
            "detached a partition, to be dropped once it is confirmed"
        );
        Ok(())
    }

    /// Waits until the slot has confirmed all that is in the log now; false if that is not to be waited for any more.
    fn is_confirmed(&mut self) -> Result<bool, Error> {
        let lsn = wal::end_of_log(&mut self.connection)?.to_string();
        let sql = "SELECT (confirmed_flush_lsn >= $2::text::pg_lsn)::text FROM pg_replication_slots WHERE slot_name = $1";
        while self.goes_on() {
            if self.connection.value(sql, &[&self.settings.slot, &lsn])?.as_deref() == Some("true") {
                return Ok(true);
            }
            if self.stop.recv_timeout(LOOK_INTERVAL) != Err(RecvTimeoutError::Timeout) {
                return Ok(false);
            }
        }
        Ok(false)
    }

    fn goes_on(&self) -> bool {
        !self.shared.stopping() && self.shared.metrics.has_slot()
    }

    fn explain(&self, outbox: &Outbox, error: Error) -> Error {
        let role = quote_identifier(&self.settings.postgres.user);
        let table = name(outbox);
        let hint = match (error.sqlstate.as_deref(), &self.settings.retention) {
            (Some("42501"), Retention::DropPartitions { .. }) => {
                format!("only its owner may detach and drop partitions: GRANT <owner of {table}> TO {role}")
            }
            (Some("42501"), _) => {
                format!("let the table's owner run: GRANT SELECT, DELETE ON {table} TO {role}")
            }
            (Some("42703"), _) => "mend retention.column, or set retention.mode = \"keep\"".to_owned(),
            _ => return error,
        };
        error.hint(hint)
    }
}

fn name(outbox: &Outbox) -> String {
    let (schema, table) = outbox.name();
    format!("{}.{}", quote_identifier(schema), quote_identifier(table))
}

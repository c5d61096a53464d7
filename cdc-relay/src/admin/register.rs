//! The metrics' names, and what each says.

use prometheus_client::registry::Registry;
use relay_core::poison::{self, Policy};

use super::{DivertedLabels, ErrorLabel, Metrics};
use crate::{config::Settings, error::Kind};

impl Metrics {
    /// Registers every metric under its name.
    pub(crate) fn register(&self, r: &mut Registry, settings: &Settings) {
        self.register_work(r);
        self.register_times(r);
        self.register_troubles(r);
        let slot = ("slot".into(), settings.slot.clone().into());
        self.register_slot(r.sub_registry_with_label(slot));
        // What is counted from 0 on can be watched from its first case on.
        for kind in Kind::ALL {
            drop(self.errors.get_or_create(&ErrorLabel { kind: kind.label() }));
        }
        let parked = settings.may_park().then_some(poison::Kind::Parked);
        for kind in poison::Kind::CONFIGURABLE.into_iter().chain(parked) {
            let policy = settings.policies.of(kind);
            if policy != Policy::Halt {
                drop(self.diverted.get_or_create(&DivertedLabels::new(kind, policy)));
            }
        }
    }

    /// What goes through.
    fn register_work(&self, r: &mut Registry) {
        r.register(
            "records_enqueued",
            "Records handed to the producer, repetitions after a rewind included",
            self.records.clone(),
        );
        r.register("records_acknowledged", "Records that Kafka has acknowledged", self.acknowledged.clone());
        r.register(
            "acknowledged_bytes",
            "Bytes of these records as the in-flight limit counts them: key, value, headers and overhead",
            self.acknowledged_bytes.clone(),
        );
        r.register(
            "transactions_published",
            "Transactions of Postgres that brought records, all of which Kafka has acknowledged, with exactly-once \
             delivery committed, repetitions after a rewind included",
            self.published_transactions.clone(),
        );
        r.register(
            "kafka_transactions",
            "Transactions that Kafka has committed; with exactly-once delivery only",
            self.transactions.clone(),
        );
        r.register(
            "ignored_changes",
            "Changes in the stream that were not inserts into the outbox",
            self.ignored_changes.clone(),
        );
        r.register(
            "passed_over_rows",
            "Rows that were read again and are published already",
            self.passed_over.clone(),
        );
        r.register(
            "in_flight_records",
            "Records in flight, or waiting behind one that is",
            self.in_flight_records.clone(),
        );
        r.register("in_flight_bytes", "Bytes of the in-flight limit in use", self.in_flight_bytes.clone());
        r.register(
            "received_lsn",
            "Position in the log up to which the stream was read, as a number; absent while this relay does not stream",
            self.received_lsn.clone(),
        );
        r.register(
            "confirmed_lsn",
            "Position in the log up to which everything is in Kafka, as a number; absent while this relay does not stream",
            self.confirmed_lsn.clone(),
        );
        r.register("sessions", "Replication sessions started", self.sessions.clone());
    }

    /// How long it takes.
    fn register_times(&self, r: &mut Registry) {
        r.register(
            "acknowledgement_seconds",
            "Of each published transaction of Postgres, from its first record being read to Kafka's acknowledgement of its \
             last, with exactly-once delivery Kafka's commit",
            self.acknowledgement.clone(),
        );
        r.register(
            "commit_to_acknowledgement_seconds",
            "Of each published transaction, from its commit in Postgres to the same. By two clocks, the server's and the \
             relay's: what they differ by is in it, and what would be negative counts as 0",
            self.commit_to_acknowledgement.clone(),
        );
    }

    /// What went wrong, and what was done about it.
    fn register_troubles(&self, r: &mut Registry) {
        r.register(
            "kafka_up",
            "0 while no broker can be reached; absent until that is known, and at a standby",
            self.kafka_up.clone(),
        );
        r.register("postgres_up", "0 while the monitor cannot ask Postgres", self.postgres_up.clone());
        r.register("streaming", "1 while this relay holds the slot and streams", self.streaming.clone());
        r.register("standby", "1 while another process holds the slot", self.standby.clone());
        r.register(
            "slot_holder",
            "1 while this relay stands by, for whoever holds the slot, as far as the server tells",
            self.holder.clone(),
        );
        r.register(
            "errors",
            "Sessions, and attempts to begin one, that ended in an error, by its kind; slot_in_use leads to standing by, \
             the others to another try or the end of the process",
            self.errors.clone(),
        );
        r.register(
            "diverted_rows",
            "Rows that did not go to their own topic, by why and by what was done, repetitions after a rewind included",
            self.diverted.clone(),
        );
        r.register(
            "parked_aggregates",
            "Aggregates whose rows go to the dead-letter topic until a redrive",
            self.parked_aggregates.clone(),
        );
        r.register(
            "redriven_rows",
            "Dead letters that were published to their topic after all",
            self.redriven.clone(),
        );
        r.register(
            "replayed_records",
            "Records that were published once more because somebody asked for it",
            self.replayed.clone(),
        );
        r.register(
            "retention_deleted_rows",
            "Rows that were deleted from the outbox, confirmed and old enough",
            self.retention_deleted.clone(),
        );
        r.register(
            "retention_dropped_partitions",
            "Partitions of the outbox that were dropped, likewise",
            self.retention_dropped.clone(),
        );
        r.register(
            "retention_failures",
            "Attempts to delete or drop that failed; the log says why",
            self.retention_failures.clone(),
        );
        r.register(
            "retention_overdue_seconds",
            "For how long the oldest row has been older than retention.older_than_seconds when it was looked at last; 0 where none is; \
             absent without retention.mode = \"delete\", and while this relay does not stream",
            self.retention_overdue.clone(),
        );
    }

    /// What concerns the slot, which all of these have as a label.
    fn register_slot(&self, r: &mut Registry) {
        r.register("state", "1 for what this relay is doing", self.state.clone());
        r.register(
            "lag_seconds",
            "Age of the oldest transaction that was read and is not in Kafka, by the server's clock and ours; 0 where there is \
             none; absent while this relay does not stream",
            self.lag.clone(),
        );
        r.register(
            "slot_wal_status",
            "1 for the slot's wal_status in pg_replication_slots, or for missing",
            self.slot_wal_status.clone(),
        );
        r.register(
            "slot_confirmed_lag_bytes",
            "Log written since the slot's confirmed flush LSN",
            self.slot_confirmed_lag_bytes.clone(),
        );
        r.register(
            "slot_restart_lag_bytes",
            "Log the server keeps for the slot, which a long transaction makes longer than the confirmed lag",
            self.slot_restart_lag_bytes.clone(),
        );
        r.register(
            "slot_safe_wal_bytes",
            "Log that can still be written before the slot is in danger; below 0 once it is; absent where the server sets no limit",
            self.slot_safe_wal_bytes.clone(),
        );
        r.register(
            "slot_time_to_loss_seconds",
            "Time until slot_safe_wal_bytes are written at the present rate, if the slot stood still; absent where the server sets \
             no limit, nothing is written or nothing is known yet",
            self.slot_time_to_loss_seconds.clone(),
        );
        r.register(
            "wal_bytes_per_second",
            "Log that the server wrote lately, over five minutes or as long as it was watched",
            self.wal_bytes_per_second.clone(),
        );
    }
}

//! What Kafka needs to be for the relay: its own topics, and those that the outbox's rows go to.

use std::collections::{BTreeMap, BTreeSet};

use relay_core::{outbox::Outbox, relay::Delivery, route::is_legal_topic};

use super::Report;
use crate::{
    config::Settings,
    error::Error,
    kafka::{Partition, Survey, Surveyed, batch_bytes},
    replication::connection::Connection,
    rows,
    snapshot::Snapshot,
};

/// So many rows of each outbox are looked at for the topics that they go to.
const ROWS_LOOKED_AT: usize = 100_000;
/// So many of the largest for how large their records are.
const LARGEST_LOOKED_AT: usize = 20;

/// What a topic of the outbox's rows is proposed to have.
const PARTITIONS: usize = 6;
const REPLICAS: usize = 3;

/// Each topic in use, and its largest record that was seen, in bytes.
pub(super) type InUse = BTreeMap<String, usize>;

/// The topics that the rows of the outboxes go to, as far as they are looked at.
pub(super) fn topics_in_use(
    connection: &mut Connection,
    settings: &Settings,
    report: &mut Report,
) -> Result<InUse, Error> {
    let mut topics = InUse::new();
    let mut snapshot = Snapshot::begin(connection, settings, None, None)?;
    let mut count = 0;
    let looked =
        rows::read(&mut snapshot, &settings.source, &format!("LIMIT {ROWS_LOOKED_AT}"), |record, poison| {
            count += 1;
            if poison.is_none() && is_legal_topic(record.topic) && !topics.contains_key(record.topic) {
                topics.insert(record.topic.to_owned(), 0);
            }
            Ok(())
        });
    let looked = looked.and_then(|()| {
        rows::read_largest(&mut snapshot, settings, LARGEST_LOOKED_AT, |record, poison| {
            if poison.is_none() && is_legal_topic(record.topic) {
                let largest = topics.entry(record.topic.to_owned()).or_default();
                *largest = batch_bytes(record).max(*largest);
            }
            Ok(())
        })
    });
    match looked {
        Ok(()) => {
            snapshot.end()?;
            if count == 0 && !settings.source.outboxes.is_empty() {
                report.note("the outbox is empty: which topics its rows go to, and how large they are, was not looked at");
            }
        }
        // What follows is a new connection's.
        Err(e) => {
            // The stream needs no right on the table, so this is a choice that one can make.
            let need = match e.sqlstate.as_deref() {
                Some("42501") => " (`audit`, `replay` and `init --backfill` read them, too, and would fail)",
                _ => "",
            };
            let grant = e.hint.as_deref().map(|hint| format!(". {hint}")).unwrap_or_default();
            report.note(format!(
                "the outbox's rows were not looked at, nor the topics they go to{need}: {e}{grant}"
            ));
        }
    }
    Ok(topics)
}

/// The topics that the configuration names, whatever the rows are.
fn topics_named(settings: &Settings) -> BTreeSet<String> {
    let source = &settings.source;
    let mut named: BTreeSet<_> = source.outboxes.iter().filter_map(Outbox::constant_topic).collect();
    named.extend(source.topic_by_type.values().cloned());
    if let Some(messages) = &source.messages {
        // Where some are listed, nothing else is allowed.
        let constant = messages.outbox.constant_topic().filter(|_| messages.topics.is_empty());
        named.extend(messages.topics.iter().cloned().chain(constant));
    }
    named
}

/// Looks at the brokers.
pub(super) fn examine(survey: &Survey, settings: &Settings, in_use: &InUse, report: &mut Report) {
    let mut own = vec![(&settings.kafka.checkpoint_topic, true)];
    if settings.may_dead_letter() {
        own.push((&settings.dead_letter_topic, false));
    }
    if settings.may_park() {
        own.push((&settings.parked_keys_topic, true));
    }
    for (name, is_compacted) in own {
        examine_own(survey, settings, name, is_compacted, report);
    }
    for (name, largest) in in_use {
        examine_topic(survey, settings, name, Some(*largest), report);
    }
    for name in topics_named(settings).difference(&in_use.keys().cloned().collect()) {
        examine_topic(survey, settings, name, None, report);
    }
    if settings.delivery != Delivery::AtLeastOnce
        && let Some(most) =
            survey.broker_setting("transaction.max.timeout.ms").and_then(|ms| ms.parse::<u128>().ok())
        && settings.transaction_timeout.as_millis() > most
    {
        let found = format!(
            "transactions.timeout_seconds is {}, and the brokers allow {most} ms (transaction.max.timeout.ms)",
            settings.transaction_timeout.as_secs()
        );
        let mend = format!("# set transactions.timeout_seconds to {} at most", most / 1000);
        report.finding("transaction-timeout", &"", found, &[&mend]);
    }
}

/// A topic of the relay's own.
fn examine_own(survey: &Survey, settings: &Settings, name: &str, is_compacted: bool, report: &mut Report) {
    match survey.topic(name) {
        Surveyed::Missing => {
            report.finding(
                "own-topic-missing",
                &"",
                format!("the relay's topic {name} does not exist"),
                &["cdc-relay init"],
            );
        }
        Surveyed::Topic { partitions, settings: there } => {
            let policy = there.get("cleanup.policy").map_or("", String::as_str);
            let compacts = policy.split(',').any(|policy| policy.trim() == "compact");
            let deletes = policy.split(',').any(|policy| policy.trim() == "delete");
            if is_compacted && !policy.is_empty() && (!compacts || deletes) {
                let found = format!(
                    "cleanup.policy of {name} is {policy}: Kafka forgets what the relay has written down there"
                );
                report.finding(
                    "own-topic-forgets",
                    &"",
                    found,
                    &[&alter(settings, name, "cleanup.policy=compact")],
                );
            }
            if !is_compacted && there.get("retention.ms").is_some_and(|ms| ms != "-1") {
                let found = format!(
                    "retention.ms of {name} is not -1: dead letters are gone after a while, and with them the rows"
                );
                report.finding(
                    "dead-letters-expire",
                    &"",
                    found,
                    &[&alter(settings, name, "retention.ms=-1")],
                );
            }
            examine_replicas(settings, name, &partitions, &there, report);
        }
        Surveyed::Unauthorized => unauthorized(name, report),
        Surveyed::NoAnswer => report.note(format!("no broker could tell about topic {name}")),
    }
}

/// A topic that rows go to, with their largest in bytes, or that only the configuration names.
fn examine_topic(
    survey: &Survey,
    settings: &Settings,
    name: &str,
    largest: Option<usize>,
    report: &mut Report,
) {
    match survey.topic(name) {
        Surveyed::Missing => {
            let who = if largest.is_some() { "rows of the outbox go" } else { "the configuration routes" };
            let found = format!("{who} to topic {name}, which does not exist");
            let replicas = survey.brokers.len().clamp(1, REPLICAS);
            let in_sync = if replicas > 1 { " --config min.insync.replicas=2" } else { "" };
            let create = format!(
                "kafka-topics.sh --bootstrap-server {} --create --topic {name} --partitions {PARTITIONS} \
                 --replication-factor {replicas}{in_sync}",
                settings.kafka.brokers
            );
            let note = "# as many partitions as consumers of a group may ever share: to add some later moves keys to others";
            report.finding("topic-missing", &"", found, &[note, &create]);
        }
        Surveyed::Topic { partitions, settings: there } => {
            let limit = there.get("max.message.bytes").and_then(|bytes| bytes.parse::<usize>().ok());
            if let (Some(limit), Some(largest)) = (limit, largest)
                && limit < largest
            {
                let found = format!(
                    "max.message.bytes of {name} is {limit}, and the outbox has a row that makes {largest}"
                );
                let more = format!("max.message.bytes={}", largest.next_multiple_of(1 << 20));
                report.finding("topic-too-small", &"", found, &[&alter(settings, name, &more)]);
            }
            examine_replicas(settings, name, &partitions, &there, report);
        }
        Surveyed::Unauthorized => unauthorized(name, report),
        Surveyed::NoAnswer => report.note(format!("no broker could tell about topic {name}")),
    }
}

fn unauthorized(name: &str, report: &mut Report) {
    report.finding(
        "topic-not-allowed",
        &"",
        format!("Kafka does not let us see topic {name}"),
        &[&format!("kafka-acls.sh --add --producer --topic {name} --allow-principal User:…")],
    );
}

fn examine_replicas(
    settings: &Settings,
    name: &str,
    partitions: &[Partition],
    there: &BTreeMap<String, String>,
    report: &mut Report,
) {
    let Some(least) = there.get("min.insync.replicas").and_then(|n| n.parse::<usize>().ok()) else { return };
    let replicas = partitions.iter().map(|p| p.replicas.len()).min().unwrap_or(0);
    if replicas < least {
        let found = format!(
            "topic {name} has {replicas} replicas and min.insync.replicas is {least}: brokers that count no further than there are \
             replicas (KIP-966) take records all the same, others none"
        );
        let lower = format!("min.insync.replicas={}", replicas.saturating_sub(1).max(1));
        report.finding("too-few-replicas", &"", found, &[&alter(settings, name, &lower)]);
        return;
    }
    let behind: Vec<_> = partitions.iter().enumerate().filter(|(_, p)| p.in_sync.len() < least).collect();
    if let Some((number, Partition { replicas, in_sync })) = behind.first() {
        let away: Vec<String> =
            replicas.iter().filter(|id| !in_sync.contains(id)).map(i32::to_string).collect();
        let found = format!(
            "{} of {} partitions of {name} have fewer replicas in sync than min.insync.replicas, {least}, and take no record: \
             partition {number} has {}",
            behind.len(),
            partitions.len(),
            in_sync.len()
        );
        let mend = format!("# start the brokers that are behind or away: {}", away.join(", "));
        report.finding("too-few-in-sync", &"", found, &[&mend]);
    } else if least == 1 && replicas > 1 {
        let found = format!(
            "min.insync.replicas of {name} is 1: a record counts as published once one broker has it, and is lost with that one"
        );
        report.finding(
            "one-replica-is-enough",
            &"",
            found,
            &[&alter(settings, name, "min.insync.replicas=2")],
        );
    }
}

fn alter(settings: &Settings, topic: &str, set: &str) -> String {
    format!(
        "kafka-configs.sh --bootstrap-server {} --alter --entity-type topics --entity-name {topic} --add-config {set}",
        settings.kafka.brokers
    )
}

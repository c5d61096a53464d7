//! `consumer dlq`: what it shows, and byte by byte what it sends to the group.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use rdkafka::{
    Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
    message::{Header, Headers, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use serde_json::{Value, json};

use crate::stage::{PATIENCE, Said, Stage, on_stage};

/// A record as it was written or read.
#[derive(Debug, Clone, Default, PartialEq)]
struct Raw {
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    headers: Vec<(String, Option<Vec<u8>>)>,
    timestamp_ms: i64,
}

/// When the records were written: another time than now, and none that retention is over for.
static WRITTEN_MS: LazyLock<i64> = LazyLock::new(|| chrono::Utc::now().timestamp_millis() - 3_600_123);

/// A record that a handler could not use.
fn poison(key: &str) -> Raw {
    Raw {
        key: Some(key.into()),
        value: Some(b"{\"price\": 1.10, \"raw\": \"\xc3\xa9\"}".to_vec()),
        headers: vec![
            ("type".into(), Some(b"OrderCreated".to_vec())),
            ("binary".into(), Some(vec![0xff, 0])),
            ("nothing".into(), None),
            ("type".into(), Some(b"Twice".to_vec())),
        ],
        timestamp_ms: *WRITTEN_MS,
    }
}

/// Writes a record and gives back where it is.
async fn write(stage: &Stage, topic: &str, record: &Raw) -> (i32, i64) {
    let producer: FutureProducer =
        stage.client().set("partitioner", "murmur2_random").set("acks", "all").create().unwrap();
    let headers = record.headers.iter().fold(OwnedHeaders::new(), |headers, (key, value)| {
        headers.insert(Header { key, value: value.as_ref() })
    });
    let mut out: FutureRecord<'_, [u8], [u8]> = FutureRecord::to(topic).headers(headers);
    out.key = record.key.as_deref();
    out.payload = record.value.as_deref();
    out.timestamp = Some(record.timestamp_ms);
    let delivery = producer.send(out, PATIENCE).await.unwrap();
    (delivery.partition, delivery.offset)
}

/// All records of a topic, each with its partition.
async fn read(stage: &Stage, topic: &str) -> Vec<(i32, Raw)> {
    let (mut config, topic, partitions) = (stage.client(), topic.to_owned(), stage.partitions);
    config.set("group.id", "reader").set("enable.partition.eof", "true");
    let read = move || {
        let consumer: BaseConsumer = config.create().unwrap();
        let mut list = TopicPartitionList::new();
        for partition in 0..partitions {
            list.add_partition_offset(&topic, partition, Offset::Beginning).unwrap();
        }
        consumer.assign(&list).unwrap();
        let (mut records, mut ended) = (Vec::new(), 0);
        while ended < partitions {
            let message = match consumer.poll(Duration::from_secs(30)).expect("Kafka must answer") {
                Err(KafkaError::PartitionEOF(_)) => {
                    ended += 1;
                    continue;
                }
                other => other.unwrap(),
            };
            let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
            let raw = Raw {
                key: message.key().map(<[u8]>::to_vec),
                value: message.payload().map(<[u8]>::to_vec),
                headers: headers.map(|h| (h.key.to_owned(), h.value.map(<[u8]>::to_vec))).collect(),
                timestamp_ms: message.timestamp().to_millis().unwrap(),
            };
            records.push((message.partition(), raw));
        }
        records
    };
    tokio::task::spawn_blocking(read).await.unwrap()
}

fn texts<const N: usize>(headers: [(&str, &str); N]) -> Vec<(String, Option<Vec<u8>>)> {
    headers.into_iter().map(|(name, value)| (name.into(), Some(value.into()))).collect()
}

/// A dead letter, as the consumer leaves it.
struct Letter {
    /// Its name.
    name: String,
    partition: i32,
    offset: i64,
}

/// What a letter is like.
#[derive(Clone)]
struct Like {
    record: Raw,
    /// The record is in its topic, and not only its name in the table.
    original: bool,
    /// Its copy is in the dead-letter topic; `false` for one of another letter's.
    copy: Option<bool>,
    without_value: bool,
    reason: &'static str,
    event_type: Option<&'static str>,
    redrives: i32,
    blocks_key: bool,
    minutes_ago: i32,
}

impl Like {
    fn of(key: &str) -> Self {
        Self {
            record: poison(key),
            original: true,
            copy: Some(true),
            without_value: false,
            reason: "missing_field",
            event_type: Some("OrderCreated"),
            redrives: 0,
            blocks_key: false,
            minutes_ago: 10,
        }
    }

    /// Makes it so.
    async fn put(self, stage: &Stage) -> Letter {
        let (partition, offset) = if self.original {
            write(stage, &stage.topic, &self.record).await
        } else {
            (0, fastrand::i64(1_000_000..2_000_000))
        };
        let mut place = None;
        if let Some(is_its) = self.copy {
            let mut copy = self.record.clone();
            copy.headers.extend(texts([
                ("dlq.reason", self.reason),
                ("dlq.topic", &stage.topic),
                ("dlq.partition", &partition.to_string()),
                ("dlq.offset", &(if is_its { offset } else { offset + 1 }).to_string()),
                ("dlq.group", &stage.name),
                ("redrive.number", "7"),
            ]));
            if self.without_value {
                copy.value = None;
                copy.headers.extend(texts([("dlq.value_omitted", "33")]));
            } else {
                // So that it shows where a record was taken from.
                copy.headers.insert(0, ("copy".into(), Some(b"yes".to_vec())));
            }
            place = Some(write(stage, &stage.dlq(), &copy).await);
        }
        sqlx::query(
            "INSERT INTO dead_letters (consumer_group, topic, partition, record_offset, key, event_type, written_at,
                 reason, error, attempts, blocks_key, dead_at, dlq_partition, dlq_offset, redrives)
             VALUES ($1, $2, $3, $4, $5, $6, to_timestamp($7 / 1000.0), $8, 'the field is missing', 4, $9,
                 now() - make_interval(mins => $10), $11, $12, $13)",
        )
        .bind(&stage.name)
        .bind(&stage.topic)
        .bind(partition)
        .bind(offset)
        .bind(&self.record.key)
        .bind(self.event_type)
        .bind(self.record.timestamp_ms)
        .bind(self.reason)
        .bind(self.blocks_key)
        .bind(self.minutes_ago)
        .bind(place.map(|(partition, _)| partition))
        .bind(place.map(|(_, offset)| offset))
        .bind(self.redrives)
        .execute(&stage.pool)
        .await
        .unwrap();
        Letter { name: format!("{}/{partition}/{offset}", stage.topic), partition, offset }
    }
}

async fn park(stage: &Stage, key: &str, count: i64) {
    let sql = "INSERT INTO parked_records (consumer_group, topic, partition, record_offset, key)
               SELECT $1, $2, 0, 5000 + n + 1000 * length($3), $3 FROM generate_series(1, $4) AS n";
    let query = sqlx::query(sql).bind(&stage.name).bind(&stage.topic).bind(key.as_bytes()).bind(count);
    query.execute(&stage.pool).await.unwrap();
}

/// With the tables, the topics and nothing in them.
async fn prepare(stage: &Stage) {
    stage.migrate().await;
    stage.create_topic(&stage.dlq()).await;
    stage.create_topic(&stage.redrive()).await;
}

async fn dlq(stage: &Arc<Stage>, arguments: &[&str]) -> Said {
    let arguments: Vec<&str> = [&["dlq"], arguments].concat();
    stage.operate("pharmacy", &arguments).await
}

/// Of each letter told about, what became of it.
fn outcomes(said: &Said) -> Vec<(String, String)> {
    let text = |object: &Value, name: &str| object[name].as_str().unwrap().to_owned();
    said.objects().iter().map(|object| (text(object, "letter"), text(object, "outcome"))).collect()
}

#[test]
fn a_list_is_a_table_with_ages_what_is_parked_and_counts_and_filters_choose() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        let old = Like { blocks_key: true, minutes_ago: 300, ..Like::of("a") }.put(&stage).await;
        let young =
            Like { reason: "not_json", event_type: None, redrives: 2, ..Like::of("b") }.put(&stage).await;
        let settled = Like { minutes_ago: 1, ..Like::of("a") }.put(&stage).await;
        let settle = "UPDATE dead_letters SET settled_at = now(), outcome = 'applied' WHERE record_offset = ";
        stage.run(&format!("{settle}{}", settled.offset)).await;
        park(&stage, "a", 3).await;
        park(&stage, "other", 5).await;
        // Another group's are not ours to show.
        stage
            .run(
                "INSERT INTO dead_letters SELECT 'another', topic, partition, record_offset, key, event_type,
                 written_at, 'another', error, attempts, blocks_key FROM dead_letters",
            )
            .await;

        let said = dlq(&stage, &["list"]).await;
        let lines: Vec<Vec<&str>> =
            said.well().lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0].join(" "), "LETTER REASON TYPE KEY ATTEMPTS REDRIVES SINCE PARKED STATE");
        assert_eq!(lines[1], [&old.name, "missing_field", "OrderCreated", "a", "4", "0", "5h", "3", "open"]);
        assert_eq!(lines[2], [&young.name, "not_json", "-", "b", "4", "2", "10m", "0", "open"]);
        assert_eq!(
            lines[3].join(" "),
            "2 letters: 1 missing_field, 1 not_json; 3 records parked behind them"
        );
        assert_eq!(lines.len(), 4);

        let chosen = async |arguments: &[&str]| {
            let said = dlq(&stage, &[&["list", "--json"], arguments].concat()).await;
            said.well();
            let names = said.objects().iter().map(|o| o["letter"].as_str().unwrap().to_owned()).collect();
            let names: Vec<String> = names;
            names
        };
        assert_eq!(chosen(&[]).await, [&*old.name, &young.name]);
        assert_eq!(chosen(&["--all-states"]).await, [&*old.name, &young.name, &settled.name]);
        assert_eq!(chosen(&["--reason", "not_json"]).await, [&*young.name]);
        assert_eq!(
            chosen(&["--reason", "not_json", "--reason", "missing_field"]).await,
            [&*old.name, &young.name]
        );
        assert_eq!(chosen(&["--type", "OrderCreated"]).await, [&*old.name]);
        assert_eq!(chosen(&["--key", "b"]).await, [&*young.name]);
        assert_eq!(chosen(&["--from", "1h"]).await, [&*young.name]);
        assert_eq!(chosen(&["--to", "1h"]).await, [&*old.name]);
        assert_eq!(chosen(&["--from", "2099-01-01T00:00:00Z"]).await, Vec::<String>::new());
        assert_eq!(chosen(&["--key", "b", "--reason", "missing_field"]).await, Vec::<String>::new());
        assert_eq!(chosen(&["--limit", "1"]).await, [&*old.name]);
        let said = dlq(&stage, &["list", "--limit", "1"]).await;
        assert!(said.err.contains("1 newer letters are not shown"), "{said:?}");
        let said = dlq(&stage, &["list", "--from", "yesterday"]).await;
        assert!(said.code == Some(64) && said.err.contains("15m"), "{said:?}");
    });
}

#[test]
fn a_letter_is_shown_whole() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        let letter = Like { blocks_key: true, ..Like::of("a") }.put(&stage).await;
        park(&stage, "a", 22).await;
        let said = dlq(&stage, &["show", &letter.name]).await;
        let written = chrono::DateTime::from_timestamp_millis(*WRITTEN_MS).unwrap();
        for line in [
            &format!("letter     {}", letter.name),
            "state      open",
            "error      the field is missing",
            "attempts   4",
            &format!("written    {}", written.format("%Y-%m-%dT%H:%M:%S%.3fZ")),
            "blocks key yes",
            &format!("parked     {}/0/6001 since", stage.topic),
            "parked     and 2 more",
            &format!("record     {}/0/0", stage.dlq()),
            "header     binary: 0xff00",
            "header     nothing: (null)",
            &format!("header     dlq.offset: {}", letter.offset),
            "value      28 bytes\n{\n  \"price\": 1.10,\n  \"raw\": \"é\"\n}\n",
        ] {
            assert!(said.well().contains(line), "{line} is not in\n{}", said.out);
        }
        let object = dlq(&stage, &["show", "--json", &letter.name]).await.objects().remove(0);
        assert_eq!(object["value"].as_str().unwrap().as_bytes(), poison("a").value.unwrap());
        assert_eq!(object["headers"][2], json!({ "name": "binary", "valueHex": "ff00" }));
        assert_eq!(object["parked"], 22);
        let said = dlq(&stage, &["show", "--raw", &letter.name]).await;
        assert_eq!(said.well().as_bytes(), poison("a").value.unwrap());

        let gone = Like { original: false, copy: None, ..Like::of("b") }.put(&stage).await;
        let said = dlq(&stage, &["show", &gone.name]).await;
        assert!(said.well().contains("record     gone"), "{said:?}");
        let said = dlq(&stage, &["show", &format!("{}/0/99", stage.topic)]).await;
        assert!(said.code == Some(64) && said.err.contains("has no dead letter"), "{said:?}");
        let said = dlq(&stage, &["show", "nonsense"]).await;
        assert!(said.code == Some(64) && said.err.contains("TOPIC/PARTITION/OFFSET"), "{said:?}");
    });
}

/// The record that a redrive of a letter is.
fn redriven(stage: &Stage, letter: &Letter, record: Raw, number: &str, action: &str) -> Raw {
    let mut expected = record;
    expected.headers.extend(texts([
        ("redrive.topic", &stage.topic),
        ("redrive.partition", &letter.partition.to_string()),
        ("redrive.offset", &letter.offset.to_string()),
        ("redrive.number", number),
        ("redrive.action", action),
    ]));
    expected
}

#[test]
fn a_redriven_record_is_the_original_and_says_which_letter_it_is() {
    on_stage(3, async |stage| {
        prepare(&stage).await;
        let whole = Like { redrives: 1, ..Like::of("whole") }.put(&stage).await;
        let omitted = Like { without_value: true, ..Like::of("omitted") }.put(&stage).await;
        let unacknowledged = Like { copy: None, ..Like::of("unacknowledged") }.put(&stage).await;
        let replaced = Like { copy: Some(false), ..Like::of("replaced") }.put(&stage).await;
        let before = stage.texts("SELECT d::text FROM dead_letters AS d ORDER BY d").await;

        let said = dlq(&stage, &["redrive", "--all", "--dry-run", "--json"]).await;
        said.well();
        assert_eq!(outcomes(&said).len(), 4);
        assert!(outcomes(&said).iter().all(|(_, outcome)| outcome == "would be redriven"), "{said:?}");
        assert_eq!(read(&stage, &stage.redrive()).await, []);
        assert_eq!(stage.texts("SELECT d::text FROM dead_letters AS d ORDER BY d").await, before);

        let said = dlq(&stage, &["redrive", "--all", "--no-wait", "--json", "--rate", "1000"]).await;
        said.well();
        let mut in_order = outcomes(&said);
        in_order.sort_by_key(|(name, _)| {
            let mut parts = name.rsplit('/').map(|part| part.parse::<i64>().unwrap_or_default());
            let offset = parts.next();
            (parts.next(), offset)
        });
        assert_eq!(outcomes(&said), in_order, "in the order of their places");
        let found = read(&stage, &stage.redrive()).await;
        let with_mark = |key: &str| {
            let mut record = poison(key);
            record.headers.insert(0, ("copy".into(), Some(b"yes".to_vec())));
            record
        };
        for (letter, record, number) in [
            (&whole, with_mark("whole"), "2"),
            (&omitted, poison("omitted"), "1"),
            (&unacknowledged, poison("unacknowledged"), "1"),
            (&replaced, poison("replaced"), "1"),
        ] {
            // The key goes to the same partition everywhere.
            let expected = (letter.partition, redriven(&stage, letter, record, number, "apply"));
            assert!(found.contains(&expected), "{expected:?} is not in {found:#?}");
        }
        assert_eq!(found.len(), 4);
        let counted =
            "SELECT count(*) FROM dead_letters WHERE redriven_at IS NOT NULL AND settled_at IS NULL";
        assert_eq!(stage.number(counted).await, 4);
        assert_eq!(stage.texts("SELECT max(redrives)::text FROM dead_letters").await, ["2"]);
    });
}

#[test]
fn what_cannot_be_redriven_stays_open_and_says_why_and_can_be_discarded() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        let gone = Like { original: false, copy: None, ..Like::of("gone") }.put(&stage).await;
        let too_often = Like { redrives: 5, ..Like::of("too-often") }.put(&stage).await;
        // Something else is at its place by now.
        let another = Like { copy: None, ..Like::of("another") }.put(&stage).await;
        let sql = "UPDATE dead_letters SET written_at = written_at - interval '1 s' WHERE key = 'another'";
        stage.run(sql).await;
        let valueless = Like { original: false, without_value: true, ..Like::of("valueless") };
        let valueless = valueless.put(&stage).await;

        let said = dlq(&stage, &["redrive", "--all", "--json"]).await;
        assert_eq!(said.code, Some(65), "{said:?}");
        assert!(said.err.contains("4 of 4 letters stay open"), "{said:?}");
        for (letter, why) in [
            (&gone, format!("dlq discard {} --yes", gone.name)),
            (&too_often, "redriven 5 times already".into()),
            (&another, "its record is gone".into()),
            (&valueless, "its value was too large".into()),
        ] {
            let told = said.objects().into_iter().find(|object| object["letter"] == letter.name).unwrap();
            assert_eq!(told["outcome"], "refused");
            assert!(told["detail"].as_str().unwrap().contains(&why), "{told}");
        }
        assert_eq!(read(&stage, &stage.redrive()).await, []);

        let said =
            dlq(&stage, &["redrive", &too_often.name, "--redrives-max", "6", "--no-wait", "--json"]).await;
        said.well();
        assert_eq!(outcomes(&said), [(too_often.name.clone(), "sent".into())]);
        let sent = read(&stage, &stage.redrive()).await;
        assert_eq!(sent.len(), 1);

        let said = dlq(&stage, &["discard", &gone.name, "--json"]).await;
        assert_eq!(said.code, Some(64), "{said:?}");
        assert!(said.err.contains("nothing was discarded") && said.err.contains("--yes"), "{said:?}");
        assert_eq!(outcomes(&said), [(gone.name.clone(), "would be discarded".into())]);
        assert_eq!(read(&stage, &stage.redrive()).await, sent);

        let said = dlq(&stage, &["discard", &gone.name, "--yes", "--no-wait"]).await;
        assert!(said.well().contains("sent"), "{said:?}");
        let sent = read(&stage, &stage.redrive()).await;
        let record = Raw { value: None, headers: Vec::new(), ..poison("gone") };
        assert_eq!(sent[1], (0, redriven(&stage, &gone, record, "1", "discard")));
    });
}

#[test]
fn letters_have_to_be_named_and_to_be_there() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        let said = dlq(&stage, &["redrive"]).await;
        assert!(said.code == Some(64) && said.err.contains("--all"), "{said:?}");
        let said = dlq(&stage, &["redrive", "--all"]).await;
        assert_eq!(said.well(), "there are no such letters\n");
        let letter = Like::of("a").put(&stage).await;
        stage.run("UPDATE dead_letters SET settled_at = now(), outcome = 'discarded'").await;
        let absent = format!("{}/0/99", stage.topic);
        let said = dlq(&stage, &["redrive", &letter.name, &absent, "--json"]).await;
        assert_eq!(said.code, Some(65), "{said:?}");
        assert_eq!(outcomes(&said), [(letter.name, "discarded".into()), (absent, "refused".into())]);
        assert_eq!(read(&stage, &stage.redrive()).await, []);
    });
}

#[test]
fn without_the_groups_own_topic_it_tells_what_makes_it() {
    on_stage(3, async |stage| {
        stage.migrate().await;
        let said = dlq(&stage, &["redrive", "--all"]).await;
        assert_eq!(said.code, Some(69), "{said:?}");
        let command = format!(
            "kafka-topics.sh --bootstrap-server {} --create --topic {} --partitions 3 --replication-factor 1",
            stage.brokers,
            stage.redrive()
        );
        assert!(said.err.contains(&command), "{said:?}");
        let mut command = stage.command("pharmacy");
        command.args(["dlq", "redrive", "--all", "--brokers", "127.0.0.1:1"]);
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(75) && told.contains("Kafka at 127.0.0.1:1"), "{told}");
    });
}

#[test]
fn where_nobody_consumes_it_gives_up_waiting_and_the_letter_is_still_there() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        let letter = Like::of("a").put(&stage).await;
        let said = dlq(&stage, &["redrive", "--all", "--json"]).await;
        assert_eq!(said.code, Some(75), "{said:?}");
        assert_eq!(outcomes(&said), [(letter.name, "waiting".into())]);
        assert!(said.err.contains("no instance of") && said.err.contains("--handler pharmacy"), "{said:?}");
        assert!(said.err.contains("waiting until"), "it tells what it waits for: {said:?}");
        assert_eq!(read(&stage, &stage.redrive()).await.len(), 1);
        let open = dlq(&stage, &["list", "--json"]).await.objects();
        assert_eq!((&open[0]["state"], &open[0]["redrives"]), (&json!("redriven"), &json!(1)));
    });
}

/// The table is all that it looks at, so this stands for the group here.
#[test]
fn each_outcome_is_told_when_the_group_has_dealt_with_its_letter() {
    on_stage(1, async |stage| {
        prepare(&stage).await;
        let applied = Like::of("applied").put(&stage).await;
        let failed = Like::of("failed").put(&stage).await;
        let group = async {
            stage.until_number("SELECT count(*) FROM dead_letters WHERE redriven_at IS NOT NULL", 2).await;
            let applied =
                "UPDATE dead_letters SET settled_at = now(), outcome = 'applied' WHERE key = 'applied'";
            stage.run(applied).await;
            let failed = "UPDATE dead_letters SET dead_at = now(), error = 'as before' WHERE key = 'failed'";
            stage.run(failed).await;
        };
        let redrive = ["redrive", "--key", "applied", "--key", "failed", "--json"];
        let (said, ()) = tokio::join!(dlq(&stage, &redrive), group);
        assert_eq!(said.code, Some(65), "{said:?}");
        assert!(said.err.contains("1 of 2 letters stay open"), "{said:?}");
        assert_eq!(outcomes(&said), [(applied.name, "applied".into()), (failed.name, "failed again".into())]);
        assert!(said.objects()[1]["detail"].as_str().unwrap().contains("as before"), "{said:?}");
    });
}

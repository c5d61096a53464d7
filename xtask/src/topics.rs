//! The topics of the order system: `contracts/topics.txt`, made through the client's admin API.

use std::{collections::BTreeMap, path::Path, time::Duration};

use rdkafka::{
    ClientConfig, ClientContext,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer, ConsumerContext},
    types::RDKafkaErrorCode,
};

use crate::failure::{Explain, Failure, Result};

/// How long the brokers may take to make the topics, and to elect their leaders.
const LIMIT: Duration = Duration::from_secs(30);
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// A line of `contracts/topics.txt`: `name partitions key=value…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Topic {
    pub name: String,
    pub partitions: i32,
    pub settings: BTreeMap<String, String>,
}

/// A client that keeps its complaints to itself: a broker that is not up yet is what we wait for.
#[derive(Debug)]
pub(crate) struct Quiet;

impl ClientContext for Quiet {
    fn log(&self, _: RDKafkaLogLevel, _: &str, _: &str) {}
    fn error(&self, _: rdkafka::error::KafkaError, _: &str) {}
}

impl ConsumerContext for Quiet {}

/// Reads the topics from the repository.
pub(crate) fn read(root: &Path) -> Result<Vec<Topic>> {
    let path = root.join("contracts/topics.txt");
    let text = std::fs::read_to_string(&path).explain(|| format!("read {}", path.display()))?;
    parse(&text).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

fn parse(text: &str) -> std::result::Result<Vec<Topic>, String> {
    let mut topics: Vec<Topic> = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_ascii_whitespace();
        let Some(name) = words.next() else { continue };
        let partitions =
            words.next().and_then(|word| word.parse().ok()).filter(|count| (1..=1000).contains(count));
        let partitions = partitions.ok_or(format!("line {number}: want `name partitions key=value…`"))?;
        if topics.iter().any(|topic| topic.name == name) {
            return Err(format!("line {number}: {name} is there twice"));
        }
        let mut settings = BTreeMap::new();
        for word in words {
            let (key, value) =
                word.split_once('=').ok_or(format!("line {number}: {word:?} is not key=value"))?;
            settings.insert(key.to_owned(), value.to_owned());
        }
        topics.push(Topic { name: name.to_owned(), partitions, settings });
    }
    Ok(topics)
}

pub(crate) fn client(bootstrap: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", bootstrap)
        .set("reconnect.backoff.ms", "50")
        .set("reconnect.backoff.max.ms", "200")
        .set_log_level(RDKafkaLogLevel::Emerg);
    config
}

/// Makes the topics that are not there yet and waits until each partition has a leader. Returns how many there
/// are. A topic that exists with another number of partitions is an error: its keys live in those partitions.
pub(crate) async fn create(bootstrap: &str, topics: Vec<Topic>, replication: i32) -> Result<usize> {
    let admin: AdminClient<Quiet> =
        client(bootstrap).create_with_context(Quiet).explain(|| "make a Kafka admin client".to_owned())?;
    let wanted: Vec<NewTopic<'_>> = topics
        .iter()
        .map(|topic| {
            let new = NewTopic::new(&topic.name, topic.partitions, TopicReplication::Fixed(replication));
            topic.settings.iter().fold(new, |new, (key, value)| new.set(key, value))
        })
        .collect();
    let options = AdminOptions::new().operation_timeout(Some(LIMIT)).request_timeout(Some(LIMIT));
    let until = std::time::Instant::now() + LIMIT;
    loop {
        let results =
            admin.create_topics(&wanted, &options).await.explain(|| "create the topics".to_owned())?;
        let refused = results.into_iter().find_map(|result| match result {
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => None,
            Err(refused) => Some(refused),
        });
        match refused {
            None => break,
            // The controller has not heard of all brokers yet.
            Some((_, RDKafkaErrorCode::InvalidReplicationFactor)) if std::time::Instant::now() < until => {
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
            Some((name, code)) => {
                return Err(Failure::new(format!("cannot create the topic {name}: {code}")));
            }
        }
    }
    let count = topics.len();
    let bootstrap = bootstrap.to_owned();
    tokio::task::spawn_blocking(move || led(&bootstrap, &topics))
        .await
        .explain(|| "wait for the topics".to_owned())??;
    Ok(count)
}

/// Removes a topic; the brokers remove its files later.
pub(crate) async fn delete(bootstrap: &str, topic: &str) -> Result<()> {
    let admin: AdminClient<Quiet> =
        client(bootstrap).create_with_context(Quiet).explain(|| "make a Kafka admin client".to_owned())?;
    let options = AdminOptions::new().operation_timeout(Some(LIMIT)).request_timeout(Some(LIMIT));
    let what = || format!("delete the topic {topic}");
    let results = admin.delete_topics(&[topic], &options).await.explain(what)?;
    results.into_iter().try_for_each(|result| match result {
        Ok(_) => Ok(()),
        Err((name, code)) => Err(Failure::new(format!("cannot delete the topic {name}: {code}"))),
    })
}

/// Waits until every partition has a leader.
fn led(bootstrap: &str, topics: &[Topic]) -> Result<()> {
    let consumer: BaseConsumer<Quiet> =
        client(bootstrap).create_with_context(Quiet).explain(|| "make a Kafka client".to_owned())?;
    let until = std::time::Instant::now() + LIMIT;
    loop {
        let mut missing = None;
        let metadata =
            consumer.fetch_metadata(None, LIMIT).explain(|| "ask Kafka for its topics".to_owned())?;
        for topic in topics {
            let found = metadata.topics().iter().find(|known| known.name() == topic.name);
            let partitions = found.map_or(0, |known| known.partitions().len());
            let led = found.is_some_and(|known| known.partitions().iter().all(|part| part.leader() >= 0));
            let wanted = usize::try_from(topic.partitions).unwrap_or(0);
            if led && partitions != 0 && partitions != wanted {
                return Err(Failure::new(format!(
                    "the topic {} has {partitions} partitions, and contracts/topics.txt wants {wanted}",
                    topic.name
                ))
                .hint("--fresh makes it anew, without its records"));
            }
            if !led || partitions != wanted {
                missing = Some(&topic.name);
            }
        }
        match missing {
            None => return Ok(()),
            Some(name) if std::time::Instant::now() > until => {
                return Err(Failure::new(format!(
                    "the topic {name} has no leader after {} s",
                    LIMIT.as_secs()
                )));
            }
            Some(_) => std::thread::sleep(LOOK_INTERVAL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_holds_names_partitions_settings_and_comments() {
        let topics =
            parse("# all\n\norder-events 6\nchanges 1 cleanup.policy=compact a=b=c # why\n").unwrap();
        assert_eq!(topics.len(), 2);
        assert_eq!((topics[0].name.as_str(), topics[0].partitions), ("order-events", 6));
        assert!(topics[0].settings.is_empty());
        assert_eq!(topics[1].settings["cleanup.policy"], "compact");
        assert_eq!(topics[1].settings["a"], "b=c");
    }

    #[test]
    fn mistakes_are_told_with_their_line() {
        assert!(parse("a 1\nb\n").unwrap_err().contains("line 2"));
        assert!(parse("a 0").unwrap_err().contains("line 1"));
        assert!(parse("a many").is_err());
        assert!(parse("a 1 compact").unwrap_err().contains("key=value"));
        assert!(parse("a 1\na 2").unwrap_err().contains("twice"));
    }

    #[test]
    fn the_repositorys_own_file_is_well_formed() {
        let topics = parse(include_str!("../../contracts/topics.txt")).unwrap();
        assert!(topics.iter().any(|topic| topic.name == "order-events" && topic.partitions == 6));
    }
}

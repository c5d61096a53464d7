//! What the relay has to know of a topic before it sends a record there. A thread asks, so that nobody waits.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use rdkafka::{
    ClientConfig,
    admin::{AdminClient, ResourceSpecifier},
    metadata::MetadataTopic,
    producer::{BaseProducer, Producer as _},
    types::RDKafkaRespErr,
};

use super::{
    client::{Quiet, client_config},
    reports::Context,
    survey,
};
use crate::{
    config::KafkaConfig,
    error::{Error, Kind},
};

/// How long to wait for a broker's answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A topic that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Topic {
    pub(super) partitions: i32,
    /// `max.message.bytes`; None where we may not ask for it.
    pub(super) limit_bytes: Option<usize>,
}

/// What a broker said about a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    Topic(Topic),
    Missing,
    Unauthorized,
    /// No broker could tell.
    NoAnswer,
}

/// Asks about topics on a thread of its own.
pub(super) struct Lookup {
    questions: Option<Sender<String>>,
    answers: Receiver<(String, Found)>,
    thread: Option<JoinHandle<()>>,
}

impl Lookup {
    /// Asks through `producer`; the limits through a client of its own, made from `config`.
    pub(super) fn start(producer: Arc<BaseProducer<Context>>, config: ClientConfig) -> Result<Self, Error> {
        let (questions, asked) = channel::<String>();
        let (told, answers) = channel();
        let work = move || {
            while let Ok(topic) = asked.recv() {
                let found = look_up(&producer, &config, &topic);
                if told.send((topic, found)).is_err() {
                    return;
                }
                producer.context().wake();
            }
        };
        let thread = std::thread::Builder::new().name("topic-lookup".into()).spawn(work);
        let thread = thread.map_err(|e| Error::new(Kind::Internal, format!("cannot start a thread: {e}")))?;
        Ok(Self { questions: Some(questions), answers, thread: Some(thread) })
    }

    pub(super) fn ask(&self, topic: &str) {
        if let Some(questions) = &self.questions {
            // The thread ends only when we do.
            let _ = questions.send(topic.to_owned());
        }
    }

    pub(super) fn answer(&self) -> Option<(String, Found)> {
        self.answers.try_recv().ok()
    }
}

impl Drop for Lookup {
    fn drop(&mut self) {
        self.questions = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn look_up(producer: &BaseProducer<Context>, config: &ClientConfig, topic: &str) -> Found {
    let Ok(metadata) = producer.client().fetch_metadata(Some(topic), TIMEOUT) else {
        return Found::NoAnswer;
    };
    producer.context().up();
    let Some(described) = metadata.topics().iter().find(|t| t.name() == topic) else {
        return Found::NoAnswer;
    };
    match described.error() {
        None => {
            Found::Topic(Topic { partitions: partitions(described), limit_bytes: limit_bytes(config, topic) })
        }
        Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART) => Found::Missing,
        Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED) => Found::Unauthorized,
        // A leader is being elected, or the like.
        Some(_) => Found::NoAnswer,
    }
}

fn partitions(topic: &MetadataTopic) -> i32 {
    i32::try_from(topic.partitions().len()).unwrap_or(i32::MAX)
}

fn limit_bytes(config: &ClientConfig, topic: &str) -> Option<usize> {
    setting(config, topic, "max.message.bytes")?.parse().ok()
}

/// Whether Kafka removes records of a key that a later one of it supersedes; None where we may not ask.
pub(crate) fn is_compacted(config: &KafkaConfig, topic: &str) -> Option<bool> {
    let policies = setting(&client_config(config), topic, "cleanup.policy")?;
    Some(policies.split(',').any(|policy| policy.trim() == "compact"))
}

fn setting(config: &ClientConfig, topic: &str, name: &str) -> Option<String> {
    let admin: AdminClient<Quiet> = config.create_with_context(Quiet).ok()?;
    survey::settings(&admin, &ResourceSpecifier::Topic(topic)).remove(name)
}

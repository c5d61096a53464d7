//! The parts of the configuration that say what the outboxes are and what becomes of their rows.

use std::{collections::BTreeMap, fmt::Display};

use relay_core::{
    outbox::{FIELDS, Outbox, OutboxTable, Updates},
    route::{self, TopicTemplate},
    source::{CloudEvents, Messages, Options},
};
use serde::Deserialize;

/// A table. A further one has the same keys.
#[derive(Debug, Clone, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct OutboxConfig {
    pub(crate) table: String,
    pub(crate) id: String,
    pub(crate) aggregate_type: String,
    pub(crate) aggregate_id: String,
    pub(crate) event_type: String,
    pub(crate) payload: String,
    pub(crate) headers: String,
    pub(crate) traceparent: String,
    pub(crate) partition: String,
    pub(crate) topic: String,
    pub(crate) timestamp: String,
    #[serde(deserialize_with = "service::config::list")]
    pub(crate) header_columns: Vec<String>,
    /// The table's own template; empty: `route.topic`.
    pub(crate) route: String,
    pub(crate) updates: UpdatesConfig,
}

#[derive(Debug, Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
pub(crate) enum UpdatesConfig {
    Ignore,
    Halt,
}

#[derive(Debug, Clone, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct MessagesConfig {
    /// Empty: messages are not asked for.
    pub(crate) prefix: String,
    #[serde(deserialize_with = "service::config::list")]
    pub(crate) topics: Vec<String>,
}

#[derive(Debug, Clone, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RouteConfig {
    pub(crate) topic: String,
    pub(crate) by_type: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct CloudEventsConfig {
    /// Empty: no CloudEvents.
    pub(crate) source: String,
    pub(crate) content_type: String,
}

impl Default for OutboxConfig {
    fn default() -> Self {
        let table = OutboxTable::default();
        let name = format!("{}.{}", table.schema, table.name);
        let [
            id,
            aggregate_type,
            aggregate_id,
            event_type,
            payload,
            headers,
            traceparent,
            partition,
            topic,
            timestamp,
        ] = table.columns;
        Self {
            table: name,
            id,
            aggregate_type,
            aggregate_id,
            event_type,
            payload,
            headers,
            traceparent,
            partition,
            topic,
            timestamp,
            header_columns: Vec::new(),
            route: String::new(),
            updates: UpdatesConfig::Ignore,
        }
    }
}

impl Default for RouteConfig {
    fn default() -> Self {
        Self { topic: "outbox.event.${aggregatetype}".into(), by_type: BTreeMap::new() }
    }
}

/// The key that is bad, and why.
type Bad = (String, String);

fn bad(key: &str, why: impl Display) -> Bad {
    (key.into(), why.to_string())
}

/// Checks it all. The first of the `tables` is `[outbox]`, the others are `[[outboxes]]`.
pub(super) fn source_options(
    tables: Vec<OutboxConfig>,
    messages: MessagesConfig,
    route: RouteConfig,
    cloud_events: CloudEventsConfig,
) -> Result<Options, Bad> {
    let topic = TopicTemplate::parse(&route.topic).map_err(|e| bad("route.topic", e))?;
    if let Some((event_type, topic)) = route.by_type.iter().find(|(_, topic)| !route::is_legal_topic(topic)) {
        let why = format!("is {topic:?}, which is not a legal name of a Kafka topic");
        return Err((format!("route.by_type.{event_type:?}"), why));
    }
    let mut outboxes: Vec<Outbox> = Vec::new();
    for (i, table) in tables.into_iter().enumerate() {
        let key = if i == 0 { "outbox".to_owned() } else { format!("outboxes[{}]", i - 1) };
        if i == 0 && table.table.is_empty() {
            continue;
        }
        let outbox = table.check(&key, &topic)?;
        if outboxes.iter().any(|other| other.name() == outbox.name()) {
            let why = format!("is {}, which another outbox has", outbox.label());
            return Err((format!("{key}.table"), why));
        }
        outboxes.push(outbox);
    }
    if outboxes.is_empty() && messages.prefix.is_empty() {
        return Err(bad("outbox.table", "is empty, and there are neither [[outboxes]] nor messages.prefix"));
    }
    let CloudEventsConfig { source, content_type } = cloud_events;
    if source.is_empty() && !content_type.is_empty() {
        return Err(bad("cloudevents.content_type", "is set, but cloudevents.source is not"));
    }
    let content_type = (!content_type.is_empty()).then_some(content_type);
    Ok(Options {
        outboxes,
        messages: messages.check(topic)?,
        topic_by_type: route.by_type,
        cloud_events: (!source.is_empty()).then_some(CloudEvents { source, content_type }),
        ..Options::default()
    })
}

impl OutboxConfig {
    fn check(self, key: &str, topic: &TopicTemplate) -> Result<Outbox, Bad> {
        let (schema, name) = self.table.split_once('.').unwrap_or(("public", &self.table));
        if schema.is_empty() || name.is_empty() || name.contains('.') {
            let why = format!("{:?} must be TABLE or SCHEMA.TABLE", self.table);
            return Err((format!("{key}.table"), why));
        }
        let columns: [String; FIELDS] = [
            self.id,
            self.aggregate_type,
            self.aggregate_id,
            self.event_type,
            self.payload,
            self.headers,
            self.traceparent,
            self.partition,
            self.topic,
            self.timestamp,
        ];
        let mut header_columns = Vec::new();
        for item in self.header_columns {
            let (column, header) = item.split_once(':').unwrap_or((&item, &item));
            if column.is_empty() {
                let why = format!("{item:?} must be COLUMN or COLUMN:HEADER");
                return Err((format!("{key}.header_columns"), why));
            }
            header_columns.push((column.to_owned(), header.to_owned()));
        }
        let topic = match self.route.as_str() {
            "" => topic.clone(),
            own => TopicTemplate::parse(own).map_err(|e| (format!("{key}.route"), e.to_string()))?,
        };
        let updates = match self.updates {
            UpdatesConfig::Ignore => Updates::Ignore,
            UpdatesConfig::Halt => Updates::Halt,
        };
        let (schema, name) = (schema.to_owned(), name.to_owned());
        let table = OutboxTable { schema, name, columns, header_columns, topic, updates };
        Outbox::new(table).map_err(|e| bad(key, e))
    }
}

impl MessagesConfig {
    fn check(self, topic: TopicTemplate) -> Result<Option<Messages>, Bad> {
        if let Some(topic) = self.topics.iter().find(|topic| !route::is_legal_topic(topic)) {
            return Err(bad(
                "messages.topics",
                format!("has {topic:?}, which is not a legal name of a Kafka topic"),
            ));
        }
        if self.prefix.is_empty() {
            return if self.topics.is_empty() {
                Ok(None)
            } else {
                Err(bad("messages.topics", "is set, but messages.prefix is not"))
            };
        }
        let outbox = Outbox::of_messages(topic).map_err(|e| bad("route.topic", e))?;
        Ok(Some(Messages { prefix: self.prefix, outbox, topics: self.topics.into_iter().collect() }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;

    /// What is wrong with the configuration, and nothing where it is good.
    fn wrong(text: &str) -> String {
        let config: Result<Config, _> = toml::from_str(text);
        match config.map(Config::check) {
            Ok(Ok(_)) => String::new(),
            Ok(Err(failure)) => failure.message,
            Err(e) => e.to_string(),
        }
    }

    #[test]
    fn what_can_work_is_taken() {
        for good in [
            "[outbox]\ntable = 'events'\ntimestamp = 'created_at'\nheaders = ''\ntopic = ''",
            "[outbox]\nheader_columns = ['tenant', 'type:eventType']",
            "[outbox]\nheader_columns = 'tenant, type:eventType'\nupdates = 'halt'\nroute = '${tenant}'",
            "[[outboxes]]\ntable = 'billing.outbox'\naggregate_type = 'kind'\n[[outboxes]]\ntable = 'c'",
            "[outbox]\ntable = ''\n[[outboxes]]\ntable = 'c'",
            "[outbox]\ntable = ''\n[messages]\nprefix = 'outbox'\ntopics = ['a', 'b']",
            "[route.by_type]\nOrderCreated = 'order-created'\n'order.updated' = 'order-updated'",
            "[cloudevents]\nsource = '/orders'\ncontent_type = 'application/avro'",
        ] {
            assert_eq!(wrong(good), "", "{good}");
        }
    }

    #[test]
    fn what_cannot_work_names_its_key() {
        for (text, key) in [
            ("[outbox]\ntable = 'a.b.c'", "outbox.table"),
            ("[outbox]\ntable = ''", "outbox.table"),
            ("[outbox]\ntopic = 'id'", "names the column \"id\" twice"),
            ("[outbox]\npayload = ''", "outbox gives no name to the column for payload"),
            ("[outbox]\nheader_columns = [':x']", "outbox.header_columns"),
            ("[outbox]\nheader_columns = ['tenant:id']", "the header \"id\", which is taken"),
            ("[outbox]\nheader_columns = ['a:x', 'b:x']", "the header \"x\", which is taken"),
            ("[outbox]\nroute = '${'", "outbox.route"),
            ("[outbox]\nupdates = 'explode'", "explode"),
            ("[[outboxes]]\nroute = 'x'", "outboxes[0].table is public.outbox"),
            ("[[outboxes]]\ntable = 'b'\n[[outboxes]]\ntable = 'public.b'", "outboxes[1].table"),
            ("[[outboxes]]\ntable = 'b'\nroute = 'a b'", "outboxes[0].route"),
            ("[[outboxes]]\ntable = 'b'\nname = 'a b'", "name"),
            ("[route]\ntopic = '${'", "route.topic"),
            ("[route.by_type]\nT = 'a/b'", "route.by_type.\"T\" is \"a/b\""),
            ("[messages]\ntopics = ['a']", "messages.topics"),
            ("[messages]\nprefix = 'outbox'\ntopics = ['a/b']", "messages.topics"),
            ("[cloudevents]\ncontent_type = 'x'", "cloudevents.content_type"),
        ] {
            assert!(wrong(text).contains(key), "{text}: {}", wrong(text));
        }
    }
}

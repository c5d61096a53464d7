//! `.stack/endpoints.json`, which tells scripts where things are.

use std::{collections::BTreeMap, fs, path::Path};

use serde::{Deserialize, Serialize};

use crate::{
    failure::{Explain, Result},
    ports::{CONSUMERS, Ports},
};

/// Where everything of a stack is. Written when all is ready, and again whenever a process gets another id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Endpoints {
    /// The orders database, as its owner.
    pub postgres: String,
    /// The consumers' database, as its owner.
    pub consumer_postgres: String,
    /// The maintenance database, as the superuser.
    pub postgres_superuser: String,
    /// Bootstrap servers.
    pub kafka: String,
    /// Base address of the first instance; missing with `--infra-only`, like all services below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order_api: Option<String>,
    /// All instances, the first included.
    pub order_apis: Vec<String>,
    /// Base address of the relay's HTTP server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cdc_relay: Option<String>,
    /// Base address of the HTTP server of the relay of the consumers' outbox.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consumers_relay: Option<String>,
    /// Base address of each consumer, by name.
    pub consumers: BTreeMap<String, String>,
    /// Process id of the supervisor.
    pub supervisor: u32,
    pub processes: Vec<Process>,
}

/// One process in `endpoints.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pub name: String,
    /// `null` while it is stopped or has given up; between a death and the next start still the former one.
    pub pid: Option<u32>,
    pub log: String,
    pub port: u16,
    /// `starting`, `ready`, `waiting` (for its next start), `down` or `stopped`.
    pub state: String,
    /// How often it died and was started again.
    pub restarts: u32,
}

impl Endpoints {
    pub(crate) fn new(ports: &Ports) -> Self {
        let url = |port: &u16| format!("http://127.0.0.1:{port}");
        let of = |service: &str| -> BTreeMap<String, String> {
            let instances = ports.services.iter().filter(|instance| instance.service == service);
            instances.map(|instance| (instance.name.clone(), url(&instance.port))).collect()
        };
        let consumers = CONSUMERS.into_iter().flat_map(of).collect();
        let apis = of("order-api");
        Self {
            postgres: database(ports.postgres, "orders_owner", "orders"),
            consumer_postgres: database(ports.postgres, "consumer", "consumers"),
            postgres_superuser: database(ports.postgres, "postgres", "postgres"),
            kafka: bootstrap(&ports.kafka),
            order_api: apis.get("order-api").cloned(),
            order_apis: apis.into_values().collect(),
            cdc_relay: of("cdc-relay").remove("cdc-relay"),
            consumers_relay: of("consumers-relay").remove("consumers-relay"),
            consumers,
            supervisor: std::process::id(),
            processes: Vec::new(),
        }
    }
}

/// In the local stack a role's password is its name.
pub(crate) fn database(port: u16, role: &str, database: &str) -> String {
    format!("postgres://{role}:{role}@127.0.0.1:{port}/{database}")
}

pub(crate) fn bootstrap(ports: &[u16]) -> String {
    ports.iter().map(|port| format!("127.0.0.1:{port}")).collect::<Vec<_>>().join(",")
}

/// Replaces a file at once: a reader sees the former content or the new one, never a part.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).explain(|| format!("write {}", path.display()))?;
    let temporary = path.with_extension("json.tmp");
    fs::write(&temporary, text + "\n").explain(|| format!("write {}", temporary.display()))?;
    fs::rename(&temporary, path).explain(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ports::Instance;

    #[test]
    fn the_shape_that_scripts_rely_on() {
        let instance = |service, name: &str, port| Instance { service, name: name.to_owned(), port };
        let ports = Ports {
            postgres: 15432,
            kafka: vec![19092, 19093, 19094],
            controllers: vec![],
            services: vec![
                instance("order-api", "order-api", 8080),
                instance("order-api", "order-api-2", 8100),
                instance("cdc-relay", "cdc-relay", 8081),
                instance("consumers-relay", "consumers-relay", 8082),
                instance("messages", "messages", 8092),
                instance("pharmacy", "pharmacy", 8090),
                instance("fulfillment", "fulfillment", 8091),
            ],
        };
        let mut endpoints = Endpoints::new(&ports);
        endpoints.processes.push(Process {
            name: "postgres".to_owned(),
            pid: Some(7),
            log: "/x/postgres.log".to_owned(),
            port: 15432,
            state: "ready".to_owned(),
            restarts: 0,
        });
        let json = serde_json::to_value(&endpoints).unwrap();
        assert_eq!(json["postgres"], "postgres://orders_owner:orders_owner@127.0.0.1:15432/orders");
        assert_eq!(json["consumer_postgres"], "postgres://consumer:consumer@127.0.0.1:15432/consumers");
        assert_eq!(json["kafka"], "127.0.0.1:19092,127.0.0.1:19093,127.0.0.1:19094");
        assert_eq!(json["order_api"], "http://127.0.0.1:8080");
        assert_eq!(json["order_apis"][1], "http://127.0.0.1:8100");
        assert_eq!(json["cdc_relay"], "http://127.0.0.1:8081");
        assert_eq!(json["consumers_relay"], "http://127.0.0.1:8082");
        assert_eq!(
            json["consumers"],
            serde_json::json!({
                "pharmacy": "http://127.0.0.1:8090",
                "fulfillment": "http://127.0.0.1:8091",
                "messages": "http://127.0.0.1:8092"
            })
        );
        assert_eq!(json["processes"][0]["name"], "postgres");
        assert_eq!(json["processes"][0]["pid"], 7);
        assert_eq!(json["processes"][0]["log"], "/x/postgres.log");
    }

    #[test]
    fn without_services_their_addresses_are_missing() {
        let ports = Ports { postgres: 1, kafka: vec![2], ..Ports::default() };
        let json = serde_json::to_value(Endpoints::new(&ports)).unwrap();
        assert!(json.get("order_api").is_none() && json.get("cdc_relay").is_none());
        assert_eq!(json["consumers"], serde_json::json!({}));
    }
}

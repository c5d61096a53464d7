//! What a campaign plays on: three brokers, a Postgres for the orders and one for the consumers, the services, and
//! the proxy between the relays and their servers.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use super::{
    actor::Actor,
    load,
    proxy::{Link, Route},
    targets::Targets,
};
use crate::{
    cli::{self, Delivery, Place, Up},
    endpoints::{bootstrap, database},
    failure::{Explain, Failure, Result},
    kafka::{self, Kafka, Proxied},
    layout::Layout,
    maven,
    ports::{self, Ports},
    postgres, prerequisites,
    progress::Progress,
    services,
    spec::{Layer, Spec},
    topics::{self, Topic},
};

const BROKERS: u16 = 3;
/// Consumers of this stage.
const CONSUMERS: [&str; 3] = ["pharmacy", "fulfillment", "order-view"];
/// What nobody but the orders' relay writes to: the API's events, and those of the load's own rows.
const TOPICS: [&str; 2] = ["order-events", ROWS_TOPIC];
const AGGREGATE_TYPE: &str = "chaos";
const ROWS_TOPIC: &str = "chaos-events";
const ROWS_PARTITIONS: i32 = 6;
/// Of both clusters. Nothing here outlives the machine, so nothing is synced to the disk; a killed process loses
/// nothing by that.
const POSTGRES_SETTINGS: [(&str, &str); 3] = [
    ("fsync", "off"),
    // So that a relay that stops for some seconds loses its slot.
    ("wal_sender_timeout", "4s"),
    // A crash is followed by a short recovery.
    ("checkpoint_timeout", "30s"),
];
/// A broker that is stopped for longer than its session hands its partitions over.
const BROKER_SETTINGS: [(&str, &str); 4] = [
    ("broker.session.timeout.ms", "4000"),
    ("broker.heartbeat.interval.ms", "500"),
    ("offsets.topic.num.partitions", "3"),
    ("transaction.state.log.num.partitions", "3"),
];

/// Everything that runs.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) layout: Layout,
    pub(super) actors: BTreeMap<String, Arc<Actor>>,
    pub(super) postgres_link: Link,
    pub(super) kafka_link: Link,
    pub(super) targets: Targets,
    places: Places,
    relays: Relays,
    /// Whose turn it is to strike a broker.
    pub(super) brokers: tokio::sync::Mutex<()>,
    violations: Mutex<Vec<String>>,
    notes: Mutex<Vec<String>>,
}

/// What the relays are.
#[derive(Debug)]
pub(super) struct Relays {
    pub(super) program: PathBuf,
    pub(super) delivery: Delivery,
}

/// Who listens where.
#[derive(Debug)]
struct Places {
    /// The stage's own: the orders' Postgres, the brokers and the services.
    ports: Ports,
    consumers_postgres: u16,
    proxied: Vec<Proxied>,
    orders_proxy: u16,
    consumers_proxy: u16,
    /// On the ports, held as long as they are used.
    _claims: (Option<fs::File>, fs::File),
}

impl Places {
    fn choose(up: &Up, layout: &Layout) -> Result<Self> {
        let (mut ports, claim) = ports::choose(up, &layout.downloads)?;
        let wanted =
            |service: &str| services::package(service) != Some("consumer") || CONSUMERS.contains(&service);
        ports.services.retain(|instance| wanted(instance.service));
        let (further, second) = ports::further(3 + 2 * usize::from(BROKERS), &layout.downloads)?;
        let proxied = further[3..].chunks_exact(2);
        Ok(Self {
            ports,
            consumers_postgres: further[0],
            orders_proxy: further[1],
            consumers_proxy: further[2],
            proxied: proxied.map(|pair| Proxied { port: pair[0], advertised: pair[1] }).collect(),
            _claims: (claim, second),
        })
    }

    /// As a service of this kind sees them.
    fn seen_by(&self, service: &str) -> Ports {
        let by_proxy = || self.proxied.iter().map(|proxied| proxied.advertised).collect();
        let (postgres, kafka) = match service {
            "cdc-relay" => (self.orders_proxy, by_proxy()),
            "consumers-relay" => (self.consumers_proxy, by_proxy()),
            "order-api" => (self.ports.postgres, self.ports.kafka.clone()),
            _ => (self.consumers_postgres, self.ports.kafka.clone()),
        };
        Ports { postgres, kafka, ..self.ports.clone() }
    }
}

impl Stage {
    /// Starts everything anew in an empty folder, and returns when all is ready.
    pub(super) async fn start(
        layout: &Layout,
        version: cli::Postgres,
        relays: Relays,
        progress: &Progress,
    ) -> Result<Arc<Self>> {
        let up = up(layout, version);
        let places = Places::choose(&up, layout)?;
        let mut stage = Self::empty(layout, relays, places)?;
        let step = progress.step("starting two Postgres and three brokers");
        let specs = servers(&up, layout, &stage.places, progress).await?;
        stage.run(specs).await?;
        stage.furnish().await?;
        step.done("two Postgres and three brokers ready");
        let step = progress.step("starting the services");
        let specs = service_specs(layout, &stage.places, &stage.relays)?;
        stage.run(specs).await?;
        step.done("order-api, three relays and three consumers ready");
        Ok(Arc::new(stage))
    }

    /// The proxy, and nothing behind it yet.
    fn empty(layout: &Layout, relays: Relays, places: Places) -> Result<Self> {
        let route = |listen, server| Route { listen, server };
        let databases = [
            route(places.orders_proxy, places.ports.postgres),
            route(places.consumers_proxy, places.consumers_postgres),
        ];
        let brokers = places.proxied.iter().map(|proxied| route(proxied.advertised, proxied.port));
        Ok(Self {
            layout: layout.clone(),
            actors: BTreeMap::new(),
            postgres_link: Link::start("postgres", &databases)?,
            kafka_link: Link::start("kafka", &brokers.collect::<Vec<_>>())?,
            targets: Targets {
                postgres_url: database(places.ports.postgres, "postgres", "orders"),
                order_api_url: api(&places.ports)?,
                consumers_url: database(places.consumers_postgres, "postgres", "consumers"),
                aggregate_type: AGGREGATE_TYPE.to_owned(),
                brokers: bootstrap(&places.ports.kafka),
                topics: TOPICS.map(str::to_owned).to_vec(),
            },
            relays,
            brokers: tokio::sync::Mutex::default(),
            violations: Mutex::default(),
            notes: Mutex::default(),
            places,
        })
    }

    /// Starts processes at once, and returns when all are ready.
    async fn run(&mut self, specs: Vec<Spec>) -> Result<()> {
        let mut started = Vec::new();
        for spec in specs {
            let (key, value) = self.layout.mark();
            let actor = Arc::new(Actor::new(spec, (key, value)));
            actor.hold().await.start().await?;
            self.actors.insert(actor.spec.name.clone(), actor.clone());
            started.push(actor);
        }
        for actor in started {
            actor.ready().await?;
        }
        Ok(())
    }

    /// The databases, the topics, the consumers' tables and the slots.
    async fn furnish(&self) -> Result<()> {
        let places = &self.places;
        for port in [places.ports.postgres, places.consumers_postgres] {
            postgres::databases(&self.layout, port).await?;
        }
        let mut wanted = topics::read(&self.layout.root)?;
        let (name, partitions) = (ROWS_TOPIC.to_owned(), ROWS_PARTITIONS);
        wanted.push(Topic { name, partitions, settings: BTreeMap::new() });
        topics::create(&self.targets.brokers, wanted, kafka::replication(usize::from(BROKERS))).await?;
        services::migrate(&self.layout, &places.seen_by("pharmacy")).await?;
        for relay in ["cdc-relay", "consumers-relay"] {
            self.relay_once(relay, &["init"]).await?;
        }
        Ok(())
    }

    async fn relay_once(&self, relay: &str, args: &[&str]) -> Result<()> {
        let (ports, further) = (self.places.seen_by(relay), relay_env(relay, self.relays.delivery));
        services::relay_once(&self.layout, &ports, relay, &self.relays.program, args, further).await
    }

    /// Runs a command of the orders' relay to its end.
    pub(super) async fn relay(&self, args: &[&str]) -> Result<()> {
        self.relay_once("cdc-relay", args).await
    }

    pub(super) fn actor(&self, name: &str) -> Result<&Arc<Actor>> {
        self.actors.get(name).ok_or_else(|| Failure::new(format!("there is no process {name}")))
    }

    /// The instances of a service, by name.
    pub(super) fn instances(&self, service: &str) -> Vec<&Arc<Actor>> {
        self.actors.values().filter(|actor| actor.spec.service == service).collect()
    }

    /// What must not happen, happened.
    pub(super) fn violation(&self, what: impl Into<String>) {
        self.violations.lock().unwrap_or_else(PoisonError::into_inner).push(what.into());
    }

    /// A process has ended by itself. None of ours may; that a broker does is one more fault.
    pub(super) fn ended(&self, actor: &Actor, how: String) {
        let to = if actor.spec.layer > Layer::Kafka { &self.violations } else { &self.notes };
        to.lock().unwrap_or_else(PoisonError::into_inner).push(how);
    }

    /// What must not have happened since the last call, and what else is worth telling.
    pub(super) fn take_told(&self) -> (Vec<String>, Vec<String>) {
        let take = |told: &Mutex<Vec<String>>| {
            std::mem::take(&mut *told.lock().unwrap_or_else(PoisonError::into_inner))
        };
        (take(&self.violations), take(&self.notes))
    }

    /// Looks for processes that ended by themselves, and starts them again. Runs until it is dropped.
    pub(super) async fn watch(&self) -> Result<()> {
        loop {
            for actor in self.actors.values() {
                let Some(mut held) = actor.try_hold() else { continue };
                if let Some(how) = held.ended_by_itself() {
                    self.ended(actor, how);
                    held.start().await?;
                }
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Everything is as it was at the start; a violation for what does not become ready.
    pub(super) async fn heal(&self) {
        self.postgres_link.heal();
        self.kafka_link.heal();
        for actor in self.actors.values() {
            if let Err(failure) = actor.ready().await {
                self.violation(failure.to_string());
            }
        }
    }
}

fn api(ports: &Ports) -> Result<String> {
    let api = ports.services.iter().find(|instance| instance.service == "order-api");
    let api = api.ok_or_else(|| Failure::new("this stage has no order-api"))?;
    Ok(format!("http://127.0.0.1:{}", api.port))
}

fn up(layout: &Layout, postgres: cli::Postgres) -> Up {
    let own = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    Up {
        place: Place { dir: Some(layout.dir.clone()) },
        postgres,
        postgres_set: POSTGRES_SETTINGS.map(own).to_vec(),
        kafka_set: BROKER_SETTINGS.map(own).to_vec(),
        brokers: BROKERS,
        scale: vec![("cdc-relay".to_owned(), 2)],
        ports: cli::Ports::Auto,
        detach: false,
        infra_only: false,
        json: false,
        fresh: true,
        no_build: true,
        background: false,
    }
}

/// The folder of the consumers' Postgres: one cluster and one folder of sockets per layout.
fn consumers_dir(layout: &Layout) -> PathBuf {
    layout.data().join("consumers")
}

/// Removes the data of a stage that was killed. Logs stay.
pub(super) fn sweep(layout: &Layout) {
    if let Ok(second) = Layout::open(Some(&consumers_dir(layout))) {
        let _ = fs::remove_dir_all(&second.run);
    }
    let _ = fs::remove_dir_all(layout.data());
    let _ = fs::remove_dir_all(&layout.run);
}

/// The servers' data and configurations are written, and nothing is started yet.
async fn servers(up: &Up, layout: &Layout, places: &Places, progress: &Progress) -> Result<Vec<Spec>> {
    let installation = postgres::install(layout, progress, up.postgres)?;
    let second = Layout::open(Some(&consumers_dir(layout)))?;
    let (own, with, settings) = (layout.clone(), installation.clone(), up.postgres_set.clone());
    let (first_port, second_port, beside) =
        (places.ports.postgres, places.consumers_postgres, second.clone());
    let prepare = move || {
        postgres::prepare(&own, &with, first_port, &settings)?;
        postgres::prepare(&beside, &with, second_port, &settings)
    };
    tokio::task::spawn_blocking(prepare).await.explain(|| "prepare Postgres".to_owned())??;
    let mut consumers = postgres::spec(&second, &installation, second_port);
    "consumers-postgres".clone_into(&mut consumers.name);
    consumers.log = layout.log(&consumers.name);
    let mut specs = vec![postgres::spec(layout, &installation, first_port), consumers];
    let jars = maven::kafka(layout, progress)?;
    let broker = Kafka {
        layout,
        java: prerequisites::java()?,
        jars,
        ports: &places.ports,
        settings: &up.kafka_set,
        proxied: &places.proxied,
    };
    broker.prepare().await?;
    specs.extend(broker.ids().map(|id| broker.spec(id)));
    Ok(specs)
}

/// What a relay, and each of its commands, is told beside the local stack's settings.
fn relay_env(relay: &str, delivery: Delivery) -> Vec<(&'static str, String)> {
    let mut env = vec![("CDC_RELAY_KAFKA__DELIVERY", delivery.name())];
    if relay == "cdc-relay" {
        env.push(("CDC_RELAY_MESSAGES__PREFIX", load::OUTBOX_PREFIX.to_owned()));
    }
    env
}

fn service_specs(layout: &Layout, places: &Places, relays: &Relays) -> Result<Vec<Spec>> {
    let mut specs = Vec::new();
    for instance in &places.ports.services {
        let mut spec = services::spec(layout, &places.seen_by(instance.service), instance)?;
        let relay = [
            // What a server that is stopped, or a connection that is half closed, costs.
            ("CDC_RELAY_POSTGRES__SILENCE_TIMEOUT_SECONDS", "6"),
            ("CDC_RELAY_POSTGRES__CONNECT_TIMEOUT_SECONDS", "4"),
        ];
        if services::slot(instance.service).is_some() {
            spec.program.clone_from(&relays.program);
            spec.env.extend(relay.map(|(key, value)| (key.to_owned(), value.to_owned())));
            let own = relay_env(instance.service, relays.delivery);
            spec.env.extend(own.into_iter().map(|(key, value)| (key.to_owned(), value)));
        }
        specs.push(spec);
    }
    Ok(specs)
}

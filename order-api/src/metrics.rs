//! What the service counts, besides what every service does.

use std::sync::{Arc, atomic::AtomicU64};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, MetricEncoder},
    metrics::{
        MetricType,
        counter::Counter,
        family::{Family, MetricConstructor},
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::Registry,
};

use crate::{pool::Pool, store::MAX_COUNT};

/// Which requests.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct RequestLabels {
    pub(crate) method: &'static str,
    /// The route's pattern, or `unmatched`.
    pub(crate) route: String,
    pub(crate) status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DurationLabels {
    method: &'static str,
    route: String,
}

#[derive(Debug, Clone)]
struct Buckets;

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new([0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0])
    }
}

/// Cloning shares the numbers.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    requests: Family<RequestLabels, Counter>,
    durations: Family<DurationLabels, Histogram, Buckets>,
    /// Requests to the API under way.
    pub(crate) in_flight: Gauge,
    /// Requests refused because as many were under way as there may be.
    pub(crate) shed: Counter<u64, AtomicU64>,
    /// Orders whose commit was acknowledged.
    pub(crate) orders_created: Counter<u64, AtomicU64>,
    /// Messages whose commit was acknowledged.
    pub(crate) messages_sent: Counter<u64, AtomicU64>,
    /// Messages that this instance put in the outbox again.
    pub(crate) messages_redelivered: Counter<u64, AtomicU64>,
    /// Messages that this instance gave up.
    pub(crate) messages_given_up: Counter<u64, AtomicU64>,
    /// Messages that wait for acknowledgements, of all instances.
    pub(crate) messages_waiting: Gauge,
    /// Messages that are given up, of all instances.
    pub(crate) messages_undelivered: Gauge,
    /// Statements sent again because the connection was lost.
    pub(crate) database_retries: Counter<u64, AtomicU64>,
    /// 1 while the database serves us, else 0.
    pub(crate) database_up: Gauge,
}

impl Metrics {
    /// Registers everything.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            requests: Family::default(),
            in_flight: Gauge::default(),
            shed: Counter::default(),
            durations: Family::new_with_constructor(Buckets),
            orders_created: Counter::default(),
            messages_sent: Counter::default(),
            messages_redelivered: Counter::default(),
            messages_given_up: Counter::default(),
            messages_waiting: Gauge::default(),
            messages_undelivered: Gauge::default(),
            database_retries: Counter::default(),
            database_up: Gauge::default(),
        };
        registry.register("http_requests", "Requests answered.", metrics.requests.clone());
        registry.register(
            "http_request_duration_seconds",
            "From the request's head to the answer's.",
            metrics.durations.clone(),
        );
        registry.register(
            "http_requests_in_flight",
            "Requests to the API under way; http.max_in_flight is the bound.",
            metrics.in_flight.clone(),
        );
        registry.register(
            "http_requests_shed",
            "Requests refused because as many were under way as there may be.",
            metrics.shed.clone(),
        );
        registry.register("orders_created", "Orders committed.", metrics.orders_created.clone());
        metrics.register_messages(registry);
        registry.register(
            "database_retries",
            "Statements sent again on another connection because theirs was lost.",
            metrics.database_retries.clone(),
        );
        registry.register(
            "database_up",
            "1 while the database can be written to and has our schema, else 0.",
            metrics.database_up.clone(),
        );
        metrics
    }

    fn register_messages(&self, registry: &mut Registry) {
        for (name, help, counter) in [
            ("messages_sent", "Messages committed.", &self.messages_sent),
            ("messages_redelivered", "Messages put in the outbox again.", &self.messages_redelivered),
            ("messages_given_up", "Messages given up after their last attempt.", &self.messages_given_up),
        ] {
            registry.register(name, help, counter.clone());
        }
        for (name, help, gauge) in [
            ("messages_waiting", "Messages that wait for acknowledgements", &self.messages_waiting),
            ("messages_undelivered", "Messages that were given up and are still", &self.messages_undelivered),
        ] {
            let help = format!("{help}, in the whole database, counted up to {MAX_COUNT}.");
            registry.register(name, help, gauge.clone());
        }
    }

    /// Counts an answer that took that long.
    pub(crate) fn answered(&self, labels: &RequestLabels, seconds: f64) {
        let duration = DurationLabels { method: labels.method, route: labels.route.clone() };
        self.durations.get_or_create(&duration).observe(seconds);
        self.requests.get_or_create(labels).inc();
    }
}

/// The pool's connections, read when somebody looks.
#[derive(Debug)]
pub(crate) struct PoolCollector(pub(crate) Arc<Pool>);

impl Collector for PoolCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut by_state: MetricEncoder<'_> = encoder.encode_descriptor(
            "database_connections",
            "Open connections of the pool.",
            None,
            MetricType::Gauge,
        )?;
        for (state, count) in [("idle", self.0.idle()), ("busy", self.0.busy())] {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            ConstGauge::new(count).encode(by_state.encode_family(&[("state", state)])?)?;
        }
        let most = ConstGauge::new(i64::from(self.0.max_connections()));
        let encoder = encoder.encode_descriptor(
            "database_connections_max",
            "The most connections the pool opens.",
            None,
            MetricType::Gauge,
        )?;
        most.encode(encoder)
    }
}

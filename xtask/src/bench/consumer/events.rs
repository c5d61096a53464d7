//! The events that the consumer applies: which there are, in which partition, and their records in Kafka.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use rdkafka::{
    ClientContext,
    config::RDKafkaLogLevel,
    error::KafkaError,
    message::{Header, OwnedHeaders},
    producer::{BaseRecord, DeliveryResult, Producer as _, ProducerContext, ThreadedProducer},
    types::RDKafkaErrorCode,
};

use crate::{
    failure::{Explain, Failure, Result},
    topics,
};

/// An order is created, changed, confirmed and prepared.
const EVENTS_PER_ORDER: u64 = 4;
/// So many orders at least are under way at a time, where there are as many. The events of one order are as far apart as
/// that, so a batch seldom has two of them: the consumer writes an order as often as it has events.
const UNDER_WAY: u64 = 10_000;
/// How long the acknowledgements of what was sent may take.
const FLUSH_LIMIT: Duration = Duration::from_secs(120);
/// How long to wait where the client has no room for more.
const FULL_PAUSE: Duration = Duration::from_millis(2);

/// The events of a bench, in the order in which they happened.
#[derive(Debug, Clone, Copy)]
pub(super) struct Events {
    pub(super) count: u64,
    pub(super) partitions: u32,
}

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Event {
    /// Among all events, from 0.
    number: u64,
    /// Among all orders, from 0.
    order: u64,
    /// Among the order's events, from 1.
    version: u64,
}

impl Events {
    pub(super) fn all(self) -> impl Iterator<Item = Event> {
        let orders = self.count.div_ceil(EVENTS_PER_ORDER);
        // So that hardly an order is left without its last event.
        let under_way = orders.div_ceil((orders / UNDER_WAY).max(1)).max(1);
        let wave = under_way * EVENTS_PER_ORDER;
        (0..self.count).map(move |number| Event {
            number,
            order: number / wave * under_way + number % under_way,
            version: number % wave / under_way + 1,
        })
    }

    /// How many orders they are about.
    pub(super) fn orders(self) -> u64 {
        self.all().filter(|event| event.version == 1).count() as u64
    }

    /// What the consumer must make of them: of each status how many orders, and the sum of their versions.
    pub(super) fn projection(self) -> BTreeMap<String, (u64, u64)> {
        let mut last = BTreeMap::new();
        for event in self.all() {
            last.insert(event.order, event);
        }
        let mut projection = BTreeMap::new();
        for event in last.into_values() {
            let (orders, versions) = projection.entry(event.status().to_owned()).or_insert((0, 0));
            *orders += 1;
            *versions += event.version;
        }
        projection
    }
}

impl Event {
    /// The first event of an order of its own.
    pub(super) fn first(number: u64) -> Self {
        Self { number, order: number, version: 1 }
    }

    /// Grows with time, as those of the API do.
    pub(super) fn id(self) -> String {
        format!("01936d2e-{:04x}-7000-8000-{:012x}", self.number >> 16 & 0xffff, self.number)
    }

    /// Likewise.
    pub(super) fn order_id(self) -> String {
        format!("01936d2d-{:04x}-7000-8000-{:012x}", self.order >> 16 & 0xffff, self.order)
    }

    /// Where all of its order's events are.
    pub(super) fn partition(self, partitions: u32) -> u32 {
        u32::try_from(self.order % u64::from(partitions)).unwrap_or(0)
    }

    fn kind(self) -> &'static str {
        match self.version {
            1 => "OrderCreated",
            3 => "OrderConfirmed",
            _ => "OrderUpdated",
        }
    }

    /// The order's status after it.
    fn status(self) -> &'static str {
        match self.version {
            1 | 2 => "created",
            3 => "confirmed",
            _ => "preparing",
        }
    }

    /// Its body, by `contracts/events`.
    fn body(self) -> String {
        let seconds = self.number / 1000 % 86_400;
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        let (kind, version) = (self.kind(), self.version);
        let head = format!(
            r#"{{"eventId": "{}", "aggregateId": "{}", "occurredOn": "2026-01-01T{hour:02}:{minute:02}:{second:02}.{:03}001Z", "version": {version}, "eventType": "{kind}""#,
            self.id(),
            self.order_id(),
            self.number % 1000,
        );
        if kind == "OrderConfirmed" {
            return format!(r#"{head}, "paymentId": "payment-{}"}}"#, self.order);
        }
        let quantity = self.version;
        let cents = 950 * quantity + 175;
        let status = if version == 1 { String::new() } else { format!(r#""status": "{}", "#, self.status()) };
        format!(
            r#"{head}, {status}"customerId": "customer-{}", "restaurantId": "restaurant-{}", "currency": "EUR", "totalAmount": "{}.{:02}", "items": [{{"menuItemId": "margherita", "name": "Pizza Margherita", "price": "9.50", "quantity": {quantity}}}, {{"menuItemId": "water", "name": "Water", "price": "1.75", "quantity": 1}}]}}"#,
            self.order % 5000,
            self.order % 300,
            cents / 100,
            cents % 100,
        )
    }
}

/// Writes events as the relay does, but for the choice of the partition.
pub(super) struct Producer {
    client: ThreadedProducer<Reports>,
    reports: Reports,
}

/// The first record that Kafka did not take.
#[derive(Debug, Clone, Default)]
struct Reports(Arc<Mutex<Option<String>>>);

impl ClientContext for Reports {
    fn log(&self, _: RDKafkaLogLevel, _: &str, _: &str) {}
    fn error(&self, _: KafkaError, _: &str) {}
}

impl ProducerContext for Reports {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| error.to_string());
        }
    }
}

impl Producer {
    pub(super) fn new(bootstrap: &str) -> Result<Self> {
        let reports = Reports::default();
        let mut config = topics::client(bootstrap);
        config.set("enable.idempotence", "true").set("acks", "all");
        let client =
            config.create_with_context(reports.clone()).explain(|| "make a Kafka producer".to_owned())?;
        Ok(Self { client, reports })
    }

    /// Writes events and waits until all are acknowledged. Blocks.
    pub(super) fn write(
        &self,
        topic: &str,
        partitions: u32,
        events: impl Iterator<Item = Event>,
    ) -> Result<()> {
        for event in events {
            self.send(topic, partitions, event)?;
        }
        self.client.flush(FLUSH_LIMIT).explain(|| format!("write to {topic}"))?;
        match self.reports.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            None => Ok(()),
            Some(error) => Err(Failure::new(format!("cannot write to {topic}: {error}"))),
        }
    }

    fn send(&self, topic: &str, partitions: u32, event: Event) -> Result<()> {
        let (id, key, body) = (event.id(), event.order_id(), event.body());
        let lsn = format!("0/{:X}", 0x0100_0000 + event.number * 64);
        let headers = [
            ("id", id.as_str()),
            ("type", event.kind()),
            ("aggregatetype", "order"),
            ("lsn", &lsn),
            ("seq", "0"),
        ];
        let headers =
            headers.into_iter().fold(OwnedHeaders::new_with_capacity(headers.len()), |all, (key, value)| {
                all.insert(Header { key, value: Some(value) })
            });
        let partition = i32::try_from(event.partition(partitions)).unwrap_or(0);
        let mut record = BaseRecord::to(topic).key(&key).payload(&body).partition(partition).headers(headers);
        loop {
            match self.client.send(record) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), unsent)) => {
                    record = unsent;
                    thread::sleep(FULL_PAUSE);
                }
                Err((error, _)) => return Err(Failure::new(format!("cannot write to {topic}: {error}"))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_orders_events_are_in_one_partition_in_order_without_a_gap() {
        for count in [1, 5, 4001, 90_003] {
            let events = Events { count, partitions: 7 };
            let mut orders: BTreeMap<u64, (u32, u64)> = BTreeMap::new();
            for (number, event) in (0..).zip(events.all()) {
                let partition = event.partition(7);
                let order = orders.entry(event.order).or_insert((partition, 0));
                *order = (order.0, order.1 + 1);
                assert_eq!((event.number, *order), (number, (partition, event.version)));
            }
            assert_eq!(orders.len() as u64, events.orders());
            let whole = orders.values().filter(|(_, version)| *version == EVENTS_PER_ORDER).count() as u64;
            assert!(count - whole * EVENTS_PER_ORDER <= 4 * EVENTS_PER_ORDER, "{whole} of {count}");
        }
    }

    #[test]
    fn bodies_are_json_of_the_contracts_fields() {
        for event in (Events { count: 8, partitions: 1 }).all() {
            let body: serde_json::Value = serde_json::from_str(&event.body()).unwrap();
            let path = format!("../contracts/events/{}.example.json", event.kind());
            let example: serde_json::Value =
                serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
            let fields = |value: &serde_json::Value| -> Vec<String> {
                // What an order may have or not.
                value.as_object().unwrap().keys().filter(|key| *key != "notes").cloned().collect()
            };
            assert_eq!(fields(&body), fields(&example));
        }
    }
}

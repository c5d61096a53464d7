//! A simulated world around the state machine: a Postgres that commits and streams, a Kafka that acknowledges
//! its partitions in any order, fails, and takes late what a dead producer had sent, and a relay that crashes at
//! any step. One number decides everything that happens, so a failing seed is a test case:
//! `SIM_SEED=n cargo test --release -p relay-core the_world` runs that one, `SIM_SEEDS=n` runs the first n.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    time::Duration,
};

use fastrand::Rng;

use crate::{
    Lsn, Outgoing, Relay,
    outbox::OutboxTable,
    pgoutput::tests::encode,
    poison::Policies,
    progress::Ticket,
    relay::{Options, Past},
    route::TopicTemplate,
    source,
};

const OUTBOX: u32 = 1;
const OTHER: u32 = 2;
const KEYS: usize = 7;
const PARTITIONS: usize = 3;
const LIMIT_BYTES: usize = 4_000;
/// More than any record here costs.
const RECORD_BYTES: usize = 600;
const COLUMNS: [(&str, u32); 5] =
    [("id", 25), ("aggregatetype", 25), ("aggregateid", 25), ("type", 25), ("payload", 25)];

/// What happens to an outbox row: its number counts the rows of its key.
type RowId = (usize, u64);

/// A message of the stream and, after it, what the server would say is its position.
struct Sent {
    bytes: Vec<u8>,
    position: u64,
}

/// A committed transaction.
struct Transaction {
    end_lsn: u64,
    rows: Vec<RowId>,
    messages: Vec<Vec<u8>>,
}

/// The server: its log, and what the slot has confirmed.
#[derive(Default)]
struct Postgres {
    log: Vec<Transaction>,
    lsn: u64,
    confirmed: u64,
    rows_of_key: [u64; KEYS],
}

impl Postgres {
    fn commit(&mut self, rng: &mut Rng) {
        self.lsn += rng.u64(1..50);
        let commit_lsn = self.lsn;
        // A commit's end may be the next commit's start, and LSNs are shared: the counter moves on by little.
        self.lsn += rng.u64(1..3);
        let (mut rows, mut messages) = (Vec::new(), vec![encode::begin(commit_lsn, 0)]);
        for (oid, name) in [(OUTBOX, "outbox"), (OTHER, "other")] {
            messages.push(encode::relation(oid, "public", name, &COLUMNS));
        }
        let size = if rng.u8(..10) == 0 { rng.usize(..40) } else { rng.usize(..4) };
        for _ in 0..size {
            match rng.u8(..6) {
                0 => messages.push(encode::insert(OTHER, &[Some(b"1"), None, None, None, None])),
                1 => messages.push(encode::delete(OUTBOX)),
                _ => {
                    let key = rng.usize(..KEYS);
                    let n = &mut self.rows_of_key[key];
                    *n += 1;
                    rows.push((key, *n));
                    let (key, n) = (key.to_string(), n.to_string());
                    let filler = "x".repeat(rng.usize(..200));
                    let values = [&n, "k", &key, "t", &filler].map(|v| Some(v.as_bytes()));
                    messages.push(encode::insert(OUTBOX, &values));
                }
            }
        }
        messages.push(encode::commit(commit_lsn, self.lsn, 0));
        self.log.push(Transaction { end_lsn: self.lsn, rows, messages });
    }

    /// What a new session is sent: every transaction that is not confirmed.
    fn stream(&self) -> VecDeque<Sent> {
        let open = self.log.iter().filter(|t| t.end_lsn > self.confirmed);
        open.flat_map(sent).collect()
    }
}

fn sent(transaction: &Transaction) -> impl Iterator<Item = Sent> {
    transaction.messages.iter().map(|m| Sent { bytes: m.clone(), position: transaction.end_lsn })
}

/// A record on its way: of a living producer with its ticket, of a dead one without.
type OnItsWay = (Option<Ticket>, RowId);

/// The broker: what it has, and what was sent to each partition and has not arrived.
#[derive(Default)]
struct Kafka {
    has: [Vec<RowId>; PARTITIONS],
    on_its_way: [VecDeque<OnItsWay>; PARTITIONS],
    /// Arrived, and not acknowledged yet, in any order.
    unacknowledged: Vec<Ticket>,
    checkpoint: u64,
}

impl Kafka {
    fn send(&mut self, ticket: Ticket, row: RowId) {
        let partition = row.0 % PARTITIONS;
        self.on_its_way[partition].push_back((Some(ticket), row));
    }

    fn arrive(&mut self, partition: usize) {
        if let Some((ticket, row)) = self.on_its_way[partition].pop_front() {
            self.has[partition].push(row);
            self.unacknowledged.extend(ticket);
        }
    }

    /// The producer is gone. Of what it had sent, a part in front may still arrive, some time.
    fn lose_producer(&mut self, rng: &mut Rng) {
        self.unacknowledged.clear();
        for partition in &mut self.on_its_way {
            partition.truncate(rng.usize(..=partition.len()));
            for (ticket, _) in partition.iter_mut() {
                *ticket = None;
            }
        }
    }
}

struct World {
    rng: Rng,
    now: Duration,
    postgres: Postgres,
    kafka: Kafka,
    relay: Relay,
    stream: VecDeque<Sent>,
    /// How many transactions the present session's stream holds or has given.
    streamed: usize,
    position: u64,
}

fn relay(confirmed: u64, checkpoint: u64, now: Duration) -> Relay {
    let options = Options {
        source: source::Options {
            table: OutboxTable::default(),
            topic: TopicTemplate::parse("${aggregatetype}").unwrap(),
        },
        policies: Policies::default(),
        dead_letter_topic: "dead".into(),
        in_flight_limit_bytes: LIMIT_BYTES,
        status_interval: Duration::from_secs(10),
        silence_limit: Duration::from_mins(1),
    };
    let past = Past { confirmed: Lsn(confirmed), checkpoint: Lsn(checkpoint), ..Past::default() };
    let mut relay = Relay::new(options, past, now);
    relay.set_listening(true, now);
    relay
}

impl World {
    fn new(seed: u64) -> Self {
        let (postgres, now) = (Postgres::default(), Duration::ZERO);
        let relay = relay(0, 0, now);
        let rng = Rng::with_seed(seed);
        Self {
            rng,
            now,
            postgres,
            kafka: Kafka::default(),
            relay,
            stream: VecDeque::new(),
            streamed: 0,
            position: 0,
        }
    }

    fn step(&mut self) {
        self.now += Duration::from_millis(self.rng.u64(..40));
        match self.rng.u8(..100) {
            0..15 => self.postgres.commit(&mut self.rng),
            15..50 => self.read(),
            50..55 => self.keepalive(),
            55..75 => self.kafka.arrive(self.rng.usize(..PARTITIONS)),
            75..90 => self.acknowledge(),
            90..98 => self.tell_status(),
            98 => self.fail(),
            _ => self.relay.set_listening(self.rng.bool(), self.now),
        }
        let in_flight = self.relay.progress().in_flight_bytes();
        assert!(in_flight < LIMIT_BYTES + RECORD_BYTES, "{in_flight} bytes are in flight");
    }

    fn read(&mut self) {
        if !self.relay.wants_input() {
            return;
        }
        if self.stream.is_empty() {
            self.stream.extend(self.postgres.log[self.streamed..].iter().flat_map(sent));
            self.streamed = self.postgres.log.len();
        }
        let Some(sent) = self.stream.pop_front() else { return };
        let start = Lsn(sent.position);
        let Some(record) = self.relay.handle_wal(start, &sent.bytes, self.now).unwrap() else {
            if sent.bytes[0] == b'C' {
                self.position = sent.position;
            }
            return;
        };
        let Outgoing { ticket, record, .. } = record;
        let row = (record.aggregate_id.parse().unwrap(), record.row_id.parse().unwrap());
        self.kafka.send(ticket, row);
    }

    /// The server says how far it has sent. Behind a whole transaction that is the transaction's end, or later
    /// when there is nothing more for us; inside one, it may already be that one's end.
    fn keepalive(&mut self) {
        let caught_up = self.stream.is_empty() && self.streamed == self.postgres.log.len();
        if caught_up {
            // Other databases write to the same log.
            self.postgres.lsn += self.rng.u64(..20);
            self.position = self.postgres.lsn;
        }
        let inside = self.stream.front().filter(|next| next.bytes[0] != b'B').map(|next| next.position);
        let asks = self.rng.bool();
        self.relay.handle_keepalive(Lsn(inside.unwrap_or(self.position)), asks, self.now);
    }

    fn acknowledge(&mut self) {
        if self.kafka.unacknowledged.is_empty() {
            return;
        }
        let any = self.rng.usize(..self.kafka.unacknowledged.len());
        let ticket = self.kafka.unacknowledged.swap_remove(any);
        self.relay.handle_settled(ticket).unwrap();
    }

    /// The status update, if one is due, arrives; and everything that it confirms must be in Kafka.
    fn tell_status(&mut self) {
        if let Some(lsn) = self.relay.take_checkpoint(self.now) {
            self.kafka.checkpoint = lsn.0;
            if self.rng.u8(..10) == 0 {
                // It crashes before it hears of it.
                return self.fail();
            }
            self.relay.handle_checkpointed();
        }
        let Some(status) = self.relay.take_status(self.now) else { return };
        assert!(status.confirmed.0 <= self.kafka.checkpoint, "no checkpoint covers what is confirmed");
        assert!(status.confirmed.0 >= self.postgres.confirmed, "the confirmed LSN goes back");
        self.postgres.confirmed = status.confirmed.0;
        let has: HashSet<RowId> = self.kafka.has.iter().flatten().copied().collect();
        for transaction in self.postgres.log.iter().filter(|t| t.end_lsn <= status.confirmed.0) {
            for row in &transaction.rows {
                assert!(
                    has.contains(row),
                    "row {row:?} is confirmed at {} and not in Kafka",
                    status.confirmed
                );
            }
        }
    }

    /// The relay crashes, or a delivery fails, or the connection is cut: a new session with a new producer.
    fn fail(&mut self) {
        self.kafka.lose_producer(&mut self.rng);
        self.relay = relay(self.postgres.confirmed, self.kafka.checkpoint, self.now);
        self.stream = self.postgres.stream();
        self.streamed = self.postgres.log.len();
        self.position = self.postgres.confirmed;
    }

    /// Nothing fails any more: everything must arrive and be confirmed.
    fn settle_down(&mut self) {
        let end = self.postgres.log.last().map_or(0, |t| t.end_lsn);
        for _ in 0..1_000_000 {
            if self.postgres.confirmed >= end {
                return;
            }
            self.now += Duration::from_millis(200);
            self.read();
            (0..PARTITIONS).for_each(|p| self.kafka.arrive(p));
            self.acknowledge();
            self.tell_status();
        }
        panic!("stuck: confirmed {} of {end}", self.postgres.confirmed);
    }

    fn check(&self) {
        let mut first: BTreeMap<usize, u64> = BTreeMap::new();
        for (key, n) in self.kafka.has.iter().flatten() {
            let highest = first.entry(*key).or_default();
            // A repetition, or the next one: a later one would be a gap, or out of order.
            assert!(*n <= *highest + 1, "key {key}: row {n} comes first after row {highest}");
            *highest = (*highest).max(*n);
        }
        for (key, count) in (0..).zip(self.postgres.rows_of_key) {
            assert_eq!(first.get(&key).copied().unwrap_or(0), count, "rows of key {key}");
        }
    }
}

fn run(seed: u64) {
    let mut world = World::new(seed);
    let steps = world.rng.usize(100..3000);
    for _ in 0..steps {
        world.step();
    }
    world.settle_down();
    world.check();
}

/// A number from the environment.
fn number(variable: &str) -> Option<u64> {
    std::env::var(variable)
        .ok()
        .map(|v| v.parse().unwrap_or_else(|_| panic!("{variable}={v:?} is not a number")))
}

#[test]
fn the_world_loses_nothing_and_keeps_order_whatever_fails() {
    let seeds = match number("SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SIM_SEEDS").unwrap_or(500),
    };
    for seed in seeds {
        if let Err(cause) = std::panic::catch_unwind(|| run(seed)) {
            eprintln!("seed {seed} fails: SIM_SEED={seed} cargo test --release -p relay-core the_world");
            std::panic::resume_unwind(cause);
        }
    }
}

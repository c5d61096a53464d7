//! A session of the state machine: whatever happens, it is what a naive model says it is.

use std::{collections::BTreeSet, time::Duration};

use relay_core::{
    Checkpoint, Lsn, Outgoing, Relay,
    outbox::{Outbox, OutboxTable},
    parking::Key,
    pgoutput::{Message, decode},
    poison::{Poison, Policies, Policy},
    progress::Ticket,
    relay::{Delivery, Options, Past},
    route::{TopicTemplate, is_legal_topic},
    source,
};

const DEAD_LETTERS: &str = "dead-letters";
const LIMIT_BYTES: usize = 4096;
/// Of one letter, so that it is found.
const PREFIX: &str = "o";

/// A session: which policy poison has, then messages of pgoutput among all that else can happen. After each event
/// the state machine is what a naive model says it is. Returns how many events were taken before the session
/// halted or ended.
pub fn stream(bytes: &[u8]) -> usize {
    let Some((policy, _)) = bytes.split_first() else { return 0 };
    let mut session = Session::new(match policy {
        b'd' => Policy::DeadLetter,
        b'p' => Policy::ParkKey,
        b's' => Policy::Skip,
        _ => Policy::Halt,
    });
    for (taken, event) in events(bytes).enumerate() {
        if session.take(event).is_none() {
            return taken;
        }
        session.check();
    }
    events(bytes).count()
}

/// What happens to a session.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// `w`, a length in 16 bits, a message of pgoutput (perhaps cut).
    Wal(&'a [u8]),
    /// `k`, the log's end in 64 bits, whether a reply is wanted.
    Keepalive(Lsn, bool),
    /// `s`, which of those that are not settled.
    Settle(u8),
    /// `u`: a ticket that is not in flight.
    SettleUnknown,
    /// `r`: Kafka will not have the record that the message just before became.
    Refuse,
    /// `f`: the aggregate of the last record is freed, if it is parked.
    Free,
    /// `c`: a checkpoint is written, if it is time.
    Checkpoint,
    /// `a`: Kafka acknowledges the checkpoint.
    Checkpointed,
    /// `t`, after how many hundredths of a second.
    Status(u8),
    /// `l`, whether the caller reads.
    Listen(bool),
}

/// The events of a session, up to anything that is no event.
pub fn events(bytes: &[u8]) -> impl Iterator<Item = Event<'_>> {
    let mut input = bytes.get(1..).unwrap_or_default();
    std::iter::from_fn(move || {
        let (event, rest) = event(input)?;
        input = rest;
        Some(event)
    })
}

fn event(input: &[u8]) -> Option<(Event<'_>, &[u8])> {
    let (tag, rest) = input.split_first()?;
    Some(match tag {
        b'w' => {
            let (length, rest) = rest.split_first_chunk()?;
            let (message, rest) = rest.split_at(usize::from(u16::from_be_bytes(*length)).min(rest.len()));
            (Event::Wal(message), rest)
        }
        b'k' => {
            let (end, rest) = rest.split_first_chunk()?;
            let (asks, rest) = rest.split_first()?;
            (Event::Keepalive(Lsn(u64::from_be_bytes(*end)), asks % 2 == 1), rest)
        }
        b's' => rest.split_first().map(|(n, rest)| (Event::Settle(*n), rest))?,
        b'u' => (Event::SettleUnknown, rest),
        b'r' => (Event::Refuse, rest),
        b'f' => (Event::Free, rest),
        b'c' => (Event::Checkpoint, rest),
        b'a' => (Event::Checkpointed, rest),
        b't' => rest.split_first().map(|(n, rest)| (Event::Status(*n), rest))?,
        b'l' => rest.split_first().map(|(n, rest)| (Event::Listen(n % 2 == 1), rest))?,
        _ => return None,
    })
}

/// The state machine, and beside it all that ever happened, kept naively.
struct Session<'a> {
    relay: Relay,
    policy: Policy,
    now: Duration,
    /// Whether each record, or marker of a parked key, is settled.
    records: Vec<bool>,
    /// How many records there were at a commit's end, and its LSN.
    commits: Vec<(usize, Lsn)>,
    /// The furthest keepalive that came when idle.
    idle: Lsn,
    settled_to: Lsn,
    checkpoint: Lsn,
    checkpoint_in_flight: Option<Lsn>,
    reported: Lsn,
    /// What the transaction that is open has sent so far.
    changes: u64,
    /// The record that the message just before became, and that message.
    last: Option<(Ticket, &'a [u8])>,
    last_key: Option<Key>,
}

impl<'a> Session<'a> {
    fn new(policy: Policy) -> Self {
        let options = Options {
            delivery: Delivery::AtLeastOnce,
            source: source_options(),
            policies: Policies::all(policy),
            dead_letter_topic: DEAD_LETTERS.to_owned(),
            dead_letter_source: "1/slot".to_owned(),
            in_flight_limit_bytes: LIMIT_BYTES,
            status_interval: Duration::from_secs(10),
            silence_limit: Duration::from_secs(60),
        };
        let mut relay = Relay::new(options, Lsn::ZERO, Duration::ZERO);
        relay.recall(Past::default());
        Self {
            relay,
            policy,
            now: Duration::ZERO,
            records: Vec::new(),
            commits: Vec::new(),
            idle: Lsn::ZERO,
            settled_to: Lsn::ZERO,
            checkpoint: Lsn::ZERO,
            checkpoint_in_flight: None,
            reported: Lsn::ZERO,
            changes: 0,
            last: None,
            last_key: None,
        }
    }

    /// None when the session is over.
    fn take(&mut self, event: Event<'a>) -> Option<()> {
        let last = self.last.take();
        match event {
            Event::Wal(message) => self.read(message)?,
            Event::Keepalive(end, asks) => {
                let is_idle = !self.relay.is_in_transaction() && self.settled() == self.records.len();
                self.relay.handle_keepalive(end, asks, self.now).expect("at-least-once");
                self.idle = if is_idle { self.idle.max(end) } else { self.idle };
                assert!(!asks || self.relay.next_deadline() <= self.now, "a reply is due at once");
            }
            Event::Settle(n) => {
                let open: Vec<usize> = (0..self.records.len()).filter(|i| !self.records[*i]).collect();
                if let Some(ticket) = open.get(usize::from(n) % open.len().max(1)) {
                    self.relay.handle_settled(Ticket(*ticket as u64)).expect("it is in flight");
                    self.records[*ticket] = true;
                }
            }
            Event::SettleUnknown => {
                let unknown = Ticket(self.records.len() as u64);
                assert!(
                    !self.relay.handle_settled(unknown).expect_err("not in flight").to_string().is_empty()
                );
            }
            Event::Refuse => {
                if let Some((ticket, bytes)) = last {
                    self.refuse(ticket, bytes)?;
                }
            }
            Event::Free => {
                if let Some(key) = self.last_key.take() {
                    self.relay.free(&key, self.now);
                    self.begin(&[]);
                }
            }
            Event::Checkpoint => {
                if let Some(Checkpoint { lsn, .. }) = self.relay.take_checkpoint(self.now) {
                    assert_eq!(lsn, self.settled_to);
                    assert!(lsn > self.checkpoint && self.checkpoint_in_flight.is_none());
                    self.checkpoint_in_flight = Some(lsn);
                }
            }
            Event::Checkpointed => {
                self.relay.handle_checkpointed();
                self.checkpoint = self.checkpoint_in_flight.take().unwrap_or(self.checkpoint);
            }
            Event::Status(hundredths) => {
                self.now += Duration::from_millis(10 * u64::from(hundredths));
                self.tell_status();
            }
            Event::Listen(listening) => self.relay.set_listening(listening, self.now),
        }
        Some(())
    }

    fn tell_status(&mut self) {
        let is_news = self.settled_to.min(self.checkpoint) > self.reported;
        let status = self.relay.take_status(self.now);
        assert!(status.is_some() || !is_news, "what may be confirmed is told at once");
        if let Some(status) = status {
            assert_eq!(status.confirmed, self.settled_to.min(self.checkpoint));
            assert!(status.received >= status.confirmed && status.confirmed >= self.reported);
            self.reported = status.confirmed;
        }
    }

    fn read(&mut self, bytes: &'a [u8]) -> Option<()> {
        let record = match self.relay.handle_wal(Lsn(1), bytes, self.now) {
            Ok(record) => record,
            Err(halt) => {
                assert!(!halt.to_string().is_empty());
                return None;
            }
        };
        let message = decode(bytes).expect("what was handled can be decoded");
        if let Some(record) = record {
            assert!(matches!(
                message,
                Message::Insert { .. } | Message::LogicalMessage { prefix: PREFIX, .. }
            ));
            check_record(&record, lone(&message).map_or(self.changes, |_| 0), self.policy);
            let (ticket, told) = (record.ticket, format!("{record:?}"));
            self.last_key = Key::of(&record.record);
            self.last = Some((ticket, bytes));
            self.begin(&[ticket]);
            let again = self.relay.repeat(ticket, bytes).expect("it was handled before");
            assert_eq!(format!("{:?}", again.expect("it was a record before")), told);
        }
        self.begin(&[]);
        if let Some(lsn) = lone(&message) {
            self.commits.push((self.records.len(), Lsn(lsn.0.saturating_add(1))));
        }
        match message {
            Message::Begin { .. } => self.changes = 0,
            Message::Commit { end_lsn, .. } => self.commits.push((self.records.len(), end_lsn)),
            Message::Insert { .. }
            | Message::Update { .. }
            | Message::Delete { .. }
            | Message::Truncate { .. }
            | Message::LogicalMessage { transactional: true, .. } => self.changes += 1,
            _ => {}
        }
        Some(())
    }

    fn refuse(&mut self, ticket: Ticket, bytes: &[u8]) -> Option<()> {
        if self.records[usize::try_from(ticket.0).expect("a small number")] {
            return Some(());
        }
        let poison = Poison::Refused { topic: "t".to_owned(), why: "w".to_owned() };
        match self.relay.refuse(ticket, bytes, poison) {
            Ok(Some(record)) => {
                assert_eq!(record.ticket, ticket);
                let is_lone = decode(bytes).is_ok_and(|message| lone(&message).is_some());
                let seq = if is_lone { 0 } else { self.changes.saturating_sub(1) };
                check_record(&record, seq, self.policy);
                assert!(record.is_dead_letter);
            }
            Ok(None) => {
                assert_eq!(self.policy, Policy::Skip);
                self.records[usize::try_from(ticket.0).expect("a small number")] = true;
            }
            Err(halt) => {
                assert!(!halt.to_string().is_empty());
                return None;
            }
        }
        self.begin(&[]);
        Some(())
    }

    /// New tickets, and those of markers that are to be written: they count up by one, whatever they are for.
    fn begin(&mut self, records: &[Ticket]) {
        let markers = self.relay.take_markers();
        let mut tickets: Vec<Ticket> =
            markers.iter().map(|m| m.ticket).chain(records.iter().copied()).collect();
        tickets.sort();
        for ticket in tickets {
            assert_eq!(ticket, Ticket(self.records.len() as u64));
            self.records.push(false);
        }
        self.relay.take_diversions();
    }

    /// How many records in front are settled.
    fn settled(&self) -> usize {
        self.records.iter().take_while(|settled| **settled).count()
    }

    fn check(&mut self) {
        let settled = self.settled();
        let ends = self.commits.iter().take_while(|(records, _)| *records <= settled).map(|(_, end)| *end);
        let expected = ends.chain([self.idle]).max().expect("there is one");
        let progress = self.relay.progress();
        assert!(expected >= self.settled_to);
        assert_eq!(progress.confirmed(), expected);
        assert_eq!(progress.in_flight_records(), self.records.len() - settled);
        assert_eq!(progress.in_flight_bytes() == 0, settled == self.records.len());
        assert_eq!(self.relay.wants_input(), progress.in_flight_bytes() < LIMIT_BYTES);
        assert_eq!(self.relay.is_covered(), expected <= self.checkpoint);
        assert_eq!(self.relay.confirmed(), expected.min(self.checkpoint));
        self.settled_to = expected;
    }
}

/// Debezium's table, and messages.
fn source_options() -> source::Options {
    let topic = TopicTemplate::parse("${aggregatetype}-events").expect("a template");
    let table = OutboxTable { topic: topic.clone(), ..OutboxTable::default() };
    source::Options {
        outboxes: vec![Outbox::new(table).expect("an outbox")],
        messages: Some(source::Messages {
            prefix: PREFIX.to_owned(),
            outbox: Outbox::of_messages(topic).expect("an outbox"),
            topics: BTreeSet::new(),
        }),
        ..source::Options::default()
    }
}

/// Where the message is of our prefix and outside any transaction: its position.
fn lone(message: &Message<'_>) -> Option<Lsn> {
    match message {
        Message::LogicalMessage { transactional: false, lsn, prefix, .. } => {
            (*prefix == PREFIX).then_some(*lsn)
        }
        _ => None,
    }
}

fn check_record(out: &Outgoing<'_>, seq: u64, policy: Policy) {
    let Outgoing { record, is_dead_letter, .. } = out;
    assert!(is_legal_topic(record.topic));
    assert_eq!(record.identity.seq, seq);
    assert_eq!(record.headers.get("seq"), Some(Some(seq.to_string().as_bytes())));
    assert_eq!(record.headers.iter().count(), record.headers.len());
    assert!(!record.describe().is_empty());
    if *is_dead_letter {
        assert_eq!(record.topic, DEAD_LETTERS);
        assert!(record.headers.get("dlq.reason").is_some());
        assert!(matches!(policy, Policy::DeadLetter | Policy::ParkKey));
    }
}

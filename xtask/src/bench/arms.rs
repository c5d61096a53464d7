//! Who is compared with whom.

use std::path::{Path, PathBuf};

use super::{
    arm::{self, Arm},
    debezium::{self, Debezium, Tuning},
    limits::Limit,
    publisher::Publisher,
    relay::{Relay, arm_name},
    workload::Workload,
};
use crate::{cli, cli::Delivery, failure::Result, layout::Layout, progress::Progress, services};

/// Those that are measured, by their names: the one that the others are measured by first.
pub(super) struct Arms {
    /// This repository's.
    pub(super) relay: PathBuf,
    readers: Vec<(&'static str, Arm)>,
}

impl Arms {
    /// Those that the command line asks for; fetches what they need.
    pub(super) fn new(args: &cli::Publishing, progress: &Progress) -> Result<Self> {
        arm::recvlogical()?;
        let relay = services::binary("cdc-relay")?;
        let mut readers = vec![("pg_recvlogical", Arm::Recvlogical)];
        readers.extend(own(&relay, false, args.delivery.all()));
        if let Some(against) = &args.against {
            readers.extend(own(against, true, args.delivery.all()));
        }
        if args.peers {
            let debezium = debezium::install(&Layout::open(None)?, progress)?;
            readers.extend(debezium.map(|it| (it.arm_name(), Arm::Publisher(Publisher::Debezium(it)))));
            readers
                .extend([Limit::Polling, Limit::Producer].map(|limit| (limit.arm_name(), Arm::Limit(limit))));
        }
        Ok(Self { relay, readers })
    }

    /// Those that bring rows to Kafka as they come.
    pub(super) fn publishers(&self) -> impl Iterator<Item = (&'static str, &Publisher)> {
        self.readers.iter().filter_map(|(name, arm)| match arm {
            Arm::Publisher(publisher) => Some((*name, publisher)),
            _ => None,
        })
    }

    /// Debezium Server, where it is among them.
    pub(super) fn debezium(&self) -> impl Iterator<Item = &Debezium> {
        self.publishers().filter_map(|(_, publisher)| match publisher {
            Publisher::Debezium(debezium) => Some(debezium),
            Publisher::Relay(_) => None,
        })
    }

    /// Those that drain a workload, or without one a single transaction.
    pub(super) fn of(&self, workload: Option<Workload>) -> Vec<(&'static str, Arm)> {
        let of_another_size = matches!(workload, Some(Workload::Small | Workload::Large));
        let is_wanted = |arm: &Arm| match arm {
            // Of other sizes, the relay beside the best of the peers.
            Arm::Publisher(Publisher::Debezium(it)) if of_another_size => it.tuning == Tuning::Tuned,
            Arm::Publisher(Publisher::Relay(it)) if of_another_size => it.delivery == Delivery::AtLeastOnce,
            Arm::Session(_) | Arm::Limit(_) if of_another_size => false,
            // It is set up for payloads as text here.
            Arm::Publisher(Publisher::Debezium(_)) => workload != Some(Workload::Bytea),
            // What is polled knows no transaction.
            Arm::Limit(_) => workload.is_some(),
            _ => true,
        };
        self.readers.iter().filter(|(_, arm)| is_wanted(arm)).cloned().collect()
    }
}

/// A build of the relay: its session alone, and all of it.
fn own(binary: &Path, is_against: bool, deliveries: &[Delivery]) -> Vec<(&'static str, Arm)> {
    let session = if is_against { "session (against)" } else { "session" };
    let mut arms = vec![(session, Arm::Session(binary.to_path_buf()))];
    arms.extend(deliveries.iter().map(|&delivery| {
        let relay = Relay { binary: binary.to_path_buf(), delivery, count_allocations: false };
        (arm_name(delivery, is_against), Arm::Publisher(Publisher::Relay(relay)))
    }));
    arms
}

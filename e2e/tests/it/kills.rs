//! kill -9 of everything, while orders come in.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::{
    stack::{Api, Stack, eventually, tell},
    views::assert_nothing_lost,
};

/// Orders that are taken (answered by 201) in the campaign.
const ORDERS: usize = 20_000;
const CLIENTS: usize = 8;
/// What is killed, once so many orders have been taken.
const KILLS: [(usize, &str); 6] = [
    (3_000, "cdc-relay"),
    (6_000, "cdc-relay"),
    (9_000, "cdc-relay"),
    (12_000, "pharmacy"),
    (14_000, "kafka-1"),
    (17_000, "postgres"),
];

#[test]
fn nothing_is_lost_when_everything_is_killed_in_turn() {
    let stack = Stack::start("kills", &[]);
    let api = Api::of(&stack);
    let (taken, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (api, taken, failed) = (api.clone(), &taken, &failed);
            scope.spawn(move || {
                while taken.load(Ordering::Relaxed) < ORDERS {
                    match api.post(&format!("c{client}")) {
                        Some(_) => taken.fetch_add(1, Ordering::Relaxed),
                        None => failed.fetch_add(1, Ordering::Relaxed),
                    };
                }
            });
        }
        for (after, process) in KILLS {
            eventually(&format!("{after} orders are taken"), || {
                (taken.load(Ordering::Relaxed) >= after).then_some(())
            });
            stack.kill(process);
        }
    });
    let count = assert_nothing_lost(&stack);
    let (taken, failed) = (taken.into_inner(), failed.into_inner());
    // A request that failed may have been carried out all the same; one that was answered must have been.
    assert!(
        count.orders >= taken && count.orders <= taken + failed,
        "{taken} taken, {failed} failed, {} in the database",
        count.orders
    );
    tell(&format!(
        "{taken} orders taken, {failed} requests failed, {} orders in Postgres, {} records in Kafka ({} repeated), {} kills: 0 lost, 0 out of order",
        count.orders,
        count.records,
        count.repeated,
        KILLS.len()
    ));
}

//! A simulated world around the state machine: a Postgres that commits, streams, crashes and shuts down; a Kafka that
//! acknowledges in any order, refuses, goes away, and takes late what a dead producer had sent; and a relay that
//! crashes at any step. One number decides everything that happens, so a failing seed is a test case:
//! `cargo xtask sim --seed N` runs that one, `--seeds N` the first N.

mod kafka;
mod ledger;
mod postgres;
mod world;

use world::World;

fn run(seed: u64) {
    let mut world = World::new(seed);
    let steps = world.rng.usize(100..4000);
    for _ in 0..steps {
        world.step();
    }
    world.settle_down();
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
            eprintln!("seed {seed} fails: cargo xtask sim --seed {seed}");
            std::panic::resume_unwind(cause);
        }
    }
}

//! `cargo xtask sim`: any number of the simulated worlds of which the tests run some hundred.

use tokio::process::Command;

use crate::{
    cli, ending,
    failure::{Explain, Failure, Result},
    layout::Layout,
    services,
};

/// Runs them; the test itself tells the seed that fails.
pub(crate) async fn sim(args: &cli::Sim) -> Result<()> {
    let home = Layout::open(None)?;
    let mut cargo = Command::from(services::cargo(&home)?);
    cargo.args(["test", "--release", "--quiet", "--package", "relay-core", "--lib", "the_world"]);
    match args.seed {
        Some(seed) => cargo.env("SIM_SEED", seed.to_string()),
        None => cargo.env("SIM_SEEDS", args.seeds.to_string()),
    };
    let status = cargo.status().await.explain(|| "start cargo".to_owned())?;
    if status.success() {
        return Ok(());
    }
    Err(Failure::new(format!("the simulation: {}", ending::describe(status))))
}

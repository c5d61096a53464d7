//! A consumer that runs: the repository's binary on a topic, with a group and a database.

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use tokio::process::{Child, Command};

use super::Bench;
use crate::{
    ending,
    failure::{Explain, Failure, Result},
    identity, logs, ports,
    spec::{Probe, open_log},
};

/// How long the consumer may take to have its partitions, and to end.
const LIMIT: Duration = Duration::from_secs(60);
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
const ASK_TIMEOUT: Duration = Duration::from_secs(5);

/// What the bench asks `/metrics` for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) processed: u64,
    pub(super) dead_lettered: u64,
    pub(super) assigned: u64,
}

/// The process.
pub(super) struct Running<'a> {
    bench: &'a Bench<'a>,
    child: Child,
    address: String,
    agent: ureq::Agent,
}

impl<'a> Running<'a> {
    /// Starts it; it has nothing yet.
    pub(super) fn start(bench: &'a Bench<'a>, topic: &str, group: &str, database: &str) -> Result<Self> {
        let address = ports::free()?.to_string();
        let out = open_log(&bench.servers.layout.log("consumer"))?;
        let errors = out.try_clone().explain(|| "write a log".to_owned())?;
        let (key, value) = bench.servers.layout.mark();
        let mut command = Command::new(&bench.binary);
        command.env("CONSUMER_CONSUMER__HANDLER", bench.args.handler.name());
        command.env("CONSUMER_CONSUMER__BATCH_RECORDS_MAX", bench.batch_records.to_string());
        command.env("CONSUMER_HTTP__LISTEN", &address);
        command.env("CONSUMER_KAFKA__BROKERS", &bench.servers.kafka);
        command.env("CONSUMER_KAFKA__TOPICS", topic).env("CONSUMER_KAFKA__GROUP", group);
        command.env("CONSUMER_POSTGRES__URL", bench.url("consumer", database));
        command.env("CONSUMER_POSTGRES__CONNECTIONS_MAX", bench.events.partitions.to_string());
        command.env(key, value).current_dir(&bench.servers.layout.dir).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(out).stderr(errors);
        let child = command.spawn().explain(|| "start the consumer".to_owned())?;
        let agent = ureq::Agent::config_builder().timeout_global(Some(ASK_TIMEOUT)).build().new_agent();
        Ok(Self { bench, child, address, agent })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id().unwrap_or(0)
    }

    /// What it has counted so far; nothing before it answers.
    ///
    /// # Errors
    /// It has ended.
    pub(super) async fn counts(&mut self) -> Result<Counts> {
        if let Some(status) = self.child.try_wait().explain(|| "wait for the consumer".to_owned())? {
            return Err(self.failed(&format!("the consumer ended: {}", ending::describe(status))));
        }
        let (agent, url) = (self.agent.clone(), format!("http://{}/metrics", self.address));
        let asked = tokio::task::spawn_blocking(move || {
            agent.get(&url).call().ok()?.body_mut().read_to_string().ok().map(|text| counts(&text))
        });
        Ok(asked.await.ok().flatten().unwrap_or_default())
    }

    /// Waits until it is ready and has every partition.
    pub(super) async fn ready(&mut self) -> Result<()> {
        let ready = Probe::Http { url: format!("http://{}/health/ready", self.address) };
        let until = Instant::now() + LIMIT;
        while self.counts().await?.assigned < u64::from(self.bench.events.partitions)
            || !ready.attempt().await
        {
            if Instant::now() > until {
                return Err(self.failed("the consumer is not ready"));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        Ok(())
    }

    /// Ends it as its supervisor would.
    pub(super) async fn stop(mut self) -> Result<()> {
        identity::send(self.pid(), Signal::TERM);
        match tokio::time::timeout(LIMIT, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(self.failed(&format!("the consumer's end: {}", ending::describe(status)))),
            Ok(Err(error)) => Err(self.failed(&format!("the consumer's end: {error}"))),
            Err(_) => Err(self.failed(&format!("the consumer did not end within {} s", LIMIT.as_secs()))),
        }
    }

    /// A failure with the end of its log.
    pub(super) fn failed(&self, why: &str) -> Failure {
        logs::with_tail(Failure::new(why), &self.bench.servers.layout.log("consumer"))
    }
}

fn counts(metrics: &str) -> Counts {
    let sum = |name: &str| {
        let values = metrics.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            // Another metric may begin with this one's name.
            rest.starts_with([' ', '{']).then(|| rest.rsplit(' ').next()?.parse::<u64>().ok())?
        });
        values.sum()
    };
    Counts {
        processed: sum("consumer_processed_total"),
        dead_lettered: sum("consumer_dead_lettered_total"),
        assigned: sum("consumer_assigned_partitions"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_values_of_all_labels_are_added_up() {
        let metrics = "# TYPE consumer_processed counter\nconsumer_processed_total{type=\"a b\"} 7\n\
                       consumer_processed_total{type=\"c\"} 5\nconsumer_processed_total_x 100\n\
                       consumer_assigned_partitions 6\nconsumer_dead_lettered_total{reason=\"x\"} 0\n# EOF\n";
        assert_eq!(counts(metrics), Counts { processed: 12, dead_lettered: 0, assigned: 6 });
        assert_eq!(counts(""), Counts::default());
    }
}

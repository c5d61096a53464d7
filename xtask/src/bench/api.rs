//! `cargo xtask bench api`: orders over HTTP, beside pgbench that runs the API's own statement over as many connections on
//! the same server.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde::Serialize;
use serde_json::json;
use sqlx::{Connection, PgConnection};
use tokio::process::{Child, Command};

use super::{
    document::{Document, version},
    load::Load,
    numbers::{SPREAD_LIMIT, Spread, per_mille},
    plot::{Bar, Chart},
    section::{Section, head},
    servers::Servers,
    usage::Usage,
};
use crate::{
    cli,
    endpoints::database,
    failure::{Explain, Failure, Result},
    identity,
    layout::Layout,
    logs, ports, prerequisites,
    progress::Progress,
    services,
    spec::{Probe, open_log},
};

/// The API's statement, from its source.
const STATEMENT: &str = "order-api/src/store/create_order.sql";
/// How long connections are made and statements prepared before anything counts.
const WARM_UP: Duration = Duration::from_secs(2);
/// How long the API may take until it is ready, and pgbench and the API to end.
const LIMIT: Duration = Duration::from_secs(30);
/// Of so many of pgbench's transactions one is logged, with what it took.
const SAMPLE: u32 = 10;

/// What one run of an arm said.
#[derive(Debug, Clone, Serialize)]
struct Run {
    orders: u64,
    orders_per_second: f64,
    p50_us: u32,
    p99_us: u32,
    /// Of the API and of what sends the requests, which is this process; zero for pgbench.
    api_cpu_seconds: f64,
    client_cpu_seconds: f64,
    /// Transactions in the orders database for each order, of which each is one round trip.
    transactions_per_order: f64,
    api_peak_rss_bytes: u64,
}

/// All of it.
#[derive(Debug, Serialize)]
struct Report {
    connections: u32,
    seconds: u64,
    postgres_settings: Vec<String>,
    api: Vec<Run>,
    pgbench_runs: Vec<Run>,
    /// The API's orders a second to pgbench's, in the same round.
    ratio: Spread,
}

/// `pgbench` of the system.
pub(super) fn pgbench() -> Result<PathBuf> {
    prerequisites::on_path("pgbench").ok_or_else(|| {
        Failure::new("no `pgbench` on the PATH: it is what the API is measured by")
            .hint("on Debian or Ubuntu: apt-get install postgresql-client postgresql-contrib")
    })
}

/// Runs the scenario; its servers are gone when it returns.
pub(super) async fn api(args: &cli::ApiBench, document: &mut Document, progress: &Progress) -> Result<()> {
    let pgbench = pgbench()?;
    if !args.setup.no_build {
        services::build(&Layout::open(None)?, progress)?;
    }
    let binary = services::binary("order-api")?;
    document.version(version(&binary)?);
    document.version(version(&pgbench)?);
    document.busy();
    // What is answered is on the disk: without it, no order is safe.
    let mut settings = vec![("fsync".to_owned(), "on".to_owned())];
    settings.extend(args.setup.postgres_set.iter().cloned());
    let (servers, mut stack) = Servers::start(args.setup.postgres, &settings, progress).await?;
    let bench = Bench { args, servers: &servers, binary, pgbench };
    let result = tokio::select! {
        result = bench.rounds() => result,
        () = stack.interrupted() => Err(Failure::new("interrupted")),
    };
    document.version(format!("PostgreSQL {}", servers.postgres_version));
    servers.stop(stack, result.is_err()).await;
    let (api, pgbench_runs) = result?;
    let ratios =
        api.iter().zip(&pgbench_runs).map(|(api, pgbench)| api.orders_per_second / pgbench.orders_per_second);
    let ratio = Spread::of(ratios).ok_or_else(|| Failure::new("nothing was measured"))?;
    let report = Report {
        connections: args.connections,
        seconds: args.seconds,
        postgres_settings: settings.iter().map(|(name, value)| format!("{name}={value}")).collect(),
        api,
        pgbench_runs,
        ratio,
    };
    document.sections.push(report.section()?);
    Ok(())
}

struct Bench<'a> {
    args: &'a cli::ApiBench,
    servers: &'a Servers,
    binary: PathBuf,
    pgbench: PathBuf,
}

impl Bench<'_> {
    async fn rounds(&self) -> Result<(Vec<Run>, Vec<Run>)> {
        let (mut api, mut pgbench) = (Vec::new(), Vec::new());
        for round in 1..=self.args.rounds {
            let what = format!("order-api, round {round} of {}", self.args.rounds);
            let step = self.servers.progress.step(&what);
            let run = self.over_http().await?;
            step.done(&format!("{what}: {:.0} orders/s", run.orders_per_second));
            api.push(run);
            let what = format!("pgbench, round {round} of {}", self.args.rounds);
            let step = self.servers.progress.step(&what);
            let run = self.by_pgbench(round).await?;
            step.done(&format!("{what}: {:.0} orders/s", run.orders_per_second));
            pgbench.push(run);
        }
        Ok((api, pgbench))
    }

    fn url(&self, role: &str) -> String {
        database(self.servers.postgres_port, role, "orders")
    }

    async fn over_http(&self) -> Result<Run> {
        let before = self.counts().await?;
        let address = ports::free()?;
        let mut api = self.start_api(address).await?;
        let load = Load {
            address,
            path: "/api/orders",
            body: order().to_string().into(),
            connections: self.args.connections,
            status: 201,
        };
        load.run(WARM_UP).await?;
        let pid = api.id().unwrap_or(0);
        let (usage, own) = (usage(pid), usage(std::process::id()));
        let since = Instant::now();
        let mut took = load.run(Duration::from_secs(self.args.seconds)).await?;
        let seconds = since.elapsed().as_secs_f64();
        let (usage_after, own_after) = (self::usage(pid), self::usage(std::process::id()));
        if let Some(pid) = api.id() {
            identity::send(pid, Signal::TERM);
        }
        let stop = || "stop order-api".to_owned();
        tokio::time::timeout(LIMIT, api.wait()).await.explain(stop)?.explain(stop)?;
        let after = self.counts().await?;
        took.sort_unstable();
        #[expect(clippy::cast_precision_loss, reason = "no count of orders comes near 2^52")]
        let (count, transactions, orders) =
            (took.len() as f64, (after.0 - before.0) as f64, (after.1 - before.1) as f64);
        Ok(Run {
            orders: took.len() as u64,
            orders_per_second: count / seconds,
            p50_us: per_mille(&took, 500),
            p99_us: per_mille(&took, 990),
            api_cpu_seconds: usage_after.cpu_seconds - usage.cpu_seconds,
            client_cpu_seconds: own_after.cpu_seconds - own.cpu_seconds,
            transactions_per_order: transactions / orders,
            api_peak_rss_bytes: usage_after.peak_rss_bytes,
        })
    }

    async fn start_api(&self, address: SocketAddr) -> Result<Child> {
        let log = self.servers.layout.log("order-api");
        let out = open_log(&log)?;
        let errors = out.try_clone().explain(|| "write a log".to_owned())?;
        let (key, value) = self.servers.layout.mark();
        let mut command = Command::new(&self.binary);
        command.env("ORDER_API_HTTP__LISTEN", address.to_string());
        command.env("ORDER_API_POSTGRES__URL", self.url("order_api"));
        command.env("ORDER_API_POSTGRES__MAX_CONNECTIONS", self.args.connections.to_string());
        // Nothing else is to be counted.
        command.env("ORDER_API_POSTGRES__CHECK_INTERVAL_MS", "60000");
        command.env("ORDER_API_LOG__LEVEL", "info,access=warn");
        command.env(key, value).stdin(Stdio::null()).stdout(out).stderr(errors).kill_on_drop(true);
        let mut api = command.spawn().explain(|| "start order-api".to_owned())?;
        let ready = Probe::Http { url: format!("http://{address}/health/ready") };
        let until = Instant::now() + LIMIT;
        while !ready.attempt().await {
            if Instant::now() > until || api.try_wait().is_ok_and(|ended| ended.is_some()) {
                return Err(logs::with_tail(Failure::new("order-api is not ready"), &log));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(api)
    }

    /// How many transactions have been committed in the orders database, and how many orders there are, while nobody is
    /// at it: a backend counts its last transactions when it ends.
    async fn counts(&self) -> Result<(i64, i64)> {
        let what = || "count the transactions".to_owned();
        let mut connection = PgConnection::connect(&self.url("postgres")).await.explain(what)?;
        sqlx::query_as(
            "SELECT xact_commit, (SELECT count(*) FROM orders) FROM pg_stat_database WHERE datname = 'orders'",
        )
        .fetch_one(&mut connection)
        .await
        .explain(what)
    }

    async fn by_pgbench(&self, round: u32) -> Result<Run> {
        let folder = self.servers.layout.dir.join(format!("pgbench-{round}"));
        fs::create_dir_all(&folder).explain(|| format!("create {}", folder.display()))?;
        let source = self.servers.layout.root.join(STATEMENT);
        let statement = fs::read_to_string(&source).explain(|| format!("read {}", source.display()))?;
        let file = folder.join("order.sql");
        fs::write(&file, script(&statement)).explain(|| format!("write {}", file.display()))?;
        let seconds = self.args.seconds;
        let mut command = Command::new(&self.pgbench);
        command.args([
            "--no-vacuum",
            "--protocol=prepared",
            "--log",
            &format!("--sampling-rate={}", 1.0 / f64::from(SAMPLE)),
        ]);
        command.args([
            format!("--client={}", self.args.connections),
            "--jobs=2".into(),
            format!("--time={seconds}"),
        ]);
        command.arg(format!("--define=base={}", u64::from(round) << 40));
        command.args(["--define=n=0", &format!("--define=payload={}", event())]);
        command.arg("--file").arg(&file).arg(self.url("order_api"));
        command.current_dir(&folder).stdin(Stdio::null()).kill_on_drop(true);
        let limit = Duration::from_secs(seconds) + LIMIT;
        let output =
            tokio::time::timeout(limit, command.output()).await.explain(|| "wait for pgbench".to_owned())?;
        let output = output.explain(|| "start pgbench".to_owned())?;
        let said = String::from_utf8_lossy(&output.stdout);
        let value = |key: &str| {
            said.lines()
                .find_map(|line| line.strip_prefix(key)?.split_ascii_whitespace().next()?.parse::<f64>().ok())
        };
        let per_second = value("tps = ").filter(|_| output.status.success());
        let (Some(orders_per_second), Some(orders)) =
            (per_second, value("number of transactions actually processed: "))
        else {
            return Err(Failure::new(format!(
                "pgbench failed: {}{}",
                said,
                String::from_utf8_lossy(&output.stderr)
            )));
        };
        let mut took = logged(&folder)?;
        took.sort_unstable();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a count, printed as one"
        )]
        let orders = orders as u64;
        Ok(Run {
            orders,
            orders_per_second,
            p50_us: per_mille(&took, 500),
            p99_us: per_mille(&took, 990),
            api_cpu_seconds: 0.0,
            client_cpu_seconds: 0.0,
            transactions_per_order: 1.0,
            api_peak_rss_bytes: 0,
        })
    }
}

/// An order as most are: two lines.
fn order() -> serde_json::Value {
    json!({
        "customerId": "customer-1", "restaurantId": "restaurant-1",
        "items": [
            {"menuItemId": "margherita", "name": "Pizza Margherita", "price": "9.50", "quantity": 2},
            {"menuItemId": "water", "name": "Water", "price": "1.75", "quantity": 1},
        ],
    })
}

/// Its event, as pgbench writes it.
fn event() -> serde_json::Value {
    let mut event = order();
    event["totalAmount"] = "20.75".into();
    event["currency"] = "EUR".into();
    event["version"] = 1.into();
    event["eventType"] = "OrderCreated".into();
    event["occurredOn"] = "2026-01-01T00:00:00.000001Z".into();
    for id in ["eventId", "aggregateId"] {
        event[id] = "01936d2e-7c01-7a4b-8e55-9f0c1d2e3a41".into();
    }
    event
}

/// The API's statement as a script of pgbench: no answer to remember, and ids that grow as the API's do.
fn script(statement: &str) -> String {
    let number = "(:base::bigint + :n::bigint * 1024 + :client_id::bigint)";
    let id = format!("lpad(to_hex({number}), 32, '0')");
    let values = [
        "NULL",
        "NULL",
        "NULL",
        "NULL",
        "NULL",
        "NULL",
        "NULL",
        &id,
        "'customer-1'",
        "'restaurant-1'",
        "'EUR'",
        "20.75",
        "now()",
        "NULL",
        "'{margherita,water}'",
        "'{Pizza Margherita,Water}'",
        "'{9.50,1.75}'",
        "'{2,1}'",
        &format!("{id}::uuid"),
        ":payload::jsonb",
        "NULL",
    ];
    // The last first, or $1 would be found in $10.
    let statement = (1..)
        .zip(values)
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
        .fold(without_comments(statement), |text, (n, value)| text.replace(&format!("${n}"), value));
    format!("\\set n :n + 1\n{};\n", statement.trim())
}

fn without_comments(statement: &str) -> String {
    statement.lines().filter(|line| !line.starts_with("--")).collect::<Vec<_>>().join("\n")
}

/// What the sampled transactions took, in microseconds: the third field of each line
/// (<https://www.postgresql.org/docs/current/pgbench.html>).
fn logged(folder: &Path) -> Result<Vec<u32>> {
    let mut took = Vec::new();
    for entry in fs::read_dir(folder).explain(|| "read pgbench's log".to_owned())?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("pgbench_log.") {
            let text = fs::read_to_string(entry.path()).explain(|| "read pgbench's log".to_owned())?;
            took.extend(text.lines().filter_map(|line| line.split(' ').nth(2)?.parse::<u32>().ok()));
        }
    }
    Ok(took)
}

fn usage(pid: u32) -> Usage {
    Usage::of(pid).unwrap_or_default()
}

impl Report {
    fn section(&self) -> Result<Section> {
        let title = "orders over HTTP, beside pgbench with the API's own statement".to_owned();
        let mut section = Section::of("api", title, self)?;
        section.notes.push(format!(
            "{} connections each, {} s a run, {} rounds interleaved: medians; Postgres with {}; CPU in seconds per 1,000 orders",
            self.connections,
            self.seconds,
            self.api.len(),
            self.postgres_settings.join(", ")
        ));
        section.table =
            head(["ARM", "ORDERS/S", "FROM TO", "P50 MS", "P99 MS", "API CPU", "CLIENT CPU", "API PEAK MIB"]);
        let mut bars = Vec::new();
        for (name, runs) in [("pgbench", &self.pgbench_runs), ("order-api", &self.api)] {
            section.table.extend(cells(name, runs));
            if let Some(rate) = Spread::of(runs.iter().map(|run| run.orders_per_second)) {
                let label = format!("{:.0}", rate.median);
                bars.push(Bar { name: name.to_owned(), parts: vec![rate.median], spread: Some(rate), label });
            }
        }
        section.charts.push(Chart { title: "Orders a second".into(), bars });
        let transactions =
            Spread::of(self.api.iter().map(|run| run.transactions_per_order)).map_or(0.0, |s| s.median);
        let Spread { median, min, max } = self.ratio;
        section.findings.push(format!("ratio to pgbench: {median:.2} ({min:.2} to {max:.2})"));
        section.findings.push(format!("database round trips per order: {transactions:.2}"));
        if self.ratio.relative() > SPREAD_LIMIT {
            section.warnings.push(format!(
                "the ratio spreads by {:.0} % of its median, so it says little; try again on a quiet machine, with more --rounds",
                self.ratio.relative() * 100.0
            ));
        }
        Ok(section)
    }
}

fn cells(name: &str, runs: &[Run]) -> Option<Vec<String>> {
    let median =
        |of: &dyn Fn(&Run) -> f64| Spread::of(runs.iter().map(of)).map_or(0.0, |spread| spread.median);
    let rate = Spread::of(runs.iter().map(|run| run.orders_per_second))?;
    #[expect(clippy::cast_precision_loss, reason = "no count of orders comes near 2^52")]
    let per_thousand = |cpu: fn(&Run) -> f64| {
        let seconds = median(&|run| cpu(run) * 1000.0 / run.orders as f64);
        if seconds > 0.0 { format!("{seconds:.3}") } else { "-".to_owned() }
    };
    let peak = runs.iter().map(|run| run.api_peak_rss_bytes).max().unwrap_or(0) >> 20;
    Some(vec![
        name.to_owned(),
        format!("{:.0}", rate.median),
        format!("{:.0} to {:.0}", rate.min, rate.max),
        format!("{:.2}", median(&|run| f64::from(run.p50_us) / 1000.0)),
        format!("{:.2}", median(&|run| f64::from(run.p99_us) / 1000.0)),
        per_thousand(|run| run.api_cpu_seconds),
        per_thousand(|run| run.client_cpu_seconds),
        if peak > 0 { peak.to_string() } else { "-".to_owned() },
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_has_every_value_in_its_place() {
        let script = script("-- $1\nSELECT $1, $10::text, $12, $19");
        assert!(
            script.starts_with("\\set n :n + 1\nSELECT NULL, 'restaurant-1'::text, 20.75, lpad("),
            "{script}"
        );
        assert!(!script.contains('$'), "{script}");
    }
}

//! The services: building them, and how to run each instance.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use crate::{
    ending,
    endpoints::{bootstrap, database},
    failure::{Explain, Failure, Result},
    layout::Layout,
    logs,
    ports::{CONSUMERS, Instance, Ports},
    prerequisites,
    progress::Progress,
    spec::{Layer, Probe, Spec, open_log},
};

/// How long a service may take to drain.
const GRACE: Duration = Duration::from_secs(20);

/// The packages of the services, and this one: its manifest names every feature of every dependency that any
/// build of the workspace wants, so that whatever is built together with it compiles each dependency once.
const PACKAGES: [&str; 4] = ["order-api", "cdc-relay", "consumer", "xtask"];

/// The topic that a consumer reads.
pub(crate) fn topic(consumer: &str) -> &'static str {
    match consumer {
        "messages" => "notifications",
        "acks" => "order-acks",
        _ => "order-events",
    }
}

/// The replication slot of a relay.
pub(crate) fn slot(service: &str) -> Option<&'static str> {
    match service {
        "cdc-relay" => Some("cdc_relay"),
        "consumers-relay" => Some("consumers_relay"),
        _ => None,
    }
}

/// The package that a service is built from; nothing for Postgres and Kafka.
pub(crate) fn package(service: &str) -> Option<&'static str> {
    match service {
        "order-api" => Some("order-api"),
        "cdc-relay" | "consumers-relay" => Some("cdc-relay"),
        consumer if CONSUMERS.contains(&consumer) => Some("consumer"),
        _ => None,
    }
}

/// Builds the services, with cargo's own progress on the terminal.
pub(crate) fn build(layout: &Layout, progress: &Progress) -> Result<()> {
    let mut cargo = cargo(layout)?;
    cargo.args(["build", "--release"]).args(PACKAGES.iter().flat_map(|package| ["-p", package]));
    progress.line(&format!("  building {} (the first time takes minutes)", PACKAGES[..3].join(", ")));
    let since = std::time::Instant::now();
    let status = cargo.stdin(Stdio::null()).status().explain(|| "start cargo".to_owned())?;
    if !status.success() {
        return Err(Failure::new(format!("the build failed: {}", ending::describe(status)))
            .hint("a C toolchain, make and perl are needed: apt-get install build-essential perl"));
    }
    progress.line(&format!("  built ({:.1} s)", since.elapsed().as_secs_f64()));
    Ok(())
}

/// Cargo in the repository, on the target folder that this program came from. What the cargo that runs us put
/// into the environment is taken out: build scripts that ask for it would be run again, and with them all that
/// depends on them.
pub(crate) fn cargo(layout: &Layout) -> Result<Command> {
    let mut cargo = Command::new(prerequisites::cargo()?);
    for (key, _) in std::env::vars_os() {
        let name = key.to_string_lossy();
        let of_our_package = name.starts_with("CARGO_PKG_")
            || name.starts_with("CARGO_MANIFEST_")
            || name.starts_with("CARGO_BIN_")
            || [
                "CARGO",
                "CARGO_CRATE_NAME",
                "CARGO_PRIMARY_PACKAGE",
                "CARGO_TARGET_TMPDIR",
                "LD_LIBRARY_PATH",
            ]
            .contains(&name.as_ref());
        if of_our_package {
            cargo.env_remove(key);
        }
    }
    cargo.current_dir(&layout.root).env("CARGO_TARGET_DIR", target()?);
    Ok(cargo)
}

/// `target/`, where this program lies in `target/release/`.
pub(crate) fn target() -> Result<PathBuf> {
    let program = this_program()?;
    let folder = program.ancestors().nth(2).map(Path::to_path_buf);
    folder.ok_or_else(|| Failure::new("this program is not in a target folder"))
}

/// This program. Where the build has just replaced it, the system tells the path of what it was.
pub(crate) fn this_program() -> Result<PathBuf> {
    let program = std::env::current_exe().explain(|| "find this program".to_owned())?;
    let replaced = program.to_str().and_then(|path| path.strip_suffix(" (deleted)")).map(PathBuf::from);
    Ok(replaced.unwrap_or(program))
}

/// The binary of a package.
pub(crate) fn binary(package: &str) -> Result<PathBuf> {
    let path = target()?.join("release").join(package);
    if path.is_file() {
        return Ok(path);
    }
    Err(Failure::new(format!("there is no {}", path.display())).hint("leave --no-build out"))
}

/// How to run one instance.
pub(crate) fn spec(layout: &Layout, ports: &Ports, instance: &Instance) -> Result<Spec> {
    let listen = format!("127.0.0.1:{}", instance.port);
    // Any instance of the API will do; the others say when it is away.
    let api = ports.services.iter().find(|other| other.service == "order-api");
    let fleet = api.map_or_else(String::new, |api| format!("http://127.0.0.1:{}", api.port));
    let name = instance.name.clone();
    let (package, layer, args, env) = match instance.service {
        "order-api" => (
            "order-api",
            Layer::Api,
            vec![],
            vec![
                ("ORDER_API_HTTP__LISTEN", listen),
                ("ORDER_API_POSTGRES__URL", database(ports.postgres, "order_api", "orders")),
                ("ORDER_API_FLEET__INSTANCE", name),
                ("ORDER_API_MESSAGES__TOPICS", "notifications".to_owned()),
            ],
        ),
        "cdc-relay" | "consumers-relay" => {
            let mut env = relay_env(ports, instance.service);
            env.push(("CDC_RELAY_HTTP__LISTEN", listen));
            env.push(("CDC_RELAY_FLEET__URL", fleet));
            env.push(("CDC_RELAY_FLEET__INSTANCE", name));
            ("cdc-relay", Layer::Relay, vec!["run".into()], env)
        }
        handler => {
            let url = match handler {
                "acks" => database(ports.postgres, "order_acks", "orders"),
                _ => consumers(ports),
            };
            let env = vec![
                ("CONSUMER_HTTP__LISTEN", listen),
                ("CONSUMER_KAFKA__BROKERS", bootstrap(&ports.kafka)),
                ("CONSUMER_KAFKA__TOPICS", topic(handler).to_owned()),
                ("CONSUMER_POSTGRES__URL", url),
                ("CONSUMER_CONSUMER__HANDLER", handler.to_owned()),
                ("CONSUMER_FLEET__URL", fleet),
                ("CONSUMER_FLEET__INSTANCE", name),
                // A static member: one that was killed has its partitions back at once, instead of after the
                // session's time-out.
                ("CONSUMER_KAFKA__PROPERTIES__GROUP_INSTANCE_ID", instance.name.clone()),
            ];
            ("consumer", Layer::Consumer, vec![], env)
        }
    };
    Ok(Spec {
        name: instance.name.clone(),
        service: instance.service.to_owned(),
        layer,
        program: binary(package)?,
        args,
        env: env.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        cwd: layout.dir.clone(),
        user: None,
        log: layout.log(&instance.name),
        port: instance.port,
        probe: Probe::Http { url: format!("http://127.0.0.1:{}/health/ready", instance.port) },
        grace: GRACE,
    })
}

/// The consumers' database, as its owner.
fn consumers(ports: &Ports) -> String {
    database(ports.postgres, "consumer", "consumers")
}

fn relay_env(ports: &Ports, service: &str) -> Vec<(&'static str, String)> {
    let mut env = vec![("CDC_RELAY_KAFKA__BROKERS", bootstrap(&ports.kafka))];
    if service == "consumers-relay" {
        env.extend([
            ("CDC_RELAY_POSTGRES__URL", database(ports.postgres, "consumers_relay", "consumers")),
            ("CDC_RELAY_POSTGRES__SLOT", "consumers_relay".to_owned()),
            ("CDC_RELAY_POSTGRES__PUBLICATION", "consumers_relay".to_owned()),
        ]);
    } else {
        env.push(("CDC_RELAY_POSTGRES__URL", database(ports.postgres, "cdc_relay", "orders")));
    }
    // Of a row that names no topic.
    env.push(("CDC_RELAY_ROUTE__TOPIC", "${aggregatetype}-events".to_owned()));
    env
}

/// Makes the tables and slots that services need before there is one, by the commands that a user would use: the
/// consumers' tables, then each relay's slot. Nothing happens when they are there.
pub(crate) async fn init(layout: &Layout, ports: &Ports) -> Result<()> {
    migrate(layout, ports).await?;
    let program = binary("cdc-relay")?;
    for relay in ["cdc-relay", "consumers-relay"] {
        relay_once(layout, ports, relay, &program, &["init"], Vec::new()).await?;
    }
    Ok(())
}

/// Makes the consumers' tables.
pub(crate) async fn migrate(layout: &Layout, ports: &Ports) -> Result<()> {
    let env = vec![("CONSUMER_POSTGRES__URL", consumers(ports))];
    once(layout, "consumers-migrate", &binary("consumer")?, &["migrate"], env).await
}

/// Runs a command of a relay's to its end, with further configuration; `program` is its binary.
pub(crate) async fn relay_once(
    layout: &Layout,
    ports: &Ports,
    relay: &str,
    program: &Path,
    args: &[&str],
    further: Vec<(&'static str, String)>,
) -> Result<()> {
    let name = format!("{relay}-{}", args.first().unwrap_or(&"run"));
    let mut env = relay_env(ports, relay);
    env.extend(further);
    once(layout, &name, program, args, env).await
}

/// Runs a program to its end.
pub(crate) async fn once(
    layout: &Layout,
    name: &str,
    program: &Path,
    args: &[&str],
    env: Vec<(&'static str, String)>,
) -> Result<()> {
    let path = layout.log(name);
    let log = open_log(&path)?;
    let errors = log.try_clone().explain(|| format!("write {}", path.display()))?;
    let status = tokio::process::Command::new(program)
        .args(args)
        .envs(env)
        .current_dir(&layout.dir)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .kill_on_drop(true)
        .status()
        .await
        .explain(|| format!("start {} {}", program.display(), args.join(" ")))?;
    if status.success() {
        return Ok(());
    }
    let why =
        format!("{name} ({} {}) failed: {}", program.display(), args.join(" "), ending::describe(status));
    Err(logs::with_tail(Failure::new(why), &path))
}

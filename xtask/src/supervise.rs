//! The supervisor: starts the stack in order, keeps it running, and stops it in the reverse order.

use std::{fs, sync::Arc, time::Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    cli::Up,
    control,
    crew::Crew,
    desk::Desk,
    down,
    endpoints::Endpoints,
    failure::{Explain, Failure, Result},
    identity::Identity,
    kafka::{self, Kafka},
    keeper::Order,
    layout::Layout,
    logs, maven,
    ports::{self, Ports},
    postgres::{self, Installation},
    prerequisites,
    progress::Progress,
    services, state,
    state::State,
    topics,
};

/// A stack that was started by this process and has to be stopped by it.
#[derive(Debug)]
pub(crate) struct Stack {
    desk: Arc<Desk>,
    crew: Arc<Crew>,
    interrupts: Interrupts,
    /// Held as long as we live.
    _locks: (fs::File, Option<fs::File>),
}

/// Ctrl-C, and what `cargo xtask down` sends.
#[derive(Debug)]
pub(crate) struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Interrupts {
    /// From now on these signals do not end the process by themselves.
    pub(crate) fn new() -> Result<Self> {
        let listen = |kind| signal(kind).explain(|| "listen to signals".to_owned());
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    /// Returns at the next signal.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}

impl Stack {
    /// Starts everything; on failure, or when told to stop on the way, stops again what was started.
    pub(crate) async fn start(up: &Up, layout: &Layout, progress: &Progress) -> Result<Self> {
        let lock = state::lock(layout)?.ok_or_else(|| already(layout))?;
        let mut interrupts = Interrupts::new()?;
        down::clear(layout, progress).await;
        if up.fresh {
            wipe(layout)?;
        }
        prerequisites::disk(&layout.dir)?;
        let installation = postgres::install(layout, progress, up.postgres)?;
        let (ports, claim) = ports::choose(up, &layout.downloads)?;
        let supervisor = Identity::of(std::process::id())
            .ok_or_else(|| Failure::new("cannot tell this process's start time"))?;
        let state = State {
            supervisor,
            ready: false,
            cluster: postgres::cluster(layout, installation.major),
            endpoints: Endpoints::new(&ports),
            processes: Vec::new(),
        };
        let desk = Arc::new(Desk::new(layout.clone(), progress.clone(), state));
        let crew = Arc::new(Crew::new(desk.clone()));
        let started = tokio::select! {
            started = start(up, &desk, &crew, &installation, &ports) => started,
            () = interrupts.next() => Err(Failure::new("interrupted")),
        };
        let mut stack = Self { desk, crew, interrupts, _locks: (lock, claim) };
        match started.and_then(|()| stack.desk.all_ready()) {
            Ok(()) => Ok(stack),
            Err(failure) => {
                stack.stop().await;
                Err(failure)
            }
        }
    }

    pub(crate) fn endpoints(&self) -> Endpoints {
        self.desk.state().endpoints
    }

    pub(crate) fn state(&self) -> State {
        self.desk.state()
    }

    /// Takes commands until it is told to stop.
    pub(crate) async fn run(&mut self) -> Result<()> {
        let serve = control::serve(&self.desk, &self.crew);
        let logs = self.desk.state().processes.into_iter().map(|entry| entry.log).collect();
        tokio::select! {
            result = serve => result,
            () = logs::keep_bounded(logs) => Ok(()),
            () = self.interrupts.next() => Ok(()),
        }
    }

    /// Returns at a signal to stop.
    pub(crate) async fn interrupted(&mut self) {
        self.interrupts.next().await;
    }

    /// Stops everything in the reverse order. A second signal kills what is left.
    pub(crate) async fn stop(&mut self) {
        let since = Instant::now();
        let progress = &self.desk.progress;
        progress.line("stopping (again Ctrl-C kills)");
        let _ = fs::remove_file(self.desk.layout.endpoints());
        tokio::select! {
            () = self.crew.stop_all(Order::End) => {}
            () = self.interrupts.next() => {
                progress.line("  killing what is left");
                down::kill(&self.desk.layout, &self.desk.state()).await;
            }
        }
        // Again: the processes' ends were told there.
        let _ = fs::remove_file(self.desk.layout.endpoints());
        let _ = fs::remove_file(self.desk.layout.state());
        let _ = fs::remove_dir_all(&self.desk.layout.run);
        progress.line(&format!("stopped ({:.1} s)", since.elapsed().as_secs_f64()));
    }
}

pub(crate) fn already(layout: &Layout) -> Failure {
    let dir = layout.dir.display();
    let pid = state::read(layout).map(|state| format!(" (supervisor process {})", state.supervisor.pid));
    Failure::new(format!("a stack runs in {dir} already{}", pid.unwrap_or_default()))
        .hint("`cargo xtask status` shows it, `cargo xtask down` stops it (both with the same --dir, if any)")
}

/// `--fresh`: data and logs go, downloads stay.
pub(crate) fn wipe(layout: &Layout) -> Result<()> {
    for folder in [layout.data(), layout.conf()] {
        fs::remove_dir_all(&folder).explain(|| format!("remove {}", folder.display()))?;
        fs::create_dir(&folder).explain(|| format!("create {}", folder.display()))?;
    }
    let logs = fs::read_dir(layout.logs()).explain(|| format!("read {}", layout.logs().display()))?;
    for entry in logs.filter_map(std::result::Result::ok) {
        // Our own is open.
        if entry.path() != layout.log("supervisor") {
            fs::remove_file(entry.path()).explain(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

async fn start(up: &Up, desk: &Desk, crew: &Crew, installation: &Installation, ports: &Ports) -> Result<()> {
    tokio::try_join!(
        start_postgres(up, desk, crew, installation, ports),
        start_kafka(up, desk, crew, ports)
    )?;
    if !up.infra_only {
        start_services(desk, crew, ports).await?;
    }
    Ok(())
}

async fn start_postgres(
    up: &Up,
    desk: &Desk,
    crew: &Crew,
    installation: &Installation,
    ports: &Ports,
) -> Result<()> {
    let (layout, progress) = (&desk.layout, &desk.progress);
    let step = progress.step("starting Postgres");
    let (own, with, port, settings) =
        (layout.clone(), installation.clone(), ports.postgres, up.postgres_set.clone());
    let prepare = move || postgres::prepare(&own, &with, port, &settings);
    tokio::task::spawn_blocking(prepare).await.explain(|| "prepare Postgres".to_owned())??;
    crew.hire(postgres::spec(layout, installation, port))?;
    crew.ready("postgres").await?;
    step.done(&format!("postgres {} ready on 127.0.0.1:{port}", installation.version));
    let step = progress.step("applying the schema");
    postgres::databases(layout, port).await?;
    step.done("databases orders and consumers ready");
    Ok(())
}

async fn start_kafka(up: &Up, desk: &Desk, crew: &Crew, ports: &Ports) -> Result<()> {
    let (layout, progress) = (&desk.layout, &desk.progress);
    let jars = maven::kafka(layout, progress)?;
    let version = kafka::version(&jars);
    let wanted = topics::read(&layout.root)?;
    let step = progress.step("starting Kafka");
    let broker =
        Kafka { layout, java: prerequisites::java()?, jars, ports, settings: &up.kafka_set, proxied: &[] };
    broker.prepare().await?;
    for id in broker.ids() {
        crew.hire(broker.spec(id))?;
    }
    for id in broker.ids() {
        crew.ready(&format!("kafka-{id}")).await?;
    }
    let bootstrap = crate::endpoints::bootstrap(&ports.kafka);
    step.done(&format!("kafka {version} ready on {bootstrap}"));
    let step = progress.step("creating the topics");
    let names = wanted.iter().map(|topic| topic.name.as_str()).collect::<Vec<_>>().join(", ");
    topics::create(&bootstrap, wanted, kafka::replication(ports.kafka.len())).await?;
    step.done(&format!("topics {names} ready"));
    Ok(())
}

async fn start_services(desk: &Desk, crew: &Crew, ports: &Ports) -> Result<()> {
    let (layout, progress) = (&desk.layout, &desk.progress);
    let step = progress.step("consumer migrate, cdc-relay init");
    services::init(layout, ports).await?;
    step.done("the consumers' tables and the replication slots ready");
    let mut steps = Vec::new();
    for instance in &ports.services {
        crew.hire(services::spec(layout, ports, instance)?)?;
        steps.push((instance, progress.step(format!("starting {}", instance.name))));
    }
    for (instance, step) in steps {
        crew.ready(&instance.name).await?;
        step.done(&format!("{} ready on http://127.0.0.1:{}", instance.name, instance.port));
    }
    Ok(())
}

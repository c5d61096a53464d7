//! `cdc-relay run`: the threads, and their order of starting and stopping.

use std::{
    sync::{Arc, atomic::Ordering, mpsc},
    time::Duration,
};

use service::{Failure, Health, access, exit::Kind, fleet::Fleet, health, http, metrics, shutdown::Shutdown};

use crate::{
    admin::Metrics, config::Settings, dlq, monitor, replay, retention, sessions, shared::Shared, wait,
};

/// How long a stop waits for what has nothing to save.
const LEAVE_GRACE: Duration = Duration::from_secs(5);

/// Streams until a stop is asked for or an error ends the process.
pub(super) fn run(settings: Settings) -> Result<(), Failure> {
    service::logs::init(&settings.log)?;
    let internal =
        |what: &str, e: std::io::Error| Failure::new(Kind::Internal, format!("cannot {what}: {e}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| internal("start the runtime", e))?;
    let (waker, wakeups) = wait::pair().map_err(|e| internal("make a pipe", e))?;
    let shared = Shared {
        settings: Arc::new(settings),
        metrics: Metrics::default(),
        health: Health::default(),
        waker,
        stop: Arc::default(),
        postgres_stops: Arc::default(),
        server: Arc::default(),
        redrives: Arc::default(),
        replays: Arc::default(),
    };
    let fleet =
        Fleet::join(shared.settings.fleet.clone(), "cdc-relay", env!("CARGO_PKG_VERSION"), &shared.health);
    let result = runtime.block_on(async {
        let listener = http::bind(&shared.settings.listen).await?;
        let mut registry = metrics::registry("cdc_relay");
        shared.metrics.register(&mut registry, &shared.settings);
        let address = listener.local_addr().map_err(|e| internal("tell the address", e))?;
        tracing::info!(%address, slot = shared.settings.slot, "starting");
        let settings = Arc::clone(&shared.settings);
        let replays = replay::api::router(Arc::clone(&shared.replays), settings, shared.waker.clone());
        let redrives = dlq::api::router(Arc::clone(&shared.redrives), shared.waker.clone());
        let administration = redrives.merge(replays);
        let administration = access::guard(administration, address, &shared.settings.admin_token);
        let router = health::router(shared.health.clone(), Arc::new(registry)).merge(administration);
        let (trigger, shutdown) = Shutdown::on_signals()?;
        let (http_trigger, http_shutdown) = Shutdown::manual();
        let serving = tokio::spawn(http::serve(listener, router, http::Limits::default(), http_shutdown));

        let (stop_monitor, monitor_stopped) = mpsc::channel::<()>();
        let watched = shared.clone();
        let monitor = spawn("monitor", move || monitor::run(&watched, &monitor_stopped))?;
        let (stop_retention, retention_stopped) = mpsc::channel::<()>();
        let cleaned = shared.clone();
        let retention = spawn("retention", move || retention::run(&cleaned, &retention_stopped))?;
        let piped = shared.clone();
        let pipeline = spawn("pipeline", move || {
            let result = sessions::run(&piped, &wakeups);
            // Whatever ended it, the process ends with it.
            trigger.request();
            result
        })?;

        shutdown.requested().await;
        shared.stop.store(true, Ordering::Relaxed);
        shared.waker.wake();
        // A connection attempt that hangs is not waited for: nothing is lost by leaving it.
        let grace = shared.settings.drain_grace + LEAVE_GRACE;
        let result = tokio::time::timeout(grace, join(pipeline)).await;
        drop((stop_monitor, stop_retention));
        let watched = tokio::time::timeout(LEAVE_GRACE, join(monitor)).await;
        // A statement that is under way is the server's, which ends it or takes it back.
        let cleaned = tokio::time::timeout(LEAVE_GRACE, join(retention)).await;
        http_trigger.request();
        let served = tokio::time::timeout(LEAVE_GRACE, serving).await;
        result.unwrap_or(Ok(Ok(())))??;
        watched.unwrap_or(Ok(()))?;
        cleaned.unwrap_or(Ok(()))?;
        match served {
            Ok(Err(e)) => Err(Failure::new(Kind::Internal, format!("the HTTP server: {e}"))),
            // Or a client that holds its connection open.
            Ok(Ok(())) | Err(_) => Ok(()),
        }
    });
    runtime.shutdown_background();
    fleet.leave();
    result
}

fn spawn<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<std::thread::JoinHandle<T>, Failure> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(|e| Failure::new(Kind::Internal, format!("cannot start the thread {name}: {e}")))
}

/// Waits for a thread without keeping the runtime from serving.
async fn join<T: Send + 'static>(thread: std::thread::JoinHandle<T>) -> Result<T, Failure> {
    let panicked = || Failure::new(Kind::Internal, "a thread of the relay panicked; its message is above");
    let joined = tokio::task::spawn_blocking(move || thread.join()).await.map_err(|_| panicked())?;
    joined.map_err(|_| panicked())
}

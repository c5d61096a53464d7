//! The service as a value: built, then run until it is asked to stop.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use service::{
    Failure, Health,
    exit::Kind,
    http::{self, Limits},
    shutdown::Shutdown,
};
use tokio::{net::TcpListener, sync::Semaphore};

use crate::{
    chores::Chores,
    config::Config,
    member::Member,
    metrics::{Metrics, PoolCollector},
    pool::Pool,
    readiness::Watch,
    routes::{self, Context},
    store::Store,
};

/// A service that listens but does not answer yet.
#[derive(Debug)]
pub struct App {
    listener: TcpListener,
    address: SocketAddr,
    router: Router,
    watch: Watch,
    chores: Chores,
    member: Arc<Member>,
    drain_timeout: Duration,
}

/// Builds the service and binds its address. The database may be away: the service says so until it is there.
///
/// # Errors
/// 64 for a configuration that is wrong, 69 for an address that is taken.
pub async fn build(config: &Config) -> Result<App, Failure> {
    config.check()?;
    let mut registry = service::metrics::registry("order_api");
    let metrics = Metrics::register(&mut registry);
    let postgres = &config.postgres;
    let options = postgres.connect_options()?;
    let pool = Arc::new(Pool::new(options.clone(), postgres.max_connections, postgres.acquire_timeout()));
    registry.register_collector(Box::new(PoolCollector(Arc::clone(&pool))));
    let store = Store::new(pool, postgres.answer_timeout(), metrics.database_retries.clone());
    let health = Health::default();
    let watch = Watch {
        options,
        interval: postgres.check_interval(),
        timeout: postgres.answer_timeout(),
        health: health.clone(),
        up: metrics.database_up.clone(),
    };
    let context = Context {
        store,
        metrics,
        fleet: config.fleet.clone(),
        tokens: config.tokens()?.map(Arc::new),
        places: Semaphore::new(config.http.max_in_flight),
        header_limit_bytes: config.http.header_limit_bytes,
        body_limit_bytes: config.http.body_limit_bytes,
        request_timeout: config.http.request_timeout(),
        messages: config.messages.clone(),
    };
    let context = Arc::new(context);
    let chores = Chores { context: Arc::clone(&context), idempotency: config.idempotency.clone() };
    let member = Member::new(&context, &health)?;
    let router = routes::router(context, health, Arc::new(registry));
    let listener = http::bind(&config.http.listen).await?;
    let address = listener
        .local_addr()
        .map_err(|e| Failure::new(Kind::Internal, format!("cannot tell the address we listen on: {e}")))?;
    Ok(App { listener, address, router, watch, chores, member, drain_timeout: config.http.drain_timeout() })
}

impl App {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until the stop is asked for and the requests under way have been answered.
    pub async fn run_until_stopped(self, shutdown: Shutdown) {
        tracing::info!(address = %self.address, "listening");
        let watching = tokio::spawn(self.watch.run(shutdown.clone()));
        let mut chores = self.chores.start();
        chores.spawn(Arc::clone(&self.member).stay());
        let drain_is_over = async {
            shutdown.requested().await;
            tokio::time::sleep(self.drain_timeout).await;
        };
        tokio::select! {
            () = http::serve(self.listener, self.router, Limits::default(), shutdown.clone()) => {}
            // Requests have shorter deadlines than the drain: what is still open has sent no whole request.
            () = drain_is_over => {
                tracing::warn!("some connections are still open after the drain's time, closing them");
            }
        }
        watching.abort();
        drop(chores);
        self.member.leave().await;
        tracing::info!("stopped");
    }
}

//! The database away, slow, killed, or silent: bounded answers, no partial write, recovery by itself.

use std::{
    net::TcpListener,
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use order_api::config::Config;

use crate::{
    gate::{Gate, Mode},
    stage::{Answer, Stage, order, wait_for},
};

const ANYWHERE: std::net::SocketAddr =
    std::net::SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

fn short(config: &mut Config) {
    config.postgres.acquire_timeout_ms = 300;
    config.postgres.statement_timeout_ms = 300;
}

#[track_caller]
fn unavailable(answer: &Answer, detail: &str) {
    let problem = answer.problem(503, "database-unavailable");
    assert!(problem["detail"].as_str().unwrap().contains(detail), "{problem}");
    assert_eq!(answer.header("retry-after"), "1");
}

#[test]
fn a_database_that_is_away_at_the_start_comes_later() {
    let stage = Stage::new();
    let free = TcpListener::bind(ANYWHERE).unwrap().local_addr().unwrap();
    let mut config = stage.config(free);
    short(&mut config);
    let service = stage.service_of(&config);
    assert_eq!(service.get("/health/live").status, 200);
    let not_ready = || service.get("/health/ready").json()["state"] == "database_unavailable";
    wait_for("the service to say why it is not ready", not_ready);
    assert!(service.get("/health/ready").text.contains(&free.to_string()));
    let started = Instant::now();
    unavailable(&service.post(&order()), "Nothing was written");
    unavailable(&service.get("/api/orders/x"), "Nothing was written");
    assert!(started.elapsed().as_secs() < 5, "bounded by the acquire timeout");
    let _gate = Gate::new(&stage.runtime, free, stage.postgres());
    service.wait_ready();
    assert_eq!(service.post(&order()).status, 201);
    assert_eq!(stage.counts(), [1, 2, 1, 1]);
}

#[test]
fn a_schema_that_is_missing_is_named_with_the_command() {
    let stage = Stage::empty();
    // The role exists in the cluster only once some database has been set up.
    drop(Stage::new());
    let mut config = stage.config(stage.postgres());
    short(&mut config);
    let service = stage.service_of(&config);
    let state = || service.get("/health/ready").json()["state"].clone();
    wait_for("the service to miss the schema", || state() == "schema_missing");
    let detail = service.get("/health/ready").json()["detail"].as_str().unwrap().to_owned();
    for part in ["outbox (INSERT)", "psql", "postgres/init.sql", &stage.database] {
        assert!(detail.contains(part), "{detail}");
    }
    assert!(!detail.contains("order_api:"), "no password: {detail}");
    unavailable(&service.post(&order()), "Nothing was written");
    stage.apply_schema();
    service.wait_ready();
    assert_eq!(service.post(&order()).status, 201);
    stage.sql("ALTER TABLE order_items RENAME COLUMN price TO cost");
    stage.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'order_api' \
         AND datname = current_database()",
    );
    wait_for("the service to miss the column", || state() == "schema_missing");
    assert!(service.get("/health/ready").text.contains("price"));
}

#[test]
fn a_database_that_goes_and_returns_needs_no_restart() {
    let stage = Stage::new();
    let gate = Gate::new(&stage.runtime, ANYWHERE, stage.postgres());
    let mut config = stage.config(gate.address);
    short(&mut config);
    let service = stage.service_of(&config);
    service.wait_ready();
    for round in 1..=3 {
        assert_eq!(service.post(&order()).status, 201);
        gate.set(Mode::Shut);
        assert_eq!(service.post(&order()).status, 503);
        wait_for("not ready", || service.get("/health/ready").status == 503);
        gate.set(Mode::Open);
        // Not only the readiness: the very next request is served.
        assert_eq!(service.post(&order()).status, 201);
        service.wait_ready();
        assert_eq!(stage.count("orders"), 2 * round);
    }
}

#[test]
fn a_commit_whose_answer_is_lost_is_found_by_the_retry() {
    let stage = Stage::new();
    let gate = Gate::new(&stage.runtime, ANYWHERE, stage.postgres());
    // Looked at so rarely that only the request's own answer can be the one that is lost.
    let service = {
        let mut config = stage.config(gate.address);
        config.postgres.check_interval_ms = 60_000;
        stage.service_of(&config)
    };
    service.wait_ready();
    assert_eq!(service.post(&order()).status, 201);
    gate.lose_answers(1, Mode::Open);
    let answer = service.post(&order());
    assert_eq!(answer.status, 201, "{answer:?}");
    assert_eq!(service.get(answer.header("location")).json(), answer.json());
    assert_eq!(stage.counts(), [2, 4, 2, 2], "written once");
    assert!(service.get("/metrics").text.contains("order_api_database_retries_total 1\n"));
}

#[test]
fn a_commit_whose_answer_is_lost_for_good_is_told_as_such() {
    let stage = Stage::new();
    let gate = Gate::new(&stage.runtime, ANYWHERE, stage.postgres());
    let service = {
        let mut config = stage.config(gate.address);
        config.postgres.check_interval_ms = 60_000;
        config.postgres.acquire_timeout_ms = 300;
        stage.service_of(&config)
    };
    service.wait_ready();
    assert_eq!(service.post(&order()).status, 201);
    gate.lose_answers(1, Mode::Shut);
    unavailable(&service.post(&order()), "may or may not have taken effect");
    wait_for("the commit that nobody heard of", || stage.count("orders") == 2);
    assert_eq!(stage.counts(), [2, 4, 2, 2], "whole or not at all");
}

#[test]
fn a_database_that_says_nothing_is_given_up() {
    let stage = Stage::new();
    let gate = Gate::new(&stage.runtime, ANYWHERE, stage.postgres());
    let mut config = stage.config(gate.address);
    short(&mut config);
    // One connection: if it were kept, nothing would ever pass again.
    config.postgres.max_connections = 1;
    config.http.request_timeout_ms = 600;
    let service = stage.service_of(&config);
    service.wait_ready();
    assert_eq!(service.post(&order()).status, 201);
    gate.set(Mode::Frozen);
    let started = Instant::now();
    unavailable(&service.post(&order()), "may or may not");
    unavailable(&service.get("/api/orders/x"), "Nothing was written");
    assert!(started.elapsed().as_secs() < 5);
    gate.set(Mode::Open);
    wait_for("the service to recover", || service.post(&order()).status == 201);
}

#[test]
fn a_statement_that_waits_is_cancelled_and_leaves_nothing() {
    let stage = Stage::new();
    let service = stage.service_with(short);
    let lock = Lock::take(&stage);
    unavailable(&service.post(&order()), "Nothing was written");
    lock.release(&stage);
    assert_eq!(stage.counts(), [0; 4]);
    assert_eq!(service.post(&order()).status, 201);
}

#[test]
fn an_outbox_row_that_cannot_be_written_leaves_no_order() {
    let stage = Stage::new();
    let service = stage.service();
    stage.sql("ALTER TABLE outbox ADD CONSTRAINT refused CHECK (aggregateid IS NULL)");
    service.post(&order()).problem(500, "internal-error");
    assert_eq!(stage.counts(), [0; 4]);
    stage.sql("ALTER TABLE outbox DROP CONSTRAINT refused");
    assert_eq!(service.post(&order()).status, 201);
    assert_eq!(stage.counts(), [1, 2, 1, 1]);
}

#[test]
fn killed_connections_cost_no_order_and_no_client_an_error() {
    let stage = Stage::new();
    let service = stage.service();
    let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                WHERE usename = 'order_api' AND datname = current_database()";
    // Idle ones first: every connection of the pool is dead, and the next request does not notice.
    service.post(&order());
    stage.sql(kill);
    assert_eq!(service.post(&order()).status, 201);

    let done = AtomicBool::new(false);
    let (clients, each) = (8, 100);
    let kills = std::thread::scope(|scope| {
        let posting: Vec<_> = (0..clients)
            .map(|_| {
                scope.spawn(|| {
                    for _ in 0..each {
                        let answer = service.post(&order());
                        assert_eq!(answer.status, 201, "{answer:?}");
                    }
                })
            })
            .collect();
        let killing = scope.spawn(|| {
            let mut kills = 0;
            while !done.load(Ordering::SeqCst) {
                stage.sql(kill);
                kills += 1;
            }
            kills
        });
        let failed = posting.into_iter().filter_map(|p| p.join().err()).count();
        done.store(true, Ordering::SeqCst);
        assert_eq!(failed, 0);
        killing.join().unwrap()
    });
    assert!(kills > 3, "{kills}");
    let all = clients * each + 2;
    assert_eq!(stage.counts(), [all, 2 * all, all, all]);
}

#[test]
fn requests_under_way_are_answered_before_the_end() {
    let stage = Stage::new();
    let service = stage.service();
    let lock = Lock::take(&stage);
    std::thread::scope(|scope| {
        let under_way = scope.spawn(|| service.post(&order()));
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'order_api' \
                       AND wait_event_type = 'Lock' AND datname = current_database()";
        wait_for("the request to wait in the database", || stage.value(waiting) == "1");
        service.trigger.request();
        wait_for("new connections to be refused", || std::net::TcpStream::connect(service.address).is_err());
        assert!(!service.running.is_finished());
        lock.release(&stage);
        let answer = under_way.join().unwrap();
        assert_eq!(answer.status, 201, "{answer:?}");
    });
    stage.runtime.block_on(service.running).unwrap();
    assert_eq!(stage.counts(), [1, 2, 1, 1]);
}

#[test]
fn a_client_that_never_finishes_its_request_does_not_hold_up_the_end() {
    use std::io::Write;
    let stage = Stage::new();
    let service = stage.service_with(|c| {
        c.http.request_timeout_ms = 300;
        c.http.drain_timeout_ms = 300;
    });
    let silent = std::net::TcpStream::connect(service.address).unwrap();
    let mut half = std::net::TcpStream::connect(service.address).unwrap();
    half.write_all(b"POST /api/orders HTTP/1.1\r\nhost").unwrap();
    assert_eq!(service.get("/health/live").status, 200);
    service.trigger.request();
    stage.runtime.block_on(service.running).unwrap();
    drop((silent, half));
}

/// A lock of another session on the outbox: inserts wait.
pub(crate) struct Lock(sqlx::PgConnection);

impl Lock {
    pub(crate) fn take(stage: &Stage) -> Self {
        use sqlx::Connection;
        let options = stage.superuser();
        stage.runtime.block_on(async {
            let mut connection = sqlx::PgConnection::connect_with(&options).await.unwrap();
            sqlx::raw_sql("BEGIN; LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
                .execute(&mut connection)
                .await
                .unwrap();
            Self(connection)
        })
    }

    pub(crate) fn release(mut self, stage: &Stage) {
        stage.runtime.block_on(async { sqlx::raw_sql("COMMIT").execute(&mut self.0).await.unwrap() });
    }
}

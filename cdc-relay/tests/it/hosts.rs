//! Connection strings with several hosts.

use std::{
    io,
    net::{Shutdown, TcpListener, TcpStream},
    sync::atomic::{AtomicUsize, Ordering},
};

use crate::{
    database::{Database, eventually, server},
    pair::Pair,
    relay::{Relay, command, init},
};

/// A port where nobody listens.
fn closed_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn the_primary_is_found_behind_a_host_that_refuses_and_a_standby() {
    let mut pair = Pair::start(&[], &[]);
    let (name, standby, primary) = (pair.database.name.clone(), pair.standby.port, pair.primary.port);
    for attributes in ["read-write", "primary"] {
        let url = format!(
            "postgres://{name}:{name}@/{name}?host=127.0.0.1,localhost,localhost&port={},{standby},{primary}&target_session_attrs={attributes}",
            closed_port()
        );
        let output = pair.run(&["init"], &[("CDC_RELAY_POSTGRES__URL", &url)]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let relay = Relay::start(&pair.database, &[("CDC_RELAY_POSTGRES__URL", &url)]);
        eventually("the primary's slot is watched", || {
            relay.metric("cdc_relay_postgres_up").filter(|up| *up > 0.0)
        });
        relay.stop();
    }
    // Any will do, and the first is the standby.
    let url = format!("postgres://{name}:{name}@127.0.0.1:{standby},127.0.0.1:{primary}/{name}");
    let mut relay = Relay::spawn(&pair.database, &[("CDC_RELAY_POSTGRES__URL", &url)]);
    assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
    assert!(relay.log().contains("add target_session_attrs=read-write"), "{}", relay.log());
    // None takes writes, until one is promoted.
    let kind = pair.topic.kind.clone();
    pair.primary.kill();
    let relay = Relay::spawn(&pair.database, &[("CDC_RELAY_POSTGRES__URL", &pair.url())]);
    let said =
        format!("127.0.0.1:{standby} is read-only, and target_session_attrs=read-write; cannot connect");
    eventually("it says why no host will do", || {
        let log = relay.log();
        (log.contains(&said) && log.contains("no host of postgres.url will do")).then_some(())
    });
    pair.standby.promote();
    pair.database.move_to(standby);
    pair.database.insert(&kind, 0, 1);
    let mut relay = relay;
    assert_eq!(relay.wait().code(), Some(65), "found, and without its slot: {}", relay.log());
}

#[test]
fn a_wrong_password_ends_the_search() {
    let database = Database::new();
    init(&database);
    let shared: sqlx::postgres::PgConnectOptions = server("TEST_POSTGRES_URL").parse().unwrap();
    let (name, port) = (&database.name, shared.get_port());
    let url = format!(
        "postgres://{name}:wrong@127.0.0.1:{},127.0.0.1:{port},127.0.0.1:{port}/{name}",
        closed_port()
    );
    let output = command(&database).arg("init").env("CDC_RELAY_POSTGRES__URL", url).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(69), "{said}");
    assert_eq!(said.matches("password authentication failed").count(), 1, "{said}");
}

/// Forwards connections to the ports, whoever's turn it is.
fn forward_in_turn(listener: &TcpListener, next: impl Fn() -> u16) {
    for client in listener.incoming() {
        let (Ok(client), Ok(server)) = (client, TcpStream::connect(("127.0.0.1", next()))) else { continue };
        for (mut from, mut to) in
            [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)]
        {
            std::thread::spawn(move || {
                let _ = io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
        }
    }
}

#[test]
fn the_two_connections_of_whoever_needs_both_are_to_one_server_or_nothing_is_done() {
    let pair = Pair::start(&[], &[]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (primary, standby) = (pair.primary.port, pair.standby.port);
    // An address that moves to the standby after the first connection, and back after the second.
    let turns = AtomicUsize::new(0);
    let next = move || if turns.fetch_add(1, Ordering::Relaxed) == 1 { standby } else { primary };
    std::thread::spawn(move || forward_in_turn(&listener, next));
    let name = pair.database.name.clone();
    let url = format!("postgres://{name}:{name}@127.0.0.1:{port}/{name}");
    let run = || pair.run(&["init"], &[("CDC_RELAY_POSTGRES__URL", &url)]);
    let output = run();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(75) && said.contains("reached two servers"), "{said}");
    assert!(run().status.success());
}

//! What a request meets before its handler: bounds, ids, encodings.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use serde_json::json;

use crate::{
    limits::raw,
    outage::Lock,
    stage::{Client, PATIENCE, Stage, order, wait_for},
};

/// A request of exactly that many bytes that asks for an order that is not there.
fn padded(bytes: usize) -> String {
    let head = "GET /api/orders/none HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-pad: \r\n\r\n";
    head.replace("x-pad: ", &format!("x-pad: {}", "x".repeat(bytes - head.len())))
}

#[test]
fn a_head_has_a_limit_in_bytes() {
    let stage = Stage::new();
    let service = stage.service();
    assert!(raw(&service, &padded(16 * 1024)).starts_with("HTTP/1.1 404"));
    let over = raw(&service, &padded(16 * 1024 + 1));
    assert!(over.starts_with("HTTP/1.1 431") && over.contains("16384"), "{over}");
    assert!(over.contains("/problems/request-head-too-large"), "{over}");
    let service = stage.service_with(|c| c.http.header_limit_bytes = 1024);
    assert!(raw(&service, &padded(1024)).starts_with("HTTP/1.1 404"));
    assert!(raw(&service, &padded(1025)).starts_with("HTTP/1.1 431"));
    let long = format!("/api/orders?{}", "x".repeat(1024));
    service.get(&long).problem(431, "request-head-too-large");
}

#[test]
fn a_head_that_does_not_come_is_cut_off() {
    let stage = Stage::new();
    let service = stage.service();
    let mut slow = TcpStream::connect(service.address).unwrap();
    slow.set_read_timeout(Some(PATIENCE)).unwrap();
    slow.write_all(b"POST /api/orders HTTP/1.1\r\nhost: x\r\nx-slow").unwrap();
    assert_eq!(slow.read(&mut [0]).unwrap(), 0, "closed without a word");
    assert_eq!(service.post(&order()).status, 201);
}

#[test]
fn beyond_the_bound_a_request_is_refused_at_once_and_none_is_queued() {
    let stage = Stage::new();
    let service = stage.service_with(|c| c.http.max_in_flight = 3);
    let lock = Lock::take(&stage);
    let metric = |name: &str| {
        let text = service.get("/metrics").text;
        let line =
            text.lines().find_map(|line| line.strip_prefix(&format!("order_api_http_requests_{name} ")));
        line.unwrap_or_else(|| panic!("{text}")).to_owned()
    };
    std::thread::scope(|scope| {
        let waiting: Vec<_> = (0..3).map(|_| scope.spawn(|| service.post(&order()))).collect();
        wait_for("three requests to be under way", || metric("in_flight") == "3");
        for _ in 0..2 {
            let shed = service.post(&order());
            shed.problem(503, "overloaded");
            assert_eq!(shed.header("retry-after"), "1");
        }
        assert_eq!(service.get("/health/ready").status, 200, "outside the bound");
        assert_eq!(metric("shed_total"), "2");
        assert!(waiting.iter().all(|request| !request.is_finished()));
        lock.release(&stage);
        for request in waiting {
            let answer = request.join().unwrap();
            assert_eq!(answer.status, 201, "{answer:?}");
        }
    });
    assert_eq!(metric("in_flight"), "0");
    assert_eq!(service.post(&order()).status, 201);
    assert_eq!(stage.count("orders"), 4, "what was refused was not done later");
}

#[test]
fn a_client_that_leaves_gives_its_place_back() {
    let stage = Stage::new();
    let service = stage.service_with(|c| c.http.max_in_flight = 1);
    let lock = Lock::take(&stage);
    let body = order().to_string();
    let mut leaving = TcpStream::connect(service.address).unwrap();
    let head = format!("content-type: application/json\r\ncontent-length: {}", body.len());
    write!(leaving, "POST /api/orders HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n{body}").unwrap();
    wait_for("the place to be taken", || service.get("/api/orders/none").status == 503);
    drop(leaving);
    wait_for("the place to be free", || service.get("/api/orders/none").status == 404);
    lock.release(&stage);
}

#[test]
fn a_request_has_the_id_it_came_with_or_a_new_one() {
    let stage = Stage::new();
    let service = stage.service();
    let id = |headers: &[(&str, &str)]| {
        let answer = service.send("GET", "/api/orders/none", headers, "");
        assert_eq!(answer.headers.get_all("x-request-id").iter().count(), 1);
        answer.header("x-request-id").to_owned()
    };
    let longest = "x".repeat(128);
    for good in ["a", "7f0c-é".split_once('-').unwrap().0, "!~", &longest] {
        assert_eq!(id(&[("x-request-id", good)]), good);
    }
    let too_long = "x".repeat(129);
    let mut made = vec![id(&[]), id(&[("x-request-id", "a"), ("x-request-id", "b")])];
    made.extend(["", "a b", &too_long].map(|bad| id(&[("x-request-id", bad)])));
    for id in &made {
        assert_eq!((id.len(), id.as_bytes()[14]), (36, b'7'), "a UUID of version 7: {id}");
    }
    made.sort_unstable();
    made.dedup();
    assert_eq!(made.len(), 5, "each its own");
    // Also where no handler is reached.
    assert_eq!(service.get("/none").header("x-request-id").len(), 36);
}

#[test]
fn long_answers_are_compressed_for_those_who_take_it() {
    let stage = Stage::new();
    let service = stage.service();
    let mut long = order();
    long["items"] = vec![long["items"][0].clone(); 100].into();
    let long = service.post(&long);
    let (plain, short) = (long.header("location"), service.post(&order()));
    let ask = |path: &str, accept: &str| ask_raw(&service, path, accept);
    let (head, body) = ask(plain, "gzip, br");
    assert!(head.contains("content-encoding: gzip") && head.contains("vary: accept-encoding"), "{head}");
    let mut text = String::new();
    flate2::read::GzDecoder::new(&body[..]).read_to_string(&mut text).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), long.json());
    assert!(body.len() < text.len() / 5, "{} of {}", body.len(), text.len());
    for (path, accept) in [(plain, "identity"), (plain, "br"), (short.header("location"), "gzip")] {
        let (head, body) = ask(path, accept);
        assert!(!head.contains("content-encoding"), "{head}");
        serde_json::from_slice::<serde_json::Value>(&body).unwrap();
    }
}

/// An answer's head in small letters, and its body as it came.
fn ask_raw(client: &Client, path: &str, accept: &str) -> (String, Vec<u8>) {
    let mut stream = TcpStream::connect(client.address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // Version 1.0: the body is not in chunks, and the connection ends with it.
    write!(stream, "GET {path} HTTP/1.0\r\naccept-encoding: {accept}\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    let body = answer.split_off(end + 4);
    (String::from_utf8(answer).unwrap().to_lowercase(), body)
}

#[test]
fn a_compressed_body_is_refused_by_its_name() {
    let stage = Stage::new();
    let service = stage.service();
    let with = |encoding: &str| {
        let headers = [("content-type", "application/json"), ("content-encoding", encoding)];
        service.send("POST", "/api/orders", &headers, &order().to_string())
    };
    assert_eq!(with("identity").status, 201);
    assert_eq!(with("Identity").status, 201);
    for encoding in ["gzip", "br", "zstd", "gzip, identity", ""] {
        let refused = with(encoding);
        let problem = refused.problem(415, "unsupported-content-encoding");
        assert!(problem["detail"].as_str().unwrap().contains("Content-Encoding"), "{problem}");
        assert_eq!(refused.header("accept-encoding"), "identity");
    }
    assert_eq!(stage.count("orders"), 2);
    assert_eq!(json!(service.get("/api/orders/none").status), 404);
}

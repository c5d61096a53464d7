//! What is refused, and that the last thing before each limit is not.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use serde_json::{Value, json};

use crate::stage::{Client, PATIENCE, Stage, order};

const JSON: (&str, &str) = ("content-type", "application/json");

/// Sends bytes as they are and reads the answer to the connection's end.
pub(crate) fn raw(client: &Client, request: &str) -> String {
    let mut stream = TcpStream::connect(client.address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn each_limit_holds_just_over_and_not_just_under() {
    let stage = Stage::new();
    let service = stage.service();
    let item = order()["items"][0].clone();
    let cases: [(&str, Value, Value); 12] = [
        ("/customerId", json!("c".repeat(64)), json!("c".repeat(65))),
        ("/restaurantId", json!("r"), json!("")),
        ("/items", vec![item.clone(); 200].into(), vec![item.clone(); 201].into()),
        ("/items", json!([item]), json!([])),
        ("/items/0/menuItemId", json!("m".repeat(64)), json!("m".repeat(65))),
        ("/items/0/name", json!("é".repeat(200)), json!("é".repeat(201))),
        ("/items/0/price", json!(0), json!("-0.01")),
        ("/items/0/price", json!("1000000000.00"), json!("1000000000.01")),
        ("/items/0/price", json!("0.010"), json!("0.001")),
        ("/items/0/quantity", json!(1), json!(0)),
        ("/items/0/quantity", json!(10_000), json!(10_001)),
        ("/currency", json!("JPX"), json!("JPXY")),
    ];
    for (pointer, under, over) in cases {
        let with = |value: Value| {
            let mut body = order();
            match body.pointer_mut(pointer) {
                Some(place) => *place = value,
                None => body[&pointer[1..]] = value,
            }
            service.post(&body)
        };
        assert_eq!(with(under).status, 201, "{pointer}");
        assert_eq!(with(over).wrong_fields(), [pointer]);
    }
    assert_eq!(stage.count("orders"), 12, "nothing of what was refused");
}

#[test]
fn a_body_has_a_limit_in_bytes_declared_or_not() {
    let stage = Stage::new();
    let service = stage.service_with(|c| c.http.body_limit_bytes = 2048);
    let body = order().to_string();
    let padded = |bytes: usize| format!("{body}{}", " ".repeat(bytes - body.len()));
    assert_eq!(service.post_text(&padded(2048)).status, 201);
    let problem = service.post_text(&padded(2049)).problem(413, "body-too-large");
    assert!(problem["detail"].as_str().unwrap().contains("2048"), "{problem}");
    let chunked = |text: &str| {
        let size = text.len();
        raw(
            &service,
            &format!(
                "POST /api/orders HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
                 transfer-encoding: chunked\r\n\r\n{size:x}\r\n{text}\r\n0\r\n\r\n"
            ),
        )
    };
    assert!(chunked(&padded(2048)).starts_with("HTTP/1.1 201"));
    assert!(chunked(&padded(2049)).starts_with("HTTP/1.1 413"));
    assert_eq!(stage.count("orders"), 2);
}

#[test]
fn what_is_not_json_is_told_with_its_place() {
    let stage = Stage::new();
    let service = stage.service();
    let problem = service.post_text("{\n  \"customerId\": oops\n}").problem(400, "malformed-json");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("line 2 column 17"), "{detail}");
    for body in ["{", "{} {}", "{\"a\":01}", "{\"a\":\"\u{1}\"}", "nul", "[1,]", "\u{feff}{}"] {
        service.post_text(body).problem(400, "malformed-json");
    }
    service.send("POST", "/api/orders", &[JSON], "").problem(400, "malformed-json");
    let latin = "POST /api/orders HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
                 content-length: 2\r\n\r\n";
    let mut stream = TcpStream::connect(service.address).unwrap();
    stream.write_all(&[latin.as_bytes(), &[b'"', 0xe9]].concat()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("Not UTF-8 from byte 1"), "{answer}");
    // Deep nesting is neither a crash nor a 500.
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(matches!(service.post_text(&deep).status, 400 | 422));
}

#[test]
fn every_wrong_field_is_in_one_answer() {
    let stage = Stage::new();
    let service = stage.service();
    let mut body = order();
    body["note"] = json!("x");
    body["customerId"] = json!("\u{0}");
    body["items"][0]["price"] = json!(-1);
    body["items"][1]["name"] = json!("a\u{0}b");
    body["items"][1].as_object_mut().unwrap().remove("quantity");
    let mut found = service.post(&body).wrong_fields();
    found.sort_unstable();
    assert_eq!(found, ["/customerId", "/items/0/price", "/items/1/name", "/items/1/quantity", "/note"]);
    let problem = service.post(&body).json();
    let unknown = problem["errors"].as_array().unwrap().iter().find(|e| e["pointer"] == "/note").unwrap();
    assert!(unknown["detail"].as_str().unwrap().starts_with("unknown field"), "{unknown}");
    let mut wrong_total = order();
    wrong_total["totalAmount"] = json!("16.41");
    assert_eq!(service.post(&wrong_total).wrong_fields(), ["/totalAmount"]);
    assert_eq!(stage.counts(), [0; 4]);
}

#[test]
fn numbers_never_pass_through_a_float() {
    let stage = Stage::new();
    let service = stage.service();
    let with = |price: &str| service.post_text(&order().to_string().replace("6.25", price));
    // 0.1 + 0.2 and 999999999.99, where a float has no more digits after 10,000 of them.
    assert_eq!(with("0.1").json()["totalAmount"], "4.10");
    assert_eq!(with("999999999.99").json()["totalAmount"], "2000000003.88");
    for exact_or_refused in ["1e400", "0.30000000000000004", "1e-400"] {
        assert_eq!(with(exact_or_refused).wrong_fields(), ["/items/0/price"]);
    }
}

#[test]
fn media_types_methods_routes_and_ids_are_problems_too() {
    let stage = Stage::new();
    let service = stage.service();
    let text = order().to_string();
    for headers in [&[("content-type", "text/plain")][..], &[("content-type", "application/jsonp")]] {
        service.send("POST", "/api/orders", headers, &text).problem(415, "unsupported-media-type");
    }
    let vendor = [("content-type", "Application/vnd.order+JSON; charset=utf-8")];
    assert_eq!(service.send("POST", "/api/orders", &vendor, &text).status, 201);
    service.get("/").problem(404, "route-not-found");
    service.get("/api/orders/").problem(404, "route-not-found");
    service.get("/api/orders/none").problem(404, "order-not-found");
    service.get("/api/orders/a%20b").problem(400, "invalid-id");
    service.get("/api/orders/a%00b").problem(400, "invalid-id");
    service.get("/api/orders/%ff").problem(400, "invalid-id");
    service.get(&format!("/api/orders/{}", "x".repeat(64))).problem(404, "order-not-found");
    service.get(&format!("/api/orders/{}", "x".repeat(65))).problem(400, "invalid-id");
    for (method, path, allow) in [
        ("DELETE", "/api/orders", "POST,GET,HEAD"),
        ("PUT", "/api/orders/x", "GET,HEAD,PATCH"),
        ("POST", "/metrics", "GET,HEAD"),
    ] {
        let answer = service.send(method, path, &[], "");
        answer.problem(405, "method-not-allowed");
        assert_eq!(answer.header("allow"), allow);
    }
}

#[test]
fn a_body_that_does_not_come_is_a_timeout() {
    let stage = Stage::new();
    let service = stage.service_with(|c| c.http.request_timeout_ms = 200);
    let head =
        "POST /api/orders HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n";
    let answer = raw(&service, &format!("{head}content-length: 100\r\n\r\n{{"));
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("/problems/request-timeout"), "{answer}");
}

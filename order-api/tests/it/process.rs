//! The binary itself: its command line, its exit codes, its signals.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Output, Stdio},
};

use crate::stage::{Client, Stage, order, wait_for};

fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_order-api"));
    command.env_clear();
    command
}

fn ends(command: &mut Command) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code(), String::from_utf8([stdout, stderr].concat()).unwrap())
}

#[test]
fn the_configuration_is_shown_and_checked() {
    let (code, example) = ends(binary().args(["config", "example"]));
    assert_eq!((code, example.as_str()), (Some(0), order_api::config::EXAMPLE));
    let path = std::env::temp_dir().join(format!("order-api-{}.toml", std::process::id()));
    std::fs::write(&path, &example).unwrap();
    let with_file = || {
        let mut command = binary();
        command.arg("--check-config").arg("--config").arg(&path);
        command
    };
    assert_eq!(ends(&mut with_file()).0, Some(0));
    for (variable, value, named) in [
        ("ORDER_API_HTTP__BODY_LIMIT_BYTES", "1", "http.body_limit_bytes"),
        ("ORDER_API_HTTP__PORT", "80", "port"),
        ("ORDER_API_POSTGRES__MAX_CONNECTIONS", "many", "max_connections"),
    ] {
        let (code, told) = ends(with_file().env(variable, value));
        assert_eq!(code, Some(64), "{told}");
        assert!(told.contains(named), "{told}");
    }
    std::fs::remove_file(&path).unwrap();
    assert_eq!(ends(binary().args(["--check-config", "--config", "/none"])).0, Some(64));
}

#[test]
fn sigterm_ends_it_cleanly_and_a_taken_address_does_not_start_it() {
    let stage = Stage::new();
    let start = |listen: &str| {
        let mut command = binary();
        command
            .args(["--listen", listen])
            .env(
                "ORDER_API_POSTGRES__URL",
                format!("postgres://order_api@{}/{}", stage.postgres(), stage.database),
            )
            .env("ORDER_API_POSTGRES__PASSWORD", "order_api")
            .env("ORDER_API_LOG__FORMAT", "json");
        command
    };
    let mut child = start("127.0.0.1:0").stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let address = lines
        .by_ref()
        .map(|line| serde_json::from_str::<serde_json::Value>(&line.unwrap()).unwrap())
        .find_map(|line| line["address"].as_str().map(str::to_owned))
        .expect("a line that tells the address");
    let client = Client::new(address.parse().unwrap());
    wait_for("the process to be ready", || client.get("/health/ready").status == 200);
    assert_eq!(client.post(&order()).status, 201);

    let (code, told) = ends(&mut start(&address));
    assert_eq!(code, Some(69), "{told}");
    assert!(told.contains("http.listen"), "{told}");

    let kill = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let log: Vec<String> = lines.map(Result::unwrap).collect();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{log:?}");
    assert!(!log.concat().contains("order_api\":\"order_api"), "no password in the log");
    assert_eq!(stage.count("orders"), 1);
}

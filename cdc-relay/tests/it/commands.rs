//! Every command where something is away or empty, on a narrow terminal, and for a program.

use std::{
    ffi::OsStr,
    fs::{File, OpenOptions},
    io::Read as _,
    os::unix::ffi::OsStrExt as _,
    process::{Command, Output},
};

use rustix::{
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use crate::{
    database::{Database, eventually},
    network::free_ports,
    poison::Morgue,
    relay::{Relay, command, init},
    topics::Topic,
};

/// Those that look or ask, each with what a program would add; for a person without that.
const COMMANDS: [&[&str]; 12] = [
    &["status", "--json"],
    &["check", "--json"],
    &["audit", "--wait", "1", "--json"],
    &["init"],
    &["accept-gap", "--json"],
    &["tail", "--rows", "1", "--json"],
    &["probe", "--json"],
    &["dlq", "list", "--json"],
    &["dlq", "show", "0/0", "--json"],
    &["dlq", "redrive", "--all", "--json"],
    &["dlq", "discard", "--all", "--json"],
    &["replay", "--id", "00000000-0000-0000-0000-000000000000", "--json"],
];

/// Runs all of them at once, because each waits for what is away as long as that may take to come back.
fn run_all(database: &Database, environment: &[(&str, &str)], left_out: &[&str]) -> Vec<(String, Output)> {
    let children: Vec<_> = COMMANDS
        .iter()
        .filter(|arguments| !left_out.contains(&arguments[0]))
        .flat_map(|arguments| [*arguments, arguments.strip_suffix(&["--json"]).unwrap_or_default()])
        .filter(|arguments| !arguments.is_empty())
        .map(|arguments| {
            let mut command = command(database);
            command.args(arguments).envs(environment.iter().copied());
            let child = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
            (arguments.join(" "), child.spawn().unwrap())
        })
        .collect();
    children.into_iter().map(|(name, child)| (name, child.wait_with_output().unwrap())).collect()
}

/// What a program reads is JSON, line by line, or nothing; and nobody panicked.
fn assert_readable(name: &str, output: &Output) -> String {
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(!said.contains("panicked"), "{name}: {said}");
    let out = String::from_utf8(output.stdout.clone()).unwrap();
    for line in out.lines().filter(|_| name.ends_with("--json")) {
        let parsed: Result<serde_json::Value, _> = serde_json::from_str(line);
        assert!(parsed.is_ok(), "{name}: {line}");
    }
    said
}

#[test]
fn without_postgres_each_command_says_so() {
    let database = Database::new();
    let [port] = free_ports::<1>();
    let url = database.url().replace(&format!(":{}/", database.options.get_port()), &format!(":{port}/"));
    for (name, output) in run_all(&database, &[("CDC_RELAY_POSTGRES__URL", &url)], &["dlq"]) {
        let said = assert_readable(&name, &output);
        let address = format!("127.0.0.1:{port}");
        let out = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains(&address) || out.contains(&address), "{name}: {said}{out}");
        let code = if name.starts_with("check") { 65 } else { 75 };
        assert_eq!(output.status.code(), Some(code), "{name}: {said}");
    }
}

#[test]
fn without_kafka_each_command_says_so_or_does_without() {
    let mut database = Database::new();
    init(&database);
    let name = database.name.clone();
    database.run(&format!("GRANT SELECT ON outbox TO {name}"));
    database.insert("order", 0, 1);
    let [port] = free_ports::<1>();
    let brokers = format!("127.0.0.1:{port}");
    // `tail` and `probe` ask no Kafka; the one waits for a row, the other would take the slot.
    let environment = [("CDC_RELAY_KAFKA__BROKERS", brokers.as_str())];
    for (name, output) in run_all(&database, &environment, &["tail", "probe"]) {
        let said = assert_readable(&name, &output);
        let out = String::from_utf8_lossy(&output.stdout);
        let code = match name.split(' ').next().unwrap() {
            "status" => 0,
            "check" | "replay" => 65,
            _ => 75,
        };
        assert_eq!(output.status.code(), Some(code), "{name}: {said}{out}");
        if !name.starts_with("replay") {
            assert!(said.contains(&brokers) || out.contains(&brokers), "{name}: {said}{out}");
        }
    }
    let topic = ["replay", "--from-topic", "t", "--from-lsn", "0/1", "--through-lsn", "0/2"];
    let output = command(&database).args(topic).envs(environment).output().unwrap();
    let said = assert_readable("replay of records", &output);
    assert!(said.contains(&brokers) && output.status.code() == Some(75), "{said}");
}

#[test]
fn of_an_empty_outbox_each_command_says_what_there_is() {
    let mut database = Database::new();
    let morgue = Morgue::new(&[("unroutable", "dead-letter")]);
    let environment = morgue.environment();
    init(&database);
    let name = database.name.clone();
    database.run(&format!("GRANT SELECT ON outbox TO {name}"));
    let relay = Relay::start(&database, &environment);
    let listen = relay.url().unwrap().replace("http://", "");
    let environment = [&environment[..], &[("CDC_RELAY_HTTP__LISTEN", listen.as_str())]].concat();
    // `tail` waits for a row, `probe` and `accept-gap` for the slot.
    for (name, output) in run_all(&database, &environment, &["tail", "probe", "accept-gap"]) {
        let said = assert_readable(&name, &output);
        let code = match name.as_str() {
            "dlq show 0/0 --json" | "dlq show 0/0" => 64,
            // The other one of the two is.
            _ if said.contains("A redrive is under way") => 75,
            // It finds that no topic is there that rows could go to, and that id is no row's.
            _ if name.starts_with("replay") => 65,
            _ => 0,
        };
        if !name.starts_with("check") {
            let out = String::from_utf8_lossy(&output.stdout);
            assert_eq!(output.status.code(), Some(code), "{name}: {said}{out}");
        }
    }
    for arguments in [&["dlq", "list"][..], &["dlq", "redrive", "--all"]] {
        let output = command(&database).args(arguments).envs(environment.iter().copied()).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "there are no such letters\n", "{arguments:?}");
    }
    relay.stop();
}

/// What a command prints on a terminal of 80 columns.
fn on_a_terminal(mut command: Command) -> String {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&ours, size).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap();
    let theirs = OpenOptions::new().read(true).write(true).open(OsStr::from_bytes(name.as_bytes())).unwrap();
    let mut child = command.stdout(theirs.try_clone().unwrap()).stderr(theirs).spawn().unwrap();
    // Ours of theirs are closed with the command, so that its end is the end of what is read.
    drop(command);
    let (mut text, mut ours) = (Vec::new(), File::from(ours));
    let mut piece = [0; 4096];
    while let Ok(length @ 1..) = ours.read(&mut piece) {
        text.extend_from_slice(&piece[..length]);
    }
    child.wait().unwrap();
    String::from_utf8(text).unwrap().replace("\r\n", "\n")
}

#[test]
fn a_table_that_is_wider_than_the_terminal_is_told_row_by_row() {
    let (mut database, topic) = (Database::new(), Topic::missing(1));
    let name = database.name.clone();
    database.run(&format!("GRANT SELECT ON outbox TO {name}"));
    let morgue = Morgue::new(&[("unroutable", "dead-letter")]);
    init(&database);
    let relay = Relay::start(&database, &morgue.environment());
    let kind = &topic.kind;
    let id = database.text(&format!(
        "INSERT INTO outbox VALUES (gen_random_uuid(), '{kind}', 'an-order-with-a-long-name', 'OrderCreated', '{{}}') \
         RETURNING id::text"
    ));
    morgue.letters.read(1);
    let run = |arguments: &[&str]| {
        let mut command = command(&database);
        command.envs(morgue.environment()).args(arguments);
        command
    };
    let listed = on_a_terminal(run(&["dlq", "list"]));
    for part in ["LETTER     0/0\n", &format!("ROW ID     {id}\n"), "STATE      open\n"] {
        assert!(listed.contains(part), "{part}: {listed}");
    }
    let looked = on_a_terminal(run(&["replay", "--id", &id]));
    assert!(looked.contains("TYPE   OrderCreated\n"), "{looked}");
    // In a pipe it is a table, whatever its width.
    let output = run(&["dlq", "list"]).output().unwrap();
    let piped = String::from_utf8(output.stdout).unwrap();
    assert!(piped.starts_with("LETTER  AT") && piped.lines().count() == 2, "{piped}");
    // What is not a table fits, but for addresses and texts that are longer themselves.
    let status = on_a_terminal(run(&["status", "--relay", &relay.url().unwrap()]));
    let slot = &database.slot;
    eventually("status is told", || status.contains("until slot lost").then_some(()));
    for line in status.lines().filter(|line| !line.contains(slot) && !line.starts_with("note: ")) {
        assert!(line.chars().count() <= 80, "{line}");
    }
    relay.stop();
}

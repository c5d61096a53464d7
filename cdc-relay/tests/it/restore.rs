//! A server that is restored from a backup, and one that changes its timeline.

use std::{io::Write as _, os::unix::fs::chown, path::PathBuf, process::Command};

use crate::{
    database::Database,
    relay::{Relay, command, init},
    stack::Stack,
    topics::{Topic, assert_complete_and_ordered, headers},
};

/// A stack's Postgres, its files within reach while it is down.
struct Cold {
    stack: Stack,
    data: PathBuf,
    database: Database,
    topic: Topic,
}

impl Cold {
    fn start() -> Self {
        let stack = Stack::start("restore", &[]);
        let (mut database, topic) = (Database::on(&stack.servers), Topic::on(&stack.servers, 1, &[]));
        let data = PathBuf::from(database.text("SHOW data_directory"));
        init(&database);
        Self { stack, data, database, topic }
    }

    /// Does something to the files while the server is down.
    fn while_down(&mut self, act: impl FnOnce(&PathBuf)) {
        self.stack.stop("postgres");
        act(&self.data);
        self.stack.start_again("postgres");
        self.database.reconnect();
    }

    /// Publishes ten rows from `first` on, and stops.
    fn publish(&mut self, first: usize) {
        let relay = Relay::start(&self.database, &[]);
        self.database.insert(&self.topic.kind, first, 10);
        assert_complete_and_ordered(&self.topic.read(first + 10), first + 10);
        relay.stop();
    }

    fn halted(&self) -> String {
        let mut relay = Relay::spawn(&self.database, &[]);
        assert_eq!(relay.wait().code(), Some(65), "{}", relay.log());
        relay.log()
    }
}

fn copy(from: &PathBuf, to: &PathBuf) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(copied.success());
}

/// Has the server recover as from an archive that has nothing more: it begins a new timeline at the end of its log.
fn switch_timeline(data: &PathBuf) {
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(data).unwrap());
    let signal = data.join("recovery.signal");
    std::fs::write(&signal, "").unwrap();
    chown(&signal, Some(owner), None).unwrap();
    let mut configuration =
        std::fs::File::options().append(true).open(data.join("postgresql.auto.conf")).unwrap();
    writeln!(configuration, "restore_command = 'false'").unwrap();
}

#[test]
fn a_restored_server_halts_whether_it_kept_its_timeline_or_not_and_a_promoted_one_is_followed() {
    let mut cold = Cold::start();
    cold.publish(0);
    let backup = cold.data.with_extension("backup");
    cold.while_down(|data| copy(data, &backup));
    cold.publish(10);

    // It had everything when it began its new timeline.
    cold.while_down(switch_timeline);
    cold.publish(20);

    cold.while_down(|data| {
        std::fs::remove_dir_all(data).unwrap();
        copy(&backup, data);
    });
    let log = cold.halted();
    assert!(log.contains("restored from a backup") && log.contains("cdc-relay accept-gap"), "{log}");
    // Twenty, less those at whose LSNs the restored server has written something of its own.
    let last = cold.topic.read(30).pop().unwrap();
    let output = command(&cold.database).args(["accept-gap", "--json"]).output().unwrap();
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let events = told["onlyInKafka"]["events"].as_array().unwrap();
    assert!((10..=20).contains(&events.len()), "{told}");
    let id = headers(&last)[0].1.clone().unwrap();
    assert!(
        log.contains(" exist only in Kafka: ") && events.last().unwrap()["id"] == id.as_str(),
        "{log}\n{told}"
    );

    cold.while_down(switch_timeline);
    let log = cold.halted();
    assert!(log.contains("restored from a backup"), "{log}");

    let output = command(&cold.database).args(["accept-gap", "--yes"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    cold.publish(30);
}

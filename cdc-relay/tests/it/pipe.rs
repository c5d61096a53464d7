//! Commands whose output nobody reads any more, as of `… | head -0`.

use std::process::Stdio;

use crate::{
    database::Database,
    relay::{command, init},
};

#[test]
fn a_reader_that_is_gone_ends_a_command_and_is_no_error_of_it() {
    let mut database = Database::new();
    init(&database);
    let name = database.name.clone();
    database.run(&format!("GRANT SELECT ON outbox TO {name}"));
    for arguments in [
        &["status"][..],
        &["status", "--json"],
        &["check"],
        &["audit", "--wait", "1"],
        &["init"],
        &["accept-gap"],
        &["replay", "--id", "00000000-0000-0000-0000-000000000000"],
        &["config", "example"],
        &["--check-config"],
    ] {
        let mut command = command(&database);
        let mut child =
            command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(141), "{arguments:?}: {said}");
        assert!(!said.contains("panicked"), "{arguments:?}: {said}");
    }
}

//! The start: what is refused, with which exit code and hint, and what is waited for.

use std::process::{Command, Output};

use rdkafka::admin::AdminOptions;
use sqlx::{AssertSqlSafe, ConnectOptions};

use crate::stage::{Stage, eventually, on_stage};

/// Runs a command to its end.
async fn output(mut command: Command) -> (Option<i32>, String) {
    let run = move || command.output().unwrap();
    let Output { status, stdout, stderr } = tokio::task::spawn_blocking(run).await.unwrap();
    (status.code(), format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr)))
}

fn against(stage: &Stage, url: &str) -> Command {
    let mut command = stage.command("pharmacy");
    command.env("CONSUMER_POSTGRES__URL", url).env("CONSUMER_POSTGRES__START_TIMEOUT_SECONDS", "1");
    command
}

#[test]
fn a_wrong_password_and_an_unknown_database_end_it_at_once_with_a_hint() {
    on_stage(1, async |stage| {
        let url = stage.options().password("wrong").to_url_lossy().to_string();
        let (code, said) = output(against(&stage, &url)).await;
        assert_eq!(code, Some(69), "{said}");
        assert!(said.contains("hint") && said.contains("CONSUMER_POSTGRES__PASSWORD"), "{said}");

        let url = stage.options().database("no_such_database").to_url_lossy().to_string();
        let (code, said) = output(against(&stage, &url)).await;
        assert_eq!(code, Some(69), "{said}");
        assert!(said.contains("CREATE DATABASE"), "{said}");
    });
}

#[test]
fn a_database_that_does_not_answer_is_waited_for_and_then_given_up() {
    on_stage(1, async |stage| {
        let url = stage.options().host("127.0.0.1").port(1).to_url_lossy().to_string();
        let (code, said) = output(against(&stage, &url)).await;
        assert_eq!(code, Some(75), "{said}");
        assert!(said.contains("start_timeout_seconds"), "{said}");

        let forbid = format!("ALTER DATABASE {} WITH ALLOW_CONNECTIONS false", stage.name);
        sqlx::query(AssertSqlSafe(forbid)).execute(&stage.server).await.unwrap();
        let consumer = stage.spawn(stage.command("pharmacy")).await;
        consumer.until_state("waiting_for_database").await;
        let allow = format!("ALTER DATABASE {} WITH ALLOW_CONNECTIONS true", stage.name);
        sqlx::query(AssertSqlSafe(allow)).execute(&stage.server).await.unwrap();
        consumer.until_ready().await;
    });
}

#[test]
fn a_wrong_configuration_is_64_and_names_the_key() {
    let run = |args: &[&str], variable: (&str, &str)| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_consumer"));
        let output = command.args(args).env(variable.0, variable.1).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    };
    let check = ["--check-config", "--handler", "pharmacy"];
    assert_eq!(run(&check, ("IRRELEVANT", "")).0, Some(0));
    for (variable, value, told) in [
        ("CONSUMER_KAFKA__PROPERTIES__ISOLATION_LEVEL", "read_uncommitted", "isolation.level"),
        ("CONSUMER_KAFKA__PROPERTIES__ENABLE_AUTO_COMMIT", "true", "enable.auto.commit"),
        ("CONSUMER_KAFKA__PROPERTIES__NO_SUCH_THING", "1", "no.such.thing"),
        ("CONSUMER_CONSUMER__BATCH_RECORDS_MAX", "0", "consumer.batch_records_max"),
        ("CONSUMER_POSTGRES__URL", "mysql://", "postgres.url"),
    ] {
        let (code, said) = run(&check, (variable, value));
        assert_eq!(code, Some(64), "{variable}: {said}");
        assert!(said.contains(told), "{variable}: {said}");
    }
    let (code, said) = run(&["--check-config"], ("IRRELEVANT", ""));
    assert_eq!(code, Some(64));
    assert!(said.contains("--handler fulfillment"), "{said}");
}

#[test]
fn the_printed_example_is_a_configuration() {
    let printed = Command::new(env!("CARGO_BIN_EXE_consumer")).args(["config", "example"]).output().unwrap();
    assert!(printed.status.success());
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("consumer-example.toml");
    std::fs::write(&path, &printed.stdout).unwrap();
    let checked = Command::new(env!("CARGO_BIN_EXE_consumer"))
        .args(["--check-config", "--handler", "fulfillment", "--config"])
        .arg(&path)
        .output()
        .unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

#[test]
fn a_topic_that_does_not_exist_yet_is_named_and_found_once_it_does() {
    on_stage(1, async |stage| {
        let late = format!("{}-late", stage.topic);
        let command = stage.command_on("pharmacy", &late);
        let consumer = stage.spawn(command).await;
        eventually("the topic is named", async || {
            consumer.until_state("joining").await.contains(&late).then_some(())
        })
        .await;
        stage.create_topic(&late).await;
        consumer.until_ready().await;
        drop(consumer);
        stage.admin().delete_topics(&[&late], &AdminOptions::new()).await.unwrap();
    });
}

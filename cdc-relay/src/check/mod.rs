//! What an operator should mend before it hurts, although the relay runs: a list of findings, each with what mends it.

mod certificates;
mod failover;
mod kafka;
mod position;
mod server;

use serde::Serialize;

use self::kafka::InUse;
use crate::{
    config::Settings,
    error::{Error, Kind},
    kafka::Survey,
    replication::{connection::Connection, handshake::Purpose},
};

/// Something that should be otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// What kind it is, for programs: words with hyphens, never changed.
    pub(crate) name: &'static str,
    /// Which server; empty where it is not about one.
    pub(crate) server: String,
    pub(crate) found: String,
    /// What to run there, in this order: each a statement of SQL, a command or a comment.
    pub(crate) mend: Vec<String>,
}

/// What was found, and what could not be looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Report {
    pub(crate) findings: Vec<Finding>,
    pub(crate) notes: Vec<String>,
}

impl Report {
    fn finding(
        &mut self,
        name: &'static str,
        server: &impl ToString,
        found: impl Into<String>,
        mend: &[&str],
    ) {
        let mend = mend.iter().map(|line| (*line).to_owned()).collect();
        self.findings.push(Finding { name, server: server.to_string(), found: found.into(), mend });
    }

    /// What could not be looked at at all, by two names: where nobody answers, and where somebody does and refuses.
    fn error(&mut self, [away, refused]: [&'static str; 2], error: Error, look_at: &str) {
        let name = if matches!(error.kind, Kind::Refused | Kind::Misconfigured) { refused } else { away };
        let mend = format!("# {}", error.hint.as_deref().unwrap_or(look_at));
        self.finding(name, &"", error.message, &[&mend]);
    }

    fn note(&mut self, what: impl Into<String>) {
        self.notes.push(what.into());
    }
}

/// Looks at everything there is to look at, as far as somebody answers. Changes nothing.
pub(crate) fn examine(settings: &Settings) -> Report {
    let mut report = Report::default();
    certificates::examine_files(settings, &mut report);
    let in_use = examine_postgres(settings, &mut report);
    let is_answered = in_use.is_some();
    let in_use = in_use.unwrap_or_default();
    match Survey::begin(&settings.kafka) {
        Ok(survey) => {
            kafka::examine(&survey, settings, &in_use, &mut report);
            certificates::examine_brokers(settings, &survey.brokers, &mut report);
            if is_answered {
                position::examine(settings, &mut report);
            }
        }
        Err(e) => {
            report.error(["kafka-away", "kafka-refused"], e, "look whether Kafka runs, and at kafka.brokers");
            // One that is over may be why.
            certificates::examine_brokers(settings, &bootstrap(&settings.kafka.brokers), &mut report);
        }
    }
    report
}

/// The brokers of the configuration, without the protocol that librdkafka lets stand before one.
fn bootstrap(brokers: &str) -> Vec<String> {
    let place = |broker: &str| {
        let broker = broker.trim();
        broker.split_once("://").map_or(broker, |(_, place)| place).to_owned()
    };
    brokers.split(',').map(place).filter(|place| !place.is_empty()).collect()
}

/// None where it could not be looked at.
fn examine_postgres(settings: &Settings, report: &mut Report) -> Option<InUse> {
    let looked = examine_server(settings, report);
    // Also where none takes writes, which it then tells by its name.
    let followed = failover::examine(settings, report);
    if let Err(e) = looked.as_ref().map(drop).map_err(Clone::clone).and(followed)
        && !report.findings.iter().any(|finding| finding.name == failover::NO_PRIMARY)
    {
        let look_at = "look whether the server runs, and at postgres.url";
        report.error(["postgres-away", "postgres-refused"], e, look_at);
    }
    looked.ok()
}

fn examine_server(settings: &Settings, report: &mut Report) -> Result<InUse, Error> {
    let connect = || Connection::connect(&settings.postgres, Purpose::Sql, settings.connect_timeout);
    let mut connection = connect()?;
    certificates::examine_postgres(&connection, report);
    server::examine(&mut connection, settings, report)?;
    // Of its own: what cannot be read leaves a connection that is of no more use.
    kafka::topics_in_use(&mut connect()?, settings, report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_brokers_places_are_told_without_their_protocol() {
        assert_eq!(bootstrap("SSL://a:1, b:2,"), ["a:1", "b:2"]);
    }
}

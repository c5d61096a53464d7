//! Tells the order API now and then that this instance is there: `POST /api/instances/{id}/heartbeat`. A thread of its
//! own, so that nothing it meets delays or fails the service.

use std::{
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    time::{Duration, Instant},
};

use chrono::{SecondsFormat, Utc};
use serde::{Deserialize, Serialize};
use ureq::{Agent, http::Uri};

use crate::{Failure, Health, Secret};

/// How soon a change of state is told, and what could not be told is tried again.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How long one heartbeat may take.
const ATTEMPT: Duration = Duration::from_secs(2);

/// How long the last one may hold up the end of the process.
const FAREWELL: Duration = Duration::from_secs(1);

/// The longest name of an instance, in characters.
const MAX_NAME_CHARS: usize = 64;

/// The `[fleet]` section of a service that registers with the order API.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct FleetConfig {
    /// Where the order API is, such as `http://127.0.0.1:8080`; empty: nobody is told.
    pub url: String,
    /// What this instance is called; empty: host name and process id.
    pub instance: String,
    /// The bearer token with the scope `write`, if the API asks for one.
    pub token: Secret,
    /// The time between two heartbeats while nothing changes, in seconds (1 to 3,600).
    pub interval_seconds: u64,
}

impl Default for FleetConfig {
    fn default() -> Self {
        Self { url: String::new(), instance: String::new(), token: Secret::default(), interval_seconds: 10 }
    }
}

/// A checked [`FleetConfig`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The route of our heartbeats.
    url: String,
    token: Secret,
    interval: Duration,
}

impl FleetConfig {
    /// What to do; nothing where nobody is to be told.
    ///
    /// # Errors
    /// 64 with the key that is wrong.
    pub fn check(&self) -> Result<Option<Settings>, Failure> {
        if !(1..=3600).contains(&self.interval_seconds) {
            let why =
                format!("fleet.interval_seconds is {}; it must be from 1 to 3600", self.interval_seconds);
            return Err(Failure::configuration(why));
        }
        let instance = instance_name(&self.instance)?;
        if self.url.is_empty() {
            return Ok(None);
        }
        // The url is not repeated: it may hold a password.
        if self.url.starts_with("https://") {
            return Err(Failure::configuration(
                "fleet.url begins with https://, but heartbeats speak plain HTTP only",
            )
            .hint(
                "name a proxy on this machine that speaks TLS to the order API, as http://127.0.0.1:PORT",
            ));
        }
        let wrong = || {
            Failure::configuration("fleet.url is not a URL such as http://127.0.0.1:8080")
                .hint("write http://HOST:PORT; a token belongs into fleet.token")
        };
        let url = self.url.trim_end_matches('/');
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let plain = uri.scheme_str() == Some("http")
            && uri.host().is_some_and(|host| !host.is_empty())
            && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
            && uri.query().is_none();
        if !plain {
            return Err(wrong());
        }
        Ok(Some(Settings {
            url: format!("{url}/api/instances/{instance}/heartbeat"),
            token: self.token.clone(),
            interval: Duration::from_secs(self.interval_seconds),
        }))
    }
}

/// What an instance is called: as configured, or by its host's name and its process id.
///
/// # Errors
/// 64 for a name that is not 1 to 64 of `A-Z a-z 0-9 . _ -`.
pub fn instance_name(configured: &str) -> Result<String, Failure> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if configured.is_empty() {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let id = format!("-{}", std::process::id());
        let host = host.chars().map(|c| if legal(c) { c } else { '-' }).take(MAX_NAME_CHARS - id.len());
        return Ok(format!("{}{id}", host.collect::<String>()));
    }
    if configured.len() <= MAX_NAME_CHARS && configured.chars().all(legal) {
        return Ok(configured.into());
    }
    let why = format!("fleet.instance is {configured:?}; it must be 1 to 64 characters of A-Z a-z 0-9 . _ -");
    Err(Failure::configuration(why))
}

/// The thread that tells, if there is one; it ends with [`Fleet::leave`], or with the process.
#[derive(Debug, Default)]
pub struct Fleet(Option<Running>);

#[derive(Debug)]
struct Running {
    stop: Sender<()>,
    ended: Receiver<()>,
}

/// What the thread has.
struct Teller {
    settings: Settings,
    agent: Agent,
    service: String,
    version: &'static str,
    started: String,
    health: Health,
    failing: bool,
}

impl Fleet {
    /// Begins to tell, if somebody is to be told. `service` is its name (`cdc-relay`), `version` its version.
    pub fn join(settings: Option<Settings>, service: &str, version: &'static str, health: &Health) -> Self {
        let Some(settings) = settings else { return Self(None) };
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(ATTEMPT))
            // Rarer than a connection is worth keeping, and the token goes nowhere else.
            .max_idle_connections(0)
            .max_redirects(0)
            .proxy(None)
            .build()
            .new_agent();
        let mut teller = Teller {
            settings,
            agent,
            service: service.into(),
            version,
            started: Utc::now().to_rfc3339_opts(SecondsFormat::Micros, true),
            health: health.clone(),
            failing: false,
        };
        let ((stop, stopped), (ending, ended)) = (mpsc::channel(), mpsc::channel());
        let thread = std::thread::Builder::new().name("fleet".into()).spawn(move || {
            teller.run(&stopped);
            // Nobody waits if the process ends otherwise.
            let _ = ending.send(());
        });
        match thread {
            Ok(_) => Self(Some(Running { stop, ended })),
            Err(e) => {
                tracing::warn!(error = %e, "cannot start the thread that registers this instance");
                Self(None)
            }
        }
    }

    /// Tells that this instance has stopped. Takes a second at most, whether or not anybody heard.
    pub fn leave(self) {
        let Some(Running { stop, ended }) = self.0 else { return };
        if stop.send(()).is_ok() {
            let _ = ended.recv_timeout(FAREWELL);
        }
    }
}

impl Teller {
    fn run(&mut self, stopped: &Receiver<()>) {
        let mut last: Option<(String, Instant)> = None;
        loop {
            let state = self.health.state();
            let known = last
                .as_ref()
                .is_some_and(|(told, at)| *told == state && at.elapsed() < self.settings.interval);
            if !known {
                let told = self.tell(&state, ATTEMPT);
                last = told.is_ok().then(|| (state, Instant::now()));
                self.note(told);
            }
            match stopped.recv_timeout(LOOK_INTERVAL) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        if let Err(why) = self.tell("stopped", FAREWELL) {
            tracing::debug!(why, "could not tell that this instance has stopped");
        }
    }

    fn tell(&self, state: &str, timeout: Duration) -> Result<(), String> {
        let body = serde_json::json!({
            "service": self.service, "version": self.version, "started": self.started, "state": state,
        });
        let mut request = self.agent.post(&self.settings.url);
        if !self.settings.token.is_empty() {
            let token = self.settings.token.expose();
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let answer = request.config().timeout_global(Some(timeout)).build().send_json(body);
        match answer {
            Ok(answer) if answer.status().is_success() => Ok(()),
            Ok(answer) => Err(match answer.status().as_u16() {
                code @ (401 | 403) => {
                    format!("it answers {code}: fleet.token must be a token with the scope write")
                }
                code => format!("it answers {code}"),
            }),
            Err(e) => Err(e.to_string()),
        }
    }

    /// Logs when it begins to fail, and when it works again.
    fn note(&mut self, told: Result<(), String>) {
        let failed = told.is_err();
        match told {
            Err(why) if !self.failing => {
                tracing::warn!(why, "the order API does not take our heartbeats; the service goes on");
            }
            Ok(()) if self.failing => tracing::info!("the order API takes our heartbeats again"),
            _ => {}
        }
        self.failing = failed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(url: &str) -> Result<Option<Settings>, Failure> {
        FleetConfig { url: url.into(), instance: "relay-1".into(), ..FleetConfig::default() }.check()
    }

    #[test]
    fn nobody_is_told_unless_a_url_is_set() {
        assert_eq!(FleetConfig::default().check().unwrap(), None);
        assert_eq!(url("").unwrap(), None);
        for good in ["http://127.0.0.1:8080", "http://order-api:8080/", "http://[::1]:80"] {
            let settings = url(good).unwrap().unwrap();
            let base = good.trim_end_matches('/');
            assert_eq!(settings.url, format!("{base}/api/instances/relay-1/heartbeat"));
        }
    }

    #[test]
    fn what_cannot_work_names_its_key_and_nothing_secret() {
        for (wrong, told) in [
            ("https://order-api", "https"),
            ("order-api:8080", "fleet.url"),
            ("http://", "fleet.url"),
            ("http://x:hunter2@order-api", "fleet.url"),
            ("http://order-api/?token=hunter2", "fleet.url"),
            ("ftp://order-api", "fleet.url"),
        ] {
            let failure = url(wrong).unwrap_err();
            assert_eq!(failure.kind.code(), 64);
            assert!(failure.message.contains(told), "{failure}");
            assert!(!failure.to_string().contains("hunter2"), "{failure}");
        }
        for seconds in [0, 3601] {
            let config = FleetConfig { interval_seconds: seconds, ..FleetConfig::default() };
            assert!(config.check().unwrap_err().message.contains("fleet.interval_seconds"));
        }
        let config = FleetConfig { token: Secret::new("hunter2"), ..FleetConfig::default() };
        assert!(!format!("{config:?}").contains("hunter2"));
    }

    #[test]
    fn an_instance_has_a_name_of_its_own() {
        assert_eq!(instance_name("relay.1_a-b").unwrap(), "relay.1_a-b");
        let own = instance_name("").unwrap();
        assert!(own.ends_with(&format!("-{}", std::process::id())) && own.len() <= 64, "{own}");
        assert_eq!(instance_name(&own).unwrap(), own, "it is a legal name");
        for wrong in ["a b", "a/b", &"n".repeat(65)] {
            assert!(instance_name(wrong).unwrap_err().message.contains("fleet.instance"), "{wrong}");
        }
    }
}

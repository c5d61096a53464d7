//! The admin API of a relay that runs, as a command asks it.

use std::{net::SocketAddr, time::Duration};

use serde::{Serialize, de::DeserializeOwned};
use service::{Failure, exit};

use crate::config::Settings;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The most of an answer that is read, in bytes.
const ANSWER_LIMIT_BYTES: u64 = 16 << 20;

/// One relay.
pub(super) struct RelayApi<'a> {
    settings: &'a Settings,
    base: String,
    agent: ureq::Agent,
}

impl<'a> RelayApi<'a> {
    /// The one at `given`, or else where the configuration has it listen. `answer_timeout` is how long it may take to carry
    /// something out; None: as long as it likes.
    ///
    /// # Errors
    /// The address is of a protocol that it does not speak.
    pub(super) fn new(
        settings: &'a Settings,
        given: Option<&str>,
        answer_timeout: Option<Duration>,
    ) -> Result<Self, Failure> {
        let base = relay_url(settings, given);
        if base.to_ascii_lowercase().starts_with("https:") {
            let why = "--relay begins with https://, and the relay's administration speaks plain HTTP only";
            return Err(
                Failure::configuration(why).hint("write http://, and send a token over a network you trust")
            );
        }
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            // The token goes nowhere else.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(answer_timeout)
            .build();
        Ok(Self { settings, base, agent: agent.into() })
    }

    /// Asks for something, and waits for what comes of it.
    ///
    /// # Errors
    /// The relay cannot be asked, or refuses; `look` says where to see what it did.
    pub(super) fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        request: &impl Serialize,
        look: &str,
    ) -> Result<T, Failure> {
        let mut post = self.agent.post(format!("{}{path}", self.base));
        if let Some(token) = self.token() {
            post = post.header("authorization", token);
        }
        self.answer(post.send_json(request), look)
    }

    /// Asks how something is.
    ///
    /// # Errors
    /// As [`post`](Self::post).
    pub(super) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let get = self.agent.get(format!("{}{path}", self.base));
        let mut get = get.config().timeout_global(Some(CONNECT_TIMEOUT)).build();
        if let Some(token) = self.token() {
            get = get.header("authorization", token);
        }
        self.answer(get.call(), "GET /health/ready says how it is")
    }

    fn token(&self) -> Option<String> {
        let token = &self.settings.admin_token;
        (!token.is_empty()).then(|| format!("Bearer {}", token.expose()))
    }

    fn answer<T: DeserializeOwned>(
        &self,
        response: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
        look: &str,
    ) -> Result<T, Failure> {
        let base = &self.base;
        let unreachable = |e: ureq::Error| {
            Failure::new(exit::Kind::GaveUp, format!("the relay at {base} cannot be asked: {e}"))
                .hint(format!("is it running there? --relay URL says where else; {look}"))
        };
        let mut response = response.map_err(unreachable)?;
        let status = response.status().as_u16();
        let body = response.body_mut().with_config().limit(ANSWER_LIMIT_BYTES).read_to_vec();
        let body = body.map_err(unreachable)?;
        if status == 200 {
            let not_ours =
                |e| Failure::new(exit::Kind::Internal, format!("{base} answers what no relay does: {e}"));
            return serde_json::from_slice(&body).map_err(not_ours);
        }
        Err(problem(base, status, &body))
    }
}

/// Where the relay is: what was given, or else where the configuration has it listen.
pub(super) fn relay_url(settings: &Settings, given: Option<&str>) -> String {
    match given {
        Some(url) => url.trim_end_matches('/').to_owned(),
        None => format!("http://{}", reachable(&settings.listen)),
    }
}

/// Where a relay is that listens everywhere.
fn reachable(listen: &str) -> String {
    match listen.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_unspecified() && address.is_ipv4() => {
            format!("127.0.0.1:{}", address.port())
        }
        Ok(address) if address.ip().is_unspecified() => format!("[::1]:{}", address.port()),
        _ => listen.to_owned(),
    }
}

fn problem(base: &str, status: u16, body: &[u8]) -> Failure {
    let problem: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let text = |name: &str| problem[name].as_str().unwrap_or_default();
    let kind = match status {
        401 | 403 => exit::Kind::Refused,
        409 | 503 => exit::Kind::GaveUp,
        400..=499 => exit::Kind::BadConfiguration,
        _ => exit::Kind::Internal,
    };
    let mut what = format!("the relay at {base} refuses ({status}): {}", text("title"));
    for part in [text("detail"), &problem["errors"].as_array().map(|e| format!("{e:?}")).unwrap_or_default()]
    {
        if !part.is_empty() {
            what = format!("{what}: {part}");
        }
    }
    let failure = Failure::new(kind, what);
    match status {
        401 => failure.hint("set http.admin_token here as at the relay: CDC_RELAY_HTTP__ADMIN_TOKEN(_FILE)"),
        _ => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::reachable;

    #[test]
    fn a_relay_that_listens_everywhere_is_asked_here() {
        assert_eq!(reachable("0.0.0.0:8081"), "127.0.0.1:8081");
        assert_eq!(reachable("[::]:8081"), "[::1]:8081");
        assert_eq!(reachable("relay.internal:8081"), "relay.internal:8081");
    }
}

//! One request and what its answer means. Headers and signature are those of Standard Webhooks
//! (<https://www.standardwebhooks.com>), for which every language has a verifier.

use std::{io::Read as _, ops::RangeInclusive, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use chrono::Utc;
use ring::hmac;
use service::{Failure, Secret};
use ureq::{
    Agent,
    http::{StatusCode, Uri},
};

use super::Notification;
use crate::{
    config::NotifyConfig,
    decide::{Fault, Poison, Reason},
    tls,
};

/// How much of an answer is read.
const ANSWER_BYTES_MAX: u64 = 4096;
/// How much of it is told.
const EXCERPT_CHARS_MAX: usize = 200;
/// How long a signing key may be, in bytes.
const KEY_BYTES: RangeInclusive<usize> = 24..=64;

/// Somebody who is told of events.
pub(super) struct Webhook {
    agent: Agent,
    url: Secret,
    /// The URL as far as it may be told: its path may be as good as a password.
    place: String,
    key: Option<hmac::Key>,
}

impl Webhook {
    /// # Errors
    /// 64, naming the key of `[notify]`.
    pub(super) fn new(config: &NotifyConfig) -> Result<Self, Failure> {
        let (place, secure) = place(config.url.expose())?;
        if let Some(why) = tls::trusts_nobody().filter(|_| secure) {
            let why = format!("notify.url is https, and no certificate is trusted: {why}");
            return Err(Failure::configuration(why).hint(
                "install the certificates (ca-certificates), or name a file of them in SSL_CERT_FILE",
            ));
        }
        let key = signing_key(config.secret.expose())?;
        if key.is_none() {
            tracing::warn!(
                "notify.secret is not set: requests are not signed, and whoever receives them cannot know that they are ours"
            );
        }
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            // Such an answer is looked at like any other.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_global(Some(Duration::from_millis(config.timeout_ms)))
            .tls_config(tls::config())
            .user_agent(concat!("consumer/", env!("CARGO_PKG_VERSION")));
        Ok(Self { agent: agent.build().into(), url: config.url.clone(), place, key })
    }

    /// Sends it and waits for the answer: blocking, up to the configured time.
    pub(super) fn tell(&self, event: &Notification) -> Result<(), Fault> {
        let (id, timestamp) = (event.id.to_string(), Utc::now().timestamp());
        let mut request = self
            .agent
            .post(self.url.expose())
            .content_type("application/json")
            .header("webhook-id", &id)
            .header("webhook-timestamp", timestamp.to_string());
        if let Some(key) = &self.key {
            request = request.header("webhook-signature", signature(key, &id, timestamp, &event.value));
        }
        for (name, value) in [("event-type", &event.kind), ("traceparent", &event.traceparent)] {
            if let Some(value) = value {
                request = request.header(name, value);
            }
        }
        let mut answer = request
            .send(&event.value[..])
            .map_err(|e| Fault::Transient(format!("{} does not answer: {e}", self.place)))?;
        let mut said = Vec::new();
        // What cannot be read of it does not matter.
        let _ = answer.body_mut().as_reader().take(ANSWER_BYTES_MAX).read_to_end(&mut said);
        verdict(&self.place, answer.status(), &said)
    }
}

/// What an answer means.
fn verdict(place: &str, status: StatusCode, said: &[u8]) -> Result<(), Fault> {
    if status.is_success() {
        return Ok(());
    }
    let excerpt: String = String::from_utf8_lossy(said)
        .chars()
        .take(EXCERPT_CHARS_MAX)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let error = format!("{place} answers {} {excerpt}", status.as_u16());
    let error = error.trim_end();
    match status.as_u16() {
        408 | 425 | 429 | 500.. => Err(Fault::Transient(error.to_owned())),
        300..400 => {
            let why = format!("{error}: a redirect, which is not followed; correct notify.url");
            Err(Fault::Record(Poison::new(Reason::Refused, why)))
        }
        _ => Err(Fault::Record(Poison::new(Reason::Refused, error))),
    }
}

/// `v1,` and the HMAC of id, time and body.
fn signature(key: &hmac::Key, id: &str, timestamp: i64, body: &[u8]) -> String {
    let mut context = hmac::Context::with_key(key);
    context.update(format!("{id}.{timestamp}.").as_bytes());
    context.update(body);
    format!("v1,{}", STANDARD.encode(context.sign()))
}

/// Scheme and host of a URL, and whether it wants TLS.
fn place(url: &str) -> Result<(String, bool), Failure> {
    // The URL is not repeated: it may hold a token.
    let bad = |why: &str| {
        Failure::configuration(format!("notify.url {why}"))
            .hint("write it as https://HOST/PATH (CONSUMER_NOTIFY__URL, or CONSUMER_NOTIFY__URL_FILE for a file that holds it)")
    };
    if url.is_empty() {
        return Err(bad("is not set, and the handler notify needs it"));
    }
    let uri: Uri = url.parse().map_err(|_| bad("is not a URL"))?;
    let tls = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => return Err(bad("begins with neither https:// nor http://")),
    };
    let authority = uri.authority().ok_or_else(|| bad("names no host"))?;
    if authority.as_str().contains('@') {
        return Err(bad(
            "holds a user or a password; the signature (notify.secret) is what tells who we are",
        ));
    }
    Ok((format!("{}://{authority}", if tls { "https" } else { "http" }), tls))
}

/// The key in a secret as Standard Webhooks writes it; none if it is empty.
fn signing_key(secret: &str) -> Result<Option<hmac::Key>, Failure> {
    if secret.is_empty() {
        return Ok(None);
    }
    let encoded = secret.strip_prefix("whsec_").unwrap_or(secret);
    let bytes = STANDARD.decode(encoded).ok().filter(|bytes| KEY_BYTES.contains(&bytes.len()));
    let bytes = bytes.ok_or_else(|| {
        Failure::configuration("notify.secret is not 24 to 64 bytes in base64")
            .hint("make one with `openssl rand -base64 32` and give it to the receiver, too; whsec_ before it is allowed")
    })?;
    Ok(Some(hmac::Key::new(hmac::HMAC_SHA256, &bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the specification's own libraries.
    #[test]
    fn a_signature_is_as_the_specification_says() {
        let key = signing_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap().unwrap();
        let id = "msg_p5jXN8AQM9LWM0D4loKWxJek";
        let signed = signature(&key, id, 1_614_265_330, br#"{"test": 2432232314}"#);
        assert_eq!(signed, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn a_secret_is_base64_of_the_right_length_and_is_not_repeated() {
        assert!(signing_key("").unwrap().is_none());
        let key = STANDARD.encode([7; 24]);
        assert!(signing_key(&key).unwrap().is_some());
        assert!(signing_key(&format!("whsec_{key}")).unwrap().is_some());
        for wrong in [STANDARD.encode([7; 23]), STANDARD.encode([7; 65]), "hunter2!".into()] {
            let failure = signing_key(&wrong).unwrap_err();
            assert_eq!(failure.kind.code(), 64);
            assert!(failure.message.contains("notify.secret") && !failure.to_string().contains(&wrong));
        }
    }

    #[test]
    fn a_url_is_told_without_what_may_be_secret() {
        assert_eq!(place("https://h:8443/services/T0K3N?k=T0K3N").unwrap(), ("https://h:8443".into(), true));
        assert_eq!(place("http://127.0.0.1/").unwrap(), ("http://127.0.0.1".into(), false));
        for wrong in
            ["", "h/T0K3N", "ftp://h/T0K3N", "https:///T0K3N", "https://u:T0K3N@h/", "https://h/T0K3N\n"]
        {
            let failure = place(wrong).unwrap_err();
            assert_eq!(failure.kind.code(), 64);
            assert!(
                failure.message.contains("notify.url") && !failure.to_string().contains("T0K3N"),
                "{failure}"
            );
        }
    }

    #[test]
    fn what_may_pass_is_tried_again_and_what_is_refused_is_not() {
        let verdict = |status: u16| verdict("http://h", StatusCode::from_u16(status).unwrap(), b"no\r\nway");
        for status in [200, 202, 204] {
            verdict(status).unwrap();
        }
        for status in [408, 425, 429, 500, 502, 503, 504, 599] {
            let Err(Fault::Transient(error)) = verdict(status) else { panic!("{status}") };
            assert_eq!(error, format!("http://h answers {status} no  way"));
        }
        for status in [301, 307, 400, 401, 404, 410, 422] {
            let Err(Fault::Record(poison)) = verdict(status) else { panic!("{status}") };
            assert_eq!(poison.reason, Reason::Refused);
            assert_eq!(poison.error.contains("notify.url"), status < 400, "{}", poison.error);
        }
    }
}

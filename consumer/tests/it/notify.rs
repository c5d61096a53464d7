//! Webhooks, told to a real server: signed, repeated where that may help, dead-lettered where it does not.

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
    process::Command,
    sync::{Arc, Mutex},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ring::hmac;
use rustls::{ServerConfig, ServerConnection, StreamOwned, crypto::ring::default_provider};
use uuid::Uuid;

use crate::{
    records::{Record, confirmed, created},
    stage::{Stage, eventually, on_stage},
};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
/// A path as good as a password, as chat services have it.
const PATH: &str = "/services/T0K3N";
const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// A request as it came.
#[derive(Debug, Clone)]
struct Request {
    line: String,
    headers: HashMap<String, String>,
    body: Vec<u8>,
}

impl Request {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    fn is_about(&self, record: &Record) -> bool {
        self.header("webhook-id").as_bytes() == record.headers[0].1
    }
}

/// What a request is answered with: status line and headers, then the body; nothing: silence.
type Answer = Option<(&'static str, &'static str)>;

const FINE: Answer = Some(("200 OK", "thank you"));

/// An HTTP server.
struct Receiver {
    address: SocketAddr,
    received: Arc<Mutex<Vec<Request>>>,
}

impl Receiver {
    /// `answer` is given the request and how many came before it with the same id.
    fn start(
        tls: Option<Arc<ServerConfig>>,
        answer: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let receiver = Self { address: listener.local_addr().unwrap(), received: Arc::default() };
        let (received, answer) = (receiver.received.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (tls, received, answer) = (tls.clone(), received.clone(), answer.clone());
                std::thread::spawn(move || {
                    // A client that does not trust us hangs up.
                    let _ = match tls {
                        None => converse(stream, &received, &*answer),
                        Some(config) => {
                            let connection = ServerConnection::new(config).unwrap();
                            converse(StreamOwned::new(connection, stream), &received, &*answer)
                        }
                    };
                });
            }
        });
        receiver
    }

    fn received(&self) -> Vec<Request> {
        self.received.lock().unwrap().clone()
    }

    /// The requests, as soon as there are so many.
    async fn until(&self, count: usize) -> Vec<Request> {
        let what = format!("{count} requests have come");
        eventually(&what, async || Some(self.received()).filter(|r| r.len() >= count)).await
    }

    /// How often it was told of a record.
    fn times(&self, record: &Record) -> usize {
        self.received().iter().filter(|request| request.is_about(record)).count()
    }
}

fn converse(
    mut stream: impl Read + Write,
    received: &Mutex<Vec<Request>>,
    answer: &(dyn Fn(&Request, usize) -> Answer + Send + Sync),
) -> std::io::Result<()> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let (line, fields) = head.trim_end().split_once("\r\n").unwrap();
    let fields = fields.lines().filter_map(|field| field.split_once(": "));
    let headers: HashMap<String, String> =
        fields.map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).collect();
    let mut body = vec![0; headers["content-length"].parse().unwrap()];
    stream.read_exact(&mut body)?;
    let request = Request { line: line.to_owned(), headers, body };
    let before = {
        let mut received = received.lock().unwrap();
        received.push(request.clone());
        received.iter().filter(|r| r.header("webhook-id") == request.header("webhook-id")).count() - 1
    };
    match answer(&request, before) {
        Some((status, body)) => {
            let length = body.len();
            write!(
                stream,
                "HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
            )?;
            stream.flush()
        }
        // Until the client has had enough.
        None => stream.read_to_end(&mut Vec::new()).map(drop),
    }
}

fn command(stage: &Stage, url: &str) -> Command {
    let mut command = stage.command("notify");
    command.env("CONSUMER_NOTIFY__URL", url).env("CONSUMER_NOTIFY__SECRET", SECRET);
    command
}

fn orders(count: usize) -> Vec<Record> {
    (0..count).map(|n| Record::of(&created(&format!("o-{n}")))).collect()
}

#[test]
fn each_event_is_told_once_as_it_came_with_a_signature_that_verifies() {
    on_stage(1, async |stage| {
        let receiver = Receiver::start(None, |_, _| FINE);
        let mut command = command(&stage, &format!("http://{}{PATH}", receiver.address));
        command.args(["--log-level", "debug"]);
        let consumer = stage.spawn(command).await;
        consumer.until_ready().await;
        let mut first = Record::of(&created("o-1"));
        first.header("traceparent", TRACEPARENT);
        let mut message = Record::of(&confirmed("o-2", 7));
        message.value = Some(b" {\"amount\":  12345678901234567890.10,\"\\u0041\":\"\xc3\xa9\"}\n".to_vec());
        let message_id = Uuid::now_v7().to_string();
        message.header("message-id", &message_id);
        let records = [first, message];
        stage.produce(records.clone()).await;
        receiver.until(2).await;
        // The same again, and then one by which we know that they were seen.
        let last = Record::of(&created("o-3"));
        stage.produce(records.iter().chain([&last]).cloned()).await;
        let received = receiver.until(3).await;
        assert_eq!(received.len(), 3, "{received:?}");
        assert!(received[2].is_about(&last));

        let key = STANDARD.decode(SECRET.strip_prefix("whsec_").unwrap()).unwrap();
        let key = hmac::Key::new(hmac::HMAC_SHA256, &key);
        for (request, record) in received.iter().zip(records.iter().chain([&last])) {
            assert_eq!(request.line, format!("POST {PATH} HTTP/1.1"));
            assert_eq!(Some(&request.body), record.value.as_ref());
            assert_eq!(request.header("content-type"), "application/json");
            assert!(request.header("user-agent").starts_with("consumer/"), "{request:?}");
            let (id, timestamp) = (request.header("webhook-id"), request.header("webhook-timestamp"));
            assert!(timestamp.parse::<u64>().unwrap() > 0);
            let signed = [id.as_bytes(), b".", timestamp.as_bytes(), b".", &request.body].concat();
            let signature = request.header("webhook-signature").strip_prefix("v1,").unwrap();
            hmac::verify(&key, &signed, &STANDARD.decode(signature).unwrap()).unwrap();
        }
        assert!(received[0].is_about(&records[0]));
        assert_eq!(
            (received[0].header("event-type"), received[0].header("traceparent")),
            ("OrderCreated", TRACEPARENT)
        );
        assert_eq!(received[1].header("webhook-id"), message_id);
        assert_eq!(
            (received[1].header("event-type"), received[1].header("traceparent")),
            ("OrderConfirmed", "")
        );

        let log = consumer.log();
        assert!(log.contains("POST"), "the client's own log is in it:\n{log}");
        for secret in [SECRET, &SECRET["whsec_".len()..], "T0K3N"] {
            assert!(!log.contains(secret), "{secret} is in the log:\n{log}");
        }
    });
}

#[test]
fn what_may_pass_is_tried_again_until_it_is_told() {
    on_stage(1, async |stage| {
        stage.create_topic(&stage.dlq()).await;
        let receiver = Receiver::start(None, |request, before| {
            let shy = request.header("event-type") == "OrderConfirmed";
            if shy && before < 2 { Some(("503 Service Unavailable", "not now")) } else { FINE }
        });
        let mut command = command(&stage, &format!("http://{}{PATH}", receiver.address));
        command.env_remove("CONSUMER_NOTIFY__SECRET");
        let consumer = stage.spawn(command).await;
        consumer.until_ready().await;
        let records = [created("o-1"), confirmed("o-1", 2), created("o-2")].map(|body| Record::of(&body));
        stage.produce(records.clone()).await;
        let received = receiver.until(5).await;
        let order: Vec<usize> =
            received.iter().filter_map(|r| records.iter().position(|record| r.is_about(record))).collect();
        assert_eq!(order, [0, 1, 1, 1, 2], "in order, and nothing but what failed again");
        assert!(received.iter().all(|request| request.header("webhook-signature").is_empty()));
        eventually("all committed", async || (stage.committed().await == 3).then_some(())).await;
        assert_eq!((receiver.received().len(), stage.dead_letter_count().await), (5, 0));
        assert!((consumer.metric("consumer_retried_total{cause=\"event\"}").await - 2.0).abs() < 0.1);
        assert!(consumer.log().contains("notify.secret is not set"), "{}", consumer.log());
    });
}

#[test]
fn what_is_refused_or_never_answered_is_dead_lettered_and_the_others_flow_on() {
    on_stage(1, async |stage| {
        stage.create_topic(&stage.dlq()).await;
        let records = orders(9);
        let [bad, moved, silent] = [&records[1], &records[4], &records[6]];
        let receiver = Receiver::start(None, {
            let [bad, moved, silent] = [bad, moved, silent].map(Clone::clone);
            move |request, _| match request {
                r if r.is_about(&bad) => Some(("400 Bad Request", "no such\r\nthing")),
                r if r.is_about(&moved) => Some(("307 Temporary Redirect\r\nlocation: /elsewhere", "")),
                r if r.is_about(&silent) => None,
                _ => FINE,
            }
        });
        let mut command = command(&stage, &format!("http://{}{PATH}", receiver.address));
        command.env("CONSUMER_NOTIFY__TIMEOUT_MS", "300").env("CONSUMER_CONSUMER__RETRIES_MAX", "1");
        let consumer = stage.spawn(command).await;
        consumer.until_ready().await;
        stage.produce(records.clone()).await;
        let letters = stage.dead_letters(3).await;
        let said =
            letters.iter().map(|l| (l.value.clone(), l.header("dlq.reason"), l.header("dlq.attempts")));
        let expected = [(bad, "refused", "1"), (moved, "refused", "1"), (silent, "retries_exhausted", "2")];
        let expected =
            expected.map(|(r, reason, attempts)| (r.value.clone(), reason.into(), attempts.into()));
        assert_eq!(said.collect::<Vec<_>>(), expected);
        let errors: Vec<String> = letters.iter().map(|l| l.header("dlq.error")).collect();
        assert!(errors[0].contains("400 no such  thing"), "{errors:?}");
        assert!(errors[1].contains("307") && errors[1].contains("redirect"), "{errors:?}");
        assert!(errors[2].contains("timeout"), "{errors:?}");
        assert!(!errors.concat().contains("T0K3N"), "{errors:?}");
        eventually("all committed", async || (stage.committed().await == 9).then_some(())).await;
        for record in &records {
            let times = if record.value == silent.value { 2 } else { 1 };
            assert_eq!(receiver.times(record), times, "{record:?}");
        }
        assert!(
            receiver.received().iter().all(|request| request.line.contains(PATH)),
            "nobody went elsewhere"
        );
    });
}

/// A certificate for 127.0.0.1, where a client finds it, and the server's side of it.
fn certificate(stage: &Stage, name: &str) -> (std::path::PathBuf, Arc<ServerConfig>) {
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{name}.pem", stage.name));
    std::fs::write(&path, made.cert.pem()).unwrap();
    let key = made.signing_key.serialize_der().try_into().unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    (path, Arc::new(config))
}

#[test]
fn a_server_is_told_by_https_if_its_certificate_is_trusted() {
    on_stage(1, async |stage| {
        stage.create_topic(&stage.dlq()).await;
        let (trusted, config) = certificate(&stage, "trusted");
        let (other, _) = certificate(&stage, "other");
        let receiver = Receiver::start(Some(config), |_, _| FINE);
        let trusting = |path| {
            let mut command = command(&stage, &format!("https://{}{PATH}", receiver.address));
            command.env("SSL_CERT_FILE", path).env_remove("SSL_CERT_DIR");
            command.env("CONSUMER_CONSUMER__RETRIES_MAX", "0");
            command
        };
        let records = orders(2);
        let mut distrustful = stage.spawn(trusting(&other)).await;
        stage.produce([records[0].clone()]).await;
        let letters = stage.dead_letters(1).await;
        assert!(letters[0].header("dlq.error").contains("certificate"), "{}", letters[0].header("dlq.error"));
        eventually("it is committed", async || (stage.committed().await == 1).then_some(())).await;
        assert!(distrustful.terminate().await.success());
        assert!(receiver.received().is_empty());

        let _consumer = stage.spawn(trusting(&trusted)).await;
        stage.produce([records[1].clone()]).await;
        let received = receiver.until(1).await;
        assert!(received[0].is_about(&records[1]));
        for path in [trusted, other] {
            std::fs::remove_file(path).unwrap();
        }
    });
}

#[test]
fn a_wrong_section_is_64_and_names_the_key_but_no_secret() {
    let check = |url: &str, variable: (&str, &str)| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_consumer"));
        command.args(["--check-config", "--handler", "notify"]).env("CONSUMER_NOTIFY__URL", url);
        let output = command.env(variable.0, variable.1).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let fine = "https://127.0.0.1/T0K3N";
    assert_eq!(check(fine, ("CONSUMER_NOTIFY__SECRET", SECRET)).0, Some(0));
    for (url, variable, value, told) in [
        ("", "IRRELEVANT", "", "notify.url"),
        ("ftp://h/T0K3N", "IRRELEVANT", "", "notify.url"),
        (fine, "CONSUMER_NOTIFY__SECRET", "T0K3N", "notify.secret"),
        (fine, "CONSUMER_NOTIFY__TIMEOUT_MS", "0", "notify.timeout_ms"),
        (fine, "CONSUMER_CONSUMER__APPLY_TIMEOUT_SECONDS", "5", "notify.timeout_ms"),
    ] {
        let (code, said) = check(url, (variable, value));
        assert_eq!(code, Some(64), "{url} {variable}: {said}");
        assert!(said.contains(told) && !said.contains("T0K3N"), "{url} {variable}: {said}");
    }
}

//! The HTTP server of every service: hyper under axum's routes, with a bound on everything a client may take its
//! time with or make large before a handler sees it.

use std::{convert::Infallible, io, net::SocketAddr, pin::pin, time::Duration};

use axum::{Router, extract::Request};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tower_service::Service as _;

use crate::{Failure, exit::Kind, shutdown::Shutdown};

/// The largest head of a request, and the most of a body that is read ahead. Beyond it: 431, without a body.
/// A service's own limit comes before it and says more.
const BUFFER_BYTES: usize = 64 * 1024;

/// The most header fields of a request. Beyond it: 431.
const MAX_HEADERS: usize = 100;

/// How long to wait when no connection can be taken, for instance because there are no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// What the server allows its clients.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The most open connections; further ones wait until one is closed.
    pub connections: usize,
    /// How long a request's head may take, and how long a connection may be idle before it.
    pub head_timeout: Duration,
    /// How long an answer may wait for a client that reads nothing of it (Linux; elsewhere the system decides).
    pub unread_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            head_timeout: Duration::from_secs(10),
            unread_timeout: Duration::from_secs(30),
        }
    }
}

/// Who is at the other end of a request's connection; among the request's extensions.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub SocketAddr);

/// Binds `listen` (`address:port`), with the exact next step if it is taken.
pub async fn bind(listen: &str) -> Result<TcpListener, Failure> {
    TcpListener::bind(listen).await.map_err(|e| {
        Failure::new(Kind::Refused, format!("cannot listen on {listen}: {e}"))
            .hint("choose another address with http.listen, or stop what listens there")
    })
}

/// Serves until the shutdown is asked for and the requests under way have been answered. From then on nothing
/// listens any more, idle connections are closed, and each other one after its answer. Dropping the future closes
/// them all.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, shutdown: Shutdown) {
    let mut connections = JoinSet::new();
    {
        let mut stop = pin!(shutdown.requested());
        loop {
            tokio::select! {
                () = &mut stop => break,
                // What has ended makes room.
                Some(_) = connections.join_next() => {}
                accepted = listener.accept(), if connections.len() < limits.connections => match accepted {
                    Ok((stream, peer)) => {
                        connections.spawn(converse(stream, peer, router.clone(), limits, shutdown.clone()));
                    }
                    Err(e) if is_of_one_connection(&e) => {}
                    Err(e) => {
                        tracing::warn!(error = %e, "cannot take connections");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Whether the client was gone before we took its connection.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Answers the requests of one connection.
async fn converse(stream: TcpStream, peer: SocketAddr, router: Router, limits: Limits, shutdown: Shutdown) {
    // An answer in two segments would wait for the client's delayed acknowledgement of the first.
    if let Err(e) = stream.set_nodelay(true) {
        tracing::debug!(error = %e, "cannot set TCP_NODELAY");
    }
    // A client that does not read its answer is not waited for without end, nor one that is gone without a word.
    #[cfg(target_os = "linux")]
    if let Err(e) = rustix::net::sockopt::set_tcp_user_timeout(
        &stream,
        u32::try_from(limits.unread_timeout.as_millis()).unwrap_or(u32::MAX),
    ) {
        tracing::debug!(error = %e, "cannot set TCP_USER_TIMEOUT");
    }
    let answer = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Peer(peer));
        let mut router = router.clone();
        async move { Ok::<_, Infallible>(router.call(request).await.unwrap_or_else(|never| match never {})) }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head_timeout)
            .max_buf_size(BUFFER_BYTES)
            .max_header_size(BUFFER_BYTES)
            .max_headers(MAX_HEADERS)
            .serve_connection(TokioIo::new(stream), answer)
    );
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.requested() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(e) = ended {
        tracing::debug!(%peer, error = %e, "a connection failed");
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{Shutdown as Half, TcpStream},
        sync::Arc,
    };

    use axum::{Extension, routing::get};
    use tokio::{runtime::Runtime, sync::Notify, task::JoinHandle};

    use super::*;
    use crate::shutdown::Trigger;

    /// Longer than anything here takes, and no reason to wait.
    const PATIENCE: Duration = Duration::from_secs(30);

    struct Server {
        runtime: Runtime,
        address: SocketAddr,
        trigger: Trigger,
        running: JoinHandle<()>,
        /// A request to `/slow` has arrived.
        arrived: Arc<Notify>,
        /// Lets one request to `/slow` be answered.
        release: Arc<Notify>,
    }

    impl Server {
        fn start(limits: Limits) -> Self {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            let (arrived, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
            let (here, held) = (arrived.clone(), release.clone());
            let router = Router::new()
                .route("/", get(|Extension(peer): Extension<Peer>| async move { peer.0.to_string() }))
                .route("/large", get(|| async { vec![0_u8; 32 << 20] }))
                .route(
                    "/slow",
                    get(move || async move {
                        here.notify_one();
                        held.notified().await;
                        "slow"
                    }),
                );
            let listener = runtime.block_on(bind("127.0.0.1:0")).unwrap();
            let address = listener.local_addr().unwrap();
            let (trigger, shutdown) = Shutdown::manual();
            let running = runtime.spawn(serve(listener, router, limits, shutdown));
            Self { runtime, address, trigger, running, arrived, release }
        }

        fn connect(&self) -> TcpStream {
            let stream = TcpStream::connect(self.address).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream
        }

        /// Asks on a connection and reads its answer, which ends as `end` says.
        fn ask(stream: &mut TcpStream, path: &str, end: &str) -> String {
            stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).unwrap();
            read_until(stream, end)
        }
    }

    fn read_until(stream: &mut TcpStream, end: &str) -> String {
        let (mut text, mut byte) = (String::new(), [0]);
        while !text.ends_with(end) {
            assert_eq!(stream.read(&mut byte).unwrap(), 1, "{text}");
            text.push(byte[0].into());
        }
        text
    }

    fn rest(stream: &mut TcpStream) -> String {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    fn short() -> Limits {
        Limits { head_timeout: Duration::from_millis(100), ..Limits::default() }
    }

    #[test]
    fn a_head_that_does_not_come_ends_the_connection() {
        let server = Server::start(short());
        let mut half = server.connect();
        half.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nx-half").unwrap();
        assert_eq!(rest(&mut half), "");
        let mut silent = server.connect();
        assert_eq!(rest(&mut silent), "");
        // A handler may take longer than that, and its answer is whole.
        let mut slow = server.connect();
        slow.write_all(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        let mut later = server.connect();
        assert_eq!(rest(&mut later), "");
        server.release.notify_one();
        assert!(read_until(&mut slow, "slow").starts_with("HTTP/1.1 200"));
    }

    #[test]
    fn at_the_bound_connections_wait_until_one_is_closed() {
        let server = Server::start(Limits { connections: 2, ..Limits::default() });
        let (mut first, mut second) = (server.connect(), server.connect());
        let own = first.local_addr().unwrap().to_string();
        assert!(Server::ask(&mut first, "/", &own).contains("200 OK"));
        second.write_all(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        let mut third = server.connect();
        third.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        third.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        third.read_exact(&mut [0]).unwrap_err();
        third.set_read_timeout(Some(PATIENCE)).unwrap();
        first.shutdown(Half::Both).unwrap();
        let own = third.local_addr().unwrap().to_string();
        assert!(read_until(&mut third, &own).contains("200 OK"));
        server.release.notify_one();
        read_until(&mut second, "slow");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_client_that_reads_nothing_does_not_keep_its_connection() {
        let limits =
            Limits { connections: 1, unread_timeout: Duration::from_millis(300), ..Limits::default() };
        let server = Server::start(limits);
        let mut deaf = server.connect();
        // More than the system buffers on its way.
        deaf.write_all(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        // There is room for one, so whoever is answered has come after it.
        let mut next = server.connect();
        let own = next.local_addr().unwrap().to_string();
        assert!(Server::ask(&mut next, "/", &own).contains("200 OK"));
        drop(deaf);
    }

    #[test]
    fn a_stop_closes_what_is_idle_and_answers_what_is_not() {
        let server = Server::start(Limits::default());
        let (mut idle, mut busy) = (server.connect(), server.connect());
        let own = idle.local_addr().unwrap().to_string();
        Server::ask(&mut idle, "/", &own);
        busy.write_all(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        server.runtime.block_on(server.arrived.notified());
        server.trigger.request();
        assert_eq!(rest(&mut idle), "");
        // The listener's own task may be the last to hear of it.
        while TcpStream::connect(server.address).is_ok() {
            std::thread::yield_now();
        }
        assert!(!server.running.is_finished());
        server.release.notify_one();
        let answer = rest(&mut busy);
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("slow"), "{answer}");
        server.runtime.block_on(server.running).unwrap();
    }

    #[test]
    fn a_head_is_bounded_in_bytes_and_fields() {
        let server = Server::start(Limits::default());
        let with = |fields: &str| {
            let mut stream = server.connect();
            let head = format!("GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{fields}\r\n");
            // The server may answer and close before all of it was sent.
            let _ = stream.write_all(head.as_bytes());
            let mut answer = [0; 12];
            stream.read_exact(&mut answer).unwrap();
            String::from_utf8_lossy(&answer[9..]).into_owned()
        };
        let long = |bytes: usize| format!("x-long: {}\r\n", "x".repeat(bytes));
        assert_eq!(with(&long(60 * 1024)), "200");
        assert_eq!(with(&long(70 * 1024)), "431");
        assert_eq!(with(&"x: y\r\n".repeat(98)), "200");
        assert_eq!(with(&"x: y\r\n".repeat(99)), "431");
    }
}

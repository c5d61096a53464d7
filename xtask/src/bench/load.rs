//! Loads of HTTP requests over a number of connections, each of which has one under way: one request again and again, or
//! requests at a rate.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpStream,
    task::{JoinHandle, JoinSet},
};

use crate::failure::{Explain, Failure, Result};

/// How long one request may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);

/// What is sent.
#[derive(Debug, Clone)]
pub(super) struct Load {
    pub(super) address: SocketAddr,
    pub(super) path: &'static str,
    pub(super) body: Bytes,
    pub(super) connections: u32,
    /// The answer that every request must have.
    pub(super) status: u16,
}

impl Load {
    /// Sends for so long; gives back what each request took, in microseconds.
    pub(super) async fn run(&self, duration: Duration) -> Result<Vec<u32>> {
        let until = Instant::now() + duration;
        let mut clients = JoinSet::new();
        for _ in 0..self.connections {
            clients.spawn(self.clone().client(until));
        }
        let mut all = Vec::new();
        while let Some(client) = clients.join_next().await {
            all.append(&mut client.explain(|| "run a client".to_owned())??);
        }
        Ok(all)
    }

    async fn client(self, until: Instant) -> Result<Vec<u32>> {
        let mut connection = Connection::open(self.address).await?;
        let mut took = Vec::new();
        while Instant::now() < until {
            let since = Instant::now();
            connection.post(self.path, self.body.clone(), self.status).await?;
            took.push(u32::try_from(since.elapsed().as_micros()).unwrap_or(u32::MAX));
        }
        connection.close().await;
        Ok(took)
    }
}

/// Requests at a rate that waits for no answer, as long as a connection is free. Request n is due n / `rate` seconds after
/// `start`, and what it took is counted from then, however late it was sent.
#[derive(Debug, Clone)]
pub(super) struct Paced {
    pub(super) address: SocketAddr,
    pub(super) path: &'static str,
    pub(super) connections: u32,
    pub(super) status: u16,
    pub(super) start: Instant,
    pub(super) rate: u32,
    pub(super) requests: u64,
}

impl Paced {
    /// When a request is to be sent.
    pub(super) fn due(&self, number: u64) -> Instant {
        self.start + Duration::from_secs(number) / self.rate
    }

    /// Sends all of them, with the body that belongs to each number; gives back what each took, in microseconds.
    pub(super) async fn run(&self, body: impl Fn(u64) -> Bytes + Copy + Send + 'static) -> Result<Vec<u32>> {
        let next = Arc::new(AtomicU64::new(0));
        let mut clients = JoinSet::new();
        for _ in 0..self.connections {
            clients.spawn(self.clone().client(Arc::clone(&next), body));
        }
        let mut all = Vec::new();
        while let Some(client) = clients.join_next().await {
            all.append(&mut client.explain(|| "run a client".to_owned())??);
        }
        Ok(all)
    }

    async fn client(self, next: Arc<AtomicU64>, body: impl Fn(u64) -> Bytes) -> Result<Vec<u32>> {
        let mut connection = Connection::open(self.address).await?;
        let mut took = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= self.requests {
                break;
            }
            let due = self.due(number);
            tokio::time::sleep_until(due.into()).await;
            connection.post(self.path, body(number), self.status).await?;
            took.push(u32::try_from(due.elapsed().as_micros()).unwrap_or(u32::MAX));
        }
        connection.close().await;
        Ok(took)
    }
}

/// One connection.
struct Connection {
    address: SocketAddr,
    sender: http1::SendRequest<Full<Bytes>>,
    driver: JoinHandle<hyper::Result<()>>,
}

impl Connection {
    async fn open(address: SocketAddr) -> Result<Self> {
        let what = || format!("connect to {address}");
        let stream = TcpStream::connect(address).await.explain(what)?;
        stream.set_nodelay(true).explain(what)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.explain(what)?;
        Ok(Self { address, sender, driver: tokio::spawn(connection) })
    }

    /// Waits for the answer, which must have this status.
    async fn post(&mut self, path: &str, body: Bytes, status: u16) -> Result<()> {
        let what = || format!("send POST {path} to {}", self.address);
        let request = Request::post(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .explain(what)?;
        let sender = &mut self.sender;
        let exchange = async {
            sender.ready().await?;
            let answer = sender.send_request(request).await?;
            let status = answer.status();
            Ok::<_, hyper::Error>((status, answer.into_body().collect().await?.to_bytes()))
        };
        let exchange = tokio::time::timeout(REQUEST_LIMIT, exchange).await;
        let (answered, body) = exchange.explain(what)?.explain(what)?;
        if answered.as_u16() != status {
            let body = String::from_utf8_lossy(&body).into_owned();
            return Err(Failure::new(format!("POST {path} was answered {answered}: {body}")));
        }
        Ok(())
    }

    async fn close(self) {
        drop(self.sender);
        let _ = self.driver.await;
    }
}

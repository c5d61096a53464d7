//! A load of one HTTP request, sent again and again over a number of connections, each of which has one under way.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, task::JoinSet};

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
        let what = || format!("send POST {} to {}", self.path, self.address);
        let stream = TcpStream::connect(self.address).await.explain(what)?;
        stream.set_nodelay(true).explain(what)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.explain(what)?;
        let driver = tokio::spawn(connection);
        let mut took = Vec::new();
        while Instant::now() < until {
            let request = Request::post(self.path)
                .header(header::HOST, "localhost")
                .header(header::CONTENT_TYPE, "application/json")
                .body(Full::new(self.body.clone()))
                .explain(what)?;
            let since = Instant::now();
            let exchange = async {
                sender.ready().await?;
                let answer = sender.send_request(request).await?;
                let status = answer.status();
                Ok::<_, hyper::Error>((status, answer.into_body().collect().await?.to_bytes()))
            };
            let exchange = tokio::time::timeout(REQUEST_LIMIT, exchange).await;
            let (status, body) = exchange.explain(what)?.explain(what)?;
            if status.as_u16() != self.status {
                let body = String::from_utf8_lossy(&body).into_owned();
                return Err(Failure::new(format!("POST {} was answered {status}: {body}", self.path)));
            }
            took.push(u32::try_from(since.elapsed().as_micros()).unwrap_or(u32::MAX));
        }
        drop(sender);
        let _ = driver.await;
        Ok(took)
    }
}

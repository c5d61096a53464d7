//! The campaign's own TCP proxy between the relays and their servers: it cuts, delays and half-closes.
//!
//! It runs on a thread of its own, so that nothing the campaign waits for holds up a connection.

use std::{net::Ipv4Addr, thread, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::{oneshot, watch},
};

use crate::failure::{Explain, Result};

/// What one direction of a connection may hold. Bytes.
const BUFFER_BYTES: usize = 64 << 10;
/// Where the system refuses a connection for want of resources, the next is not tried at once.
const REFUSED_PAUSE: Duration = Duration::from_millis(50);

/// A listener and the server behind it; ports of the loopback address.
#[derive(Debug, Clone, Copy)]
pub(super) struct Route {
    pub(super) listen: u16,
    pub(super) server: u16,
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Way {
    #[default]
    ToServer,
    ToRelay,
}

/// How it is on a link. The counters say that something happened to what is connected then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Weather {
    cuts: u64,
    half_closes: u64,
    half_closed: Way,
    /// New connections are closed at once.
    is_closed: bool,
    /// How long each piece of up to `BUFFER_BYTES` waits.
    delay: Duration,
}

/// All connections to one kind of server.
#[derive(Debug)]
pub(super) struct Link {
    weather: watch::Sender<Weather>,
    /// Dropped with us: the thread ends.
    _alive: oneshot::Sender<()>,
}

impl Link {
    /// Listens for all routes before it returns.
    pub(super) fn start(name: &str, routes: &[Route]) -> Result<Self> {
        let listen = |route: &Route| {
            let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, route.listen))?;
            listener.set_nonblocking(true)?;
            Ok::<_, std::io::Error>((listener, route.server))
        };
        let doors: std::result::Result<Vec<_>, _> = routes.iter().map(listen).collect();
        let doors = doors.explain(|| format!("listen for the proxy to {name}"))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.explain(|| "start the proxy's runtime".to_owned())?;
        let (weather, seen) = watch::channel(Weather::default());
        let (alive, gone) = oneshot::channel::<()>();
        let serve = async move {
            for (listener, server) in doors {
                if let Ok(listener) = TcpListener::from_std(listener) {
                    tokio::spawn(accept(listener, server, seen.clone()));
                }
            }
            let _ = gone.await;
        };
        thread::Builder::new()
            .name(format!("proxy-{name}"))
            .spawn(move || runtime.block_on(serve))
            .explain(|| "start the proxy's thread".to_owned())?;
        Ok(Self { weather, _alive: alive })
    }

    /// Resets every connection, and closes new ones at once until `heal`.
    pub(super) fn cut(&self) {
        self.weather.send_modify(|weather| {
            weather.cuts += 1;
            weather.is_closed = true;
        });
    }

    /// From now on each piece of each direction waits so long.
    pub(super) fn delay(&self, delay: Duration) {
        self.weather.send_modify(|weather| weather.delay = delay);
    }

    /// Tells one end of every connection that the other has no more to say; what the other goes on saying is lost.
    pub(super) fn half_close(&self, way: Way) {
        self.weather.send_modify(|weather| {
            weather.half_closes += 1;
            weather.half_closed = way;
        });
    }

    /// Takes new connections and holds nothing back. What was broken stays so.
    pub(super) fn heal(&self) {
        self.weather.send_modify(|weather| {
            weather.is_closed = false;
            weather.delay = Duration::ZERO;
        });
    }
}

async fn accept(listener: TcpListener, server: u16, weather: watch::Receiver<Weather>) {
    loop {
        match listener.accept().await {
            Ok((client, _)) if weather.borrow().is_closed => drop(client),
            Ok((client, _)) => {
                tokio::spawn(connection(client, server, weather.clone()));
            }
            Err(_) => tokio::time::sleep(REFUSED_PAUSE).await,
        }
    }
}

/// From the connection to the server until both directions have ended, or it is cut.
async fn connection(mut client: TcpStream, server: u16, mut weather: watch::Receiver<Weather>) {
    let cuts = weather.borrow().cuts;
    let seen = weather.clone();
    let work = async {
        // A server that is away: the client's connection is closed.
        let Ok(mut server) = TcpStream::connect((Ipv4Addr::LOCALHOST, server)).await else { return };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        // So that a cut is a reset on both sides; an end in order has sent its FIN before.
        let _ = (client.set_zero_linger(), server.set_zero_linger());
        let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
        tokio::join!(
            pump(from_client, to_server, Way::ToServer, seen.clone()),
            pump(from_server, to_client, Way::ToRelay, seen)
        );
    };
    tokio::select! {
        () = work => {}
        () = until(&mut weather, |now| now.cuts != cuts) => {}
    }
}

/// Returns when the weather is like that, or when the link is no more.
async fn until(weather: &mut watch::Receiver<Weather>, like: impl FnMut(&Weather) -> bool) {
    drop(weather.wait_for(like).await);
}

/// Passes on what comes, until there is no more or nobody takes it.
async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    way: Way,
    mut weather: watch::Receiver<Weather>,
) {
    let before = weather.borrow().half_closes;
    let closes = |now: &Weather| now.half_closes != before && now.half_closed == way;
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut is_open = true;
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            () = until(&mut weather, closes), if is_open => {
                let _ = to.shutdown().await;
                is_open = false;
                continue;
            }
        };
        let Ok(count @ 1..) = read else { break };
        if !is_open {
            continue;
        }
        let delay = weather.borrow().delay;
        if delay > Duration::ZERO {
            tokio::time::sleep(delay).await;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// A server that sends back what it gets, and a link to it.
    fn echo() -> (Link, u16) {
        let server = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = server.local_addr().unwrap().port();
        thread::spawn(move || {
            for stream in server.incoming().filter_map(std::result::Result::ok) {
                thread::spawn(move || {
                    let mut stream = stream;
                    let mut buffer = [0; 64];
                    while let Ok(count @ 1..) = stream.read(&mut buffer) {
                        if stream.write_all(&buffer[..count]).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        let listen =
            std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        (Link::start("echo", &[Route { listen, server: port }]).unwrap(), listen)
    }

    fn connect(port: u16) -> std::net::TcpStream {
        let stream = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    }

    fn said(stream: &mut std::net::TcpStream, text: &str) -> std::io::Result<String> {
        stream.write_all(text.as_bytes())?;
        let mut buffer = vec![0; text.len()];
        stream.read_exact(&mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer).into_owned())
    }

    #[test]
    fn a_cut_resets_what_is_connected_and_keeps_new_ones_out_until_it_is_healed() {
        let (link, port) = echo();
        let mut stream = connect(port);
        assert_eq!(said(&mut stream, "one").unwrap(), "one");
        link.cut();
        let error = stream.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        assert!(said(&mut connect(port), "two").is_err());
        link.heal();
        assert_eq!(said(&mut connect(port), "three").unwrap(), "three");
    }

    #[test]
    fn a_half_close_ends_one_direction_only() {
        let (link, port) = echo();
        let mut stream = connect(port);
        assert_eq!(said(&mut stream, "one").unwrap(), "one");
        link.half_close(Way::ToRelay);
        // The end of what the server says; we may still speak.
        assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
        stream.write_all(b"two").unwrap();
        let mut other = connect(port);
        assert_eq!(said(&mut other, "later ones are whole").unwrap(), "later ones are whole");
    }

    #[test]
    fn a_delayed_link_passes_everything_on() {
        let (link, port) = echo();
        link.delay(Duration::from_millis(20));
        let mut stream = connect(port);
        let since = std::time::Instant::now();
        assert_eq!(said(&mut stream, "slow").unwrap(), "slow");
        assert!(since.elapsed() >= Duration::from_millis(40), "there and back");
    }
}

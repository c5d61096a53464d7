//! The socket under a connection: TCP, TLS over TCP, or a Unix socket.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::Duration,
};

use rustix::net::sockopt;
use rustls::{ClientConnection, StreamOwned};

use super::{conninfo::Host, place::Place};

/// A connected socket.
#[derive(Debug)]
pub(crate) enum Transport {
    Tcp(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
    Unix(UnixStream),
}

/// A peer that is gone is noticed after this long without an answer, whatever the kernel's defaults.
const PEER_TIMEOUT: Duration = Duration::from_secs(30);

/// The kernel doubles it for its own needs. Several of the loopback's segments of 64 KiB have to fit, or the peer waits for
/// each acknowledgement.
const LOCAL_WINDOW_BYTES: usize = 256 * 1024;

impl Transport {
    /// Connects, and gives up after `timeout`.
    pub(super) fn connect(place: &Place, timeout: Duration) -> io::Result<Self> {
        match (&place.host, place.address) {
            (Host::Unix(path), _) => UnixStream::connect(path).map(Self::Unix),
            (Host::Tcp { .. }, Some(address)) => Self::tuned(TcpStream::connect_timeout(&address, timeout)?),
            (Host::Tcp { .. }, None) => Err(io::ErrorKind::AddrNotAvailable.into()),
        }
    }

    fn tuned(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        // A peer on this host needs no room for what is on its way, and a window that can fill is what pacing is for.
        if stream.peer_addr()?.ip() == stream.local_addr()?.ip() {
            sockopt::set_socket_recv_buffer_size(&stream, LOCAL_WINDOW_BYTES)?;
        }
        sockopt::set_socket_keepalive(&stream, true)?;
        sockopt::set_tcp_keepidle(&stream, Duration::from_secs(10))?;
        sockopt::set_tcp_keepintvl(&stream, Duration::from_secs(5))?;
        sockopt::set_tcp_keepcnt(&stream, 4)?;
        let timeout_ms = u32::try_from(PEER_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
        sockopt::set_tcp_user_timeout(&stream, timeout_ms)?;
        Ok(Self::Tcp(stream))
    }

    /// How long a blocking read or write may take.
    pub(crate) fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        let timeout = Some(timeout);
        match self {
            Self::Tcp(s) => s.set_read_timeout(timeout).and_then(|()| s.set_write_timeout(timeout)),
            Self::Tls(s) => s.sock.set_read_timeout(timeout).and_then(|()| s.sock.set_write_timeout(timeout)),
            Self::Unix(s) => s.set_read_timeout(timeout).and_then(|()| s.set_write_timeout(timeout)),
        }
    }

    pub(crate) fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Tcp(s) => s.set_nonblocking(true),
            Self::Tls(s) => s.sock.set_nonblocking(true),
            Self::Unix(s) => s.set_nonblocking(true),
        }
    }

    /// Goes on in TLS. Only a TCP connection is ever encrypted; a Unix socket stays within the machine.
    pub(crate) fn encrypt(self, client: ClientConnection) -> io::Result<Self> {
        match self {
            Self::Tcp(socket) => {
                let mut stream = StreamOwned::new(client, socket);
                while stream.conn.is_handshaking() {
                    stream.conn.complete_io(&mut stream.sock)?;
                }
                Ok(Self::Tls(Box::new(stream)))
            }
            other => Ok(other),
        }
    }

    /// What SCRAM binds to, where there is TLS.
    pub(crate) fn tls(&self) -> Option<&ClientConnection> {
        match self {
            Self::Tls(s) => Some(&s.conn),
            Self::Tcp(_) | Self::Unix(_) => None,
        }
    }

    /// Whether bytes that were written wait for the socket.
    pub(crate) fn wants_write(&self) -> bool {
        self.tls().is_some_and(|c| c.wants_write())
    }
}

impl Read for Transport {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.read(buf),
            Self::Tls(s) => s.read(buf),
            Self::Unix(s) => s.read(buf),
        }
    }
}

impl Write for Transport {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.write(buf),
            Self::Tls(s) => s.write(buf),
            Self::Unix(s) => s.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Tls(s) => s.flush(),
            Self::Tcp(_) | Self::Unix(_) => Ok(()),
        }
    }
}

impl AsFd for Transport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(s) => s.as_fd(),
            Self::Tls(s) => s.sock.as_fd(),
            Self::Unix(s) => s.as_fd(),
        }
    }
}

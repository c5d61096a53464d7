//! Our own replication session on `postgres-protocol`: connect, authenticate, frames, feedback, reader pacing
//! (<https://www.postgresql.org/docs/current/protocol-replication.html>).

pub(crate) mod connection;
pub(crate) mod conninfo;
pub(crate) mod encode;
pub(crate) mod handshake;
pub(crate) mod pace;
pub(crate) mod place;
mod server_error;
pub(crate) mod stream;
pub(crate) mod tls;
mod transport;
mod wire;

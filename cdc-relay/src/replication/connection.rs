//! A connection for SQL: what the relay asks the server beside the stream.

use std::{io, time::Duration};

use postgres_protocol::{IsNull, message::frontend};

use super::{
    conninfo::ConnInfo,
    handshake::{self, Purpose},
    server_error::server_error,
    wire::{Fill, Wire},
};
use crate::error::{Error, Kind};

/// The most an answer to one query may hold, in rows.
const ROWS_LIMIT: usize = 10_000;

/// A row of text values.
pub(crate) type TextRow = Vec<Option<String>>;

/// A connection that waits for each answer, no longer than its timeout for each read.
#[derive(Debug)]
pub(crate) struct Connection {
    wire: Wire,
}

impl Connection {
    /// Connects to the first host that takes us.
    ///
    /// # Errors
    /// The last host's, where none does; a refusal (wrong password, …) ends the search at once.
    pub(crate) fn connect(info: &ConnInfo, purpose: Purpose, timeout: Duration) -> Result<Self, Error> {
        let mut last = Error::new(Kind::Misconfigured, "postgres.url names no host");
        for host in &info.hosts {
            let found = handshake::connect(info, host, purpose, timeout).map(|wire| Self { wire });
            match found.and_then(|connection| connection.accept(info)) {
                Ok(connection) => return Ok(connection),
                Err(e) if e.kind == Kind::PostgresAway => last = e,
                Err(e) => return Err(e),
            }
        }
        Err(last)
    }

    fn accept(mut self, info: &ConnInfo) -> Result<Self, Error> {
        if info.read_write {
            let read_only = self.simple_query("SHOW transaction_read_only")?;
            if read_only.first().and_then(|r| r.first()?.as_deref()) == Some("on") {
                return Err(Error::new(
                    Kind::PostgresAway,
                    "the server is read-only, and target_session_attrs=read-write",
                ));
            }
        }
        Ok(self)
    }

    /// How long to wait for an answer from now on.
    pub(crate) fn set_answer_timeout(&self, timeout: Duration) -> Result<(), Error> {
        self.wire
            .set_timeout(timeout)
            .map_err(|e| Error::postgres_io("the connection to Postgres failed", &e))
    }

    /// Runs one statement that takes no parameters (all that a replication connection takes).
    pub(crate) fn simple_query(&mut self, sql: &str) -> Result<Vec<TextRow>, Error> {
        self.send_query(sql)?;
        self.answer()
    }

    /// Runs one statement with text parameters.
    pub(crate) fn query(&mut self, sql: &str, parameters: &[&str]) -> Result<Vec<TextRow>, Error> {
        let out = &mut self.wire.out;
        let built = frontend::parse("", sql, [], out)
            .and_then(|()| {
                let bind = |p: &&str, buf: &mut bytes::BytesMut| {
                    buf.extend_from_slice(p.as_bytes());
                    Ok(IsNull::No)
                };
                frontend::bind("", "", [0], parameters, bind, [0], out).map_err(|e| match e {
                    frontend::BindError::Conversion(e) => io::Error::other(e),
                    frontend::BindError::Serialization(e) => e,
                })
            })
            .and_then(|()| frontend::execute("", 0, out));
        built.map_err(|e| Error::postgres_io("cannot send a query", &e))?;
        frontend::sync(out);
        self.answer()
    }

    fn answer(&mut self) -> Result<Vec<TextRow>, Error> {
        let io = |e: io::Error| Error::postgres_io("the connection to Postgres failed", &e);
        self.wire.flush().map_err(io)?;
        let (mut rows, mut failed) = (Vec::new(), None);
        loop {
            let Some((tag, body)) = self.wire.next_frame().map_err(io)? else {
                if self.wire.fill().map_err(io)? == Fill::Empty {
                    return Err(io(io::Error::new(io::ErrorKind::TimedOut, "no answer in time")));
                }
                continue;
            };
            match tag {
                b'D' if rows.len() < ROWS_LIMIT => rows.push(text_row(body).map_err(io)?),
                b'E' => {
                    let error = server_error(body);
                    // A fatal error is the connection's last message; an ordinary one is followed by ReadyForQuery.
                    if error.kind == Kind::PostgresAway {
                        return Err(error);
                    }
                    failed = Some(error);
                }
                b'Z' => return failed.map_or(Ok(rows), Err),
                _ => {}
            }
        }
    }

    /// Sends a statement whose answer the caller reads from the socket.
    pub(super) fn send_query(&mut self, sql: &str) -> Result<(), Error> {
        let io = |e: io::Error| Error::postgres_io("cannot send a query", &e);
        frontend::query(sql, &mut self.wire.out).map_err(io)?;
        self.wire.flush().map_err(io).map(drop)
    }

    /// Gives the socket to a replication stream.
    pub(super) fn into_wire(self) -> Wire {
        self.wire
    }
}

fn text_row(body: &[u8]) -> io::Result<TextRow> {
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "a damaged row");
    let (count, mut rest) = body.split_first_chunk().ok_or_else(damaged)?;
    let mut row = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (length, after) = rest.split_first_chunk().ok_or_else(damaged)?;
        let length = i32::from_be_bytes(*length);
        rest = after;
        row.push(match usize::try_from(length) {
            Err(_) => None,
            Ok(length) => {
                let (value, after) = rest.split_at_checked(length).ok_or_else(damaged)?;
                rest = after;
                Some(String::from_utf8_lossy(value).into_owned())
            }
        });
    }
    Ok(row)
}

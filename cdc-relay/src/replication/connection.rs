//! A connection for SQL: what the relay asks the server beside the stream.

use std::{
    io,
    time::{Duration, Instant},
};

use postgres_protocol::{IsNull, message::frontend};

use super::{
    conninfo::{ConnInfo, Target},
    handshake::{self, Purpose},
    place::Place,
    server_error::server_error,
    tls,
    wire::{Fill, Wire},
};
use crate::error::{Error, Kind};

/// The most an answer to one query may hold, in rows.
const ROWS_LIMIT: usize = 10_000;

/// How often whoever waits for rows is asked whether that is still wanted.
const ASK_INTERVAL: Duration = Duration::from_secs(1);

/// A row of text values.
pub(crate) type TextRow = Vec<Option<String>>;

/// A connection that waits for each answer, no longer than its timeout for each read.
#[derive(Debug)]
pub(crate) struct Connection {
    wire: Wire,
    place: Place,
    /// How long the server may say nothing while an answer is due.
    answer_timeout: Duration,
}

impl Connection {
    /// Connects to the first place that takes us and is what `target_session_attrs` wants: each host in turn, each
    /// address of its name in turn.
    ///
    /// # Errors
    /// What each place said, where none does; a refusal (wrong password, …) ends the search at once.
    pub(crate) fn connect(info: &ConnInfo, purpose: Purpose, timeout: Duration) -> Result<Self, Error> {
        let mut failures = Vec::new();
        for host in &info.hosts {
            let places = Place::of(host)
                .map_err(|e| Error::postgres_io(&format!("cannot look up Postgres' host {host}"), &e));
            for found in places.map_or_else(|e| vec![Err(e)], |p| p.into_iter().map(Ok).collect()) {
                let tried = found.and_then(|place| Self::connect_to(info, place, purpose, timeout));
                match tried.and_then(|connection| connection.accept(info.target)) {
                    Ok(connection) => return Ok(connection),
                    Err(e) if e.kind == Kind::PostgresAway => failures.push(e),
                    Err(e) => return Err(e),
                }
            }
        }
        Err(none_will_do(failures))
    }

    /// Connects to one place, whatever it is.
    pub(crate) fn connect_to(
        info: &ConnInfo,
        place: Place,
        purpose: Purpose,
        timeout: Duration,
    ) -> Result<Self, Error> {
        handshake::connect(info, &place, purpose, timeout).map(|wire| Self {
            wire,
            place,
            answer_timeout: timeout,
        })
    }

    /// Opens another connection to the same server: what one asks must be true for the other.
    ///
    /// # Errors
    /// [`Kind::PostgresAway`] also when another server has taken the place meanwhile, as behind an address that moves.
    pub(crate) fn beside(
        &mut self,
        info: &ConnInfo,
        purpose: Purpose,
        timeout: Duration,
    ) -> Result<Self, Error> {
        let mut other = Self::connect_to(info, self.place.clone(), purpose, timeout)?;
        if self.server()? == other.server()? {
            return Ok(other);
        }
        let what = format!("two connections to Postgres at {} reached two servers", self.place);
        Err(Error::new(Kind::PostgresAway, what))
    }

    /// Where the server is.
    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// In DER form, where the connection has TLS.
    pub(crate) fn server_certificate(&self) -> Option<Vec<u8>> {
        tls::shown(self.wire.transport().tls()?)
    }

    /// What tells a running server from any other: when it was started, in microseconds.
    pub(crate) fn server(&mut self) -> Result<Vec<TextRow>, Error> {
        self.simple_query("SELECT extract(epoch FROM pg_postmaster_start_time())")
    }

    /// Whether the server is a standby.
    pub(crate) fn is_in_recovery(&mut self) -> Result<bool, Error> {
        let rows = self.simple_query("SELECT pg_is_in_recovery()::text")?;
        Ok(rows.first().and_then(|r| r.first()?.as_deref()) == Some("true"))
    }

    /// Asks what libpq asks.
    fn accept(mut self, target: Target) -> Result<Self, Error> {
        let unfit = |place: &Place, what: &str| {
            Err(Error::new(Kind::PostgresAway, format!("Postgres at {place} {what}")))
        };
        match target {
            Target::Primary if self.is_in_recovery()? => {
                return unfit(&self.place, "is in recovery, and target_session_attrs=primary");
            }
            Target::ReadWrite => {
                let read_only = self.simple_query("SHOW transaction_read_only")?;
                if read_only.first().and_then(|r| r.first()?.as_deref()) == Some("on") {
                    return unfit(&self.place, "is read-only, and target_session_attrs=read-write");
                }
            }
            Target::Any | Target::Primary => {}
        }
        Ok(self)
    }

    /// How long to wait for an answer from now on.
    pub(crate) fn set_answer_timeout(&mut self, timeout: Duration) -> Result<(), Error> {
        self.answer_timeout = timeout;
        self.set_read_timeout(timeout)
    }

    fn set_read_timeout(&self, timeout: Duration) -> Result<(), Error> {
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
        self.send_with(sql, parameters)?;
        self.answer()
    }

    /// The first value of the first row; None where there is no row, or that is NULL.
    pub(crate) fn value(&mut self, sql: &str, parameters: &[&str]) -> Result<Option<String>, Error> {
        let rows = self.query(sql, parameters)?;
        Ok(rows.into_iter().next().and_then(|row| row.into_iter().next()?))
    }

    /// Runs one statement with text parameters, and hands over each row as it comes: nothing is kept, and the server
    /// waits while a row is handled. While none comes, `patience` is asked once a second.
    ///
    /// # Errors
    /// The server's, or what `take` or `patience` says, after which the connection is of no more use.
    pub(crate) fn each_row(
        &mut self,
        sql: &str,
        parameters: &[&str],
        patience: &dyn Fn() -> Result<(), Error>,
        take: impl FnMut(Values<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.send_with(sql, parameters)?;
        self.set_read_timeout(ASK_INTERVAL.min(self.answer_timeout))?;
        self.read_answer(patience, take)?;
        self.set_read_timeout(self.answer_timeout)
    }

    fn send_with(&mut self, sql: &str, parameters: &[&str]) -> Result<(), Error> {
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
        Ok(())
    }

    fn answer(&mut self) -> Result<Vec<TextRow>, Error> {
        let mut rows = Vec::new();
        self.read_answer(&|| Ok(()), |values| {
            if rows.len() < ROWS_LIMIT {
                let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
                rows.push(values.map(|value| value.map(text)).collect());
            }
            Ok(())
        })?;
        Ok(rows)
    }

    fn read_answer(
        &mut self,
        patience: &dyn Fn() -> Result<(), Error>,
        mut take: impl FnMut(Values<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let io = |e: io::Error| Error::postgres_io("the connection to Postgres failed", &e);
        self.wire.flush().map_err(io)?;
        let (mut failed, mut heard) = (None, Instant::now());
        loop {
            let Some((tag, body)) = self.wire.next_frame().map_err(io)? else {
                match self.wire.fill().map_err(io)? {
                    Fill::Data => heard = Instant::now(),
                    // The read has waited for its time-out, which may be a part of the whole one.
                    Fill::Empty if heard.elapsed() + ASK_INTERVAL / 2 >= self.answer_timeout => {
                        return Err(io(io::Error::new(io::ErrorKind::TimedOut, "no answer in time")));
                    }
                    Fill::Empty => patience()?,
                }
                continue;
            };
            match tag {
                b'D' => take(Values::parse(body).map_err(io)?)?,
                b'E' => {
                    let error = server_error(body);
                    // A fatal error is the connection's last message; an ordinary one is followed by ReadyForQuery.
                    if error.kind == Kind::PostgresAway {
                        return Err(error);
                    }
                    failed = Some(error);
                }
                b'Z' => return failed.map_or(Ok(()), Err),
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
    pub(super) fn into_wire(self) -> (Wire, Place) {
        (self.wire, self.place)
    }
}

/// What each place said, as one error.
fn none_will_do(mut failures: Vec<Error>) -> Error {
    let Some(last) = failures.pop() else {
        return Error::new(Kind::Misconfigured, "postgres.url names no host");
    };
    if failures.is_empty() {
        return last;
    }
    failures.push(last);
    let said: Vec<_> = failures.iter().map(|e| e.message.as_str()).collect();
    Error::new(Kind::PostgresAway, format!("no host of postgres.url will do: {}", said.join("; ")))
}

/// The values of a row, in the order of its columns: text, or None for NULL.
#[derive(Debug, Clone)]
pub(crate) struct Values<'a> {
    left: u16,
    rest: &'a [u8],
}

impl<'a> Values<'a> {
    /// Of the body of a `DataRow`, which is looked at to its end.
    fn parse(body: &'a [u8]) -> io::Result<Self> {
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "a damaged row");
        let (count, rest) = body.split_first_chunk().ok_or_else(damaged)?;
        let values = Self { left: u16::from_be_bytes(*count), rest };
        let mut walked = values.clone();
        if walked.by_ref().count() == usize::from(values.left) { Ok(values) } else { Err(damaged()) }
    }
}

impl<'a> Iterator for Values<'a> {
    type Item = Option<&'a [u8]>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let (length, rest) = self.rest.split_first_chunk()?;
        // -1 is NULL.
        let Ok(length) = usize::try_from(i32::from_be_bytes(*length)) else {
            self.rest = rest;
            return Some(None);
        };
        let (value, rest) = rest.split_at_checked(length)?;
        self.rest = rest;
        Some(Some(value))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (usize::from(self.left), Some(usize::from(self.left)))
    }
}

impl ExactSizeIterator for Values<'_> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_whole_or_damaged() {
        let body = b"\0\x03\0\0\0\x02ab\xff\xff\xff\xff\0\0\0\0";
        let values = Values::parse(body).unwrap();
        assert_eq!(values.collect::<Vec<_>>(), [Some(&b"ab"[..]), None, Some(&b""[..])]);
        for cut in 0..body.len() {
            assert!(Values::parse(&body[..cut]).is_err(), "{cut}");
        }
    }
}

//! The replication stream: `START_REPLICATION`, its frames, and feedback.

use std::{
    io,
    os::fd::BorrowedFd,
    time::{Duration, Instant},
};

use relay_core::{Lsn, StatusUpdate};

use super::{
    connection::Connection,
    place::Place,
    server_error::{error_fields, routine, server_error},
    wire::{Fill, Wire},
};
use crate::{
    clock,
    error::{Error, Kind},
    position::{System, parse_history},
};

/// How long the server may take to answer our goodbye.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(2);

/// What the server sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event<'a> {
    /// A message of the output plug-in, at `start` in the log.
    Wal { start: Lsn, message: &'a [u8] },
    /// The server has sent everything up to `wal_end`.
    Keepalive { wal_end: Lsn, reply_requested: bool },
}

/// A slot that we hold and read from.
#[derive(Debug)]
pub(crate) struct ReplicationStream {
    wire: Wire,
    behind: Duration,
    /// Where the server is.
    pub(crate) place: Place,
    /// Its process that holds the slot for us, as `pg_replication_slots.active_pid` has it.
    pub(crate) pid: Option<String>,
}

impl ReplicationStream {
    /// Takes the slot and starts the stream where the server says that the slot is confirmed; with what
    /// `pg_logical_emit_message` wrote, where `messages` are wanted.
    ///
    /// # Errors
    /// [`Kind::SlotInUse`] while another process holds the slot; what the server says otherwise.
    pub(crate) fn start(
        mut connection: Connection,
        slot: &str,
        publication: &str,
        messages: bool,
    ) -> Result<(Self, System), Error> {
        let system = identify(&mut connection)?;
        let pid = connection.simple_query("SELECT pg_backend_pid()")?.into_iter().flatten().next().flatten();
        let publication = quote_literal(&quote_identifier(publication));
        let messages = if messages { ", messages 'true'" } else { "" };
        let options = format!("proto_version '1', publication_names {publication}{messages}");
        let sql = format!("START_REPLICATION SLOT {} LOGICAL 0/0 ({options})", quote_identifier(slot));
        connection.send_query(&sql)?;
        let (mut wire, place) = connection.into_wire();
        let io = |e: io::Error| Error::postgres_io("cannot start the replication stream", &e);
        loop {
            match wire.next_frame().map_err(io)? {
                // CopyBothResponse
                Some((b'W', _)) => break,
                Some((b'E', body)) => return Err(server_error(body)),
                Some(_) => {}
                None => {
                    if wire.fill().map_err(io)? == Fill::Empty {
                        return Err(io(io::ErrorKind::TimedOut.into()));
                    }
                }
            }
        }
        wire.set_nonblocking().map_err(io)?;
        Ok((Self { wire, behind: Duration::ZERO, place, pid }, system))
    }

    /// The next event that was read, or None when more has to be [read](Self::fill).
    pub(crate) fn next_event(&mut self) -> Result<Option<Event<'_>>, Error> {
        loop {
            // Looked at twice because the borrow checker cannot see that only one branch keeps the borrow.
            match self.wire.peek_tag().map_err(|e| stream_failed(&e))? {
                None => return Ok(None),
                Some(b'd') => break,
                Some(tag) => {
                    if let Some((_, body)) = self.wire.next_frame().map_err(|e| stream_failed(&e))? {
                        other_frame(tag, body)?;
                    }
                }
            }
        }
        match self.wire.next_frame().map_err(|e| stream_failed(&e))? {
            Some((_, body)) => {
                if let Some(behind) = behind(body) {
                    self.behind = behind;
                }
                copy_data(body).map(Some)
            }
            None => Ok(None),
        }
    }

    /// How long the last transaction that began had been committed when the server sent it.
    pub(crate) fn behind(&self) -> Duration {
        self.behind
    }

    /// Reads once, without waiting. Whether there was anything.
    pub(crate) fn fill(&mut self) -> Result<bool, Error> {
        Ok(self.wire.fill().map_err(|e| stream_failed(&e))? == Fill::Data)
    }

    /// Sends a status update that asks for a reply.
    pub(crate) fn send_status(&mut self, status: StatusUpdate) -> Result<(), Error> {
        put_status(&mut self.wire.out, status);
        self.flush()
    }

    /// Sends what a full socket did not take before.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        self.wire.flush().map_err(|e| stream_failed(&e)).map(drop)
    }

    /// Whether something waits for the socket to take it.
    pub(crate) fn wants_write(&self) -> bool {
        self.wire.wants_write()
    }

    /// The socket, to wait on.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.wire.fd()
    }

    /// Says the last status and goodbye, and waits, for two seconds at most, until the server has said its own: then the status has
    /// arrived and the slot is free.
    pub(crate) fn finish(mut self, status: StatusUpdate) -> Result<(), Error> {
        put_status(&mut self.wire.out, status);
        self.wire.out.extend_from_slice(b"c\0\0\0\x04");
        let deadline = Instant::now() + GOODBYE_TIMEOUT;
        loop {
            self.wire.flush().map_err(|e| stream_failed(&e))?;
            while let Some((tag, _)) = self.wire.next_frame().map_err(|e| stream_failed(&e))? {
                // ReadyForQuery: the copy is over on both sides.
                if tag == b'Z' {
                    return Ok(());
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(
                    Kind::PostgresAway,
                    "the server did not answer the end of the stream in time",
                ));
            }
            crate::wait::for_socket(self.wire.fd(), self.wants_write(), left);
            if let Err(e) = self.wire.fill() {
                return if e.kind() == io::ErrorKind::UnexpectedEof {
                    Ok(())
                } else {
                    Err(stream_failed(&e))
                };
            }
        }
    }
}

/// Which server this is (<https://www.postgresql.org/docs/current/protocol-replication.html>).
pub(crate) fn identify(connection: &mut Connection) -> Result<System, Error> {
    let rows = connection.simple_query("IDENTIFY_SYSTEM")?;
    let odd = || Error::new(Kind::PostgresAway, "the server's answer to IDENTIFY_SYSTEM cannot be read");
    let column = |n: usize| rows.first().and_then(|r| r.get(n)?.as_deref()).ok_or_else(odd);
    let timeline: u32 = column(1)?.parse().map_err(|_| odd())?;
    let (identifier, wal_end) = (column(0)?.to_owned(), column(2)?.parse().map_err(|_| odd())?);
    let mut switches = Vec::new();
    if timeline > 1 {
        let rows = connection.simple_query(&format!("TIMELINE_HISTORY {timeline}"))?;
        let content = rows.first().and_then(|r| r.get(1)?.as_deref()).unwrap_or_default();
        switches = parse_history(content);
    }
    Ok(System { identifier, timeline, wal_end, switches })
}

fn stream_failed(e: &io::Error) -> Error {
    Error::postgres_io("the replication stream failed", e)
}

fn other_frame(tag: u8, body: &[u8]) -> Result<(), Error> {
    match tag {
        b'E' => Err(server_error(body)),
        // CopyDone, CommandComplete: the server ends the stream, as it does when it shuts down.
        b'c' | b'C' | b'Z' => Err(Error::new(Kind::PostgresAway, "the server ended the replication stream")),
        b'N' => notice(body),
        // Parameters.
        _ => Ok(()),
    }
}

/// Of the server where it waits for a standby in `synchronized_standby_slots`, which it warns of: nothing is left out.
const WAITS_FOR_STANDBY: &str = "StandbySlotsHaveCaughtup";

/// From version 18 on, the server only warns when the publication did not exist at a point in the log, and goes
/// on without the changes made there.
fn notice(body: &[u8]) -> Result<(), Error> {
    let (sqlstate, message) = error_fields(body);
    tracing::warn!(sqlstate, "Postgres says: {message}");
    if sqlstate != "55000" || routine(body) == WAITS_FOR_STANDBY {
        return Ok(());
    }
    Err(Error::new(Kind::Halted, format!("the server leaves changes out of the stream: {message}")).hint(
        "the publication was dropped while rows were written. What was inserted until it was there again has to be taken \
         from the outbox table by hand; then SELECT pg_drop_replication_slot('…') and `cdc-relay init`",
    ))
}

fn copy_data(body: &[u8]) -> Result<Event<'_>, Error> {
    let damaged = || Error::new(Kind::PostgresAway, "a damaged message on the replication stream");
    let (tag, rest) = body.split_first().ok_or_else(damaged)?;
    let (position, rest) = rest.split_first_chunk().ok_or_else(damaged)?;
    let position = Lsn(u64::from_be_bytes(*position));
    match tag {
        // The end of the log and the server's clock, 8 bytes each, come before the message.
        b'w' => Ok(Event::Wal { start: position, message: rest.get(16..).ok_or_else(damaged)? }),
        b'k' => {
            let reply = rest.get(8).ok_or_else(damaged)?;
            Ok(Event::Keepalive { wal_end: position, reply_requested: *reply == 1 })
        }
        _ => Err(damaged()),
    }
}

/// Of a transaction's beginning: the server's time of sending less that of the commit. None of anything else
/// (<https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>, Begin).
fn behind(body: &[u8]) -> Option<Duration> {
    let time = |at: usize| Some(i64::from_be_bytes(*body.get(at..)?.first_chunk()?));
    if body.first() != Some(&b'w') || body.get(25) != Some(&b'B') {
        return None;
    }
    let us = time(17)?.saturating_sub(time(34)?);
    Some(Duration::from_micros(u64::try_from(us).unwrap_or(0)))
}

/// A standby status update that asks for a reply, as a `CopyData` message.
fn put_status(out: &mut bytes::BytesMut, status: StatusUpdate) {
    out.extend_from_slice(b"d\0\0\0\x26r");
    // Written, flushed, applied: flushed is what lets the server forget.
    for lsn in [status.received, status.confirmed, status.confirmed] {
        out.extend_from_slice(&lsn.0.to_be_bytes());
    }
    out.extend_from_slice(&clock::postgres_now_us().to_be_bytes());
    out.extend_from_slice(&[1]);
}

pub(crate) fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

pub(crate) fn quote_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted() {
        assert_eq!(quote_identifier("a\"b"), "\"a\"\"b\"");
        assert_eq!(quote_literal("a'b"), "'a''b'");
    }

    #[test]
    fn a_status_update_is_of_the_protocols_length() {
        let mut out = bytes::BytesMut::new();
        put_status(&mut out, StatusUpdate { received: Lsn(2), confirmed: Lsn(1) });
        assert_eq!(out.len(), 1 + 0x26);
        assert_eq!(&out[6..22], [2_u64.to_be_bytes(), 1_u64.to_be_bytes()].concat());
    }

    #[test]
    fn how_far_behind_a_transaction_is_stands_in_its_beginning() {
        let begin = |kind: u8, sent: i64, committed: i64| {
            let (places, sent, committed) = ([0; 16], sent.to_be_bytes(), committed.to_be_bytes());
            [&b"w"[..], &places, &sent, &[kind], &[0; 8], &committed, &[0; 4]].concat()
        };
        assert_eq!(behind(&begin(b'B', 5_000_007, 5)), Some(Duration::from_micros(5_000_002)));
        assert_eq!(behind(&begin(b'B', 5, 7)), Some(Duration::ZERO), "a clock was put back");
        assert_eq!(behind(&begin(b'B', i64::MIN, i64::MAX)), Some(Duration::ZERO));
        assert_eq!(behind(&begin(b'C', 7, 5)), None, "an end");
        let whole = begin(b'B', 7, 5);
        for cut in 0..42 {
            assert_eq!(behind(&whole[..cut]), None, "after {cut} bytes");
        }
    }

    #[test]
    fn damaged_messages_are_errors() {
        for bad in [&b""[..], b"w", b"w\0\0\0\0\0\0\0\x01", b"k\0\0\0\0\0\0\0\x01", b"x\0\0\0\0\0\0\0\x01\0"]
        {
            assert!(copy_data(bad).is_err());
        }
        let keepalive = [&b"k"[..], &5_u64.to_be_bytes(), &[0; 8], &[1]].concat();
        assert_eq!(
            copy_data(&keepalive).unwrap(),
            Event::Keepalive { wal_end: Lsn(5), reply_requested: true }
        );
    }

    #[test]
    fn what_is_left_out_halts_and_what_only_waits_does_not() {
        let notice = |routine: &str| notice(format!("SWARNING\0C55000\0Mm\0R{routine}\0\0").as_bytes());
        assert_eq!(notice("LoadPublications").unwrap_err().kind, Kind::Halted);
        assert_eq!(notice("").unwrap_err().kind, Kind::Halted);
        assert!(notice("StandbySlotsHaveCaughtup").is_ok());
    }

    /// Whatever a frame of the stream holds, it is an event or an error.
    #[test]
    fn frames_that_were_cut_or_changed_are_errors_at_worst() {
        let bodies = [
            [&b"w"[..], &5_u64.to_be_bytes(), &9_u64.to_be_bytes(), &[0; 8], b"message"].concat(),
            [&b"k"[..], &5_u64.to_be_bytes(), &[0; 8], &[1]].concat(),
            b"SERROR\0C57P01\0Mterminating connection\0\0".to_vec(),
        ];
        let take = |body: &[u8]| {
            for tag in 0..=u8::MAX {
                let _ = other_frame(tag, body);
            }
            copy_data(body).is_ok()
        };
        for body in bodies {
            for cut in 0..body.len() {
                // Of a message of the log all but its head may be missing here; the decoder tells.
                assert!(!take(&body[..cut]) || body[0] == b'w' && cut >= 25, "{cut}");
            }
            for at in 0..body.len() {
                for to in 0..=u8::MAX {
                    let mut changed = body.clone();
                    changed[at] = to;
                    take(&changed);
                }
            }
        }
    }
}

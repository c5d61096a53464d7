//! Frames over a socket: one buffer that is read into and parsed in place.

use std::{
    io::{self, Read, Write},
    ops::Range,
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use bytes::BytesMut;

use super::transport::Transport;

/// The buffer's size while no frame is larger, in bytes: what one read can bring.
const BUFFER_BYTES: usize = 256 * 1024;
/// The largest frame taken, in bytes. Postgres itself cannot make a larger one (`MaxAllocSize`).
const FRAME_LIMIT_BYTES: usize = 1 << 30;

/// A connection's socket and its buffers.
pub(crate) struct Wire {
    transport: Transport,
    buffer: Vec<u8>,
    /// The part of `buffer` that was read and not yet parsed.
    unread: Range<usize>,
    /// Bytes to send: whole messages, the first perhaps sent in part.
    pub(crate) out: BytesMut,
}

/// What a read brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fill {
    Data,
    /// Nothing is there at the moment (non-blocking sockets only).
    Empty,
}

impl Wire {
    pub(crate) fn new(transport: Transport) -> Self {
        Self { transport, buffer: vec![0; BUFFER_BYTES], unread: 0..0, out: BytesMut::new() }
    }

    pub(crate) fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.transport.set_timeout(timeout)
    }

    pub(crate) fn set_nonblocking(&self) -> io::Result<()> {
        self.transport.set_nonblocking()
    }

    pub(crate) fn transport(&self) -> &Transport {
        &self.transport
    }

    /// Whether something waits for the socket to take it.
    pub(crate) fn wants_write(&self) -> bool {
        !self.out.is_empty() || self.transport.wants_write()
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.transport.as_fd()
    }

    /// The next whole frame in the buffer: its tag and its body. None until more has been [read](Self::fill).
    pub(crate) fn next_frame(&mut self) -> io::Result<Option<(u8, &[u8])>> {
        let unread = &self.buffer[self.unread.clone()];
        let Some((&[tag, a, b, c, d], _)) = unread.split_first_chunk() else { return Ok(None) };
        let length = frame_length([a, b, c, d])?;
        if unread.len() < length {
            return Ok(None);
        }
        let start = self.unread.start;
        self.unread.start += length;
        Ok(Some((tag, &self.buffer[start + 5..start + length])))
    }

    /// The tag of the next whole frame in the buffer.
    pub(crate) fn peek_tag(&self) -> io::Result<Option<u8>> {
        let unread = &self.buffer[self.unread.clone()];
        let Some((&[tag, a, b, c, d], _)) = unread.split_first_chunk() else { return Ok(None) };
        Ok((unread.len() >= frame_length([a, b, c, d])?).then_some(tag))
    }

    /// Reads once. An orderly end of the stream is an error here: the protocol has its own goodbye.
    pub(crate) fn fill(&mut self) -> io::Result<Fill> {
        self.make_room()?;
        match self.transport.read(&mut self.buffer[self.unread.end..]) {
            Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection")),
            Ok(n) => {
                self.unread.end += n;
                Ok(Fill::Data)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Fill::Empty),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(Fill::Data),
            Err(e) => Err(e),
        }
    }

    /// Makes room behind the unread part for the rest of its frame, or for a whole buffer of new ones; gives
    /// back what an unusually large frame took.
    fn make_room(&mut self) -> io::Result<()> {
        let unread = &self.buffer[self.unread.clone()];
        let wanted = match unread.split_first_chunk() {
            // Grown as the frame arrives, so that a length alone takes no memory.
            Some((&[_, a, b, c, d], _)) => {
                frame_length([a, b, c, d])?.min(2 * unread.len()).max(BUFFER_BYTES)
            }
            None => BUFFER_BYTES,
        };
        if self.unread.start > 0 {
            self.buffer.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
        }
        if self.buffer.len() < wanted {
            self.buffer.reserve_exact(wanted - self.buffer.len());
            self.buffer.resize(wanted, 0);
        } else if self.buffer.len() > BUFFER_BYTES && wanted == BUFFER_BYTES && self.unread.end < BUFFER_BYTES
        {
            self.buffer.truncate(BUFFER_BYTES);
            self.buffer.shrink_to_fit();
        }
        Ok(())
    }

    /// Sends what is in `out`, as much as the socket takes; true when all of it went.
    pub(crate) fn flush(&mut self) -> io::Result<bool> {
        while !self.out.is_empty() {
            match self.transport.write(&self.out) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => drop(self.out.split_to(n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        match self.transport.flush() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            flushed => flushed.map(|()| true),
        }
    }
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The buffers may hold a password.
        f.debug_struct("Wire").field("transport", &self.transport).finish_non_exhaustive()
    }
}

/// The whole length of a frame, its tag included, from its length word.
fn frame_length(word: [u8; 4]) -> io::Result<usize> {
    let length = usize::try_from(u32::from_be_bytes(word)).unwrap_or(usize::MAX);
    if !(4..FRAME_LIMIT_BYTES).contains(&length) {
        let what =
            format!("a message of {length} bytes: this is not a Postgres server, or the stream is damaged");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    Ok(length + 1)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).unwrap();
        [&[tag][..], &length.to_be_bytes(), body].concat()
    }

    #[test]
    fn frames_come_out_whole_whatever_the_cuts() {
        let bodies: Vec<Vec<u8>> =
            [0, 1, 5, BUFFER_BYTES - 5, 3 * BUFFER_BYTES, 7].map(|n| vec![7; n]).to_vec();
        let stream: Vec<u8> = bodies.iter().flat_map(|b| frame(b'd', b)).collect();
        let (mut there, here) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || {
            for piece in stream.chunks(1013) {
                there.write_all(piece).unwrap();
            }
        });
        let mut wire = Wire::new(Transport::Unix(here));
        for body in &bodies {
            let got = loop {
                if let Some((tag, got)) = wire.next_frame().unwrap() {
                    assert_eq!(tag, b'd');
                    break got.to_vec();
                }
                wire.fill().unwrap();
            };
            assert_eq!(got.len(), body.len());
        }
        writer.join().unwrap();
        assert_eq!(wire.fill().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(wire.buffer.len(), BUFFER_BYTES, "what the large frame took is given back");
    }

    #[test]
    fn a_length_out_of_range_is_an_error_and_takes_no_memory() {
        for word in [0_u32, 3, 1 << 30, u32::MAX] {
            let (mut there, here) = UnixStream::pair().unwrap();
            there.write_all(&[&b"d"[..], &word.to_be_bytes()].concat()).unwrap();
            let mut wire = Wire::new(Transport::Unix(here));
            wire.fill().unwrap();
            assert_eq!(wire.next_frame().unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }
}

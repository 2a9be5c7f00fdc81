//! How a host program says which guest port it wants: "CONNECT <port>\\n".

use std::io;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::net::recv;

/// Longest line.
const LINE_BYTES: usize = 32;

/// A host program that has connected and hasn't said where to.
#[derive(Debug)]
pub(super) struct Handshake {
    stream: UnixStream,
    line: [u8; LINE_BYTES],
    len: usize,
}

impl Handshake {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            line: [0; LINE_BYTES],
            len: 0,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub(super) fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Reads on; `None` while the line isn't whole. Takes nothing behind the line: that belongs to
    /// the guest.
    pub(super) fn read(&mut self) -> io::Result<Option<u32>> {
        let room = &mut self.line[self.len..];
        let seen = match recv(
            &self.stream,
            &mut *room,
            RecvFlags::PEEK | RecvFlags::DONTWAIT,
        ) {
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            other => other?.0,
        };
        let end = room[..seen].iter().position(|&byte| byte == b'\n');
        let wanted = end.map_or(seen, |end| end + 1);
        let (taken, _) = recv(&self.stream, &mut room[..wanted], RecvFlags::DONTWAIT)?;
        self.len += taken;
        if end.is_some() {
            return parse(&self.line[..self.len]).map(Some);
        }
        if taken == 0 || self.len == LINE_BYTES {
            return Err(invalid());
        }
        Ok(None)
    }
}

fn invalid() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

fn parse(line: &[u8]) -> io::Result<u32> {
    let text = std::str::from_utf8(line).map_err(|_| invalid())?;
    let port = text.trim_end().strip_prefix("CONNECT ");
    port.and_then(|port| port.parse().ok()).ok_or_else(invalid)
}

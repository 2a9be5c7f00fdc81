//! One connection: lines in, lines out, neither without bound.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::SendFlags;
use serde_json::Value;

/// A longer request is refused by closing the connection.
const LONGEST_LINE_BYTES: usize = 64 << 10;
/// Answers that wait for a reader; one that doesn't read loses the connection.
const MOST_OUTPUT_BYTES: usize = 4 << 20;
const CHUNK_BYTES: usize = 16 << 10;
/// Descriptors beside one message, and those that wait for their request.
const MOST_FDS: usize = 16;

/// The control socket's state.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    input: Vec<u8>,
    output: Vec<u8>,
    fds: Vec<OwnedFd>,
    open: bool,
}

impl Connection {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            input: Vec::new(),
            output: Vec::new(),
            fds: Vec::new(),
            open: true,
        }
    }

    pub(crate) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    pub(crate) fn is_open(&self) -> bool {
        self.open
    }

    pub(crate) fn has_output(&self) -> bool {
        self.open && !self.output.is_empty()
    }

    /// Complete lines that have arrived.
    pub(crate) fn receive(&mut self) -> Vec<Vec<u8>> {
        let mut chunk = [0; CHUNK_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut into = [IoSliceMut::new(&mut chunk)];
        match rustix::net::recvmsg(&self.socket, &mut into, &mut beside, flags) {
            Ok(message) if message.bytes == 0 => self.open = false,
            Ok(message) => self.input.extend_from_slice(&chunk[..message.bytes]),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => self.open = false,
        }
        for message in beside.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        // What no request has asked for is closed.
        self.fds.truncate(MOST_FDS);
        let mut lines = Vec::new();
        while let Some(end) = self.input.iter().position(|&byte| byte == b'\n') {
            let rest = self.input.split_off(end + 1);
            self.input.pop();
            lines.push(std::mem::replace(&mut self.input, rest));
        }
        if self.input.len() > LONGEST_LINE_BYTES {
            self.open = false;
        }
        lines
    }

    /// Takes the descriptors that came beside requests.
    pub(crate) fn take_fds(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds)
    }

    /// Sends a line, now or when the reader takes it.
    pub(crate) fn send(&mut self, value: &Value) {
        self.output.extend_from_slice(value.to_string().as_bytes());
        self.output.push(b'\n');
        self.flush();
        if self.output.len() > MOST_OUTPUT_BYTES {
            self.open = false;
        }
    }

    /// Sends what waits, as far as the reader takes it.
    pub(crate) fn flush(&mut self) {
        while self.open && !self.output.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.socket, &self.output, flags) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.open = false,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use serde_json::json;

    use super::*;

    fn pair() -> (Connection, UnixStream) {
        let (one, other) = UnixStream::pair().expect("sockets");
        (Connection::new(one.into()), other)
    }

    #[test]
    fn lines_are_put_together_from_pieces() {
        let (mut connection, mut peer) = pair();
        peer.write_all(b"{\"a\"").expect("write");
        assert!(connection.receive().is_empty());
        peer.write_all(b":1}\n{}\nrest").expect("write");
        assert_eq!(
            connection.receive(),
            [b"{\"a\":1}".to_vec(), b"{}".to_vec()]
        );
        assert!(connection.receive().is_empty() && connection.is_open());
    }

    #[test]
    fn a_closed_or_endless_peer_ends_the_connection() {
        let (mut connection, peer) = pair();
        drop(peer);
        assert!(connection.receive().is_empty());
        assert!(!connection.is_open());

        let (mut connection, mut peer) = pair();
        for _ in 0..5 {
            peer.write_all(&[b'x'; CHUNK_BYTES]).expect("write");
            connection.receive();
        }
        assert!(!connection.is_open());
    }

    #[test]
    fn a_reader_that_does_not_read_loses_the_connection() {
        let (mut connection, _peer) = pair();
        let text = json!({"text": "x".repeat(1 << 20)});
        for _ in 0..8 {
            connection.send(&text);
        }
        assert!(!connection.is_open());
    }

    #[test]
    fn output_waits_for_a_slow_reader() {
        let (mut connection, mut peer) = pair();
        let text = json!({"text": "x".repeat(1 << 20)});
        connection.send(&text);
        assert!(connection.has_output());
        let mut received = Vec::new();
        let mut chunk = [0; 65536];
        while received.last() != Some(&b'\n') {
            let count = peer.read(&mut chunk).expect("read");
            received.extend_from_slice(&chunk[..count]);
            connection.flush();
        }
        assert_eq!(received.len(), text.to_string().len() + 1);
    }
}

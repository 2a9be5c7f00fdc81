//! One stream between a guest port and a host descriptor.
//!
//! The descriptor may be a blocking one, and its other end the host program's: each call says that
//! it won't wait.
//!
//! ```text
//!            host program connects              guest connects
//!                    │ REQUEST ►                      │ ► REQUEST
//!              Requested ── RESPONSE ──► Established ◄┘   (RESPONSE ► at once)
//!                    │                    │  either side shuts a direction: SHUTDOWN
//!                    └──────── RST ───────┴──► gone       both shut and drained: RST
//! ```

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use ringfence_memory::vectored;
use rustix::io::Errno;
use rustix::net::SendFlags;
use rustix::net::send;

use super::packet::SHUTDOWN_RECEIVE;
use super::packet::SHUTDOWN_SEND;
use crate::ChainReader;
use crate::ChainWriter;
use crate::Interest;

/// Which stream it is: the host's port and the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The guest hasn't answered yet.
    Requested,
    Established,
}

/// Packets that wait for a guest buffer. A set, so that no guest can make it grow.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Owed {
    pub(super) request: bool,
    pub(super) response: bool,
    pub(super) reset: bool,
    pub(super) shutdown: bool,
    pub(super) credit: bool,
}

impl Owed {
    pub(super) fn any(self) -> bool {
        self.request || self.response || self.reset || self.shutdown || self.credit
    }
}

/// What came of moving bytes from the host towards the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pull {
    /// This many bytes lie in the guest's buffer.
    Bytes(u32),
    /// Nothing to read now.
    Idle,
    /// The host program won't send any more.
    End,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) ports: Ports,
    pub(super) stream: UnixStream,
    pub(super) state: State,
    pub(super) owed: Owed,
    /// Our receive window.
    pub(super) window: u32,
    /// Bytes from the guest that the host program hasn't taken.
    backlog: Vec<u8>,
    backlog_start: usize,
    /// Bytes handed to the host program, wrapping, and what the guest was last told of it.
    pub(super) forwarded: u32,
    told: u32,
    /// Bytes sent to the guest, wrapping, and its window.
    sent: u32,
    peer_window: u32,
    peer_forwarded: u32,
    /// SHUTDOWN flags, ours and the guest's.
    pub(super) ours: u32,
    pub(super) theirs: u32,
    /// In the list of those with something for the guest.
    pub(super) queued: bool,
    /// The host has bytes (or its end) for the guest, as far as known.
    pub(super) readable: bool,
    /// What epoll was last told.
    pub(super) interest: Interest,
}

impl Connection {
    pub(super) fn new(ports: Ports, stream: UnixStream, state: State, window: u32) -> Self {
        Self {
            ports,
            stream,
            state,
            owed: Owed::default(),
            window,
            backlog: Vec::new(),
            backlog_start: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            peer_window: 0,
            peer_forwarded: 0,
            ours: 0,
            theirs: 0,
            queued: false,
            readable: false,
            interest: Interest::Hangup,
        }
    }

    fn backlog(&self) -> &[u8] {
        &self.backlog[self.backlog_start..]
    }

    pub(super) fn has_backlog(&self) -> bool {
        self.backlog_start < self.backlog.len()
    }

    /// What a packet header says of the guest's window (§5.10.6.3).
    pub(super) fn set_peer(&mut self, window: u32, forwarded: u32) {
        (self.peer_window, self.peer_forwarded) = (window, forwarded);
    }

    /// Bytes that the guest has room for. Nonsense from the guest gives nonsense credit, which is
    /// harmless: bytes only ever go into buffers that it lent.
    pub(super) fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_window.saturating_sub(in_flight)
    }

    /// Whether bytes may still flow to the guest.
    pub(super) fn may_send(&self) -> bool {
        self.state == State::Established
            && self.ours & SHUTDOWN_SEND == 0
            && self.theirs & SHUTDOWN_RECEIVE == 0
    }

    /// What epoll should watch for.
    pub(super) fn wanted_interest(&self) -> Interest {
        let read = self.may_send() && !self.readable;
        match (read, self.has_backlog()) {
            (true, true) => Interest::Both,
            (true, false) => Interest::Read,
            (false, true) => Interest::Write,
            (false, false) => Interest::Hangup,
        }
    }

    /// Bytes from the guest. `false`: it sent more than its credit, or after saying it wouldn't.
    pub(super) fn push(&mut self, data: &mut ChainReader<'_>, len: usize) -> bool {
        let buffered = self.backlog().len();
        let room = (self.window as usize).saturating_sub(buffered);
        if self.state != State::Established || self.theirs & SHUTDOWN_SEND != 0 || len > room {
            return false;
        }
        let mut rest = len;
        if buffered == 0 {
            let taken = match vectored::send(self.stream.as_fd(), &data.slices(len)) {
                Ok(taken) => taken,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                // The host program is gone: the bytes have nowhere to go.
                Err(_) => return self.lose(len),
            };
            data.skip(taken);
            self.count_forwarded(taken);
            rest -= taken;
        }
        self.keep(data, rest)
    }

    fn keep(&mut self, data: &mut ChainReader<'_>, len: usize) -> bool {
        if len == 0 {
            return true;
        }
        if !self.has_backlog() {
            self.backlog.clear();
            self.backlog_start = 0;
        }
        let old = self.backlog.len();
        self.backlog.resize(old + len, 0);
        if data.read_exact(&mut self.backlog[old..]).is_err() {
            self.backlog.truncate(old);
            return false;
        }
        true
    }

    fn lose(&mut self, len: usize) -> bool {
        self.count_forwarded(len);
        self.host_is_gone();
        true
    }

    fn count_forwarded(&mut self, len: usize) {
        let len = u32::try_from(len).unwrap_or(0);
        self.forwarded = self.forwarded.wrapping_add(len);
        // Tell the guest before it runs dry, not after each packet.
        if self.forwarded.wrapping_sub(self.told) >= self.window / 2 {
            self.owed.credit = true;
        }
    }

    /// Hands kept bytes to the host program.
    pub(super) fn flush(&mut self) {
        while self.has_backlog() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match send(&self.stream, self.backlog(), flags) {
                Ok(taken) => {
                    self.backlog_start += taken;
                    self.count_forwarded(taken);
                }
                Err(Errno::AGAIN) => return self.compact(),
                Err(Errno::INTR) => {}
                Err(_) => {
                    let lost = self.backlog().len();
                    self.backlog_start = self.backlog.len();
                    self.lose(lost);
                }
            }
        }
        self.backlog = Vec::new();
        self.backlog_start = 0;
    }

    /// Keeps the backlog's memory within twice the window.
    fn compact(&mut self) {
        if self.backlog_start >= self.window as usize {
            self.backlog.drain(..self.backlog_start);
            self.backlog_start = 0;
        }
    }

    /// Moves bytes from the host into a guest buffer, which is behind the header already.
    pub(super) fn pull(&mut self, writer: &mut ChainWriter<'_>) -> Pull {
        let len = writer.remaining().min(self.credit() as usize);
        match vectored::receive(self.stream.as_fd(), &writer.slices(len)) {
            Ok(0) => Pull::End,
            Ok(len) => {
                writer.advance(len);
                let len = u32::try_from(len).unwrap_or(0);
                self.sent = self.sent.wrapping_add(len);
                Pull::Bytes(len)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Pull::Idle,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Pull::Idle,
            Err(_) => {
                self.host_is_gone();
                Pull::End
            }
        }
    }

    /// The host program closed its end: neither direction goes on.
    pub(super) fn host_is_gone(&mut self) {
        let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
        if self.ours != both {
            self.ours = both;
            self.owed.shutdown = true;
        }
    }

    /// The host program won't send any more.
    pub(super) fn host_ended(&mut self) {
        if self.ours & SHUTDOWN_SEND == 0 {
            self.ours |= SHUTDOWN_SEND;
            self.owed.shutdown = true;
        }
    }

    /// The guest shuts one or both directions.
    pub(super) fn guest_shuts(&mut self, flags: u32) {
        self.theirs |= flags & (SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
        if self.theirs & SHUTDOWN_RECEIVE != 0 {
            // Fails when the host program is gone already.
            let _ = self.stream.shutdown(std::net::Shutdown::Read);
        }
        self.pass_on_end();
    }

    /// Tells the host program that the guest won't send any more, once it has all bytes.
    pub(super) fn pass_on_end(&self) {
        if self.theirs & SHUTDOWN_SEND != 0 && !self.has_backlog() {
            // Fails when the host program is gone already.
            let _ = self.stream.shutdown(std::net::Shutdown::Write);
        }
    }

    /// Both directions are shut by the guest and the host program has all bytes.
    pub(super) fn is_over(&self) -> bool {
        self.theirs == SHUTDOWN_SEND | SHUTDOWN_RECEIVE && !self.has_backlog()
    }

    /// The guest is told of `forwarded` by the packet that is about to be sent.
    pub(super) fn tell_credit(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        self.owed.credit = false;
        (self.window, self.forwarded)
    }
}

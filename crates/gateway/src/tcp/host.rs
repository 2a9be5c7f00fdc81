//! The host side of a connection: its socket.

use rustix::io::Errno;
use rustix::net::SendFlags;
use rustix::net::sockopt;

use super::connection::Connection;
use super::connection::Fate;
use super::connection::IN_BYTES;
use super::connection::OUT_BYTES;
use super::connection::State;
use crate::policy::FirstName;
use crate::policy::Inspect;
use crate::policy::Reason;
use crate::policy::Transport;
use crate::policy::first_name;
use crate::stream;
use crate::world::World;

/// Bytes read in one turn; then others have theirs.
const TURN_BYTES: usize = 1 << 20;
/// Bytes read by one call.
const READ_BYTES: usize = 256 << 10;

impl Connection {
    /// Whether the host side is connected; `Err` when it can't be.
    pub(super) fn finish_connect(&mut self) -> Result<bool, Errno> {
        if !self.writable && !self.hung_up {
            return Ok(false);
        }
        match sockopt::socket_error(&self.socket) {
            Ok(Ok(())) => {}
            Ok(Err(error)) | Err(error) => return Err(error),
        }
        if !self.writable {
            return Ok(false);
        }
        self.state = State::SynReceived;
        Ok(true)
    }

    /// Hands bytes of the guest on; returns how many were taken.
    pub(super) fn deliver(&mut self, world: &mut World, bytes: &[u8]) -> Result<usize, Fate> {
        let mut taken = 0;
        if self.inbox.is_empty() && self.inspect.is_none() && self.state == State::Open {
            taken = self.write(bytes).map_err(|_| Fate::Reset)?;
        }
        let rest = &bytes[taken..];
        if !rest.is_empty() {
            taken += self.inbox.push(rest, IN_BYTES, &mut world.budget);
        }
        if let Some(inspect) = self.inspect {
            self.look(world, inspect)?;
        }
        Ok(taken)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, Errno> {
        stream::send(&self.socket, bytes, &mut self.writable)
    }

    /// Looks for the name in the first bytes.
    fn look(&mut self, world: &mut World, inspect: Inspect) -> Result<(), Fate> {
        let (first, second) = self.inbox.slices(0, self.inbox.len());
        let found = if second.is_empty() {
            first_name(first)
        } else {
            first_name(&[first, second].concat())
        };
        let mut to = self.key.remote;
        if world.net.is_own(to.ip()) {
            to.set_ip(super::behind(to.ip()));
        }
        let verdict = match found {
            FirstName::Incomplete => return Ok(()),
            FirstName::Other => Ok(()),
            FirstName::Missing if inspect == Inspect::MustBeAllowed => Err(Reason::NoName),
            FirstName::Missing => Ok(()),
            FirstName::Name(name) => world.check_name(self.key.port, to, &name),
        };
        if let Err(reason) = verdict {
            world.refuse(self.key.port, Transport::Tcp, self.key.remote, &reason);
            return Err(Fate::Reset);
        }
        self.inspect = None;
        Ok(())
    }

    /// Writes what the guest sent and the host side didn't take yet.
    pub(super) fn drain_inbox(&mut self, world: &mut World) -> Result<(), Fate> {
        if let Some(inspect) = self.inspect {
            if !self.guest_fin {
                return Ok(());
            }
            // It has said all, and not for whom.
            if !self.inbox.is_empty() && inspect == Inspect::MustBeAllowed {
                let reason = Reason::NoName;
                world.refuse(self.key.port, Transport::Tcp, self.key.remote, &reason);
                return Err(Fate::Reset);
            }
        }
        while self.writable && !self.inbox.is_empty() {
            let parts = self.inbox.io_slices(0, READ_BYTES);
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let mut none = rustix::net::SendAncillaryBuffer::default();
            match rustix::net::sendmsg(&self.socket, &parts, &mut none, flags) {
                Ok(len) => self.inbox.consume(len),
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Fate::Reset),
            }
        }
        if !self.inbox.is_empty() {
            return Ok(());
        }
        if self.inbox.capacity() > 0 {
            self.inbox.release(&mut world.budget);
        }
        if self.guest_fin && !self.host_shut {
            self.host_shut = true;
            // Gone already: reading tells.
            let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
        }
        if self.window_opened(world) {
            self.need_ack = true;
        }
        Ok(())
    }

    /// Reads as much as the guest takes soon. Says whether there may be more.
    pub(super) fn fill_out(&mut self, world: &mut World) -> Result<bool, Fate> {
        let wanted = (self.guest_window as usize).saturating_add(READ_BYTES);
        let limit = OUT_BYTES.min(wanted);
        let mut turn = TURN_BYTES;
        while (self.readable || self.hung_up) && !self.host_eof {
            if self.out.len() >= limit {
                return Ok(false);
            }
            if turn == 0 {
                return Ok(true);
            }
            if self.out.free() == 0 && !self.out.grow(OUT_BYTES, &mut world.budget) {
                return Ok(false);
            }
            let asked = self.out.free().min(READ_BYTES).min(turn);
            let mut slices = self.out.free_slices(asked);
            let used = if slices[1].is_empty() { 1 } else { 2 };
            match rustix::io::readv(&self.socket, &mut slices[..used]) {
                Ok(0) => self.host_eof = true,
                Ok(len) => {
                    self.out.commit(len);
                    turn -= len;
                    // A short read has emptied it; what comes later is another event.
                    self.readable &= len == asked;
                }
                Err(Errno::AGAIN) => {
                    self.readable = false;
                    break;
                }
                Err(Errno::INTR) => {}
                Err(_) => return Err(Fate::Reset),
            }
        }
        Ok(false)
    }

    /// Makes the other side see a reset when the socket is closed.
    pub(super) fn abort_host(&self) {
        // It may be no TCP socket at all: then closing it has to do.
        let _ = sockopt::set_socket_linger(&self.socket, Some(std::time::Duration::ZERO));
    }
}

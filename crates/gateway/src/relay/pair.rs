//! Two sockets whose bytes go to one another.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::net::sockopt;

use crate::policy::FirstName;
use crate::policy::Inspect;
use crate::policy::MAX_FIRST_BYTES;
use crate::policy::first_name;
use crate::stream;
use crate::world::Budget;
use crate::world::World;

/// Bytes read by one call.
const READ_BYTES: usize = 256 << 10;
/// The same while memory is short.
const TIGHT_BYTES: usize = 4 << 10;
/// Bytes one way in one turn; then others have theirs.
const TURN_BYTES: usize = 1 << 20;

/// What passing on takes: room to read into, and what may be kept.
pub(super) struct Flow<'a> {
    scratch: &'a mut [u8],
    budget: &'a mut Budget,
}

impl<'a> Flow<'a> {
    pub(super) fn new(world: &'a mut World, scratch: &'a mut Vec<u8>) -> Self {
        scratch.resize(READ_BYTES, 0);
        let room = if world.budget.is_tight() {
            TIGHT_BYTES
        } else {
            READ_BYTES
        };
        Self {
            scratch: &mut scratch[..room],
            budget: &mut world.budget,
        }
    }
}

/// One socket, and what was read from it and not passed on yet.
#[derive(Debug)]
pub(super) struct End {
    socket: OwnedFd,
    readable: bool,
    writable: bool,
    hung_up: bool,
    /// It has said all.
    ended: bool,
    /// The other one was told so.
    told: bool,
    waiting: Vec<u8>,
    passed: usize,
}

impl End {
    fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            readable: false,
            writable: false,
            hung_up: false,
            ended: false,
            told: false,
            waiting: Vec::new(),
            passed: 0,
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn notice(&mut self, flags: EventFlags) {
        let ended = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
        self.readable |= flags.contains(EventFlags::IN);
        self.writable |= flags.contains(EventFlags::OUT);
        self.hung_up |= flags.intersects(ended);
    }

    /// Reads into `room`; `None` when there is nothing now.
    fn read(&mut self, room: &mut [u8]) -> Result<Option<usize>, Errno> {
        while (self.readable || self.hung_up) && !self.ended {
            match rustix::net::recv(&self.socket, &mut *room, RecvFlags::DONTWAIT) {
                Ok((0, _)) => self.ended = true,
                Ok((len, _)) => {
                    // A short read has emptied it; what comes later is another event.
                    self.readable &= len == room.len();
                    return Ok(Some(len));
                }
                Err(Errno::AGAIN) => {
                    self.readable = false;
                    return Ok(None);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, Errno> {
        stream::send(&self.socket, bytes, &mut self.writable)
    }

    fn keep(&mut self, bytes: &[u8], budget: &mut Budget) {
        self.waiting.extend_from_slice(bytes);
        budget.force(bytes.len());
    }

    /// Writes what waits to the other end; whether nothing waits any more.
    fn pass_waiting(&mut self, to: &mut Self, budget: &mut Budget) -> Result<bool, Errno> {
        self.passed += to.write(&self.waiting[self.passed..])?;
        if self.passed < self.waiting.len() {
            return Ok(false);
        }
        budget.give(self.waiting.len());
        (self.waiting, self.passed) = (Vec::new(), 0);
        Ok(true)
    }

    /// Passes on what there is; says whether there may be more.
    fn flow(&mut self, to: &mut Self, flow: &mut Flow<'_>) -> Result<bool, Errno> {
        let mut turn = TURN_BYTES;
        while self.pass_waiting(to, flow.budget)? {
            if turn == 0 {
                return Ok(true);
            }
            let room = flow.scratch.len().min(turn);
            let Some(len) = self.read(&mut flow.scratch[..room])? else {
                if self.ended && !self.told {
                    self.told = true;
                    // Gone already: reading tells.
                    let _ = rustix::net::shutdown(&to.socket, rustix::net::Shutdown::Write);
                }
                return Ok(false);
            };
            turn -= len;
            let done = to.write(&flow.scratch[..len])?;
            self.keep(&flow.scratch[done..len], flow.budget);
        }
        Ok(false)
    }
}

/// A guest's connection and the one that goes on for it.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) near: End,
    pub(super) far: End,
    /// Whose it is.
    pub(super) machine: String,
    pub(super) to: SocketAddr,
    /// What its first bytes must hold to, until they were looked at.
    pub(super) inspect: Option<Inspect>,
    pub(super) queued: bool,
}

impl Pair {
    pub(super) fn new(
        near: OwnedFd,
        far: OwnedFd,
        (machine, to): (String, SocketAddr),
        inspect: Option<Inspect>,
    ) -> Self {
        Self {
            near: End::new(near),
            far: End::new(far),
            machine,
            to,
            inspect,
            queued: false,
        }
    }

    /// Reads what comes first and says what name it shows; `None` when it was looked at before.
    pub(super) fn look_at_first(
        &mut self,
        flow: &mut Flow<'_>,
    ) -> Result<Option<FirstName>, Errno> {
        if self.inspect.is_none() {
            return Ok(None);
        }
        while self.near.waiting.len() < MAX_FIRST_BYTES {
            let room = flow
                .scratch
                .len()
                .min(MAX_FIRST_BYTES - self.near.waiting.len());
            let Some(len) = self.near.read(&mut flow.scratch[..room])? else {
                break;
            };
            self.near.keep(&flow.scratch[..len], flow.budget);
        }
        let found = first_name(&self.near.waiting);
        Ok(Some(match found {
            // It has said all, and not for whom.
            FirstName::Incomplete if self.near.ended && self.near.waiting.is_empty() => {
                FirstName::Other
            }
            FirstName::Incomplete if self.near.ended => FirstName::Missing,
            found => found,
        }))
    }

    /// Passes bytes on both ways; says whether there may be more.
    pub(super) fn pump(&mut self, flow: &mut Flow<'_>) -> Result<bool, Errno> {
        let mut more = self.far.flow(&mut self.near, flow)?;
        if self.inspect.is_none() {
            more |= self.near.flow(&mut self.far, flow)?;
        }
        Ok(more)
    }

    /// Whether both sides have said all, and know.
    pub(super) fn is_over(&self) -> bool {
        self.near.told && self.far.told
    }

    /// Closes both; each sees a reset, if asked for.
    pub(super) fn close(self, budget: &mut Budget, reset: bool) {
        for end in [&self.near, &self.far] {
            budget.give(end.waiting.len());
            if reset {
                reset_at_close(&end.socket);
            }
        }
    }
}

/// Makes the other side see a reset when a socket is closed.
pub(super) fn reset_at_close(socket: &OwnedFd) {
    // Closing it has to do otherwise.
    let _ = sockopt::set_socket_linger(socket, Some(std::time::Duration::ZERO));
}

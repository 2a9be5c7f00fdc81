//! Queue pairs that somebody outside the process serves: the host's kernel, by vhost-net.
//!
//! ```text
//!              DRIVER_OK, or the control queue          quiesce
//!   Idle ─────────────────────────────────────► Lent ◄───────────► Parked
//!     ▲             fewer pairs, reset            │  a doorbell, a frame
//!     └───────────────────────────────────────────┘
//! ```
//! A lent pair's doorbells and interrupts pass this process by where the engine has events for
//! them. A parked one rests, so that a snapshot can be taken; whatever happens first afterwards
//! lends it again. Where lending fails the device serves the pair itself, as without a mover.

use std::io;
use std::sync::Arc;

use ringfence_device::tracing;
use ringfence_device::warn_limited;
use ringfence_memory::GuestAddress;
use ringfence_netstack::LentRing;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

use super::device::Net;
use crate::Active;
use crate::Interest;
use crate::QueueError;
use crate::VirtioDevice;

/// Tokens by queue: used buffers, and doorbells of a parked pair; by pair: a broken ring.
pub(super) const CALLS: u32 = 0x200;
pub(super) const KICKS: u32 = 0x300;
pub(super) const BROKEN: u32 = 0x400;
pub(super) const END: u32 = 0x500;

/// Who serves a pair of queues.
#[derive(Debug, Default)]
pub(super) enum Server {
    /// The device.
    #[default]
    Own,
    /// Nobody: the guest doesn't use it yet.
    Idle,
    /// Somebody outside.
    Lent(Lent),
    /// Nobody, until something happens.
    Parked,
}

/// How the device hears of a pair that is lent.
#[derive(Debug)]
pub(super) struct Lent {
    calls: [Arc<EventFd>; 2],
    broken: EventFd,
}

impl Lent {
    fn new() -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK);
        Ok(Self {
            calls: [Arc::new(event()?), Arc::new(event()?)],
            broken: event()?,
        })
    }
}

fn queues(pair: u16) -> [u16; 2] {
    [2 * pair, 2 * pair + 1]
}

impl Net {
    /// Whether somebody outside serves the pairs that the guest uses.
    pub(super) fn lends(&mut self) -> bool {
        // What is bounded is counted here, frame by frame.
        let bounded = self.receive_limiter.is_some() || self.send_limiter.is_some();
        !bounded && self.backend.mover().is_some()
    }

    /// How many pairs are lent or will be.
    pub(super) fn lent_pairs(&self) -> u64 {
        let lent = |server: &Server| matches!(server, Server::Lent(_) | Server::Parked);
        self.pairs.iter().filter(|pair| lent(&pair.server)).count() as u64
    }

    /// Lends the pairs that the guest uses, and takes the others back.
    pub(super) fn lend_used(&mut self, active: &mut Active) {
        if !self.lends() {
            return;
        }
        for pair in self.all_pairs() {
            let server = &self.pairs[usize::from(pair)].server;
            let used = pair < self.used_pairs && !active.broken;
            match (used, server) {
                (true, Server::Idle) => self.lend(active, pair),
                (false, Server::Lent(_) | Server::Parked) => self.idle(active, pair),
                _ => {}
            }
        }
    }

    fn lend(&mut self, active: &mut Active, pair: u16) {
        let server = match self.try_lend(active, pair) {
            Ok(Some(lent)) => Server::Lent(lent),
            // Nobody uses a pair without rings.
            Ok(None) => Server::Idle,
            Err(error) => {
                warn_limited!(pair, %error, "vhost-net can't serve a queue pair: it is served here");
                hear_doorbells(active, pair);
                for queue in queues(pair) {
                    // What was rung for while nobody served it.
                    if let Some(queue) = active.queue(queue) {
                        queue.ring_again();
                    }
                }
                Server::Own
            }
        };
        self.pairs[usize::from(pair)].server = server;
    }

    fn try_lend(&mut self, active: &mut Active, pair: u16) -> io::Result<Option<Lent>> {
        let numbers = queues(pair);
        if numbers.iter().any(|&index| active.queue(index).is_none()) {
            return Ok(None);
        }
        let lent = Lent::new()?;
        let rings = numbers.map(|index| lent_ring(active, index, &lent));
        let [Some(receive), Some(send)] = rings else {
            return Ok(None);
        };
        let features = active.session.features;
        let Some(mover) = self.backend.mover() else {
            return Ok(None);
        };
        mover.start(pair, features, [receive, send])?;
        if let Err(error) = hear(active, pair, &lent) {
            // Said before: whatever comes of it, it has stopped.
            let _ = mover.stop(pair);
            forget(active, pair, &lent);
            return Err(error);
        }
        tracing::debug!(pair, "vhost-net serves a queue pair");
        Ok(Some(lent))
    }

    /// Takes a lent pair back. The rings stand where they were left, nobody hears of them, and
    /// the guest has heard of everything.
    fn take_back(&mut self, active: &mut Active, pair: u16, lent: &Lent) {
        let stopped = self.backend.mover().map(|mover| mover.stop(pair));
        forget(active, pair, lent);
        for (index, call) in queues(pair).into_iter().zip(&lent.calls) {
            if call.read().is_ok() {
                active.session.interrupt.queue_used(index);
            }
        }
        match stopped {
            Some(Ok(positions)) => {
                for (index, next) in queues(pair).into_iter().zip(positions) {
                    if let Some((queue, session)) = active.split(index) {
                        queue.resume(next, &session.memory);
                    }
                }
            }
            Some(Err(error)) => {
                warn_limited!(pair, %error, "vhost-net doesn't say where it stopped");
                active.check::<()>(2 * pair, Err(QueueError::Ring));
            }
            None => {}
        }
    }

    fn server(&mut self, pair: u16) -> Option<&mut Server> {
        self.pairs
            .get_mut(usize::from(pair))
            .map(|pair| &mut pair.server)
    }

    fn idle(&mut self, active: &mut Active, pair: u16) {
        let Some(server) = self.server(pair) else {
            return;
        };
        match std::mem::replace(server, Server::Idle) {
            Server::Lent(lent) => self.take_back(active, pair, &lent),
            Server::Parked => {
                stop_hearing_doorbells(active, pair);
                self.forget_link(&active.session, pair);
            }
            Server::Own | Server::Idle => {}
        }
    }

    /// Takes all pairs back: the guest let go of the device, or broke it.
    pub(super) fn take_all_back(&mut self, active: &mut Active) {
        for pair in self.all_pairs() {
            self.idle(active, pair);
        }
    }

    /// Brings a lent pair to rest. The next doorbell or frame lends it again.
    pub(super) fn park(&mut self, active: &mut Active, pair: u16) {
        let Some(server @ Server::Lent(_)) = self.server(pair) else {
            return;
        };
        let Server::Lent(lent) = std::mem::replace(server, Server::Parked) else {
            return;
        };
        self.take_back(active, pair, &lent);
        if active.broken {
            return;
        }
        hear_doorbells(active, pair);
        self.rewatch(&active.session, pair, |wanted| wanted.read = true);
    }

    /// Something happened to a parked pair.
    pub(super) fn unpark(&mut self, active: &mut Active, pair: u16) -> bool {
        let parked = matches!(self.server(pair), Some(Server::Parked));
        if parked {
            self.idle(active, pair);
            self.lend_used(active);
        }
        parked
    }

    /// A descriptor of a lent or parked pair is ready.
    pub(super) fn lent_event(&mut self, active: &mut Active, token: u32) {
        let number = u16::try_from(token & 0xff).unwrap_or(0);
        match token & !0xff {
            CALLS => self.called(active, number),
            KICKS => self.rung(active, number),
            _ => self.broke(active, number),
        }
    }

    /// Buffers were used, and the engine doesn't interrupt for it itself.
    fn called(&mut self, active: &Active, index: u16) {
        if let Some(Server::Lent(lent)) = self.server(index / 2)
            && lent.calls[usize::from(index % 2)].read().is_ok()
        {
            active.session.interrupt.queue_used(index);
        }
    }

    fn rung(&mut self, active: &mut Active, index: u16) {
        if let Some(queue) = active.queue(index) {
            // Empty when it was drained already: one turn too many is harmless.
            let _ = queue.kick().read();
        }
        if !self.unpark(active, index / 2) {
            self.queue_ready(active, index);
        }
    }

    fn broke(&mut self, active: &mut Active, pair: u16) {
        if matches!(self.server(pair), Some(Server::Lent(_))) {
            self.take_all_back(active);
            active.check::<()>(2 * pair, Err(QueueError::Ring));
        }
    }
}

fn lent_ring<'a>(active: &'a Active, index: u16, lent: &'a Lent) -> Option<LentRing<'a>> {
    let queue = active.queues.get(usize::from(index))?.as_ref()?;
    let ring = queue.ring();
    Some(LentRing {
        size: ring.size(),
        descriptors: GuestAddress(ring.desc_table()),
        driver: GuestAddress(ring.avail_ring()),
        device: GuestAddress(ring.used_ring()),
        next: ring.next_avail(),
        kick: queue.kick(),
        call: &lent.calls[usize::from(index % 2)],
        broken: &lent.broken,
    })
}

/// From now on the other side's signals are ours, and the doorbells somebody else's.
fn hear(active: &mut Active, pair: u16, lent: &Lent) -> io::Result<()> {
    let numbers = queues(pair);
    let session = &active.session;
    session
        .events
        .add(&lent.broken, BROKEN + u32::from(pair), Interest::Read)?;
    for (index, call) in numbers.into_iter().zip(&lent.calls) {
        let token = CALLS + u32::from(index);
        session.events.add(&**call, token, Interest::Read)?;
        session.interrupt.wire(index, Some(Arc::clone(call)));
    }
    stop_hearing_doorbells(active, pair);
    Ok(())
}

fn stop_hearing_doorbells(active: &mut Active, pair: u16) {
    for index in queues(pair) {
        if let Some((queue, session)) = active.split(index) {
            session.events.remove(queue.kick());
        }
    }
}

fn hear_doorbells(active: &mut Active, pair: u16) {
    for index in queues(pair) {
        if let Some((queue, session)) = active.split(index) {
            // Fails where it's heard of already, by the transport.
            let token = KICKS + u32::from(index);
            let _ = session.events.add(queue.kick(), token, Interest::Read);
        }
    }
}

fn forget(active: &Active, pair: u16, lent: &Lent) {
    let session = &active.session;
    for (index, call) in queues(pair).into_iter().zip(&lent.calls) {
        session.interrupt.wire(index, None);
        session.events.remove(&**call);
    }
    session.events.remove(&lent.broken);
}

#[cfg(test)]
mod tests;

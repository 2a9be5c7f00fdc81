//! Frames to the guest.

use std::collections::VecDeque;
use std::io;

use ringfence_memory::GuestMemory;
use ringfence_memory::vectored::GuestSlice;
use ringfence_netstack::HEADER_BYTES;

use super::ETHERNET_BYTES;
use super::MAX_FRAME;
use super::device::Net;
use crate::Active;
use crate::chain::Chain;

/// Frames in one turn; then other queues and devices have theirs.
const BATCH: usize = 256;
/// Offset of `num_buffers` in the header (§5.1.6).
const NUM_BUFFERS: usize = 10;
/// A VLAN tag more than the MTU counts.
const SLACK: usize = 4;
const DEFAULT_MTU: u16 = 1500;

/// The guest's buffers for frames, taken and not yet filled.
#[derive(Debug)]
pub(super) struct Receiver {
    buffers: VecDeque<Chain>,
    bytes: usize,
    /// Bytes that the largest frame may need.
    wanted: usize,
    mergeable: bool,
}

impl Default for Receiver {
    fn default() -> Self {
        Self {
            buffers: VecDeque::new(),
            bytes: 0,
            wanted: MAX_FRAME,
            mergeable: false,
        }
    }
}

impl Receiver {
    pub(super) fn set_mergeable(&mut self, mergeable: bool) {
        self.mergeable = mergeable;
    }

    /// Whether segments that are yet to be split may come.
    pub(super) fn set_large(&mut self, large: bool, mtu: Option<u16>) {
        let mtu = usize::from(mtu.unwrap_or(DEFAULT_MTU));
        self.wanted = if large {
            MAX_FRAME
        } else {
            mtu + ETHERNET_BYTES + SLACK + HEADER_BYTES
        };
    }

    fn is_filled(&self) -> bool {
        if self.mergeable {
            self.bytes >= self.wanted
        } else {
            !self.buffers.is_empty()
        }
    }

    /// Takes buffers until the largest frame fits, or there are no more.
    fn fill(&mut self, active: &mut Active, queue: u16) {
        while !self.is_filled() {
            let Some(chain) = active.pop(queue) else {
                return;
            };
            if chain.writable_len() < HEADER_BYTES {
                // Of no use, and reading into nothing would leave the frame waiting forever.
                active.complete(queue, chain.head(), 0);
                continue;
            }
            self.bytes += chain.writable_len();
            self.buffers.push_back(chain);
        }
    }

    fn slices<'a>(&'a self, memory: &'a GuestMemory) -> Vec<GuestSlice<'a>> {
        let count = if self.mergeable { usize::MAX } else { 1 };
        let mut slices = Vec::with_capacity(self.buffers.len() * 2);
        for chain in self.buffers.iter().take(count) {
            let writer = chain.writer(memory);
            slices.extend(writer.slices(writer.remaining()));
        }
        slices
    }

    fn pop(&mut self) -> Option<Chain> {
        let chain = self.buffers.pop_front()?;
        self.bytes -= chain.writable_len();
        Some(chain)
    }

    /// Forgets the buffers it holds; returns how many.
    pub(super) fn take_back(&mut self) -> usize {
        self.bytes = 0;
        std::mem::take(&mut self.buffers).len()
    }
}

/// What became of one try.
enum Received {
    Frame,
    /// Dropped: it was larger than all buffers.
    Dropped,
    /// None waits.
    Nothing,
    /// The guest has lent no buffers.
    NoBuffers,
    Throttled,
}

impl Net {
    pub(super) fn receive(&mut self, active: &mut Active, pair: u16) {
        if self
            .pairs
            .get(usize::from(pair))
            .is_none_or(|pair| pair.gone)
        {
            return;
        }
        let mut watch = true;
        for _ in 0..BATCH {
            match self.receive_one(active, pair) {
                Received::Frame | Received::Dropped => {}
                Received::Nothing => break,
                Received::NoBuffers | Received::Throttled => {
                    watch = false;
                    break;
                }
            }
        }
        active.notify(2 * pair);
        if active.queue(2 * pair).is_some() {
            self.rewatch(&active.session, pair, |wanted| wanted.read = watch);
        }
    }

    fn receive_one(&mut self, active: &mut Active, pair: u16) -> Received {
        let index = usize::from(pair);
        self.pairs[index].receiver.fill(active, 2 * pair);
        if self.pairs[index].receiver.buffers.is_empty() {
            return self.ask_for_buffers(active, pair);
        }
        if let Some(limiter) = &mut self.receive_limiter
            && !limiter.is_ready()
        {
            self.counters.throttled.increment();
            return Received::Throttled;
        }
        let memory = active.session.memory.clone();
        let (len, room) = {
            let slices = self.pairs[index].receiver.slices(&memory);
            let room: usize = slices.iter().map(GuestSlice::len).sum();
            match self.backend.receive(pair, &slices) {
                Ok(len) => (len, room),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Received::Nothing;
                }
                Err(error) => {
                    ringfence_device::warn_limited!(%error, "a network link is gone");
                    drop(slices);
                    self.lose_link(&active.session, pair);
                    return Received::NoBuffers;
                }
            }
        };
        if let Some(limiter) = &mut self.receive_limiter {
            limiter.spend(len as u64);
        }
        // A frame that fills everything was cut off, unless it is exactly as long.
        if len < HEADER_BYTES || (len == room && room < self.pairs[index].receiver.wanted) {
            self.counters.rx_dropped.increment();
            return Received::Dropped;
        }
        self.counters.rx_frames.increment();
        self.counters.rx_bytes.add((len - HEADER_BYTES) as u64);
        self.hand_over(active, &memory, pair, len);
        Received::Frame
    }

    /// Asks for a doorbell when the guest lends buffers again.
    fn ask_for_buffers(&mut self, active: &mut Active, pair: u16) -> Received {
        let queue = 2 * pair;
        let Some((ring, session)) = active.split(queue) else {
            return Received::NoBuffers;
        };
        let result = ring.enable_doorbell(&session.memory);
        match active.check(queue, result) {
            // They came just now.
            Some(true) => Received::Dropped,
            _ => Received::NoBuffers,
        }
    }

    /// Gives the buffers that `len` bytes lie in back to the guest.
    fn hand_over(&mut self, active: &mut Active, memory: &GuestMemory, pair: u16, len: usize) {
        let receiver = &mut self.pairs[usize::from(pair)].receiver;
        let mut rest = len;
        let mut used = Vec::with_capacity(4);
        while rest > 0 {
            let Some(chain) = receiver.pop() else { break };
            let part = chain.writable_len().min(rest);
            rest -= part;
            used.push((chain, part));
        }
        let count = u16::try_from(used.len()).unwrap_or(u16::MAX);
        for (index, (chain, part)) in used.iter().enumerate() {
            if index == 0 {
                let mut header = chain.writer(memory);
                header.advance(NUM_BUFFERS);
                // A first buffer too small even for the header is the guest's own loss.
                let _ = header.write_all(&count.to_le_bytes());
            }
            let part = u32::try_from(*part).unwrap_or(u32::MAX);
            active.complete(2 * pair, chain.head(), part);
        }
    }
}

//! A virtqueue, from the device's side (virtio 1.2 §2.7, split ring).
//!
//! On `virtio-queue`'s ring, with what it leaves to its users: chains are read whole and checked
//! (order, range, length), the driver's wish for no interrupts is heeded without the event index
//! too, and serving is bounded, so that a driver that adds requests forever can't keep the
//! worker from its other devices.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use ringfence_memory::GuestAddress;
use ringfence_memory::GuestMemory;
use ringfence_memory::GuestMemoryBackend;
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::Queue;
use virtio_queue::QueueOwnedT;
use virtio_queue::QueueT;
use vm_memory::Bytes;
use vmm_sys_util::eventfd::EventFd;

use crate::VirtioInterrupt;
use crate::chain::Buffer;
use crate::chain::Chain;
use crate::chain::MAX_BUFFERS;

/// How long a queue is served at a turn: requests may be large, and others wait, a pause among them.
const TURN: Duration = Duration::from_millis(5);

/// How a driver broke the rules of the ring. The device stops until it is reset (§2.1.1,
/// DEVICE_NEEDS_RESET).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The available index ran ahead by more than the queue's size, or the ring left memory.
    #[error("the available ring is not a valid one")]
    Ring,
    /// A device-readable buffer after a device-writable one (§2.7.4.2).
    #[error("a readable buffer follows a writable one")]
    Order,
    /// A buffer outside guest memory.
    #[error("a buffer lies outside memory")]
    Range,
    /// More buffers than any request needs.
    #[error("a chain has more than {MAX_BUFFERS} buffers")]
    Length,
    /// No buffer at all: the chain's first descriptor could not be read.
    #[error("a chain has no buffers")]
    Empty,
    /// More requests at a time than there are descriptors: some are used twice (§2.7.13).
    #[error("descriptors are made available again while they are in use")]
    Reuse,
}

/// What became of a request that a device was shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Finished; this many bytes were written to its buffers.
    Done(u32),
    /// The device keeps it and completes it later.
    Kept,
    /// Not now: it stays in the ring, and so do those behind it, until the device asks again.
    Blocked,
}

/// A virtqueue in use.
pub struct Virtqueue {
    index: u16,
    queue: Queue,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn VirtioInterrupt>,
    /// Requests taken and not returned.
    in_flight: u32,
}

impl std::fmt::Debug for Virtqueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Virtqueue")
            .field("index", &self.index)
            .field("queue", &self.queue)
            .finish_non_exhaustive()
    }
}

impl Virtqueue {
    /// Takes over a ring that the driver has set up; `kick` is its doorbell.
    #[must_use]
    pub fn new(
        index: u16,
        queue: Queue,
        kick: Arc<EventFd>,
        interrupt: Arc<dyn VirtioInterrupt>,
    ) -> Self {
        Self {
            index,
            queue,
            kick,
            interrupt,
            in_flight: 0,
        }
    }

    /// Its number.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The ring, for a snapshot.
    #[must_use]
    pub fn ring(&self) -> &Queue {
        &self.queue
    }

    /// Goes on where somebody else stopped serving the ring, who left nothing half done.
    pub fn resume(&mut self, next_avail: u16, memory: &GuestMemory) {
        self.queue.set_next_avail(next_avail);
        // Where the used ring stands is in the ring itself: one that can't be read stays behind.
        if let Ok(next_used) = self.queue.used_idx(memory, Ordering::Acquire) {
            self.queue.set_next_used(next_used.0);
        }
        self.in_flight = 0;
    }

    /// Its doorbell.
    #[must_use]
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Rings the queue's own doorbell: its worker looks at it again, after others had their turn.
    pub fn ring_again(&self) {
        // Fails only when the counter is full: then the doorbell is ringing already.
        let _ = self.kick.write(1);
    }

    /// Takes the next request.
    ///
    /// # Errors
    /// [`QueueError`] when the driver broke the ring; the queue must not be used on.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, QueueError> {
        let mut available = self.queue.iter(memory).map_err(|_| QueueError::Ring)?;
        let Some(descriptors) = available.next() else {
            return Ok(None);
        };
        // What a device keeps is bounded by this alone.
        if self.in_flight >= u32::from(self.queue.size()) {
            return Err(QueueError::Reuse);
        }
        let mut chain = Chain {
            head: descriptors.head_index(),
            readable: smallvec::SmallVec::new(),
            writable: smallvec::SmallVec::new(),
        };
        for descriptor in descriptors {
            if chain.readable.len() + chain.writable.len() == MAX_BUFFERS {
                return Err(QueueError::Length);
            }
            let buffer = Buffer {
                address: descriptor.addr(),
                len: descriptor.len(),
            };
            if !in_one_region(memory, buffer) {
                return Err(QueueError::Range);
            }
            if descriptor.is_write_only() {
                chain.writable.push(buffer);
            } else if chain.writable.is_empty() {
                chain.readable.push(buffer);
            } else {
                return Err(QueueError::Order);
            }
        }
        if chain.readable.is_empty() && chain.writable.is_empty() {
            return Err(QueueError::Empty);
        }
        self.in_flight += 1;
        Ok(Some(chain))
    }

    /// Puts the request that was just taken back.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// Returns a request to the driver. Follow a batch with [`Self::notify`].
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the used ring left memory.
    pub fn complete(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.queue
            .add_used(memory, head, written)
            .map_err(|_| QueueError::Ring)
    }

    /// Interrupts the driver for what was completed, unless it asked not to be (§2.7.7, §2.7.8).
    pub fn notify(&mut self, memory: &GuestMemory) {
        if self.driver_wants_interrupt(memory) {
            self.interrupt.queue_used(self.index);
        }
    }

    fn driver_wants_interrupt(&mut self, memory: &GuestMemory) -> bool {
        // A ring that can't be read gets its interrupt: the driver is to find out.
        let wanted = self.queue.needs_notification(memory).unwrap_or(true);
        if self.queue.event_idx_enabled() {
            return wanted;
        }
        let flags = GuestAddress(self.queue.avail_ring());
        let flags: u16 = memory.read_obj(flags).unwrap_or(0);
        u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0
    }

    /// Asks the driver for no doorbells while the queue is being served.
    pub fn disable_doorbell(&mut self, memory: &GuestMemory) {
        // Only a hint: a doorbell too many does no harm.
        let _ = self.queue.disable_notification(memory);
    }

    /// Asks for doorbells again; `true` when requests came in meanwhile.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the ring left memory.
    pub fn enable_doorbell(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(memory)
            .map_err(|_| QueueError::Ring)
    }

    /// Shows the device each request until the ring is empty, one is [`Outcome::Blocked`], or its
    /// turn is over: twice the queue's size were served, or some milliseconds have passed. The rest
    /// has its turn after the other devices'.
    ///
    /// # Errors
    /// [`QueueError`] when the driver broke the ring; what was completed is notified first.
    pub fn serve(
        &mut self,
        memory: &GuestMemory,
        mut device: impl FnMut(&Chain) -> Outcome,
    ) -> Result<(), QueueError> {
        let result = self.serve_batch(memory, &mut device);
        self.notify(memory);
        result
    }

    fn serve_batch(
        &mut self,
        memory: &GuestMemory,
        device: &mut impl FnMut(&Chain) -> Outcome,
    ) -> Result<(), QueueError> {
        let mut budget = u32::from(self.size()) * 2;
        let end = Instant::now() + TURN;
        self.disable_doorbell(memory);
        loop {
            while let Some(chain) = self.pop(memory)? {
                match device(&chain) {
                    Outcome::Done(written) => self.complete(memory, chain.head, written)?,
                    Outcome::Kept => {}
                    Outcome::Blocked => {
                        self.unpop();
                        return Ok(());
                    }
                }
                budget -= 1;
                if budget == 0 || Instant::now() >= end {
                    self.ring_again();
                    return Ok(());
                }
            }
            if !self.enable_doorbell(memory)? {
                return Ok(());
            }
            self.disable_doorbell(memory);
        }
    }
}

fn in_one_region(memory: &GuestMemory, buffer: Buffer) -> bool {
    memory
        .get_slice(buffer.address, buffer.len as usize)
        .is_ok()
}

//! The device: configuration and queues.

use std::io;
use std::sync::Arc;

use ringfence_block::Disk;
use ringfence_device::Counter;

use super::ThreadStart;
use super::pool::Pool;
use super::request::Kind;
use super::request::MAX_SEGMENT_SECTORS;
use super::request::MAX_SEGMENTS;
use super::request::Request;
use super::request::SECTOR;
use super::request::SERIAL_BYTES;
use crate::Active;
use crate::DeviceKind;
use crate::Interest;
use crate::Outcome;
use crate::Session;
use crate::StartError;
use crate::VirtioDevice;
use crate::chain::Chain;
use crate::rate::RateConfig;
use crate::rate::RateLimiter;

/// Feature bits (§5.2.3).
const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const TOPOLOGY: u64 = 1 << 10;
const MULTI_QUEUE: u64 = 1 << 12;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

/// Descriptors of a queue, and buffers of a request with header and status.
const QUEUE_SIZE: u16 = 256;
/// Threads for what waits for the disk: enough to keep a solid-state disk's queue filled.
const THREADS: usize = 4;

const COMPLETED: u32 = 0;
const TIMER: u32 = 1;

/// What a block device is made of.
pub struct BlockConfig {
    /// The disk behind it.
    pub disk: Arc<dyn Disk>,
    /// What the guest finds it by; at most 20 bytes count.
    pub serial: String,
    /// Queues, one a vCPU; at least one.
    pub queues: u16,
    /// Its limits.
    pub rate: RateConfig,
    /// Runs in each of its threads first.
    pub thread_start: Option<ThreadStart>,
}

impl std::fmt::Debug for BlockConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockConfig")
            .field("serial", &self.serial)
            .field("queues", &self.queues)
            .field("rate", &self.rate)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Counters {
    reads: Counter,
    writes: Counter,
    flushes: Counter,
    others: Counter,
    read_bytes: Counter,
    written_bytes: Counter,
    malformed: Counter,
    throttled: Counter,
}

/// Queue, head, bytes written.
type Completion = (u16, u16, u32);

/// The block device.
pub struct Block {
    disk: Arc<dyn Disk>,
    serial: [u8; SERIAL_BYTES],
    queues: u16,
    limiter: Option<RateLimiter>,
    /// Queues with a request that waits for the limiter.
    throttled: Vec<bool>,
    pool: Pool<Completion>,
    counters: Counters,
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Block")
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl Block {
    /// The device of `config`.
    ///
    /// # Errors
    /// When the host gives no threads or descriptors.
    pub fn new(config: BlockConfig) -> io::Result<Self> {
        let mut serial = [0; SERIAL_BYTES];
        for (to, from) in serial.iter_mut().zip(config.serial.bytes()) {
            *to = from;
        }
        let queues = config.queues.clamp(1, 32);
        Ok(Self {
            disk: config.disk,
            serial,
            queues,
            limiter: RateLimiter::new(config.rate)?,
            throttled: vec![false; usize::from(queues)],
            pool: Pool::new(THREADS, config.thread_start.as_ref())?,
            counters: Counters::default(),
        })
    }

    fn serve_queue(&mut self, active: &mut Active, index: u16) {
        self.set_throttled(index, false);
        active.serve(index, |session, chain| self.request(session, chain, index));
    }

    fn set_throttled(&mut self, index: u16, throttled: bool) {
        if let Some(slot) = self.throttled.get_mut(usize::from(index)) {
            *slot = throttled;
        }
    }

    fn request(&mut self, session: &Session, chain: &Chain, index: u16) -> Outcome {
        let Some(request) = Request::parse(&session.memory, chain.clone()) else {
            self.counters.malformed.increment();
            return Outcome::Done(0);
        };
        if let Some(limiter) = &mut self.limiter
            && !limiter.admit(request.data_len())
        {
            self.counters.throttled.increment();
            self.set_throttled(index, true);
            return Outcome::Blocked;
        }
        self.count(&request);
        let now = request.try_now(&session.memory, &*self.disk, &self.serial);
        if let Some(written) = now {
            return Outcome::Done(written);
        }
        let (disk, serial) = (Arc::clone(&self.disk), self.serial);
        let memory = session.memory.clone();
        self.pool.submit(move || {
            let written = request.run(&memory, &*disk, &serial);
            (index, request.head(), written)
        });
        Outcome::Kept
    }

    fn count(&self, request: &Request) {
        let counters = &self.counters;
        match request.kind {
            Kind::Read => {
                counters.reads.increment();
                counters.read_bytes.add(request.data_len());
            }
            Kind::Write => {
                counters.writes.increment();
                counters.written_bytes.add(request.data_len());
            }
            Kind::Flush => counters.flushes.increment(),
            _ => counters.others.increment(),
        }
    }

    fn complete(&self, active: &mut Active) {
        let mut touched = vec![false; usize::from(self.queues)];
        for (queue, head, written) in self.pool.take_results() {
            active.complete(queue, head, written);
            if let Some(slot) = touched.get_mut(usize::from(queue)) {
                *slot = true;
            }
        }
        for (queue, _) in (0..self.queues)
            .zip(touched)
            .filter(|(_, touched)| *touched)
        {
            active.notify(queue);
        }
    }

    /// `struct virtio_blk_config` (§5.2.4).
    fn config(&self) -> [u8; 60] {
        let geometry = self.disk.geometry();
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(geometry.size_bytes / SECTOR).to_le_bytes());
        put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
        put(20, &512_u32.to_le_bytes());
        let exponent = (geometry.physical_block_bytes / 512).trailing_zeros();
        put(24, &[u8::try_from(exponent).unwrap_or(0)]);
        let io_sectors = u16::try_from(geometry.physical_block_bytes / 512).unwrap_or(1);
        put(26, &io_sectors.to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        let segments = u32::try_from(MAX_SEGMENTS).unwrap_or(1);
        put(36, &MAX_SEGMENT_SECTORS.to_le_bytes());
        put(40, &segments.to_le_bytes());
        put(44, &(geometry.discard_bytes / 512).max(1).to_le_bytes());
        put(48, &MAX_SEGMENT_SECTORS.to_le_bytes());
        put(52, &segments.to_le_bytes());
        put(56, &[1]);
        config
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.queues)]
    }

    fn features(&self) -> u64 {
        let always = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY;
        let kind = if self.disk.is_read_only() {
            READ_ONLY
        } else {
            DISCARD | WRITE_ZEROES
        };
        let queues = if self.queues > 1 { MULTI_QUEUE } else { 0 };
        always | kind | queues
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::device::read_config_bytes(&self.config(), offset, data);
    }

    fn start(&mut self, active: &mut Active) -> Result<(), StartError> {
        let watch = |source| StartError::Host {
            action: "watch for disk completions",
            source,
        };
        let events = &active.session.events;
        events
            .add(self.pool.done(), COMPLETED, Interest::Read)
            .map_err(watch)?;
        if let Some(limiter) = &self.limiter {
            events
                .add(limiter.timer(), TIMER, Interest::Read)
                .map_err(watch)?;
        }
        Ok(())
    }

    fn queue_ready(&mut self, active: &mut Active, index: u16) {
        self.serve_queue(active, index);
    }

    fn event_ready(&mut self, active: &mut Active, token: u32) {
        if token == COMPLETED {
            self.complete(active);
            return;
        }
        if let Some(limiter) = &self.limiter {
            limiter.heard();
        }
        for index in 0..self.queues {
            if self.throttled[usize::from(index)] {
                self.serve_queue(active, index);
            }
        }
    }

    fn stop(&mut self, _: &mut Active) {
        // Jobs write to guest memory: none may outlive the reset.
        self.pool.abandon();
        self.throttled.fill(false);
    }

    fn quiesce(&mut self, active: &mut Active) {
        self.pool.finish();
        self.complete(active);
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.counters;
        vec![
            ("reads", counters.reads.get()),
            ("writes", counters.writes.get()),
            ("flushes", counters.flushes.get()),
            ("others", counters.others.get()),
            ("read_bytes", counters.read_bytes.get()),
            ("written_bytes", counters.written_bytes.get()),
            ("malformed", counters.malformed.get()),
            ("throttled", counters.throttled.get()),
        ]
    }
}

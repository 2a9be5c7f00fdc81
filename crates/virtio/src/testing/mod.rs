//! The driver's side of the standard: a small, single-threaded driver that talks to a device by
//! its registers and rings, as a guest would. For tests, fuzzing and benchmarks.
//!
//! The event loop is run by hand ([`TestDriver::run`]), so tests need no threads and no waiting.

mod ring;

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use ringfence_bus::Gsi;
use ringfence_bus::InterruptController;
use ringfence_bus::MsiMessage;
use ringfence_memory::GuestAddress;
use ringfence_memory::GuestMemory;
use ringfence_memory::GuestRam;
use ringfence_memory::HugePages;
use ringfence_pci::PciDevice;
use vm_memory::Bytes;

use crate::EventLoop;
use crate::VirtioDevice;
use crate::pci::Connections;
use crate::pci::VirtioPci;

pub use ring::DriverRing;
pub use ring::Segment;

/// RAM of the test machine.
pub const RAM_BYTES: u64 = 32 << 20;
/// Where rings start, 64 KiB each.
const RINGS: u64 = 1 << 20;
const RING_BYTES: u64 = 0x1_0000;
/// Where buffers are taken from, round and round.
const BUFFERS: u64 = 8 << 20;

/// Status bits (virtio 1.2 §2.1).
pub const ACKNOWLEDGE: u8 = 1;
/// See [`ACKNOWLEDGE`].
pub const DRIVER: u8 = 2;
/// See [`ACKNOWLEDGE`].
pub const DRIVER_OK: u8 = 4;
/// See [`ACKNOWLEDGE`].
pub const FEATURES_OK: u8 = 8;
/// See [`ACKNOWLEDGE`].
pub const NEEDS_RESET: u8 = 64;

/// Remembers what was sent: MSI data words, and `u32::MAX` for the wire going high.
#[derive(Debug, Default)]
pub struct Interrupts(Mutex<Vec<u32>>);

impl Interrupts {
    /// What came since the last call.
    pub fn take(&self) -> Vec<u32> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn push(&self, word: u32) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(word);
    }
}

impl InterruptController for Interrupts {
    fn set_line(&self, _: Gsi, high: bool) {
        if high {
            self.push(u32::MAX);
        }
    }
    fn send_msi(&self, message: MsiMessage) {
        self.push(message.data);
    }
}

/// A machine with one device and its driver.
pub struct TestDriver {
    /// The device, behind its transport.
    pub pci: Arc<VirtioPci>,
    /// The machine's RAM.
    pub ram: GuestRam,
    /// What interrupted.
    pub interrupts: Arc<Interrupts>,
    /// The loop the device's worker runs in.
    pub events: Arc<EventLoop>,
    /// The rings, one a queue, once set up.
    pub rings: Vec<DriverRing>,
    next_buffer: u64,
    last_writable: GuestAddress,
}

impl TestDriver {
    /// The device as the firmware leaves it.
    ///
    /// # Panics
    /// When the host can't give what a test machine needs.
    #[must_use]
    pub fn reset(device: Box<dyn VirtioDevice>) -> Self {
        let ram = GuestRam::new(RAM_BYTES, HugePages::Off).expect("test RAM");
        let events = EventLoop::new().expect("an event loop");
        let interrupts = Arc::new(Interrupts::default());
        let connections = Connections {
            memory: ram.memory().clone(),
            interrupts: Arc::clone(&interrupts) as Arc<dyn InterruptController>,
            events: Arc::clone(&events),
            vm: None,
            intx: None,
        };
        let pci = VirtioPci::new(device, connections).expect("a transport");
        Self {
            pci,
            ram,
            interrupts,
            events,
            rings: Vec::new(),
            next_buffer: BUFFERS,
            last_writable: GuestAddress(BUFFERS),
        }
    }

    /// The device with a driver that accepted every feature.
    #[must_use]
    pub fn start(device: Box<dyn VirtioDevice>) -> Self {
        Self::start_with(device, u64::MAX)
    }

    /// The device with a driver that accepted the offered ones of `features`.
    #[must_use]
    pub fn start_with(device: Box<dyn VirtioDevice>, features: u64) -> Self {
        let mut driver = Self::reset(device);
        driver.set_up(features);
        driver
    }

    /// Initialisation as in §3.1.1, from reset to DRIVER_OK.
    pub fn set_up(&mut self, features: u64) {
        self.set_status(0);
        self.set_status(ACKNOWLEDGE | DRIVER);
        let offered = self.offered_features();
        self.write_features(offered & features);
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.enable_msix();
        self.rings = (0..self.read_common_16(0x12))
            .map(|index| self.set_up_queue(index))
            .collect();
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    fn set_up_queue(&self, index: u16) -> DriverRing {
        self.write_common(0x16, &index.to_le_bytes());
        let size = self.read_common_16(0x18).min(256);
        self.write_common(0x18, &size.to_le_bytes());
        let ring = DriverRing::new(RINGS + u64::from(index) * RING_BYTES, size);
        ring.clear(self.memory());
        let [descriptors, available, used] = ring.addresses();
        self.write_common(0x20, &descriptors.to_le_bytes());
        self.write_common(0x28, &available.to_le_bytes());
        self.write_common(0x30, &used.to_le_bytes());
        self.write_common(0x1a, &(index + 1).to_le_bytes());
        self.write_common(0x1c, &1_u16.to_le_bytes());
        ring
    }

    /// Vector `n` sends the data word `n`; 0 is the configuration's, `n + 1` queue `n`'s.
    fn enable_msix(&self) {
        let vectors = u64::from(self.read_common_16(0x12)) + 1;
        for vector in 0..vectors {
            let entry = 0x4000 + vector * 16;
            self.pci.write_bar(0, entry, &0xfee0_0000_u64.to_le_bytes());
            let data = u32::try_from(vector).unwrap_or(0);
            self.pci.write_bar(0, entry + 8, &data.to_le_bytes());
            self.pci.write_bar(0, entry + 12, &[0; 4]);
        }
        let mut at = [0];
        self.pci.read_config(0x34, &mut at);
        while at[0] != 0 {
            let mut head = [0; 2];
            self.pci.read_config(u16::from(at[0]), &mut head);
            if head[0] == ringfence_pci::MSIX_CAPABILITY {
                self.pci.write_config(u16::from(at[0]) + 2, &[0, 0x80]);
            }
            at[0] = head[1];
        }
        self.write_common(0x10, &0_u16.to_le_bytes());
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        self.ram.memory()
    }

    /// Reads a field of the common configuration.
    #[must_use]
    pub fn read_common_16(&self, offset: u64) -> u16 {
        let mut data = [0; 2];
        self.pci.read_bar(0, offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// Writes a field of the common configuration.
    pub fn write_common(&self, offset: u64, data: &[u8]) {
        self.pci.write_bar(0, offset, data);
    }

    /// The status register.
    #[must_use]
    pub fn status(&self) -> u8 {
        let mut data = [0];
        self.pci.read_bar(0, 0x14, &mut data);
        data[0]
    }

    /// Writes the status register.
    pub fn set_status(&self, status: u8) {
        self.pci.write_bar(0, 0x14, &[status]);
    }

    /// All feature bits that the device offers.
    #[must_use]
    pub fn offered_features(&self) -> u64 {
        let read = |select: u32| {
            let mut data = [0; 4];
            self.write_common(0, &select.to_le_bytes());
            self.pci.read_bar(0, 4, &mut data);
            u64::from(u32::from_le_bytes(data))
        };
        read(0) | read(1) << 32
    }

    /// Chooses features.
    pub fn write_features(&self, features: u64) {
        for (select, half) in (0_u32..).zip(features.to_le_bytes().chunks_exact(4)) {
            self.write_common(8, &select.to_le_bytes());
            self.write_common(0xc, half);
        }
    }

    /// Reads the device's own configuration.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.pci.read_bar(0, 0x2000 + offset, data);
    }

    /// Writes the device's own configuration.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        self.pci.write_bar(0, 0x2000 + offset, data);
    }

    /// Takes `len` bytes of RAM for a buffer; old ones are reused after a while.
    pub fn allocate(&mut self, len: usize) -> GuestAddress {
        let len = len.next_multiple_of(16) as u64;
        if self.next_buffer + len > RAM_BYTES {
            self.next_buffer = BUFFERS;
        }
        let at = self.next_buffer;
        self.next_buffer += len;
        GuestAddress(at)
    }

    /// Where the last writable buffer lies that [`Self::add`] made.
    #[must_use]
    pub fn last_writable(&self) -> GuestAddress {
        self.last_writable
    }

    /// Makes a request available: what the device reads, then room for what it writes. Returns
    /// its head.
    ///
    /// # Panics
    /// When the test's buffers don't fit RAM.
    pub fn add(&mut self, queue: u16, readable: &[&[u8]], writable: &[usize]) -> u16 {
        let mut segments = Vec::new();
        for data in readable {
            let at = self.allocate(data.len());
            self.memory().write_slice(data, at).expect("test RAM");
            segments.push(Segment::read(at.0, data.len()));
        }
        for &len in writable {
            let at = self.allocate(len);
            self.memory()
                .write_slice(&vec![0; len], at)
                .expect("test RAM");
            segments.push(Segment::write(at.0, len));
            self.last_writable = at;
        }
        self.add_segments(queue, &segments)
    }

    /// Makes a request of any shape available.
    pub fn add_segments(&mut self, queue: u16, segments: &[Segment]) -> u16 {
        let memory = self.ram.memory();
        self.rings[usize::from(queue)].add(memory, segments)
    }

    /// Rings a queue's doorbell.
    pub fn kick(&self, queue: u16) {
        let at = 0x3000 + u64::from(queue) * 4;
        self.pci.write_bar(0, at, &queue.to_le_bytes());
    }

    /// Runs the worker until it has nothing to do. Bounded: a device that never rests fails here.
    ///
    /// # Panics
    /// When it doesn't come to rest.
    pub fn run(&self) {
        for _ in 0..10_000 {
            if self.events.run_once(0).expect("an event loop") == 0 {
                return;
            }
        }
        panic!("the device does not come to rest");
    }

    /// Rings and runs.
    pub fn kick_and_run(&self, queue: u16) {
        self.kick(queue);
        self.run();
    }

    /// The next request that the device is done with: its head and what it wrote.
    pub fn take_used(&mut self, queue: u16) -> Option<(u16, Vec<u8>)> {
        let memory = self.ram.memory();
        self.rings[usize::from(queue)].take_used(memory)
    }

    /// One whole request: returns what the device wrote.
    ///
    /// # Panics
    /// When the device isn't done at once.
    pub fn request(&mut self, queue: u16, readable: &[&[u8]], writable: &[usize]) -> Vec<u8> {
        let head = self.add(queue, readable, writable);
        self.kick_and_run(queue);
        let (used, data) = self.take_used(queue).expect("an answer");
        assert_eq!(used, head, "answers come in order here");
        data
    }
}

//! Bytes as a script of what a guest does to a virtio device.

use ringfence_memory::GuestAddress;
use ringfence_pci::PciDevice;
use ringfence_virtio::VirtioDevice;
use ringfence_virtio::testing::RAM_BYTES;
use ringfence_virtio::testing::Segment;
use ringfence_virtio::testing::TestDriver;
use vm_memory::Bytes as _;

/// Steps of one script, so that each run ends soon.
const MAX_STEPS: usize = 400;
/// Bytes of the transport's BAR.
const BAR_BYTES: u16 = 0x8000;

/// Takes values off the front; zeros when there is nothing left.
#[derive(Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of `data`.
    #[must_use]
    pub fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `len` bytes, or as many as there are.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        front
    }

    /// A number of 8 bytes.
    pub fn u64(&mut self) -> u64 {
        let mut bytes = [0; 8];
        let front = self.bytes(8);
        bytes[..front.len()].copy_from_slice(front);
        u64::from_le_bytes(bytes)
    }

    /// A number of 4 bytes.
    pub fn u32(&mut self) -> u32 {
        let mut bytes = [0; 4];
        let front = self.bytes(4);
        bytes[..front.len()].copy_from_slice(front);
        u32::from_le_bytes(bytes)
    }

    /// A number of 2 bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    /// One byte.
    pub fn u8(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    /// A number below `limit`, which isn't zero.
    pub fn below(&mut self, limit: usize) -> usize {
        usize::from(self.u16()) % limit
    }

    /// An address: mostly in RAM, sometimes at its edges or far away.
    pub fn address(&mut self) -> u64 {
        match self.u8() % 8 {
            0 => RAM_BYTES - u64::from(self.u8()),
            1 => self.u64(),
            2 => u64::MAX - u64::from(self.u8()),
            3 => u64::from(self.u16()),
            _ => u64::from(self.u32()) % RAM_BYTES,
        }
    }

    /// A length: mostly small, sometimes huge.
    pub fn len(&mut self) -> usize {
        match self.u8() % 8 {
            0 => self.u32() as usize,
            1 => 0,
            _ => usize::from(self.u16() % 8192),
        }
    }
}

/// A request of a device's own form: the bytes it reads, then room for what it writes.
pub type Request = (Vec<u8>, Vec<usize>);

/// How a device's well-formed requests look, so that scripts get past the first check.
pub type Requests = fn(&mut Input<'_>) -> (u16, Request);

/// Runs the script in `data` against `device`; what else happens in a step is `other`'s choice.
pub fn run(
    data: &[u8],
    device: Box<dyn VirtioDevice>,
    requests: Requests,
    other: &mut dyn FnMut(&mut Input<'_>, &mut TestDriver),
) {
    let mut input = Input::new(data);
    let mut driver = TestDriver::start(device);
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        step(&mut input, &mut driver, requests, other);
    }
    driver.run();
    // Whatever happened: a reset device works again.
    driver.set_up(u64::MAX);
    driver.run();
}

fn step(
    input: &mut Input<'_>,
    driver: &mut TestDriver,
    requests: Requests,
    other: &mut dyn FnMut(&mut Input<'_>, &mut TestDriver),
) {
    match input.u8() % 16 {
        0 => write_bar(input, driver),
        1 => read_bar(input, driver),
        2 => configure(input, driver),
        3 => restart(input, driver),
        4 | 5 => write_descriptor(input, driver),
        6 => disturb_ring(input, driver),
        7 => {
            let queue = input.u16() % 8;
            driver.kick(queue);
            driver.run();
        }
        8 => {
            let at = GuestAddress(input.address());
            let len = usize::from(input.u8());
            // A guest writes where it likes; outside RAM there is nothing to write to.
            let _ = driver.memory().write_slice(input.bytes(len), at);
        }
        9 | 10 => other(input, driver),
        _ => request(input, driver, requests),
    }
}

fn write_bar(input: &mut Input<'_>, driver: &TestDriver) {
    let offset = u64::from(input.u16() % BAR_BYTES);
    let len = 1 << (input.u8() % 4);
    let data = input.u64().to_le_bytes();
    driver.pci.write_bar(0, offset, &data[..len]);
}

fn read_bar(input: &mut Input<'_>, driver: &TestDriver) {
    let offset = u64::from(input.u16() % BAR_BYTES);
    let mut data = [0; 8];
    let len = 1 << (input.u8() % 4);
    driver.pci.read_bar(0, offset, &mut data[..len]);
}

fn configure(input: &mut Input<'_>, driver: &TestDriver) {
    let offset = (input.u16() % 256) & !3;
    let mut data = input.u32().to_le_bytes();
    driver.pci.write_config(offset, &data);
    driver.pci.read_config(offset, &mut data);
}

fn restart(input: &mut Input<'_>, driver: &mut TestDriver) {
    let features = match input.u8() % 3 {
        0 => u64::MAX,
        1 => 1 << 32,
        _ => input.u64() | 1 << 32,
    };
    driver.set_up(features);
}

fn ring_of(input: &mut Input<'_>, driver: &TestDriver) -> Option<usize> {
    let count = driver.rings.len();
    (count > 0).then(|| usize::from(input.u8()) % count)
}

fn write_descriptor(input: &mut Input<'_>, driver: &mut TestDriver) {
    let Some(ring) = ring_of(input, driver) else {
        return;
    };
    let memory = driver.memory().clone();
    let ring = &mut driver.rings[ring];
    let segment = Segment {
        address: input.address(),
        len: u32::try_from(input.len()).unwrap_or(u32::MAX),
        writable: input.u8().is_multiple_of(2),
    };
    let index = input.u16() % ring.size();
    let next = input.u16() % (ring.size() + 2);
    let flags = u16::from(input.u8() % 8);
    ring.write_descriptor(&memory, index, segment, flags, next);
    if input.u8().is_multiple_of(2) {
        ring.make_available(&memory, index);
    }
}

fn disturb_ring(input: &mut Input<'_>, driver: &mut TestDriver) {
    let Some(ring) = ring_of(input, driver) else {
        return;
    };
    let memory = driver.memory().clone();
    let ring = &mut driver.rings[ring];
    match input.u8() % 4 {
        0 => ring.set_available_index(&memory, input.u16()),
        1 => ring.set_available_flags(&memory, input.u16()),
        2 => ring.set_used_event(&memory, input.u16()),
        _ => ring.make_available(&memory, input.u16()),
    }
}

fn request(input: &mut Input<'_>, driver: &mut TestDriver, requests: Requests) {
    let (queue, (readable, writable)) = requests(input);
    if usize::from(queue) >= driver.rings.len() {
        return;
    }
    let split = input.below(readable.len() + 1);
    let (one, two) = readable.split_at(split);
    driver.add(queue, &[one, two], &writable);
    driver.kick(queue);
    driver.run();
}

//! A split virtqueue from the driver's side (virtio 1.2 §2.7).

use std::collections::HashMap;

use ringfence_memory::GuestAddress;
use ringfence_memory::GuestMemory;
use vm_memory::Bytes;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// One buffer of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it lies.
    pub address: u64,
    /// Its length.
    pub len: u32,
    /// Whether the device may write it.
    pub writable: bool,
}

impl Segment {
    /// For the device to read.
    #[must_use]
    pub fn read(address: u64, len: usize) -> Self {
        Self {
            address,
            len: u32::try_from(len).unwrap_or(u32::MAX),
            writable: false,
        }
    }

    /// For the device to write.
    #[must_use]
    pub fn write(address: u64, len: usize) -> Self {
        Self {
            writable: true,
            ..Self::read(address, len)
        }
    }
}

/// A ring and what the driver remembers of it.
#[derive(Debug)]
pub struct DriverRing {
    base: u64,
    size: u16,
    next_descriptor: u16,
    available: u16,
    used: u16,
    in_flight: HashMap<u16, Vec<Segment>>,
}

impl DriverRing {
    /// A ring of `size` descriptors in the 64 KiB at `base`.
    #[must_use]
    pub fn new(base: u64, size: u16) -> Self {
        Self {
            base,
            size,
            next_descriptor: 0,
            available: 0,
            used: 0,
            in_flight: HashMap::new(),
        }
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Descriptor table, available ring, used ring.
    #[must_use]
    pub fn addresses(&self) -> [u64; 3] {
        [self.base, self.base + 0x8000, self.base + 0xa000]
    }

    fn put<T: vm_memory::ByteValued>(memory: &GuestMemory, at: u64, value: T) {
        memory
            .write_obj(value, GuestAddress(at))
            .expect("rings lie in RAM");
    }

    fn get<T: vm_memory::ByteValued>(memory: &GuestMemory, at: u64) -> T {
        memory.read_obj(GuestAddress(at)).expect("rings lie in RAM")
    }

    /// Zeroes all of it.
    ///
    /// # Panics
    /// When the ring doesn't lie in RAM; so for all methods.
    pub fn clear(&self, memory: &GuestMemory) {
        memory
            .write_slice(&[0; 0x1_0000], GuestAddress(self.base))
            .expect("rings lie in RAM");
    }

    /// Writes a descriptor as it is, however wrong.
    pub fn write_descriptor(
        &self,
        memory: &GuestMemory,
        index: u16,
        segment: Segment,
        extra_flags: u16,
        next: u16,
    ) {
        let at = self.base + u64::from(index) * 16;
        let write = if segment.writable { WRITE } else { 0 };
        Self::put(memory, at, segment.address);
        Self::put(memory, at + 8, segment.len);
        Self::put(memory, at + 12, write | extra_flags);
        Self::put(memory, at + 14, next);
    }

    /// Makes `segments` available as one chain; returns its head.
    pub fn add(&mut self, memory: &GuestMemory, segments: &[Segment]) -> u16 {
        let head = self.next_descriptor;
        for (index, &segment) in segments.iter().enumerate() {
            let at = self.next_descriptor;
            self.next_descriptor = (at + 1) % self.size;
            let more = if index + 1 < segments.len() { NEXT } else { 0 };
            self.write_descriptor(memory, at, segment, more, self.next_descriptor);
        }
        self.in_flight.insert(head, segments.to_vec());
        self.make_available(memory, head);
        head
    }

    /// Makes `segments` available through an indirect table at `table`; returns the head.
    pub fn add_indirect(&mut self, memory: &GuestMemory, table: u64, segments: &[Segment]) -> u16 {
        let inner = Self::new(table, u16::MAX);
        for (index, &segment) in (0_u16..).zip(segments) {
            let more = usize::from(index) + 1 < segments.len();
            let flags = if more { NEXT } else { 0 };
            inner.write_descriptor(memory, index, segment, flags, index + 1);
        }
        let head = self.next_descriptor;
        self.next_descriptor = (head + 1) % self.size;
        let outer = Segment::read(table, segments.len() * 16);
        self.write_descriptor(memory, head, outer, INDIRECT, 0);
        self.in_flight.insert(head, segments.to_vec());
        self.make_available(memory, head);
        head
    }

    /// Puts a head into the available ring.
    pub fn make_available(&mut self, memory: &GuestMemory, head: u16) {
        let ring = self.addresses()[1];
        let slot = u64::from(self.available % self.size);
        Self::put(memory, ring + 4 + 2 * slot, head);
        self.available = self.available.wrapping_add(1);
        self.set_available_index(memory, self.available);
    }

    /// Writes the available index as it is, however wrong.
    pub fn set_available_index(&self, memory: &GuestMemory, index: u16) {
        Self::put(memory, self.addresses()[1] + 2, index);
    }

    /// Writes the available ring's flags.
    pub fn set_available_flags(&self, memory: &GuestMemory, flags: u16) {
        Self::put(memory, self.addresses()[1], flags);
    }

    /// Writes `used_event`: interrupt when the used index passes it.
    pub fn set_used_event(&self, memory: &GuestMemory, index: u16) {
        let at = self.addresses()[1] + 4 + 2 * u64::from(self.size);
        Self::put(memory, at, index);
    }

    /// Reads `avail_event`: the device wants a doorbell when the available index passes it.
    #[must_use]
    pub fn available_event(&self, memory: &GuestMemory) -> u16 {
        Self::get(memory, self.addresses()[2] + 4 + 8 * u64::from(self.size))
    }

    /// Requests that the device hasn't returned.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The next used element: just the head and the length that the device says.
    ///
    /// # Panics
    /// When the device returns a head that can't be one.
    pub fn take_used_len(&mut self, memory: &GuestMemory) -> Option<(u16, u32)> {
        let ring = self.addresses()[2];
        if Self::get::<u16>(memory, ring + 2) == self.used {
            return None;
        }
        let element = ring + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let head = Self::get::<u32>(memory, element);
        let len = Self::get::<u32>(memory, element + 4);
        let head = u16::try_from(head).expect("a head that was made available");
        Some((head, len))
    }

    /// The next used element: the head, and what the device wrote to its buffers.
    ///
    /// # Panics
    /// When the device returns a head that can't be one.
    pub fn take_used(&mut self, memory: &GuestMemory) -> Option<(u16, Vec<u8>)> {
        let (head, len) = self.take_used_len(memory)?;
        let segments = self.in_flight.remove(&head).unwrap_or_default();
        let mut data = Vec::new();
        for segment in segments.iter().filter(|segment| segment.writable) {
            let rest = len as usize - data.len();
            let mut part = vec![0; rest.min(segment.len as usize)];
            memory
                .read_slice(&mut part, GuestAddress(segment.address))
                .expect("buffers lie in RAM");
            data.extend(part);
        }
        Some((head, data))
    }
}

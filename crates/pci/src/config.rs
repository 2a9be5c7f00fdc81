//! The 256 bytes of conventional configuration space (PCI 3.0 §6.1).

use crate::PciError;

/// Bytes of conventional configuration space.
pub(crate) const CONFIG_BYTES: usize = 256;
/// First byte after the type 0 header.
const FIRST_CAPABILITY: usize = 0x40;

pub(crate) const COMMAND: usize = 0x04;
pub(crate) const STATUS: usize = 0x06;
pub(crate) const CAPABILITY_POINTER: usize = 0x34;
pub(crate) const INTERRUPT_LINE: usize = 0x3c;
pub(crate) const INTERRUPT_PIN: usize = 0x3d;

/// Command register bits (§6.2.2).
pub(crate) const COMMAND_IO: u16 = 1 << 0;
pub(crate) const COMMAND_MEMORY: u16 = 1 << 1;
pub(crate) const COMMAND_MASTER: u16 = 1 << 2;
pub(crate) const COMMAND_PARITY: u16 = 1 << 6;
pub(crate) const COMMAND_SERR: u16 = 1 << 8;
pub(crate) const COMMAND_INTX_DISABLE: u16 = 1 << 10;

/// Status register bits (§6.2.3).
pub(crate) const STATUS_INTERRUPT: u16 = 1 << 3;
pub(crate) const STATUS_CAPABILITIES: u16 = 1 << 4;

/// What a device says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, subclass and programming interface, highest byte first.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// The bytes, and which of their bits the guest may write.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: Box<[u8; CONFIG_BYTES]>,
    writable: Box<[u8; CONFIG_BYTES]>,
    /// Where the next capability goes, and the pointer that shall name it.
    next_capability: usize,
    last_pointer: usize,
}

impl ConfigSpace {
    /// A type 0 header for `identity`, decoding nothing.
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: Box::new([0; CONFIG_BYTES]),
            writable: Box::new([0; CONFIG_BYTES]),
            next_capability: FIRST_CAPABILITY,
            last_pointer: CAPABILITY_POINTER,
        };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &[identity.revision]);
        space.set(0x09, &identity.class.to_le_bytes()[..3]);
        space.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        let command = COMMAND_IO
            | COMMAND_MEMORY
            | COMMAND_MASTER
            | COMMAND_PARITY
            | COMMAND_SERR
            | COMMAND_INTX_DISABLE;
        space.set_writable(COMMAND, &command.to_le_bytes());
        space.set_writable(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Appends a capability (§6.7): `body` follows the ID and the next pointer; the guest may write
    /// the bits set in `writable`, which is as long as `body`. Returns its offset.
    ///
    /// # Errors
    /// [`PciError::CapabilitySpace`] when it doesn't fit.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u8, PciError> {
        let offset = self.next_capability;
        let len = body.len() + 2;
        let full = PciError::CapabilitySpace { len };
        if offset + len > CONFIG_BYTES {
            return Err(full);
        }
        let at = u8::try_from(offset).map_err(|_| full)?;
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        self.set_writable(offset + 2, writable);
        self.set(self.last_pointer, &[at]);
        self.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.last_pointer = offset + 1;
        self.next_capability = (offset + len).next_multiple_of(4);
        Ok(at)
    }

    /// Reads; past the end, ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let start = usize::from(offset);
        match self.bytes.get(start..start + data.len()) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xff),
        }
    }

    /// Writes the bits that the guest may write; past the end, nothing.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let start = usize::from(offset);
        let Some(bytes) = self.bytes.get_mut(start..start + data.len()) else {
            return;
        };
        for ((byte, new), mask) in bytes.iter_mut().zip(data).zip(&self.writable[start..]) {
            *byte = *byte & !mask | new & mask;
        }
    }

    /// The device's own change, whatever the guest may write.
    pub(crate) fn set(&mut self, offset: usize, data: &[u8]) {
        self.bytes[offset..offset + data.len()].copy_from_slice(data);
    }

    pub(crate) fn set_writable(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    pub(crate) fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    pub(crate) fn u32(&self, offset: usize) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset + 2)) << 16
    }

    pub(crate) fn bytes(&self) -> &[u8; CONFIG_BYTES] {
        &self.bytes
    }

    /// Takes over the writable bits of `saved`.
    pub(crate) fn load(&mut self, saved: &[u8; CONFIG_BYTES]) {
        for (at, byte) in saved.iter().enumerate() {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
        }
    }

    /// Whether both spaces differ only in bits that the guest may write or the device sets.
    pub(crate) fn same_device(&self, saved: &[u8; CONFIG_BYTES]) -> bool {
        let dynamic = STATUS..STATUS + 2;
        (0..CONFIG_BYTES).all(|at| {
            let fixed = !self.writable[at];
            dynamic.contains(&at) || self.bytes[at] & fixed == saved[at] & fixed
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1041,
            revision: 1,
            class: 0x02_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        })
    }

    #[test]
    fn the_header_says_who_it_is_and_cannot_be_changed() {
        let mut space = space();
        space.write(0, &[0; 4]);
        assert_eq!(space.u32(0), 0x1041_1af4);
        assert_eq!(space.u32(8), 0x0200_0001);
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(9, &[1, 2, 3], &[0; 3]).expect("room");
        let second = space
            .add_capability(0x11, &[0; 10], &[0; 10])
            .expect("room");
        let byte = |at: u8| space.bytes()[usize::from(at)];
        assert_eq!(byte(0x34), first);
        assert_eq!((byte(first), byte(first + 1)), (9, second));
        assert_eq!((byte(second), byte(second + 1)), (0x11, 0));
        assert_ne!(space.u16(STATUS) & STATUS_CAPABILITIES, 0);
    }

    #[test]
    fn a_capability_that_does_not_fit_is_refused() {
        let mut space = space();
        let refused = space.add_capability(9, &[0; 250], &[0; 250]);
        assert!(matches!(
            refused,
            Err(PciError::CapabilitySpace { len: 252 })
        ));
        assert_eq!(space.bytes()[0x34], 0);
    }

    #[test]
    fn accesses_past_the_end_read_ones_and_write_nothing() {
        let mut space = space();
        let mut data = [0; 4];
        space.write(254, &[1, 2, 3, 4]);
        space.read(254, &mut data);
        assert_eq!(data, [0xff; 4]);
        space.read(0x100, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}

//! The address maps: which device answers at which address.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::RwLock;

use crate::MmioDevice;
use crate::PioDevice;

/// A run of addresses in one space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Number of addresses, at least one.
    pub len: u64,
}

impl Range {
    fn last(self) -> Option<u64> {
        self.start.checked_add(self.len.checked_sub(1)?)
    }
}

/// Why a device could not be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range is empty or passes the end of the address space.
    #[error("{:#x} addresses at {:#x} are not a range", .0.len, .0.start)]
    BadRange(Range),
    /// Another device is there.
    #[error("{:#x} addresses at {:#x} overlap the device at {:#x}", wanted.len, wanted.start, taken.start)]
    Overlap {
        /// What was asked for.
        wanted: Range,
        /// What is there.
        taken: Range,
    },
}

/// The routing table of one address space.
///
/// Lookups take a read lock and clone an [`Arc`], so that a device may be moved (a PCI BAR is
/// rewritten) while another vCPU is inside it.
pub struct Bus<D: ?Sized> {
    devices: RwLock<BTreeMap<u64, (u64, Arc<D>)>>,
}

/// Port space.
pub type PioBus = Bus<dyn PioDevice>;
/// Physical memory space outside RAM.
pub type MmioBus = Bus<dyn MmioDevice>;

impl<D: ?Sized> Default for Bus<D> {
    fn default() -> Self {
        Self {
            devices: RwLock::new(BTreeMap::new()),
        }
    }
}

impl<D: ?Sized> std::fmt::Debug for Bus<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        f.debug_list()
            .entries(
                devices
                    .iter()
                    .map(|(&start, &(len, _))| Range { start, len }),
            )
            .finish()
    }
}

impl<D: ?Sized> Bus<D> {
    /// Places `device` at `range`.
    ///
    /// # Errors
    /// [`BusError`] when the range is not one or is taken; nothing is changed then.
    pub fn insert(&self, range: Range, device: Arc<D>) -> Result<(), BusError> {
        let last = range.last().ok_or(BusError::BadRange(range))?;
        let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((&start, &(len, _))) = devices.range(..=last).next_back() {
            let taken = Range { start, len };
            if taken
                .last()
                .is_some_and(|taken_last| taken_last >= range.start)
            {
                return Err(BusError::Overlap {
                    wanted: range,
                    taken,
                });
            }
        }
        devices.insert(range.start, (range.len, device));
        Ok(())
    }

    /// Takes away the device whose range starts at `start`, if there is one.
    pub fn remove(&self, start: u64) -> Option<Arc<D>> {
        let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
        devices.remove(&start).map(|(_, device)| device)
    }

    /// The device at `address` and the offset within it, when all `len` addresses are its own.
    #[must_use]
    pub fn find(&self, address: u64, len: usize) -> Option<(Arc<D>, u64)> {
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        let (&start, (range_len, device)) = devices.range(..=address).next_back()?;
        let offset = address - start;
        let end = offset.checked_add(len as u64)?;
        (end <= *range_len).then(|| (Arc::clone(device), offset))
    }
}

impl Bus<dyn PioDevice> {
    /// Routes a guest's port read. Ports that nobody claims float: they read as ones.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(u64::from(port), data.len())
            && let Ok(offset) = u16::try_from(offset)
        {
            device.read(offset, data);
        }
    }

    /// Routes a guest's port write. Writes to ports that nobody claims are lost.
    pub fn write(&self, port: u16, data: &[u8]) {
        if let Some((device, offset)) = self.find(u64::from(port), data.len())
            && let Ok(offset) = u16::try_from(offset)
        {
            device.write(offset, data);
        }
    }
}

impl Bus<dyn MmioDevice> {
    /// Routes a guest's memory read outside RAM. Addresses that nobody claims read as ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.read(offset, data);
        }
    }

    /// Routes a guest's memory write outside RAM. Writes that nobody claims are lost.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u16, Vec<u8>)>>);

    impl PioDevice for Recorder {
        fn read(&self, offset: u16, data: &mut [u8]) {
            data.fill(offset.to_le_bytes()[0]);
        }
        fn write(&self, offset: u16, data: &[u8]) {
            self.0.lock().expect("test").push((offset, data.to_vec()));
        }
    }

    fn at(start: u64, len: u64) -> Range {
        Range { start, len }
    }

    #[test]
    fn accesses_reach_the_device_with_its_own_offset() {
        let bus = PioBus::default();
        let device = Arc::new(Recorder::default());
        bus.insert(at(0x3f8, 8), device.clone()).expect("free");
        let mut data = [0];
        bus.read(0x3fd, &mut data);
        bus.write(0x3f8, b"x");
        assert_eq!(data, [5]);
        assert_eq!(*device.0.lock().expect("test"), [(0, b"x".to_vec())]);
    }

    #[test]
    fn unclaimed_and_straddling_accesses_read_as_ones() {
        let bus = PioBus::default();
        bus.insert(at(0x70, 2), Arc::new(Recorder::default()))
            .expect("free");
        let mut data = [0; 4];
        bus.read(0x70, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.read(0x80, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn overlaps_are_refused_and_change_nothing() {
        let bus = PioBus::default();
        bus.insert(at(0x60, 8), Arc::new(Recorder::default()))
            .expect("free");
        for bad in [at(0x5c, 8), at(0x64, 1), at(0x67, 9), at(0x50, 0x40)] {
            let refused = bus.insert(bad, Arc::new(Recorder::default()));
            assert!(matches!(refused, Err(BusError::Overlap { .. })), "{bad:?}");
        }
        bus.insert(at(0x68, 1), Arc::new(Recorder::default()))
            .expect("free");
    }

    #[test]
    fn impossible_ranges_are_refused() {
        let bus = PioBus::default();
        for bad in [at(0, 0), at(u64::MAX, 2)] {
            let refused = bus.insert(bad, Arc::new(Recorder::default()));
            assert_eq!(refused, Err(BusError::BadRange(bad)));
        }
    }

    #[test]
    fn a_removed_device_no_longer_answers() {
        let bus = PioBus::default();
        bus.insert(at(0x60, 8), Arc::new(Recorder::default()))
            .expect("free");
        assert!(bus.remove(0x60).is_some());
        assert!(bus.find(0x60, 1).is_none());
    }
}

//! Where everything lies in the guest's physical address space.
//!
//! ```text
//!   0                RAM, with the PC's reserved area from 0x9fc00 to 1 MiB
//!   0xc000_0000      32-bit PCI window, 512 MiB
//!   0xe000_0000      ECAM, 1 MiB: one bus
//!   0xfec0_0000      I/O APIC
//!   0xfee0_0000      local APICs, messages
//!   0xfeff_c000      an engine's own pages (KVM on Intel)
//!   4 GiB            rest of the RAM
//!   after it         64-bit PCI window, 64 GiB or a quarter of the space, aligned to its size
//! ```

use ringfence_bus::Range;
use ringfence_loader::MemoryMapEntry;
use ringfence_loader::MemoryType;
use ringfence_memory::MMIO_HOLE_END;
use ringfence_memory::MMIO_HOLE_START;
use ringfence_memory::RamLayout;
use ringfence_pci::RootWindows;

use crate::MachineError;

/// Memory-mapped configuration space of bus 0.
pub(crate) const ECAM: Range = Range {
    start: 0xe000_0000,
    len: 1 << 20,
};
const WINDOW_32_LEN: u64 = ECAM.start - MMIO_HOLE_START;
const WINDOW_64_MAX_BITS: u8 = 36;
/// Ports above those of the PC's own devices.
const WINDOW_IO: Range = Range {
    start: 0xc000,
    len: 0x4000,
};

/// The map of one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressMap {
    /// What the PCI root forwards.
    pub windows: RootWindows,
}

impl AddressMap {
    /// The map for this RAM in a guest address space of `bits` bits.
    ///
    /// # Errors
    /// [`MachineError::AddressSpace`] when the RAM leaves no room.
    pub fn new(ram: &RamLayout, bits: u8) -> Result<Self, MachineError> {
        let ram_end = ram
            .ranges()
            .iter()
            .map(|range| range.start.0 + range.len_bytes)
            .max()
            .unwrap_or(0)
            .max(MMIO_HOLE_END);
        let bits = bits.clamp(32, 52);
        let len = 1 << bits.saturating_sub(2).min(WINDOW_64_MAX_BITS);
        let start = ram_end.next_multiple_of(len);
        let fits = start + len <= 1 << bits;
        if !fits {
            return Err(MachineError::AddressSpace {
                ram_bytes: ram.size_bytes(),
                bits,
            });
        }
        Ok(Self {
            windows: RootWindows {
                memory32: Range {
                    start: MMIO_HOLE_START,
                    len: WINDOW_32_LEN,
                },
                memory64: Range { start, len },
                io: WINDOW_IO,
            },
        })
    }

    /// What the kernel's memory map has to name beside RAM: it believes in ECAM only where the map
    /// says that the addresses are taken (PCI Firmware 3.3 §4.1.2).
    pub(crate) fn reserved() -> [MemoryMapEntry; 1] {
        [MemoryMapEntry {
            start: ECAM.start,
            len_bytes: ECAM.len,
            kind: MemoryType::Reserved,
        }]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_64_bit_window_lies_after_ram() {
        for (ram, start) in [(1, 64), (61, 64), (64, 128), (200, 256)] {
            let map = AddressMap::new(&RamLayout::pc(ram * GIB), 48).expect("fits");
            assert_eq!(map.windows.memory64.start, start * GIB, "{ram} GiB");
        }
    }

    #[test]
    fn ram_that_leaves_no_room_is_refused() {
        let map = AddressMap::new(&RamLayout::pc(GIB), 36).expect("fits");
        assert_eq!(map.windows.memory64.start, 16 * GIB);
        for (ram, bits) in [(60, 36), (1000, 40), (1, 32)] {
            let error = AddressMap::new(&RamLayout::pc(ram * GIB), bits).expect_err("no room");
            assert!(
                matches!(error, MachineError::AddressSpace { .. }),
                "{error}"
            );
        }
    }
}

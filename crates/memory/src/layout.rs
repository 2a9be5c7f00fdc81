//! Where RAM lies in the guest's physical address space.

use vm_memory::GuestAddress;

/// Bytes in the smallest x86 page (SDM 3A §4.3).
pub const PAGE_SIZE: u64 = 4096;
/// First address of the hole below 4 GiB that holds PCI windows, the APICs and firmware.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// First address above the hole.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;

/// One run of RAM: where the guest sees it and where it lies in the memfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// First guest physical address.
    pub start: GuestAddress,
    /// Length in bytes, a multiple of [`PAGE_SIZE`].
    pub len_bytes: u64,
    /// Offset of the first byte in the memfd.
    pub file_offset: u64,
}

/// The RAM runs of a PC: below the hole, then from 4 GiB on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout {
    ranges: Vec<RamRange>,
}

impl RamLayout {
    /// Lays out `size_bytes` of RAM around the MMIO hole.
    ///
    /// A size that isn't a multiple of the page size is rounded down.
    #[must_use]
    pub fn pc(size_bytes: u64) -> Self {
        let size = size_bytes / PAGE_SIZE * PAGE_SIZE;
        let low = size.min(MMIO_HOLE_START);
        let mut ranges = vec![RamRange {
            start: GuestAddress(0),
            len_bytes: low,
            file_offset: 0,
        }];
        if size > low {
            ranges.push(RamRange {
                start: GuestAddress(MMIO_HOLE_END),
                len_bytes: size - low,
                file_offset: low,
            });
        }
        Self { ranges }
    }

    /// The runs, in ascending order of address.
    #[must_use]
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// Total RAM in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.len_bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_ram_is_one_range() {
        let layout = RamLayout::pc(256 << 20);
        assert_eq!(layout.ranges().len(), 1);
        assert_eq!(layout.size_bytes(), 256 << 20);
    }

    #[test]
    fn ram_past_the_hole_continues_at_4_gib_without_a_gap_in_the_file() {
        let layout = RamLayout::pc(4 << 30);
        let [low, high] = layout.ranges() else {
            panic!("expected two ranges, got {layout:?}");
        };
        assert_eq!(low.len_bytes, MMIO_HOLE_START);
        assert_eq!(high.start, GuestAddress(MMIO_HOLE_END));
        assert_eq!(high.file_offset, low.len_bytes);
        assert_eq!(layout.size_bytes(), 4 << 30);
    }
}

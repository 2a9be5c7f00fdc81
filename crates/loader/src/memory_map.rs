//! The memory map that the kernel is told.

use ringfence_memory::RamLayout;

use crate::place;

/// What a run of addresses is for (ACPI 6.5 §15, table 15.6; Xen's start info uses the same).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryType {
    /// Usable RAM.
    Ram = 1,
    /// Not for the kernel's use.
    Reserved = 2,
}

/// One run of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryMapEntry {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len_bytes: u64,
    /// What it is for.
    pub kind: MemoryType,
}

/// The map of a machine with this RAM, in ascending order: RAM without the PC's reserved area
/// below 1 MiB, and `reserved` (windows that the kernel must not use for devices).
#[must_use]
pub fn memory_map(layout: &RamLayout, reserved: &[MemoryMapEntry]) -> Vec<MemoryMapEntry> {
    let mut map = vec![
        entry(0, place::CONVENTIONAL_END, MemoryType::Ram),
        entry(
            place::CONVENTIONAL_END,
            place::HIGH_MEMORY,
            MemoryType::Reserved,
        ),
    ];
    for range in layout.ranges() {
        let start = range.start.0.max(place::HIGH_MEMORY);
        let end = range.start.0 + range.len_bytes;
        if start < end {
            map.push(entry(start, end, MemoryType::Ram));
        }
    }
    map.extend_from_slice(reserved);
    map.sort_by_key(|entry| entry.start);
    map
}

fn entry(start: u64, end: u64, kind: MemoryType) -> MemoryMapEntry {
    MemoryMapEntry {
        start,
        len_bytes: end - start,
        kind,
    }
}

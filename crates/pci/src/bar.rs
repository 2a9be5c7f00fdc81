//! Base address registers (PCI 3.0 §6.2.5).

use crate::PciError;

/// Which address space a window lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Space {
    /// Ports.
    Io,
    /// Physical memory.
    Memory,
}

/// What a BAR maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes the next BAR's register for its upper half.
    Memory64 {
        /// Reads have no side effect.
        prefetchable: bool,
    },
}

/// A BAR as the device has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarSpec {
    /// 0 to 5.
    pub index: u8,
    /// What it maps.
    pub kind: BarKind,
    /// A power of two, at least 16 (memory) or 4 (ports).
    pub size: u64,
}

/// A BAR as it decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Which BAR.
    pub bar: u8,
    /// Ports or memory.
    pub space: Space,
    /// First address.
    pub start: u64,
    /// Length in bytes or ports.
    pub len: u64,
}

impl BarSpec {
    /// Checks the rules of the header.
    pub(crate) fn check(&self) -> Result<(), PciError> {
        let bad = |why| {
            Err(PciError::BadBar {
                index: self.index,
                size: self.size,
                why,
            })
        };
        let (least, last, most) = match self.kind {
            BarKind::Io => (4, 5, 1 << 8),
            BarKind::Memory32 => (16, 5, 1 << 31),
            BarKind::Memory64 { .. } => (16, 4, 1 << 46),
        };
        if !self.size.is_power_of_two() {
            return bad("the size is not a power of two");
        }
        if self.size < least || self.size > most {
            return bad("the size is outside what this kind of BAR can be");
        }
        if self.index > last {
            return bad("the header has no such BAR");
        }
        Ok(())
    }

    /// Offset of its register in configuration space.
    pub(crate) fn register(&self) -> usize {
        0x10 + 4 * usize::from(self.index)
    }

    /// The read-only low bits that say what it is.
    pub(crate) fn flags(&self) -> u32 {
        match self.kind {
            BarKind::Io => 0b1,
            BarKind::Memory32 => 0b0000,
            BarKind::Memory64 { prefetchable } => 0b0100 | u32::from(prefetchable) << 3,
        }
    }

    /// The space it lies in.
    #[must_use]
    pub fn space(&self) -> Space {
        match self.kind {
            BarKind::Io => Space::Io,
            BarKind::Memory32 | BarKind::Memory64 { .. } => Space::Memory,
        }
    }

    /// Whether it takes two registers.
    #[must_use]
    pub fn is_64_bit(&self) -> bool {
        matches!(self.kind, BarKind::Memory64 { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_bars_are_refused() {
        let memory = |index, size| BarSpec {
            index,
            kind: BarKind::Memory64 {
                prefetchable: false,
            },
            size,
        };
        for bad in [memory(5, 4096), memory(0, 3000), memory(0, 8), memory(0, 0)] {
            assert!(
                matches!(bad.check(), Err(PciError::BadBar { .. })),
                "{bad:?}"
            );
        }
        memory(4, 16)
            .check()
            .expect("the smallest in the last place");
    }
}

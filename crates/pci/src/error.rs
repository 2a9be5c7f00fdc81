//! Why the root complex refused a device.

use ringfence_engine::ErrorKind;

use crate::PciAddress;

/// Why a device could not be placed or taken away.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// All 31 places are taken.
    #[error("the PCI bus has no free slot: a machine can have at most 31 PCI devices")]
    BusFull,
    /// Another device has that address.
    #[error("PCI address {0} is taken by another device")]
    SlotTaken(PciAddress),
    /// Nothing is there.
    #[error("there is no device at PCI address {0}")]
    Empty(PciAddress),
    /// A BAR the header can't hold.
    #[error("BAR {index} of {size} bytes is not possible: {why}")]
    BadBar {
        /// Which BAR.
        index: u8,
        /// The size asked for.
        size: u64,
        /// What rule it breaks.
        why: &'static str,
    },
    /// No room in the capability list.
    #[error("the configuration space has no room for a capability of {len} bytes")]
    CapabilitySpace {
        /// Its length with the header.
        len: usize,
    },
    /// The root complex's windows are full.
    #[error("the PCI address window has no {size} free bytes for a BAR")]
    WindowFull {
        /// The size asked for.
        size: u64,
    },
    /// The windows that the board gave are unusable.
    #[error("a PCI address window of {len} bytes at {start:#x} is not usable")]
    BadWindow {
        /// Its first address.
        start: u64,
        /// Its length.
        len: u64,
    },
}

impl PciError {
    /// Whose fault it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::BusFull | Self::SlotTaken(_) | Self::WindowFull { .. } => ErrorKind::Config,
            Self::Empty(_) => ErrorKind::State,
            Self::BadBar { .. } | Self::CapabilitySpace { .. } | Self::BadWindow { .. } => {
                ErrorKind::Internal
            }
        }
    }
}

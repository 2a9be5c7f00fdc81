//! A PCI function, seen from the root complex.

use std::fmt;

use crate::BarSpec;
use crate::Window;

/// Where a function sits on bus 0: device 0 to 31, function 0 to 7 (PCI 3.0 §3.2.2.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    devfn: u8,
}

impl PciAddress {
    /// The address of `function` of `device`; bits past the fields are dropped.
    #[must_use]
    pub const fn new(device: u8, function: u8) -> Self {
        Self {
            devfn: (device & 0x1f) << 3 | (function & 7),
        }
    }

    /// From the form that configuration accesses carry.
    #[must_use]
    pub const fn from_devfn(devfn: u8) -> Self {
        Self { devfn }
    }

    /// Device, 0 to 31.
    #[must_use]
    pub const fn device(self) -> u8 {
        self.devfn >> 3
    }

    /// Function, 0 to 7.
    #[must_use]
    pub const fn function(self) -> u8 {
        self.devfn & 7
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.{}", self.device(), self.function())
    }
}

/// One PCI function.
///
/// Configuration accesses come in 1, 2 or 4 bytes that don't cross a double word. All methods may
/// be called from any vCPU's thread.
pub trait PciDevice: Send + Sync {
    /// The guest reads configuration space at `offset`, below 4096.
    fn read_config(&self, offset: u16, data: &mut [u8]);

    /// The guest writes configuration space at `offset`, below 4096.
    fn write_config(&self, offset: u16, data: &[u8]);

    /// The BARs it has, whatever they decode now.
    fn bars(&self) -> Vec<BarSpec>;

    /// The windows that it decodes now; asked after each configuration write.
    fn windows(&self) -> Vec<Window>;

    /// The guest reads `data.len()` bytes at `offset` in `bar`.
    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset` in `bar`.
    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]);

    /// `bar` answers at `address` from now on, or nowhere: whoever gave the address to others
    /// (doorbells, DMA maps) tells them.
    fn bar_placed(&self, bar: u8, address: Option<u64>) {
        let _ = (bar, address);
    }

    /// Back to the state after power-on but for its BAR addresses.
    fn reset(&self);
}

//! The two doors to configuration space: ports 0xCF8 to 0xCFF and the ECAM window.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

use ringfence_bus::MmioDevice;
use ringfence_bus::PioDevice;

use crate::PciAddress;
use crate::PciRoot;

/// CONFIG_ADDRESS's enable bit (PCI 3.0 §3.2.2.3.2).
const ENABLE: u32 = 1 << 31;
/// Offset of the reset control register, port 0xCF9.
const RESET_CONTROL: u16 = 1;

/// What a write to the reset control register is given to: the chipset owns its meaning.
pub type ResetControl = Box<dyn Fn(u8) + Send + Sync>;

/// Configuration mechanism 1: CONFIG_ADDRESS at 0xCF8, CONFIG_DATA at 0xCFC.
///
/// Placed at port 0xCF8 with 8 ports. A byte access to 0xCF9 is not CONFIG_ADDRESS's (only double
/// words are) but the chipset's reset control register, which lies there on PCs.
pub struct ConfigPorts {
    root: Arc<PciRoot>,
    address: AtomicU32,
    reset_control: ResetControl,
}

impl std::fmt::Debug for ConfigPorts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConfigPorts")
            .field("address", &self.address())
            .finish_non_exhaustive()
    }
}

impl ConfigPorts {
    /// First port.
    pub const PORT: u16 = 0xcf8;
    /// Number of ports.
    pub const PORTS: u64 = 8;

    /// The ports of `root`; writes to 0xCF9 go to `reset_control`.
    #[must_use]
    pub fn new(root: Arc<PciRoot>, reset_control: ResetControl) -> Self {
        Self {
            root,
            address: AtomicU32::new(0),
            reset_control,
        }
    }

    /// CONFIG_ADDRESS, for a snapshot.
    #[must_use]
    pub fn address(&self) -> u32 {
        self.address.load(Ordering::Relaxed)
    }

    /// Sets CONFIG_ADDRESS: reserved bits stay zero.
    pub fn set_address(&self, address: u32) {
        self.address.store(address & 0x80ff_fffc, Ordering::Relaxed);
    }

    /// The function and register that CONFIG_DATA at `port_offset` (4 to 7) names.
    fn target(&self, port_offset: u16, len: usize) -> Option<(PciAddress, u16)> {
        let address = self.address();
        let [register, devfn, bus, _] = address.to_le_bytes();
        let within = port_offset.checked_sub(4)?;
        let fits = usize::from(within) + len <= 4;
        (address & ENABLE != 0 && bus == 0 && fits)
            .then(|| (PciAddress::from_devfn(devfn), u16::from(register) + within))
    }
}

impl PioDevice for ConfigPorts {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address().to_le_bytes());
        } else if let Some((function, register)) = self.target(offset, data.len()) {
            self.root.read_config(function, register, data);
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => self.set_address(u32::from_le_bytes([a, b, c, d])),
            (RESET_CONTROL, &[value]) => (self.reset_control)(value),
            _ => {
                if let Some((function, register)) = self.target(offset, data.len()) {
                    self.root.write_config(function, register, data);
                }
            }
        }
    }
}

/// The memory-mapped configuration window of bus 0 (PCI Express 3.0 §7.2.2): 4 KiB a function.
#[derive(Debug)]
pub struct Ecam(Arc<PciRoot>);

impl Ecam {
    /// Bytes of the window: one bus.
    pub const BYTES: u64 = 1 << 20;

    /// The window of `root`.
    #[must_use]
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self(root)
    }
}

/// The function and register at `offset` of the window.
fn ecam_target(offset: u64) -> Option<(PciAddress, u16)> {
    let devfn = u8::try_from(offset >> 12).ok()?;
    let register = u16::try_from(offset & 0xfff).ok()?;
    Some((PciAddress::from_devfn(devfn), register))
}

/// Bytes from `offset` to the end of its double word: what one configuration access may cover.
fn within_dword(offset: u64, len: usize) -> usize {
    let rest = 4 - (offset & 3);
    len.min(usize::try_from(rest).unwrap_or(4))
}

impl MmioDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let (piece, tail) = rest.split_at_mut(within_dword(at, rest.len()));
            match ecam_target(at) {
                Some((function, register)) => self.0.read_config(function, register, piece),
                None => piece.fill(0xff),
            }
            at = at.wrapping_add(piece.len() as u64);
            rest = tail;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let (piece, tail) = rest.split_at(within_dword(at, rest.len()));
            if let Some((function, register)) = ecam_target(at) {
                self.0.write_config(function, register, piece);
            }
            at = at.wrapping_add(piece.len() as u64);
            rest = tail;
        }
    }
}

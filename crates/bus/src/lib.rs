//! Where a guest's port and memory-mapped accesses go, and how a device interrupts.
//!
//! Written from the consumer's side: a device implements [`PioDevice`] or [`MmioDevice`] for what
//! it has, is placed on a [`Bus`] by whoever assembles the machine, and is given [`IrqLine`]s to
//! raise. It doesn't learn which engine runs the guest.

#![forbid(unsafe_code)]

mod irq;
mod map;

pub use irq::{Gsi, InterruptController, IrqLine, MsiMessage};
pub use map::{Bus, BusError, MmioBus, PioBus, Range};

/// A device with registers in port space.
///
/// Offsets are relative to the start of the range at which the device was placed. `data` has 1, 2
/// or 4 bytes. A device handles its own errors: a bad access reads as ones or is dropped, it
/// never stops the machine.
pub trait PioDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset`.
    fn read(&self, offset: u16, data: &mut [u8]);
    /// The guest writes `data` at `offset`.
    fn write(&self, offset: u16, data: &[u8]);
}

/// A device with registers in physical memory space.
///
/// As [`PioDevice`], but `data` has 1 to 64 bytes (vector moves to device memory are rare but legal).
pub trait MmioDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

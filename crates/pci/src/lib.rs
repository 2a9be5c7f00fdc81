//! PCI as a guest sees it: one root complex with one bus of up to 32 devices.
//!
//! Models PCI 3.0 configuration space behind ports 0xCF8/0xCFC and the PCI Express memory-mapped
//! configuration window (ECAM, PCI Express 3.0 §7.2.2), BARs that the guest may move, MSI-X
//! (PCI 3.0 §6.8.2) and the INTA wire. Doesn't model bridges, expansion ROMs, power management
//! or error reporting.
//!
//! A device implements [`PciDevice`]. Emulated ones own a [`PciFunction`], which holds the
//! configuration header, BARs and capabilities, and delegate to it; a passed-through function
//! answers configuration accesses itself. [`PciRoot`] is the one that puts a device's windows on
//! the buses and moves them; devices come and go at run time by [`PciRoot::insert`] and
//! [`PciRoot::remove`].
//!
//! Whatever the guest writes, the worst that happens is that a window doesn't decode: a BAR
//! outside the root complex's windows, or over another device, answers nowhere.

#![forbid(unsafe_code)]

mod bar;
mod config;
mod device;
mod error;
mod function;
mod intx;
mod msix;
mod ports;
mod root;

pub use bar::{BarKind, BarSpec, Space, Window};
pub use config::{ConfigSpace, Identity};
pub use device::{PciAddress, PciDevice};
pub use error::PciError;
pub use function::{FunctionState, PciFunction};
pub use intx::{IntxPin, IntxRouter};
pub use msix::{MSIX_CAPABILITY, MSIX_ENTRY_BYTES, Msix, MsixLayout, MsixState, NO_VECTOR};
pub use ports::{ConfigPorts, Ecam, ResetControl};
pub use root::{PciRoot, RootWindows};

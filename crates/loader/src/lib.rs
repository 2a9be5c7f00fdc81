//! Loads a kernel for direct boot: no firmware runs before it.
//!
//! A kernel comes as a bzImage (decompressed here) or as an ELF image, and is entered by one of
//! two protocols: Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst, "64-bit Boot
//! Protocol") or PVH (Xen's docs/misc/pvh.pandoc). [`Kernel::open`] reads and checks the file
//! before a machine exists; [`load`] places it with its initramfs, command line and memory map and
//! says what the first vCPU starts with.
//!
//! The ELF image inside a bzImage is entered directly, so the decompressor that would pick a
//! random kernel address never runs: see docs/adr/0010-direct-kernel-entry.md.
//!
//! Sources: the Linux x86 boot protocol 2.15, the ELF-64 object file format 1.5, Xen's PVH
//! start-info layout, Intel SDM 3A.

#![forbid(unsafe_code)]

mod bzimage;
mod copy;
mod decompress;
mod elf;
mod error;
mod kernel;
mod linux;
mod load;
mod memory_map;
mod place;
mod pvh;
mod source;
mod start;

pub use error::LoadError;
pub use kernel::{BootProtocol, Kernel, MAX_KERNEL_BYTES};
pub use load::{BootSetup, Loaded, load};
pub use memory_map::{MemoryMapEntry, MemoryType, memory_map};
pub use place::ACPI_LEN_BYTES;
pub use place::ACPI_START;

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "test data is built from small numbers"
)]
mod tests;
